import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pseudo import COCO_IDS, make_pseudo, save

import mcibi_d2
from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper, datasets
from mcibi_d2.data.labels import read_labels
from mcibi_d2.engine import Trainer
from mcibi_d2.evaluation import SemSegEvaluator

# Value in the label files -> class id, written down from the publishers' own descriptions.
CITYSCAPES = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11,
              25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
COCO_171 = {i - 1: place for place, i in enumerate(COCO_IDS)}
COCO_182 = {i: i for i in range(182)}
HUMAN = {i: i for i in range(20)}
EXPECTED = {
    "ade20k_150": {i: i - 1 for i in range(1, 151)},
    "cityscapes_19": CITYSCAPES,
    "lip_20": HUMAN,
    "cihp_20": HUMAN,
    "coco_stuff_164k": COCO_171,
    "coco_stuff_10k": COCO_171,
    "coco_stuff_182_164k": COCO_182,
    "coco_stuff_182_10k": COCO_182,
    "camvid_11": {i: i for i in range(11)},
}
# Splits with labels, then without.
SPLITS = {
    "ade20k_150": (["train", "val"], ["test"]),
    "cityscapes_19": (["train", "val", "trainval", "coarse"], ["test"]),
    "lip_20": (["train", "val"], ["test"]),
    "cihp_20": (["train", "val"], []),
    "coco_stuff_164k": (["train", "val"], []),
    "coco_stuff_10k": (["train", "test"], []),
    "coco_stuff_182_164k": (["train", "val"], []),
    "coco_stuff_182_10k": (["train", "test"], []),
    "camvid_11": (["train", "val", "trainval", "test"], []),
}
LAYOUTS = [
    *((dataset, {}) for dataset in SPLITS),
    ("lip_20", {"layout": "doubled"}),
    ("lip_20", {"layout": "flat"}),
    ("cihp_20", {"folder": "CIHP"}),
    ("cihp_20", {"folder": "instance-level_human_parsing/instance-level_human_parsing"}),
    ("coco_stuff_164k", {"layout": "coco"}),
]


@pytest.fixture
def pseudo(tmp_path, monkeypatch):
    """A function that makes a pseudo data set where the package looks for it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return lambda dataset, **options: make_pseudo(tmp_path, dataset, **options)


def expected_labels(dataset, file_name):
    """Class ids of a label file, value by value."""
    values = np.asarray(Image.open(file_name))
    labels = np.full(values.shape, 255)
    for value, class_id in EXPECTED[dataset].items():
        labels[values == value] = class_id
    return labels


# --- registration


@pytest.mark.parametrize("dataset, layout", LAYOUTS, ids=str)
def test_every_split_is_found_in_the_published_layout(pseudo, dataset, layout):
    pseudo(dataset, count=3, **layout)
    labeled, unlabeled = SPLITS[dataset]
    for split in labeled + unlabeled:
        name = f"{dataset}_{split}"
        records = DatasetCatalog.get(name)
        assert len(records) == (6 if split == "trainval" else 3)
        assert len({r["file_name"] for r in records}) == len(records)
        for record in records:
            assert record["dataset_name"] == name
            image = Image.open(record["file_name"])
            assert ("sem_seg_file_name" in record) == (split in labeled)
            if split in labeled:
                labels = read_labels(record["sem_seg_file_name"], name, image.size[::-1])
                assert np.array_equal(labels, expected_labels(dataset, record["sem_seg_file_name"]))


def test_registered_names_are_the_documented_ones():
    documented = (ROOT / "datasets" / "README.md").read_text()
    for dataset, (labeled, unlabeled) in SPLITS.items():
        for split in labeled + unlabeled:
            assert f"{dataset}_{split}" in DatasetCatalog.list()
        assert f"`{dataset}_{{" in documented


@pytest.mark.parametrize(
    "dataset, classes, flips, server",
    [
        ("ade20k_150", 150, [], list(range(1, 151))),
        ("cityscapes_19", 19, [], sorted(CITYSCAPES)),
        ("lip_20", 20, [[14, 15], [16, 17], [18, 19]], list(range(20))),
        ("cihp_20", 20, [[14, 15], [16, 17], [18, 19]], None),
        ("coco_stuff_164k", 171, [], None),
        ("coco_stuff_10k", 171, [], None),
        ("coco_stuff_182_164k", 182, [], None),
        ("coco_stuff_182_10k", 182, [], None),
        ("camvid_11", 11, [], None),
        ("scenes", 16, [], None),
    ],
)
def test_metadata(dataset, classes, flips, server):
    metadata = MetadataCatalog.get(f"{dataset}_train")
    assert len(metadata.stuff_classes) == len(set(metadata.stuff_classes)) == classes
    assert len(metadata.stuff_colors) == len(metadata.label_ids) == classes
    assert all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in metadata.stuff_colors)
    assert metadata.ignore_label == 255 and metadata.evaluator_type == "sem_seg"
    assert metadata.flip_pairs == flips
    assert metadata.get("server_ids") == server
    for i, j in flips:
        left, right = metadata.stuff_classes[i], metadata.stuff_classes[j]
        assert left.replace("Left", "Right") == right
    if dataset in EXPECTED:
        table = dict(zip(metadata.label_ids, range(classes), strict=True))
        assert table == EXPECTED[dataset]
        assert not set(metadata.label_ids) & set(metadata.label_ignored)


def test_traps_of_names_and_counts():
    get = MetadataCatalog.get
    assert get("lip_20_val").stuff_classes[10] == "Jumpsuits"
    assert get("cihp_20_val").stuff_classes[10] == "Torso-skin"
    assert get("coco_stuff_164k_val").stuff_classes[0] == "person"
    assert get("coco_stuff_164k_val").stuff_classes[170] == "wood"
    assert get("coco_stuff_182_10k_test").stuff_classes[11] == "street sign"
    assert "street sign" not in get("coco_stuff_10k_test").stuff_classes
    counted = {
        "ade20k_150_train": 20210, "cityscapes_19_trainval": 3475, "cityscapes_19_coarse": 19998,
        "lip_20_train": 30462, "cihp_20_train": 28280, "coco_stuff_164k_train": 118287,
        "coco_stuff_10k_train": 9000, "camvid_11_test": 233,
    }  # fmt: skip
    assert {name: get(name).published_count for name in counted} == counted


def test_metadata_files_are_all_used_and_say_where_they_are_from():
    folder = ROOT / "mcibi_d2" / "data" / "metadata"
    described = {file for file, _ in datasets._TABLE.values()}
    assert {path.stem for path in folder.glob("*.json")} == described
    for path in folder.glob("*.json"):
        assert json.loads(path.read_text())["source"]


def test_registering_reads_no_data(monkeypatch):
    names = [name for name in datasets._SPLITS if name in DatasetCatalog.list()]
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    monkeypatch.setattr(datasets, "data_root", lambda: pytest.fail("the root was read"))
    mcibi_d2.register_all_datasets()
    assert set(names) == set(datasets._SPLITS) <= set(DatasetCatalog.list())


# --- the same labels in training and in evaluation, one test per set


@pytest.mark.parametrize("dataset", SPLITS)
def test_training_and_evaluation_read_the_same_labels(pseudo, dataset):
    pseudo(dataset, count=2)
    name = f"{dataset}_{SPLITS[dataset][0][0]}"
    classes = len(MetadataCatalog.get(name).stuff_classes)
    mapper = SemSegMapper(True, augmentations=[], image_format="RGB")
    evaluator = SemSegEvaluator(name, distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        labels = mapper(record)["sem_seg"]
        assert np.array_equal(labels, expected_labels(dataset, record["sem_seg_file_name"]))
        # What training reads, as a prediction; class 0 where there is no ground truth.
        logits = torch.nn.functional.one_hot(labels * (labels != 255), classes).permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": logits.float()}])
    results = evaluator.evaluate()["sem_seg"]
    assert results["mIoU"] == results["pACC"] == 100


@pytest.mark.parametrize(
    "dataset", ["ade20k_150", "cityscapes_19", "lip_20", "cihp_20", "coco_stuff_164k", "camvid_11"]
)
def test_trains_and_evaluates(pseudo, dataset, tmp_path):
    pseudo(dataset, count=2)
    classes = len(EXPECTED[dataset])
    cfg = make_tiny_cfg(
        tmp_path / "output",
        "DATASETS.TRAIN", f"('{dataset}_train',)", "DATASETS.TEST", f"('{dataset}_val',)",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes), "SOLVER.MAX_ITER", "2",
        "INPUT.CROP.SIZE", "(33, 33)", "MODEL.MCIBI.MEMORY.INIT_MAX_IMAGES", "4",
    )  # fmt: skip
    trainer = Trainer(cfg)
    trainer.train()
    results = trainer.test(cfg, trainer.model)
    assert 0 <= results["sem_seg"]["mIoU"] <= 100


# --- bad input


def test_missing_folder_names_path_variable_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for dataset, (labeled, unlabeled) in SPLITS.items():
        for split in labeled + unlabeled:
            with pytest.raises(InputError, match=f"{tmp_path}.*no such .*DETECTRON2_DATASETS"):
                DatasetCatalog.get(f"{dataset}_{split}")


def test_labels_not_prepared_says_how(pseudo, tmp_path):
    pseudo("coco_stuff_10k")
    shutil.rmtree(tmp_path / "coco_stuff_10k" / "labels")
    with pytest.raises(InputError, match=r"labels/train: no such folder.*prepare_coco_stuff_10k"):
        DatasetCatalog.get("coco_stuff_10k_train")


@pytest.mark.parametrize(
    "dataset, split, file",
    [("lip_20", "train", "LIP/TrainVal_images/train_id.txt"),
     ("cihp_20", "val", "instance-level_human_parsing/Validation/val_id.txt"),
     ("coco_stuff_10k", "test", "coco_stuff_10k/imageLists/test.txt"),
     ("camvid_11", "val", "CamVid/val.txt")],
)  # fmt: skip
def test_lists(pseudo, tmp_path, dataset, split, file):
    name = f"{dataset}_{split}"
    pseudo(dataset, count=3)
    everything = DatasetCatalog.get(name)
    lines = (tmp_path / file).read_text().splitlines()
    (tmp_path / file).write_text("\n".join(reversed(lines[1:])) + "\n\n")
    assert DatasetCatalog.get(name) == everything[:0:-1]
    (tmp_path / file).write_text("\n")
    with pytest.raises(InputError, match=r"list(s)? no image"):
        DatasetCatalog.get(name)
    absent = lines[0].replace("00", "77")
    if absent != lines[0]:
        (tmp_path / file).write_text("\n".join([*lines, absent]))
        with pytest.raises(InputError, match="1 of 4 listed images are not there, such as .*77"):
            DatasetCatalog.get(name)


def test_without_its_list_a_folder_counts_whole(pseudo, tmp_path):
    pseudo("lip_20")
    (tmp_path / "LIP/TrainVal_images/val_id.txt").unlink()
    assert len(DatasetCatalog.get("lip_20_val")) == 3
    pseudo("coco_stuff_10k")
    (tmp_path / "coco_stuff_10k/imageLists/test.txt").unlink()
    with pytest.raises(InputError, match=r"test\.txt: no such list file"):
        DatasetCatalog.get("coco_stuff_10k_test")


def test_lists_with_short_numbers(pseudo, tmp_path):
    pseudo("cihp_20")
    expected = DatasetCatalog.get("cihp_20_train")
    file = tmp_path / "instance-level_human_parsing/Training/train_id.txt"
    file.write_text("".join(f"{int(line)}\n" for line in file.read_text().split()))
    assert DatasetCatalog.get("cihp_20_train") == expected


def test_hidden_files_are_left_out(pseudo, tmp_path):
    pseudo("coco_stuff_164k")
    folder = tmp_path / "coco_stuff/images/val2017"
    (folder / "._000000000139.jpg").write_bytes(b"resource fork")
    assert len(DatasetCatalog.get("coco_stuff_164k_val")) == 3


def test_empty_folder_and_missing_label(pseudo, tmp_path):
    pseudo("cityscapes_19")
    (
        tmp_path / "cityscapes/gtFine/val/frankfurt/frankfurt_000001_000019_gtFine_labelIds.png"
    ).unlink()
    expected = "no label for 1 of 3 .*frankfurt_000001_000019_gtFine_labelIds.png"
    with pytest.raises(InputError, match=expected):
        DatasetCatalog.get("cityscapes_19_val")
    shutil.rmtree(tmp_path / "cityscapes/leftImg8bit/val/frankfurt")
    with pytest.raises(InputError, match="leftImg8bit/val: holds no image"):
        DatasetCatalog.get("cityscapes_19_val")


@pytest.mark.parametrize(
    "dataset, value, message",
    [("ade20k_150", 151, r"label 151 .* 1\.\.150 and ignores 0"),
     ("cityscapes_19", 255, r"label 255 .* 7\.\.33"),
     ("lip_20", 20, r"label 20 .* 0\.\.19 and ignores 255"),
     ("cihp_20", 38, r"label 38 .* 0\.\.19"),
     ("coco_stuff_164k", 182, r"label 182 .*171 classes with values 0\.\.181 and ignores 255"),
     ("coco_stuff_164k", 11, r"label 11 "),
     ("coco_stuff_182_164k", 183, r"label 183 .*182 classes"),
     ("camvid_11", 12, r"label 12 .* 0\.\.10 and ignores 11")],
)  # fmt: skip
def test_value_outside_the_table_names_file_value_and_range(tmp_path, dataset, value, message):
    save(tmp_path / "x.png", np.full((4, 4), value, np.uint8))
    with pytest.raises(InputError, match=r"x\.png: " + message):
        read_labels(str(tmp_path / "x.png"), f"{dataset}_train")


def test_wrong_files_of_cityscapes_are_refused(pseudo):
    pseudo("cityscapes_19")
    label = DatasetCatalog.get("cityscapes_19_train")[0]["sem_seg_file_name"]
    with pytest.raises(InputError, match=r"instanceIds\.png: label 24000"):
        read_labels(label.replace("labelIds", "instanceIds"), "cityscapes_19_train")
    with pytest.raises(InputError, match=r"color\.png: .*shape \(48, 64, 3\)"):
        read_labels(label.replace("labelIds", "color"), "cityscapes_19_train")


def test_a_file_cut_anywhere_is_an_input_error_or_whole(pseudo, tmp_path):
    pseudo("lip_20", count=1)
    record = DatasetCatalog.get("lip_20_train")[0]
    mapper = SemSegMapper(True, augmentations=[], image_format="RGB")
    whole = mapper(record)
    for key in ("file_name", "sem_seg_file_name"):
        data = Path(record[key]).read_bytes()
        cut_record = {**record, key: str(tmp_path / "cut")}
        refused = 0
        for length in [*range(0, 64), *range(64, len(data), 29), len(data) - 3]:
            (tmp_path / "cut").write_bytes(data[:length])
            try:
                sample = mapper(cut_record)
            except InputError as error:
                assert f"{tmp_path / 'cut'}: cannot be read" in str(error)
                refused += 1
            else:
                assert torch.equal(sample["sem_seg"], whole["sem_seg"]), (key, length)
        assert refused > 30


# --- real files


@pytest.fixture
def samples(real_data, monkeypatch):
    folder = real_data if (real_data / "ADEChallengeData2016").is_dir() else real_data / "samples"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: real files are not tested")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    return folder


@pytest.mark.parametrize(
    "dataset, splits",
    [("ade20k_150", ["train", "val"]), ("cityscapes_19", ["train", "val", "trainval"]),
     ("lip_20", ["train", "val"]), ("cihp_20", ["train"]),
     ("coco_stuff_164k", ["train", "val"]), ("coco_stuff_182_164k", ["train", "val"])],
)  # fmt: skip
def test_real_labels_go_through_the_table(samples, dataset, splits):
    for split in splits:
        records = DatasetCatalog.get(f"{dataset}_{split}")
        assert records
        for record in records:
            size = Image.open(record["file_name"]).size[::-1]
            labels = read_labels(record["sem_seg_file_name"], f"{dataset}_{split}", size)
            assert np.array_equal(labels, expected_labels(dataset, record["sem_seg_file_name"]))


def test_real_cityscapes_at_full_size(samples):
    records = DatasetCatalog.get("cityscapes_19_train")
    assert len(records) == 2
    for record in records:
        labels = read_labels(record["sem_seg_file_name"], "cityscapes_19_train", (1024, 2048))
        # The published instance ids tell the class another way: id, or id * 1000 + number.
        file = record["sem_seg_file_name"].replace("labelIds", "instanceIds")
        instances = np.asarray(Image.open(file)).astype(int)
        ids = np.where(instances >= 1000, instances // 1000, instances)
        assert np.array_equal(labels, np.vectorize(lambda i: CITYSCAPES.get(i, 255))(ids))
        assert (labels == 0).mean() > 0.2 and (labels == 10)[:512].sum() > (labels == 10)[
            512:
        ].sum()


def test_real_cihp_flip_is_the_official_mirror_image(samples):
    pairs = MetadataCatalog.get("cihp_20_train").flip_pairs
    swap = np.arange(20)
    for i, j in pairs:
        swap[i], swap[j] = j, i
    records = DatasetCatalog.get("cihp_20_train")
    assert len(records) == 3
    for record in records:
        labels = read_labels(record["sem_seg_file_name"], "cihp_20_train")
        mirrored = np.asarray(
            Image.open(record["sem_seg_file_name"].replace("Category_ids", "Category_rev_ids"))
        )
        assert np.array_equal(swap[labels[:, ::-1]], mirrored)
        assert not np.array_equal(labels[:, ::-1], mirrored)


def test_real_grayscale_file_of_lip_has_three_channels(samples):
    gray = [r for r in DatasetCatalog.get("lip_20_val") if Image.open(r["file_name"]).mode == "L"]
    assert len(gray) == 1
    sample = SemSegMapper(True, augmentations=[], image_format="RGB")(gray[0])
    assert sample["image"].shape == (3, 377, 130) and sample["sem_seg"].shape == (377, 130)
    assert torch.equal(sample["image"][0], sample["image"][2])


# --- datasets/prepare_coco_stuff_10k.py


@pytest.fixture
def prepare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "datasets"))
    return importlib.import_module("prepare_coco_stuff_10k")


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_coco_stuff_10k_from_mat_files(prepare, tmp_path, monkeypatch, version):
    pytest.importorskip("scipy" if version == "1.1" else "h5py")
    from pseudo import coco_stuff_10k_mat

    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    coco_stuff_10k_mat(tmp_path, 2, (48, 64), version)
    folder = tmp_path / "coco_stuff_10k"
    prepare.prepare(folder, 1)
    for split in ("train", "test"):
        for record in DatasetCatalog.get(f"coco_stuff_10k_{split}"):
            stem = record["file_name"].rsplit("/", 1)[1].removesuffix(".jpg")
            values, found = prepare.read_mat(folder / "annotations" / f"{stem}.mat")
            assert found == version
            labels = read_labels(record["sem_seg_file_name"], f"coco_stuff_10k_{split}")
            full = read_labels(record["sem_seg_file_name"], f"coco_stuff_182_10k_{split}")
            # 1.1 has 0 and the official ids; 1.0 has 1 and the classes from 2 on.
            if version == "1.1":
                place = {0: 255, **{i: k for k, i in enumerate(COCO_IDS)}}
                ids = {0: 255, **{i: i - 1 for i in COCO_IDS}}
            else:
                place = {1: 255, **{k + 2: k for k in range(171)}}
                ids = {1: 255, **{k + 2: i - 1 for k, i in enumerate(COCO_IDS)}}
            assert np.array_equal(labels, np.vectorize(place.get)(values))
            assert np.array_equal(full, np.vectorize(ids.get)(values))


def test_coco_stuff_10k_goes_on_where_it_was(prepare, tmp_path):
    pytest.importorskip("scipy")
    from pseudo import coco_stuff_10k_mat

    coco_stuff_10k_mat(tmp_path, 2, (48, 64))
    folder = tmp_path / "coco_stuff_10k"
    prepare.prepare(folder, 2)
    files = sorted((folder / "labels").rglob("*.png"))
    assert len(files) == 4
    times = [file.stat().st_mtime_ns for file in files]
    content = files[1].read_bytes()
    files[1].unlink()
    prepare.prepare(folder, 1)
    assert files[1].read_bytes() == content
    for k in (0, 2, 3):
        assert files[k].stat().st_mtime_ns == times[k]
    # What cannot be a label file of its image is made anew.
    for damaged in (b"no image", content[:-20], b""):
        files[1].write_bytes(damaged)
        prepare.prepare(folder, 1)
        assert files[1].read_bytes() == content
    Image.new("L", (5, 5)).save(files[1])
    prepare.prepare(folder, 1)
    assert files[1].read_bytes() == content


def test_coco_stuff_10k_says_what_is_wrong_and_does_the_rest(prepare, tmp_path):
    pytest.importorskip("scipy")
    from pseudo import coco_stuff_10k_mat, write_mat

    coco_stuff_10k_mat(tmp_path, 4, (48, 64))
    folder = tmp_path / "coco_stuff_10k"
    mats = sorted((folder / "annotations").glob("*.mat"))
    write_mat(mats[0], np.zeros((5, 6), np.uint8), "1.1")
    mats[1].write_bytes(mats[1].read_bytes()[:150])
    write_mat(mats[2], np.full((52, 70), 12, np.uint8), "1.1")
    with pytest.raises(InputError) as raised:
        prepare.prepare(folder, 1)
    text = str(raised.value)
    assert "3 of 8 files were not converted" in text
    assert f"{mats[0]}: labels of shape (5, 6)" in text and "has (48, 64)" in text
    assert f"{mats[1]}: cannot be read as a .mat file" in text
    assert f"{mats[2]}: label 12 is not in the table of v1.1" in text
    assert len(list((folder / "labels").rglob("*.png"))) == 5
    shutil.rmtree(folder / "imageLists")
    with pytest.raises(InputError, match=r"train\.txt: no such list file"):
        prepare.prepare(folder, 1)
