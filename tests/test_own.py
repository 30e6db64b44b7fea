"""A data set of one's own: from files to a config, to training and evaluation."""

import json
import pickle
import re
import shutil
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from test_end_to_end import miou, run

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper, own, register_own_dataset
from mcibi_d2.data.labels import read_labels
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.launch import _guarded
from mcibi_d2.engine.setup import check_config
from mcibi_d2.tools import check_dataset, init_dataset
from mcibi_d2.tools.command import run_tool

TINY = str(ROOT / "configs/scenes/mcibi_tiny.yaml")
SIZE = (24, 32)
COUNT = 5


@pytest.fixture(autouse=True)
def _no_own_data_sets(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    yield
    forget()


def forget():
    """As in a process that has only imported the package."""
    for name in own._registered:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    own._registered.clear()


def write_images(folder, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(1)
    for name in names or [f"{i}.jpg" for i in range(COUNT)]:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*SIZE, 3), np.uint8)).save(folder / name)


def class_maps(classes, count=COUNT):
    """Blocks of 4 x 4 pixels; every class is in every map."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(count):
        blocks = rng.integers(0, classes, (SIZE[0] // 4, SIZE[1] // 4))
        blocks.flat[:classes] = np.arange(classes)
        maps.append(blocks.repeat(4, 0).repeat(4, 1))
    return maps


def write_labels(folder, values, dtype=np.uint8, mode=None):
    """Labels whose class k has the k-th of ``values``; returns the maps of k."""
    folder.mkdir(parents=True, exist_ok=True)
    maps = class_maps(len(values))
    for i, classes in enumerate(maps):
        image = Image.fromarray(np.array(values, dtype)[classes])
        if mode == "P":
            image.putpalette([(7 * v + 50 * c) % 256 for v in range(256) for c in range(3)])
        elif mode:
            image = image.convert(mode)
        image.save(folder / f"{i}.png")
    return maps


def init(*arguments):
    """The tool, in this process."""
    sys.argv = ["init_dataset", *map(str, arguments)]
    run_tool(init_dataset.main)


@pytest.fixture
def argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", [])


RED, GREEN, BORDER = (200, 0, 0), (0, 200, 0), (224, 224, 192)
FORMS = {
    # values of the files, type, mode -> which of them are ignored
    "gray ids": ([0, 1, 2, 3], np.uint8, None, []),
    "gray ids and 255": ([0, 1, 4, 255], np.uint8, None, [255]),
    "palette": ([0, 2, 3, 255], np.uint8, "P", [255]),
    "mask": ([0, 255], np.uint8, None, []),
    "mask of one bit": ([0, 1], bool, None, []),
    "levels of gray": ([0, 127, 255], np.uint8, None, []),
    "16 bits": ([1, 300, 4000, 65535], np.uint16, None, []),
    "16 bits and ignore": ([1, 2, 65535], np.uint16, None, [65535]),
    "colors": ([RED, GREEN, BORDER], np.uint8, None, [BORDER]),
    "colors with alpha": ([RED, GREEN], np.uint8, "RGBA", []),
    "ids in three channels": ([(0,) * 3, (1,) * 3, (2,) * 3], np.uint8, None, []),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_labels(form, tmp_path, argv, capsys):
    values, dtype, mode, ignored = FORMS[form]
    write_images(tmp_path / "images")
    maps = write_labels(tmp_path / "labels", values, dtype, mode)
    output = tmp_path / "mine.yaml"
    init(tmp_path / "images", tmp_path / "labels", "--output", output)

    cfg = load_config(str(output))
    described = cfg.DATASETS.OWN
    kept = sorted(set(values) - set(ignored))
    in_color = isinstance(values[0], tuple)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == len(described.CLASS_NAMES) == len(kept)
    if in_color:
        assert list(map(tuple, described.LABEL_COLORS)) == kept
        assert list(map(tuple, described.IGNORED_COLORS)) == ignored
    else:
        assert described.LABEL_IDS[:] == kept and described.LABEL_IGNORED[:] == ignored
    colors = list(map(tuple, described.CLASS_COLORS))
    assert len(set(colors)) == len(kept)
    if form == "palette":
        assert colors[1] == (14, 64, 114)  # of value 2
    if form == "colors":
        assert colors == kept
    if form == "mask":
        assert described.CLASS_NAMES == ["background", "object"]
        assert "two classes" in capsys.readouterr().out

    # The labels that training and evaluation read are the classes that were written.
    expected = [kept.index(v) if v in kept else 255 for v in values]
    records = [r for split in ("train", "val") for r in DatasetCatalog.get(f"mine_{split}")]
    assert len(records) == COUNT
    for record in records:
        truth = np.array(expected)[maps[int(record["file_name"].rsplit("/")[-1][0])]]
        labels = read_labels(record["sem_seg_file_name"], record["dataset_name"], SIZE)
        assert np.array_equal(labels, truth)


def test_palettes_that_differ_are_read_by_color(tmp_path, argv, capsys):
    write_images(tmp_path / "images")
    maps = class_maps(2)
    (tmp_path / "labels").mkdir()
    for i, classes in enumerate(maps):
        # Every second file has its indices the other way round.
        image = Image.fromarray((classes ^ (i % 2)).astype(np.uint8))
        image.putpalette([*RED, *GREEN] if i % 2 == 0 else [*GREEN, *RED])
        image.save(tmp_path / f"labels/{i}.png")
    init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml")
    assert "palettes that differ" in capsys.readouterr().out
    load_config(str(tmp_path / "mine.yaml"))
    for record in DatasetCatalog.get("mine_train"):
        classes = maps[int(record["file_name"].rsplit("/")[-1][0])]
        labels = read_labels(record["sem_seg_file_name"], "mine_train")
        # GREEN < RED: the classes are in the order of their colors.
        assert np.array_equal(labels, 1 - classes)


def test_what_is_found_is_said_and_left_out(tmp_path, argv, capsys):
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_images(images, [f"{i}.jpg" for i in range(COUNT)] + ["alone.jpg"])
    write_labels(labels, [0, 1, 2, 255])
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(labels / "nobody.png")
    (labels / "._0.png").write_bytes(b"of macOS")
    (images / "0.jpg").write_bytes((images / "0.jpg").read_bytes()[:300])
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(labels / "1.png")
    init(images, labels, "--output", tmp_path / "mine.yaml", "--base", TINY)
    said = capsys.readouterr().out
    assert f"3 images of {SIZE[0]} x {SIZE[1]} (height x width)" in said
    assert re.search(r"Without a partner, left out: 2\n.*alone\.jpg\n.*nobody\.png", said)
    assert re.search(r"Cannot be used.*: 2\n.*0\.jpg: cannot be read as an image", said)
    assert re.search(r"1\.png: labels of 10 x 10 .*image has 24 x 32", said)
    assert re.search(r"\n +255 +[\d.]+ % +3 +ignored\n", said)
    assert "255 is ignored" in said and "0 is read as a class" in said
    cfg = load_config(str(tmp_path / "mine.yaml"))
    assert cfg.DATASETS.OWN.EXCLUDED == ["0.jpg", "1.jpg"]
    used = [r["file_name"] for s in ("train", "val") for r in DatasetCatalog.get(f"mine_{s}")]
    assert sorted(used) == [str(images / f"{i}.jpg") for i in (2, 3, 4)]


def test_shares_are_those_of_the_pixels(tmp_path, argv, capsys):
    write_images(tmp_path / "images", ["0.png", "1.png"])
    (tmp_path / "labels").mkdir()
    for i in range(2):
        values = np.full(SIZE, 7, np.uint8)
        values[: 6 * i] = 9
        Image.fromarray(values).save(tmp_path / f"labels/{i}.png")
    init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml")
    said = capsys.readouterr().out
    assert re.search(r"\n +7 +87\.5 % +2 +class_7\n +9 +12\.5 % +1 +class_9\n", said)


def test_ignore_can_be_said(tmp_path, argv, capsys):
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", [0, 1, 2, 255])
    output = tmp_path / "mine.yaml"
    init(tmp_path / "images", tmp_path / "labels", "--output", output, "--ignore", 0, 255)
    described = load_config(str(output)).DATASETS.OWN
    assert described.LABEL_IDS == [1, 2] and described.LABEL_IGNORED == [0, 255]
    again = (tmp_path / "images", tmp_path / "labels", "--output", output, "--force")
    init(*again, "--ignore")
    described = load_config(str(output)).DATASETS.OWN
    assert described.LABEL_IDS == [0, 1, 2, 255] and described.LABEL_IGNORED == []
    for wrong, message in (("7", "--ignore 7: no label holds it"), ("1,2,3", "a value such as")):
        with pytest.raises(SystemExit, match=message):
            init(*again, "--ignore", wrong)


# --- to training and evaluation


@pytest.mark.slow  # test_package.py does it, but for two processes
def test_tool_to_training_to_edited_config_to_training(tmp_path, argv):
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", [RED, GREEN, BORDER])
    output = tmp_path / "mine.yaml"
    init(tmp_path / "images", tmp_path / "labels", "--output", output, "--base", TINY,
         "--val-share", 0.4)  # fmt: skip
    # Two processes, which are started and not forked.
    options = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path / "out",
               "DATALOADER.NUM_WORKERS", 0]  # fmt: skip
    said = run("-m", "mcibi_d2.tools.train", "--config-file", output, "--num-gpus", 2, *options)
    assert 0 < miou(said) <= 100

    text = output.read_text()
    assert '"color_200_0_0"' in text and "[200, 0, 0]" in text
    text = text.replace('"color_200_0_0"', '"Tomate, rot"').replace("[200, 0, 0]", "[1, 2, 3]", 1)
    output.write_text(text)
    cfg = load_config(str(output), list(map(str, options)))
    check_config(cfg)
    metadata = MetadataCatalog.get("mine_val")
    assert metadata.stuff_classes == ["color_0_200_0", "Tomate, rot"]
    assert metadata.stuff_colors == [[0, 200, 0], [1, 2, 3]]
    trainer = Trainer(cfg)
    trainer.train()
    assert {"IoU-Tomate, rot", "mIoU"} <= set(trainer._last_eval_results["sem_seg"])
    # What a run has written down is a config, too.
    again = tmp_path / "again.yaml"
    again.write_text(cfg.dump())
    assert load_config(str(again)).DATASETS.OWN == cfg.DATASETS.OWN


@pytest.mark.parametrize("form", ["json", "yaml", "txt", "tab"])
def test_lists_and_manifests(form, tmp_path, argv, capsys):
    name = "{} a.jpg" if form == "tab" else "{}.jpg"
    names = [name.format(i) for i in range(COUNT)]
    write_images(tmp_path / "a", names)
    write_labels(tmp_path / "b", [0, 1, 2])
    pairs = [(f"a/{n}", f"b/{i}.png") for i, n in enumerate(names)]
    # Paths may be absolute, too.
    pairs[0] = (str(tmp_path / pairs[0][0]), pairs[0][1])
    entries = [{"image": image, "label": label} for image, label in pairs]
    text = {
        "json": json.dumps(entries),
        "yaml": yaml.safe_dump(entries),
        "txt": "\n".join(map(" ".join, pairs)) + "\n\n",
        "tab": "\n".join(map("\t".join, pairs)),
    }[form]
    listing = tmp_path / f"pairs.{form}"
    listing.write_text(text)
    (tmp_path / f"val.{form}").write_text(text)
    init(listing, "--val-images", tmp_path / f"val.{form}", "--output", tmp_path / "mine.yaml",
         "--base", TINY)  # fmt: skip
    assert "5 images are both for training and for evaluation" in capsys.readouterr().out
    load_config(str(tmp_path / "mine.yaml"))
    for split in ("train", "val"):
        records = DatasetCatalog.get(f"mine_{split}")
        assert [(r["file_name"], r["sem_seg_file_name"]) for r in records] == [
            (str(tmp_path / "a" / n), str(tmp_path / f"b/{i}.png")) for i, n in enumerate(names)
        ]
    cfg = load_config(
        str(tmp_path / "mine.yaml"), ["OUTPUT_DIR", str(tmp_path / "out"), "DATASETS.TEST", "()"]
    )
    check_config(cfg)
    assert next(iter(Trainer.build_train_loader(cfg)))[0]["sem_seg"].shape == SIZE


# --- registration


def config(tmp_path, *options, classes=("a", "b"), values=(0, 1)):
    """A tiny config with an own data set ``mine``, and its files."""
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", list(values))
    return make_tiny_cfg(
        tmp_path / "out",
        "DATASETS.OWN.NAME", "mine",
        "DATASETS.OWN.TRAIN", repr([str(tmp_path / "images"), str(tmp_path / "labels")]),
        "DATASETS.OWN.CLASS_NAMES", repr(list(classes)),
        "DATASETS.TRAIN", "('mine_train',)",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(len(classes)),
        *options,
    )  # fmt: skip


def test_registering_twice_is_harmless_and_the_later_values_hold(tmp_path):
    cfg = config(tmp_path)
    before = DatasetCatalog.list()
    register_own_dataset(cfg)
    assert DatasetCatalog.list() == before and "mine_val" not in before
    cfg.DATASETS.OWN.CLASS_NAMES = ["c", "d"]
    cfg.DATASETS.OWN.VAL_SHARE = 0.2
    register_own_dataset(cfg)
    assert MetadataCatalog.get("mine_train").stuff_classes == ["c", "d"]
    assert len(DatasetCatalog.get("mine_val")) == 1
    cfg.DATASETS.OWN.VAL_SHARE = 0.0
    register_own_dataset(cfg)
    assert "mine_val" not in DatasetCatalog


def test_processes_that_are_started_know_it(tmp_path):
    cfg = config(tmp_path)
    record = DatasetCatalog.get("mine_train")[0]
    mapper = pickle.dumps(SemSegMapper(cfg, True))
    forget()
    # A worker process of a data loader.
    assert set(pickle.loads(mapper)(record)["sem_seg"].unique().tolist()) <= {0, 1, 255}
    forget()
    seen = []
    _guarded(lambda args, cfg: seen.extend(DatasetCatalog.get("mine_train")), None, cfg)
    assert len(seen) == COUNT
    forget()
    # By import, without load_config.
    assert Trainer(cfg).data_loader is not None


def test_held_out_share_is_the_same_again_and_nearly_so_with_more_images(tmp_path):
    write_images(tmp_path / "images", [f"{i}.png" for i in range(40)])
    write_images(tmp_path / "labels", [f"{i}.png" for i in range(40)])
    cfg = config(tmp_path, "DATASETS.OWN.VAL_SHARE", "0.25",
                 "DATASETS.OWN.EXCLUDED", str([f"{i}.jpg" for i in range(COUNT)]))  # fmt: skip
    # config() has written 0.jpg .. beside 0.png ..: the same names.
    for i in range(COUNT):
        (tmp_path / f"images/{i}.jpg").unlink()
    splits = {
        s: {r["file_name"] for r in DatasetCatalog.get(f"mine_{s}")} for s in ("train", "val")
    }
    assert len(splits["train"]) == 30 and len(splits["val"]) == 10
    assert not splits["train"] & splits["val"]
    for folder in ("images", "labels"):
        write_images(tmp_path / folder, [f"{i}.png" for i in range(40, 48)])
    more = {r["file_name"] for r in DatasetCatalog.get("mine_val")}
    assert len(more) == 12 and len(more & splits["val"]) >= 7
    # Elsewhere, under another folder: the same names.
    (tmp_path / "elsewhere").mkdir()
    for folder in ("images", "labels"):
        (tmp_path / folder).rename(tmp_path / "elsewhere" / folder)
    cfg.DATASETS.OWN.TRAIN = [str(tmp_path / "elsewhere" / f) for f in ("images", "labels")]
    register_own_dataset(cfg)
    moved = {r["file_name"].replace("/elsewhere", "") for r in DatasetCatalog.get("mine_val")}
    assert moved == more


def test_paths_below_the_data_sets_folder(tmp_path, argv, monkeypatch):
    write_images(tmp_path / "data/images/x", ["0.jpg"])
    write_images(tmp_path / "data/images", ["1.jpg", "2.jpg"])
    write_labels(tmp_path / "data/labels", [0, 1, 2])
    (tmp_path / "data/labels/x").mkdir()
    (tmp_path / "data/labels/0.png").rename(tmp_path / "data/labels/x/0.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    init(tmp_path / "data/images", tmp_path / "data/labels", "--output", tmp_path / "mine.yaml")
    cfg = load_config(str(tmp_path / "mine.yaml"))
    assert cfg.DATASETS.OWN.TRAIN == ["images", "labels"]
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "moved"))
    names = [r["file_name"] for s in ("train", "val") for r in DatasetCatalog.get(f"mine_{s}")]
    assert str(tmp_path / "moved/images/x/0.jpg") in names and len(names) == 3
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere/images: no such folder.*DETECTRON2_DATASETS"):
        DatasetCatalog.get("mine_train")


def test_number_of_classes_that_does_not_match_stops_before_training(tmp_path):
    cfg = config(tmp_path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3")
    for start in (check_config, Trainer):  # by train_net.py, and by import
        with pytest.raises(InputError, match=r"NUM_CLASSES is 3, but mine_train has 2 classes"):
            start(cfg)


def test_more_classes_than_a_byte_holds(tmp_path, argv):
    (tmp_path / "labels").mkdir()
    write_images(tmp_path / "images", ["0.png", "1.png"])
    for i in range(2):
        values = np.arange(SIZE[0] * SIZE[1], dtype=np.uint16).reshape(SIZE) % 300
        Image.fromarray(values).save(tmp_path / f"labels/{i}.png")
    init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml")
    cfg = load_config(str(tmp_path / "mine.yaml"))
    assert cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE == 65535
    assert MetadataCatalog.get("mine_train").ignore_label == 65535
    record = DatasetCatalog.get("mine_train")[0]
    assert np.array_equal(read_labels(record["sem_seg_file_name"], "mine_train"), values)


# --- mistakes


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("NAME", "scenes", r"'scenes', which is another data set already"),
        ("TRAIN", "[]", r"TRAIN is \[\], expected \[images, labels\]"),
        ("TRAIN", "['a', 'b', 'c']", r"expected \[images, labels\] or \[list or manifest\]"),
        ("CLASS_NAMES", "[]", "CLASS_NAMES is .*a list of texts"),
        ("CLASS_NAMES", "['a', True]", "quote numbers, yes and no"),
        ("CLASS_NAMES", "['a', 'a']", "'a' is there twice"),
        ("CLASS_COLORS", "[[0, 0, 0]]", "CLASS_COLORS has 1 entries, expected one for each"),
        ("CLASS_COLORS", "[[0, 0, 0], [0, 256, 0]]", r"\[0, 256, 0\]\], expected .*\[red, green"),
        ("LABEL_IDS", "[0, 1, 2]", "LABEL_IDS has 3 entries.* of the 2 DATASETS.OWN.CLASS_NAMES"),
        ("LABEL_IDS", "[0, 70000]", r"70000\], expected .*numbers? of 0\.\.65535"),
        ("LABEL_IDS", "[0, 255]", "LABEL_IDS and LABEL_IGNORED have 255 twice"),
        ("LABEL_COLORS", "[[1, 1, 1], [1, 1, 1]]", r"have \(1, 1, 1\) twice"),
        ("VAL_SHARE", "1.0", "VAL_SHARE is 1.0, expected .*below 1"),
    ],
)
def test_keys_that_do_not_fit(key, value, message, tmp_path):
    with pytest.raises(InputError, match=message):
        config(tmp_path, f"DATASETS.OWN.{key}", value)


def test_unknown_color_names_file_color_and_pixels(tmp_path):
    config(tmp_path, "DATASETS.OWN.LABEL_COLORS", str([RED, GREEN]), values=[RED, GREEN])
    labels = np.full((*SIZE, 3), RED, np.uint8)
    labels[:2, :4] = (1, 2, 3)
    labels[5, 5] = (255, 255, 255)
    Image.fromarray(labels).save(tmp_path / "wrong.png")
    message = (
        r"wrong\.png: color \(1, 2, 3\) of 8 pixels is not in the table of mine_train, which has "
        r"2 colors; 2 such colors on 9 pixels"
    )
    with pytest.raises(InputError, match=message):
        read_labels(str(tmp_path / "wrong.png"), "mine_train")
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: .* I;16, expected colors"):
        read_labels(str(tmp_path / "deep.png"), "mine_train")


@pytest.mark.parametrize(
    "text, suffix, message",
    [
        ("{}", "json", r"pairs\.json: holds dict, expected a list of \{image, label\}"),
        ('[{"image": "a"}]', "json", r"pairs\.json: entry 1 is .*expected \{image, label\}"),
        ("[", "json", r"pairs\.json: cannot be read"),
        ("- a: [", "yaml", r"pairs\.yaml: cannot be read"),
        ("a b c", "txt", r"pairs\.txt: line 1 is 'a b c', expected an image and a label"),
        ("", "txt", r"pairs\.txt: lists no image"),
        ("a.png b.png", "txt", r"none of 1 pairs can be used.*b\.png: cannot be read as a label"),
    ],
)
def test_wrong_lists_are_named(text, suffix, message, tmp_path, argv):
    (tmp_path / f"pairs.{suffix}").write_text(text)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        init(tmp_path / f"pairs.{suffix}", "--output", tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()


def test_nothing_is_overwritten_without_force(tmp_path, argv):
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", [0, 1])
    output = tmp_path / "mine.yaml"
    output.write_text("mine")
    arguments = (tmp_path / "images", tmp_path / "labels", "--output", output)
    with pytest.raises(SystemExit, match=r"mine\.yaml: exists already.*--force"):
        init(*arguments)
    assert output.read_text() == "mine"
    init(*arguments, "--force")
    assert load_config(str(output)).DATASETS.OWN.NAME == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images", "labels", "mine.yaml"]


def test_folders_that_cannot_be_used(tmp_path, argv):
    images, labels = tmp_path / "images", tmp_path / "labels"
    output = ("--output", tmp_path / "mine.yaml")

    def refused(message, *arguments):
        with pytest.raises(SystemExit, match=message):
            init(*arguments, *output)
        assert not output[1].exists()

    refused(r"images: no such folder$", images, labels)
    write_images(images)
    refused(r"images: a folder of images, expected LABELS beside it", images)
    labels.mkdir()
    refused(r"labels: holds no image \(\.png", images, labels)
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(labels / "other.png")
    refused(r"no label has the name.*labels are named as other\.png, images as 0\.jpg.*a list",
            images, labels)  # fmt: skip
    (labels / "other.png").unlink()
    write_labels(labels, [3])
    refused("the labels hold one class, 3, expected two", images, labels)
    write_images(images, ["0.png"])
    refused(r"images/0\.png: has the name of 0\.jpg|0\.jpg: has the name of 0\.png", images, labels)
    (images / "0.png").unlink()
    for i in range(COUNT):
        (labels / f"{i}.png").unlink()
    write_images(labels, [f"{i}.jpg" for i in range(COUNT)])
    refused(r"0\.jpg: a JPEG, whose compression changes labels, expected a PNG", images, labels)
    for i in range(COUNT):
        (labels / f"{i}.jpg").unlink()
    refused_output = (tmp_path / "scenes.yaml",)
    write_labels(labels, [0, 1])
    with pytest.raises(SystemExit, match=r"would be called scenes, which there is already"):
        init(images, labels, "--output", *refused_output)


def test_photographs_are_no_labels(tmp_path, argv):
    big = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        Image.fromarray(big).save(tmp_path / folder / "0.png")
    with pytest.raises(SystemExit, match=r"0\.png: 40\d\d colors, too many for classes"):
        init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml")


# --- what training reads is what is looked at


def test_images_are_looked_at_as_training_reads_them(tmp_path, argv, capsys):
    images, labels = tmp_path / "images", tmp_path / "labels"
    write_labels(labels, [0, 1, 2])
    images.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned, but the labels have the size as stored
    for i in range(COUNT - 1):
        Image.new("RGB", SIZE[::-1]).save(images / f"{i}.jpg", exif=exif)
    Image.fromarray(np.zeros(SIZE, np.float32)).save(images / f"{COUNT - 1}.tif")
    init(images, labels, "--output", tmp_path / "mine.yaml", "--base", TINY)
    assert re.search(r"Cannot be used.*: 1\n.*4\.tif: .*floating-point", capsys.readouterr().out)
    cfg = load_config(str(tmp_path / "mine.yaml"))
    mapper = SemSegMapper(cfg, True)
    records = [r for s in ("train", "val") for r in DatasetCatalog.get(f"mine_{s}")]
    assert len([mapper(r) for r in records]) == COUNT - 1


@pytest.mark.parametrize("form", ["json", "yaml", "txt"])
def test_mark_at_the_start_of_a_list_is_no_part_of_a_name(form, tmp_path, argv, capsys):
    write_images(tmp_path / "é")
    write_labels(tmp_path / "b", [0, 1, 2])
    pairs = [(f"é/{i}.jpg", f"b/{i}.png") for i in range(COUNT)]
    entries = [{"image": image, "label": label} for image, label in pairs]
    text = "\r\n".join(map(" ".join, pairs))
    if form != "txt":
        text = json.dumps(entries, ensure_ascii=False)
    (tmp_path / f"pairs.{form}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    init(tmp_path / f"pairs.{form}", "--output", tmp_path / "mine.yaml", "--base", TINY)
    assert "left out" not in capsys.readouterr().out
    assert load_config(str(tmp_path / "mine.yaml")).DATASETS.OWN.EXCLUDED == []


def test_repeated_lines_count_in_training_alone(tmp_path, argv):
    write_images(tmp_path / "a")
    write_labels(tmp_path / "b", [0, 1, 2])
    lines = [f"a/{i}.jpg b/{i}.png" for i in range(COUNT)]
    (tmp_path / "pairs.txt").write_text("\n".join(lines * 2))
    (tmp_path / "val.txt").write_text("\n".join(lines[:2] * 2))
    init(tmp_path / "pairs.txt", "--val-images", tmp_path / "val.txt",
         "--output", tmp_path / "mine.yaml", "--base", TINY)  # fmt: skip
    load_config(str(tmp_path / "mine.yaml"))
    assert len(DatasetCatalog.get("mine_train")) == 2 * COUNT
    assert len(DatasetCatalog.get("mine_val")) == 2


@pytest.mark.parametrize("base", ["cityscapes/mcibi_R50.yaml", "lip/mcibi_R50.yaml"])
def test_test_images_keep_their_size_whatever_the_base_does(base, tmp_path, argv):
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", [0, 1, 2])
    init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml",
         "--base", ROOT / "configs" / base)  # fmt: skip
    mapper = SemSegMapper(load_config(str(tmp_path / "mine.yaml")), False)
    assert mapper(DatasetCatalog.get("mine_val")[0])["image"].shape == (3, *SIZE)


def test_check_dataset_names_files_without_a_partner(tmp_path, argv, capsys):
    write_images(tmp_path / "images", [f"{i}.jpg" for i in range(COUNT)] + ["alone.jpg"])
    write_labels(tmp_path / "labels", [0, 1, 2])
    Image.new("L", SIZE).save(tmp_path / "labels/nobody.png")
    init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml")
    load_config(str(tmp_path / "mine.yaml"))
    for name in ("mine_train", "mine_val"):
        assert not check_dataset.check(name, 0, tmp_path / "out")
        problems = (tmp_path / f"out/{name}_problems.txt").read_text().splitlines()
        assert [p.split(": ")[0] for p in problems] == [
            str(tmp_path / "images/alone.jpg"), str(tmp_path / "labels/nobody.png")
        ]  # fmt: skip


def test_bad_first_file_can_be_skipped(tmp_path):
    cfg = config(tmp_path)
    (tmp_path / "pairs.txt").write_text("images/none.jpg labels/0.png\nimages/1.jpg labels/1.png")
    cfg.DATASETS.OWN.TRAIN = [str(tmp_path / "pairs.txt")]
    register_own_dataset(cfg)
    with pytest.raises(InputError, match=r"none\.jpg: no such file, but mine_train lists it"):
        check_config(cfg)
    cfg.DATALOADER.SKIP_BAD = True
    check_config(cfg)
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert {x["file_name"] for x in batch} == {str(tmp_path / "images/1.jpg")}


def test_copies_of_the_labels_are_no_images(tmp_path, argv):
    write_labels(tmp_path / "labels", [0, 1, 2])
    shutil.copytree(tmp_path / "labels", tmp_path / "images")
    output = ("--output", tmp_path / "mine.yaml")
    with pytest.raises(SystemExit, match="images: each image is a copy of its label, expected"):
        init(tmp_path / "images", tmp_path / "labels", *output)
    # One alone may be: an empty picture.
    write_images(tmp_path / "images", [f"{i}.png" for i in range(1, COUNT)])
    init(tmp_path / "images", tmp_path / "labels", *output)


def test_images_to_evaluate_on_are_training_images_by_a_link(tmp_path, argv, capsys):
    write_images(tmp_path / "images")
    write_labels(tmp_path / "labels", [0, 1, 2])
    for name in ("images", "labels"):
        (tmp_path / f"val_{name}").symlink_to(tmp_path / name)
    held_out = ("--val-images", tmp_path / "val_images", "--val-labels", tmp_path / "val_labels")
    init(*(tmp_path / x for x in ("images", "labels")), "--output", tmp_path / "m.yaml", *held_out)
    assert "5 images are both for training and for evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("one", [True, False], ids=["one folder", "two folders"])
def test_found_suffix_is_said_and_written_and_trained_with(one, tmp_path, argv, capsys):
    folders = [tmp_path / "x"] if one else [tmp_path / "x", tmp_path / "y"]
    write_images(folders[0])
    write_labels(folders[-1], [0, 1, 2])
    for i in range(COUNT):
        (folders[-1] / f"{i}.png").rename(folders[-1] / f"{i}_mask.png")
    output = ("--output", tmp_path / "mine.yaml", "--base", TINY)
    init(*folders, *output)
    assert "Names of labels end in _mask" in capsys.readouterr().out
    assert load_config(str(tmp_path / "mine.yaml")).DATASETS.OWN.LABEL_SUFFIX == "_mask"
    records = [r for s in ("train", "val") for r in DatasetCatalog.get(f"mine_{s}")]
    assert sorted((r["file_name"], r["sem_seg_file_name"]) for r in records) == [
        (str(folders[0] / f"{i}.jpg"), str(folders[-1] / f"{i}_mask.png")) for i in range(COUNT)
    ]
    before = (tmp_path / "mine.yaml").read_text()
    init(*folders, *output, "--force", "--label-suffix", "_mask")
    assert (tmp_path / "mine.yaml").read_text() == before
    with pytest.raises(SystemExit, match="labels end in '_gt'"):
        init(*folders, *output, "--force", "--label-suffix", "_gt")


def test_links_are_followed_and_those_that_are_not_are_named(tmp_path, argv, capsys):
    write_images(tmp_path / "far")
    write_labels(tmp_path / "labels/more", [0, 1, 2])
    (tmp_path / "images").mkdir()
    (tmp_path / "images/more").symlink_to(tmp_path / "far")
    (tmp_path / "images/loop").symlink_to("..")
    init(tmp_path / "images", tmp_path / "labels", "--output", tmp_path / "mine.yaml")
    said = capsys.readouterr().out
    assert "5 images of 24 x 32" in said
    assert re.search(r"Not followed: 1\n.*images/loop: a link to a folder that it is in", said)
    load_config(str(tmp_path / "mine.yaml"))
    assert not check_dataset.check("mine_train", 0, tmp_path / "out")
    assert "images/loop: a link to a folder" in (
        tmp_path / "out/mine_train_problems.txt"
    ).read_text()  # fmt: skip
