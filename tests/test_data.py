import os
import re

import numpy as np
import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.utils.file_io import PathManager
from PIL import Image

import mcibi_d2
from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper, build_train_loader, scenes
from mcibi_d2.data.labels import read_labels
from mcibi_d2.data.loader import move_to_iteration

NAMES = [
    f"{dataset}_{split}"
    for dataset, splits in {
        "ade20k_150": ["train", "val"],
        "camvid_11": ["train", "val", "trainval", "test"],
        "scenes": ["train", "val"],
    }.items()
    for split in splits
]


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(array, np.uint8))
    if mode == "P":
        image.putpalette([(7 * i + c) % 256 for i in range(256) for c in range(3)])
    image.save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Pseudo data sets in the published layouts."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    rng = np.random.default_rng(0)
    for split, name in (("training", "train"), ("validation", "val")):
        for i in range(3):
            stem = f"ADE_{name}_{i:08d}"
            base = tmp_path / "ADEChallengeData2016"
            save(base / f"images/{split}/{stem}.jpg", rng.integers(0, 256, (20, 30, 3)))
            save(base / f"annotations/{split}/{stem}.png", rng.integers(0, 151, (20, 30)))
    camvid = tmp_path / "CamVid"
    for split in ("train", "val", "test"):
        lines = []
        for i in range(2):
            save(camvid / split / f"{split}{i}.png", rng.integers(0, 256, (18, 24, 3)))
            save(camvid / f"{split}annot/{split}{i}.png", rng.integers(0, 12, (18, 24)))
            lines.append(
                f"/SegNet/CamVid/{split}/{split}{i}.png /SegNet/CamVid/{split}annot/{split}{i}.png"
            )
        (camvid / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_complete_metadata(name, root):
    metadata = MetadataCatalog.get(name)
    count = {"ade20k": 150, "camvid": 11, "scenes": 16}[name.split("_")[0]]
    assert len(metadata.stuff_classes) == len(set(metadata.stuff_classes)) == count
    assert len(metadata.stuff_colors) == len(metadata.label_ids) == count
    assert metadata.ignore_label == 255 and metadata.evaluator_type == "sem_seg"
    records = DatasetCatalog.get(name)
    assert {r["dataset_name"] for r in records} == {name}
    labels = read_labels(records[0]["sem_seg_file_name"], name)
    assert set(np.unique(labels)) <= {*range(count), 255}


def test_registering_twice_is_harmless():
    before = DatasetCatalog.list()
    mcibi_d2.register_all_datasets()
    assert DatasetCatalog.list() == before


def test_trainval_is_train_and_val(root):
    both = DatasetCatalog.get("camvid_11_trainval")
    assert len(both) == 4
    assert all(os.path.isfile(r["file_name"]) for r in both)


def test_ade20k_zero_is_ignored_and_the_rest_moves_down(root, tmp_path):
    save(tmp_path / "x.png", [[0, 1, 2, 150]])
    assert read_labels(str(tmp_path / "x.png"), "ade20k_150_val").tolist() == [[255, 0, 1, 149]]


def test_palette_images_are_read_by_index(tmp_path):
    save(tmp_path / "x.png", [[0, 1, 10, 11]], mode="P")
    assert read_labels(str(tmp_path / "x.png"), "camvid_11_val").tolist() == [[0, 1, 10, 255]]


def test_16_bit_labels(tmp_path):
    Image.fromarray(np.array([[0, 10]], np.uint16)).save(tmp_path / "x.png")
    assert read_labels(str(tmp_path / "x.png"), "camvid_11_val").tolist() == [[0, 10]]


def test_other_projects_data_sets_hold_class_ids(tmp_path):
    name = "test_other_project"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(stuff_classes=["a", "b"], ignore_label=9)
    try:
        save(tmp_path / "x.png", [[0, 1, 9]])
        assert read_labels(str(tmp_path / "x.png"), name).tolist() == [[0, 1, 9]]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_more_classes_than_a_byte_holds(tmp_path, tiny_cfg):
    name = "test_many_classes"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(stuff_classes=[str(i) for i in range(300)], ignore_label=65535)
    tiny_cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 65535
    try:
        Image.fromarray(np.full((80, 120), 270, np.uint16)).save(tmp_path / "y.png")
        save(tmp_path / "x.jpg", np.zeros((80, 120, 3)))
        record = {"file_name": str(tmp_path / "x.jpg"), "dataset_name": name,
                  "sem_seg_file_name": str(tmp_path / "y.png")}  # fmt: skip
        for seed in range(5):
            np.random.seed(seed)
            labels = SemSegMapper(tiny_cfg, True)(record)["sem_seg"]
            assert 270 in labels and set(labels.unique().tolist()) <= {270, 65535}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "array, message",
    [
        ([[0, 12, 200]], r"label 12, 200 .*camvid_11_val.*0\.\.10 and ignores 11"),
        (np.zeros((4, 4, 3)), r"shape \(4, 4, 3\)"),
    ],
    ids=["out of range", "RGB"],
)
def test_wrong_labels_name_the_file(tmp_path, array, message):
    save(tmp_path / "wrong.png", array)
    with pytest.raises(InputError, match=r"wrong\.png: .*" + message):
        read_labels(str(tmp_path / "wrong.png"), "camvid_11_val")


def test_labels_of_another_size_name_both(tmp_path):
    save(tmp_path / "x.png", np.zeros((4, 5)))
    with pytest.raises(InputError, match=r"x\.png: labels of 4 x 5.*has 6 x 7"):
        read_labels(str(tmp_path / "x.png"), "camvid_11_val", (6, 7))


def test_unreadable_label_and_image_name_the_file(tmp_path, tiny_cfg):
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"x\.png: cannot be read as a label image"):
        read_labels(str(tmp_path / "x.png"), "camvid_11_val")
    with pytest.raises(InputError, match=r"x\.png: cannot be read as an image"):
        SemSegMapper(tiny_cfg, True)({"file_name": str(tmp_path / "x.png")})


def test_missing_folder_names_the_path_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere.*no such folder.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("ade20k_150_train")
    with pytest.raises(InputError, match=r"train\.txt.*no such list file.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("camvid_11_train")


def test_image_without_label_is_named(root):
    os.remove(root / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png")
    with pytest.raises(InputError, match=r"no label for 1 of 3.*ADE_train_00000001\.png"):
        DatasetCatalog.get("ade20k_150_train")


def test_wrong_line_of_a_list_is_named(root):
    (root / "CamVid/val.txt").write_text("only_one\n")
    with pytest.raises(InputError, match=r"val\.txt: line 1 is 'only_one'"):
        DatasetCatalog.get("camvid_11_val")


def test_home_folder_is_expanded(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root.parent))
    monkeypatch.setenv("DETECTRON2_DATASETS", f"~/{root.name}")
    assert len(DatasetCatalog.get("ade20k_150_val")) == 3


# --- mapper


def test_mapper_in_training_and_in_evaluation(root, tmp_path):
    cfg = make_tiny_cfg(tmp_path, "DATASETS.TRAIN", "('ade20k_150_train',)")
    record = DatasetCatalog.get("ade20k_150_train")[0]
    sample = SemSegMapper(cfg, True)(record)
    assert sample["image"].shape == (3, 65, 97) and sample["image"].dtype == torch.uint8
    assert sample["sem_seg"].shape == (65, 97) and sample["sem_seg"].dtype == torch.long
    assert (sample["height"], sample["width"]) == (20, 30)
    sample = SemSegMapper(cfg, False)(record)
    assert sample["image"].shape == (3, 20, 30)
    assert "sem_seg" not in sample and "sem_seg_file_name" not in sample


def test_record_without_label_is_refused_in_training(root, tiny_cfg):
    record = {"file_name": DatasetCatalog.get("camvid_11_val")[0]["file_name"]}
    with pytest.raises(InputError, match="has no sem_seg_file_name"):
        SemSegMapper(tiny_cfg, True)(record)


# --- the order of training


def batches(cfg, count, iteration=0, seed=7):
    loader = build_train_loader(cfg)
    move_to_iteration(loader, cfg, seed, iteration)
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def equal(a, b):
    return all(
        x["file_name"] == y["file_name"]
        and torch.equal(x["image"], y["image"])
        and torch.equal(x["sem_seg"], y["sem_seg"])
        for batch, other in zip(a, b, strict=True)
        for x, y in zip(batch, other, strict=True)
    )


def test_batches_are_a_function_of_seed_and_iteration(tmp_path):
    cfg = make_tiny_cfg(tmp_path)
    first = batches(cfg, 4)
    assert equal(first, batches(cfg, 4))
    assert equal(first[2:], batches(cfg, 2, iteration=2))
    assert not equal(first, batches(cfg, 4, seed=8))
    cfg.DATALOADER.NUM_WORKERS = 2
    assert equal(first, batches(cfg, 4))


def test_every_pass_has_each_record_once(root, tmp_path):
    cfg = make_tiny_cfg(tmp_path, "DATASETS.TRAIN", "('ade20k_150_train',)",
                        "SOLVER.IMS_PER_BATCH", "3")  # fmt: skip
    orders = [[x["file_name"] for x in batch] for batch in batches(cfg, 6)]
    assert all(len(set(order)) == 3 for order in orders)
    assert len({tuple(order) for order in orders}) > 1


# --- generated scenes


def test_scenes_are_a_function_of_their_number():
    image, labels = scenes.render("train", 3)
    again = scenes.render("train", 3)
    assert np.array_equal(image, again[0]) and np.array_equal(labels, again[1])
    assert not np.array_equal(image, scenes.render("val", 3)[0])
    assert not np.array_equal(image, scenes.render("train", 4)[0])


def test_scenes_have_every_class_and_ignored_pixels():
    seen = set()
    for number in range(60):
        image, labels = scenes.render("train", number)
        assert image.shape == (128, 160, 3) and labels.shape == (128, 160)
        seen |= set(np.unique(labels).tolist())
    assert seen == {*range(16), 255}


def test_scenes_are_files_to_detectron2():
    record = DatasetCatalog.get("scenes_val")[5]
    image, labels = scenes.render("val", 5)
    assert np.array_equal(detection_utils.read_image(record["file_name"], "RGB"), image)
    assert np.array_equal(read_labels(record["sem_seg_file_name"], "scenes_val"), labels)
    assert PathManager.exists(record["file_name"])
    with pytest.raises(FileNotFoundError, match=re.escape("scenes://val/x/image.png")):
        PathManager.open("scenes://val/x/image.png", "rb")


def test_look_alikes_share_their_textures():
    for pair in [(scenes.SKY, scenes.WATER), (scenes.CAR, scenes.BOAT), (scenes.LAMP, scenes.SUN)]:
        assert scenes._LOOK_OF[pair[0]] is scenes._LOOK_OF[pair[1]]


# --- real files


def test_real_camvid(real_data):
    train, val = (DatasetCatalog.get(f"camvid_11_{s}") for s in ("train", "val"))
    assert len(train) == 367 and len(val) > 0
    for record in (train[0], val[-1]):
        image = detection_utils.read_image(record["file_name"], "RGB")
        labels = read_labels(record["sem_seg_file_name"], "camvid_11_val", image.shape[:2])
        assert labels.shape == (360, 480) and set(np.unique(labels)) <= {*range(11), 255}


def test_real_ade20k(real_data, monkeypatch):
    samples = real_data / "samples"
    if not samples.is_dir():
        pytest.skip(f"no {samples}")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(samples))
    for record in DatasetCatalog.get("ade20k_150_val"):
        raw = np.asarray(Image.open(record["sem_seg_file_name"])).astype(int)
        labels = read_labels(record["sem_seg_file_name"], "ade20k_150_val")
        assert np.array_equal(np.where(labels == 255, 0, labels + 1), raw)
