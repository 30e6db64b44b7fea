"""Labels that are not one value per class: what is refused, and what --nearest makes of them."""

import io
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image, ImageDraw, ImageFilter

from mcibi_d2 import InputError
from mcibi_d2.data import own
from mcibi_d2.data.labels import read_labels
from mcibi_d2.engine import load_config
from mcibi_d2.tools import check_dataset, init_dataset
from mcibi_d2.tools.command import run_tool

TINY = str(ROOT / "configs/scenes/mcibi_tiny.yaml")
COUNT, SIZE = 3, (80, 64)  # (width, height)
COLORS = [(0, 0, 0), (200, 40, 0), (0, 0, 190)]


@pytest.fixture(autouse=True)
def _no_own_data_sets(monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    monkeypatch.setattr(sys, "argv", [])
    yield
    for name in own._registered:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    own._registered.clear()


def classes(number, scale=1, count=2, lines=False):
    """A map of class ids with shapes that are ``scale`` times as large as it says."""
    rng = np.random.default_rng(number)
    image = Image.new("L", (SIZE[0] * scale, SIZE[1] * scale))
    draw = ImageDraw.Draw(image)
    for k in range(2 * count):
        x, y, r = (int(v) * scale for v in rng.integers((0, 0, 8), (SIZE[0], SIZE[1], 18)))
        if lines:
            end = tuple(int(v) * scale for v in rng.integers(0, 64, 2))
            draw.line([(x, y), end], fill=1 + k % (count - 1), width=2 * scale)
        elif k % 3 == 1:
            draw.rectangle([x - r, y - r, x + r, y + r], fill=1 + k % (count - 1))
        else:
            draw.ellipse([x - r, y - r, x + r, y + r], fill=1 + k % (count - 1))
    return np.asarray(image)


def colored(values, ids):
    return Image.fromarray(np.array(values, np.uint8)[ids])


def smaller(image):
    return image.resize(SIZE, Image.BOX)


def enlarged(image):
    small = image.resize((40, 32), Image.NEAREST)
    return small.resize(SIZE, Image.BILINEAR)


def jpeg(quality):
    def once(image):
        data = io.BytesIO()
        image.resize(SIZE, Image.NEAREST).save(data, "JPEG", quality=quality)
        return Image.open(data)

    return once


def blurred(image):
    return image.resize(SIZE, Image.NEAREST).filter(ImageFilter.GaussianBlur(1))


def in_gray_palette(image):
    return smaller(image).quantize(64)


SOFT = {
    # values or colors of the classes, what made them soft, in lines
    "antialiased": ([0, 255], smaller, False),
    "enlarged": ([0, 255], enlarged, False),
    "blurred": ([0, 255], blurred, False),
    "JPEG 98": ([0, 255], jpeg(98), False),
    "JPEG 95": ([0, 255], jpeg(95), False),
    "JPEG 75": ([0, 255], jpeg(75), False),
    "JPEG 40": ([0, 255], jpeg(40), False),
    "vessels": ([0, 255], smaller, True),
    "four levels": ([0, 85, 170, 255], smaller, False),
    "four levels, JPEG": ([0, 85, 170, 255], jpeg(90), False),
    "four levels, JPEG 100": ([0, 85, 170, 255], jpeg(100), False),
    "five levels, JPEG 98": ([0, 64, 128, 191, 255], jpeg(98), False),
    "steps of 20": ([0, 20, 40, 60], smaller, False),
    "gray in three channels": ([(0,) * 3, (255,) * 3], smaller, False),
    "colors": (COLORS, smaller, False),
    "colors, JPEG": (COLORS, jpeg(90), False),
    "palette": ([0, 255], in_gray_palette, False),
}


def write(folder, form, made=None, suffix="png"):
    """Images and labels of a form; returns the maps of class ids."""
    values, make, lines = SOFT[form]
    maps = []
    for i in range(COUNT):
        ids = classes(i, 4, len(values), lines)
        maps.append(np.asarray(Image.fromarray(ids).resize(SIZE, Image.NEAREST)))
        for name in ("images", "labels"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE, (40 * i, 90, 7)).save(folder / f"images/{i}.png")
        (made or make)(colored(values, ids)).save(folder / f"labels/{i}.{suffix}")
    return maps


def init(folder, *options):
    sys.argv = ["init_dataset", str(folder / "images"), str(folder / "labels"), "--base", TINY,
                "--force", "--output", str(folder / "mine.yaml"), *map(str, options)]  # fmt: skip
    run_tool(init_dataset.main)
    return load_config(str(folder / "mine.yaml")).DATASETS.OWN


def shares_that_are_right(maps):
    """Of each map, the share of its pixels that are read as they were meant."""
    records = [r for s in ("train", "val") for r in DatasetCatalog.get(f"mine_{s}")]
    assert len(records) == COUNT
    for record in records:
        labels = read_labels(record["sem_seg_file_name"], record["dataset_name"])
        truth = maps[int(record["file_name"].rsplit("/")[-1][0])]
        yield (labels == truth).mean()


@pytest.mark.parametrize("form", SOFT)
def test_soft_masks_are_refused_and_taken_as_the_nearest(form, tmp_path, capsys):
    values = SOFT[form][0]
    maps = write(tmp_path, form)
    with pytest.raises(SystemExit, match=r"error: .* soft masks .*--nearest.*--threshold"):
        init(tmp_path)
    assert not (tmp_path / "mine.yaml").exists()
    described = init(tmp_path, "--nearest")
    if "JPEG" not in form:
        found = described.LABEL_COLORS or described.LABEL_IDS
        expected = [[v] * 3 for v in values] if described.LABEL_COLORS else values
        assert found == (sorted(map(list, values)) if isinstance(values[0], tuple) else expected)
    assert len(described.CLASS_NAMES) == len(values) and described.LABEL_NEAREST
    assert "taken as the nearest of" in capsys.readouterr().out
    # Classes are in the order of their values.
    order = np.argsort([v if isinstance(v, int) else v[0] * 65536 + v[2] for v in values])
    maps = [np.argsort(order)[ids] for ids in maps]
    shares = list(shares_that_are_right(maps))
    assert min(shares) > (0.9 if len(values) > 2 else 0.96)
    # Named, they are the same.
    named = [",".join(map(str, np.atleast_1d(v))) for v in described.LABEL_COLORS]
    again = init(tmp_path, "--nearest", *(named or described.LABEL_IDS))
    assert again == described
    for split in ("train", "val"):
        assert check_dataset.check(f"mine_{split}", 0, tmp_path / "out")


@pytest.mark.parametrize("form", ["antialiased", "JPEG 75", "gray in three channels", "palette"])
def test_threshold(form, tmp_path, capsys):
    maps = write(tmp_path, form)
    described = init(tmp_path, "--threshold", 128)
    assert described.CLASS_NAMES == ["background", "object"] and described.LABEL_THRESHOLD == 128
    assert min(shares_that_are_right(maps)) > 0.96
    files = sorted((tmp_path / "labels").iterdir())
    for file in files:
        brightness = np.asarray(Image.open(file).convert("L"))
        assert (read_labels(str(file), "mine_train") == (brightness >= 128)).all()
    for value, message in (
        (0, "--threshold is 0, expected 1 or more"),
        (256, "labels hold 0 to 255, expected values below it and others"),
    ):
        with pytest.raises(SystemExit, match=message):
            init(tmp_path, "--threshold", value)


def test_jpegs_are_read_where_it_is_wished(tmp_path):
    maps = write(tmp_path, "JPEG 75", lambda image: image.resize(SIZE, Image.NEAREST), "jpg")
    with pytest.raises(SystemExit, match=r"0\.jpg: a JPEG, .*or --nearest and the values"):
        init(tmp_path)
    init(tmp_path, "--nearest", 0, 255)
    assert min(shares_that_are_right(maps)) > 0.99


CLASSES = {
    "ids 0 to 10": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    "ids with gaps": [0, 7, 8, 11, 24, 25, 33],
    "levels": [0, 64, 128, 191, 255],
}


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("form", CLASSES)
def test_classes_are_no_soft_masks(form, lines, tmp_path):
    values = CLASSES[form]
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for i in range(COUNT):
        ids = classes(i, 1, len(values), lines).copy()
        ids[:4] = np.arange(SIZE[0]) * len(values) // SIZE[0]
        # Poles and a border, one pixel wide.
        ids[10:40, 5::9] = 1
        ids[12:40, 7::9] = 2
        border = np.asarray(Image.fromarray(ids).filter(ImageFilter.FIND_EDGES)) > 0
        ids[50:][border[50:]] = 3
        Image.new("RGB", SIZE).save(tmp_path / f"images/{i}.png")
        colored(values, ids).save(tmp_path / f"labels/{i}.png")
    described = init(tmp_path, "--ignore")
    assert values == described.LABEL_IDS and not described.LABEL_NEAREST


@pytest.mark.parametrize(
    "pattern",
    [
        "CamVid/*annot/*.png", "CCP/labels/*/*.png", "samples/ADE*/annotations/*/*.png",
        "samples/cityscapes/gtFine/*/*/*labelIds.png", "samples/LIP/**/*segmentations/*.png",
        "samples/CIHP/**/Category_ids/*.png", "samples/coco_stuff/annotations/*/*.png",
    ],
)  # fmt: skip
def test_real_labels_are_no_soft_masks(pattern, real_data):

    files = sorted(real_data.glob(pattern))[:30]
    if not files:
        pytest.skip(f"no {pattern} in {real_data}: real labels are not tested")
    for chosen in [files, *[[file] for file in files[:10]]]:
        counts = [Counter(), Counter(), Counter()]
        for file in chosen:
            label = init_dataset._read_label(file, "exact")
            for of_all, of in zip(counts, (label.pixels, label.thin, label.between), strict=True):
                of_all.update(of)
        assert init_dataset.soft_values(*counts, np.zeros(4, np.int64)) is None


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("LABEL_THRESHOLD", 300, "two classes with a value below it"),
        ("LABEL_NEAREST", True, "LABEL_THRESHOLD is 128, expected 0 beside LABEL_NEAREST"),
    ],
)
def test_keys_that_do_not_fit(key, value, message, tmp_path):
    write(tmp_path, "antialiased")
    init(tmp_path, "--threshold", 128)
    text = (tmp_path / "mine.yaml").read_text()
    changed = "\n".join(line for line in text.splitlines() if f" {key}:" not in line)
    changed = changed.replace("  OWN:", f"  OWN:\n    {key}: {value}")
    (tmp_path / "mine.yaml").write_text(changed)
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path / "mine.yaml"))


# --- other forms of label files


def save_npy(image, path):
    np.save(path, np.asarray(image))


FORMS = {
    "gif": ("gif", lambda ids, path: Image.fromarray(ids).save(path)),
    "npy, 8 bits": ("npy", lambda ids, path: np.save(path, ids)),
    "npy, 64 bits": ("npy", lambda ids, path: np.save(path, ids.astype(np.int64))),
    "npy, unsigned": ("npy", lambda ids, path: np.save(path, ids.astype(np.uint64))),
    "npy, -1": ("npy", lambda ids, path: np.save(path, ids.astype(np.int32) - (ids == 0))),
    "npy, bool": ("npy", lambda ids, path: np.save(path, ids > 0)),
    "tif": ("tif", lambda ids, path: Image.fromarray(ids.astype(np.uint16)).save(path)),
    "pgm": ("pgm", lambda ids, path: Image.fromarray(ids).save(path)),
    "1 bit": ("png", lambda ids, path: Image.fromarray(ids > 0).save(path)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_label_files(form, tmp_path, capsys):
    suffix, save = FORMS[form]
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    maps = []
    for i in range(COUNT):
        Image.new("RGB", SIZE, (9, 9, 9)).save(tmp_path / f"images/{i}.{'gif' if i else 'jfif'}",
                                               "GIF" if i else "JPEG")  # fmt: skip
        # The last has one class alone.
        maps.append(classes(i, 1, 3) * (i < COUNT - 1))
        save(maps[-1], tmp_path / f"labels/{i}.{suffix}")
    described = init(tmp_path)
    if form in ("npy, bool", "1 bit"):
        maps = [np.minimum(ids, 1) for ids in maps]
        assert described.CLASS_NAMES == ["background", "object"]
    if form == "npy, -1":
        assert described.LABEL_IGNORED == [-1] and "-1 is ignored" in capsys.readouterr().out
        maps = [np.where(ids == 0, 255, ids - 1) for ids in maps]
    assert min(shares_that_are_right(maps)) == 1
    for split in ("train", "val"):
        assert check_dataset.check(f"mine_{split}", 0, tmp_path / "out")


def test_arrays_that_are_no_labels(tmp_path):
    name = "scenes_val"
    for array, message in (
        (np.zeros((4, 4)), r"of shape \(4, 4\) and type float64, expected one channel"),
        (np.zeros((4, 4, 3), np.uint8), r"of shape \(4, 4, 3\)"),
        (np.array([[{}]]), "cannot be read as a label image .*pickle"),
        (np.full((4, 4), 1 << 40), f"label {1 << 40} is not in the table"),
    ):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(InputError, match=r"x\.npy: .*" + message):
            read_labels(str(tmp_path / "x.npy"), name)
    with open(tmp_path / "x.npy", "wb") as archive:
        np.savez(archive, np.zeros((4, 4), np.uint8))
    for data in (b"\x93NUMPY", b"", (tmp_path / "x.npy").read_bytes()):
        (tmp_path / "x.npy").write_bytes(data)
        with pytest.raises(InputError, match=r"x\.npy: cannot be read as a label image"):
            read_labels(str(tmp_path / "x.npy"), name)


@pytest.mark.parametrize("value", [-100, 70000])
def test_values_that_no_table_has_are_named(value, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(COUNT):
        Image.new("RGB", SIZE).save(tmp_path / f"images/{i}.png")
        ids = classes(i, 1, 3).astype(np.int64)
        np.save(tmp_path / f"labels/{i}.npy", np.where(ids == 0, value, ids))
    with pytest.raises(SystemExit, match=f"error: the labels hold {value}, expected 0..65535"):
        init(tmp_path)


@pytest.mark.parametrize("values", [[1, 255], [1, 2, 255]])
def test_what_is_taken_for_ignored_is_said(values, tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(COUNT):
        Image.new("RGB", SIZE).save(tmp_path / f"images/{i}.png")
        colored(values, classes(i, 1, len(values))).save(tmp_path / f"labels/{i}.png")
    described = init(tmp_path)
    said = capsys.readouterr().out
    if len(values) == 2:
        assert described.LABEL_IGNORED == []
        assert "1 and 255 alone are two classes, and nothing is ignored. (255 often means" in said
    else:
        assert described.LABEL_IGNORED == [255] and "255 is ignored" in said


def test_masks_in_three_channels_of_which_one_is_empty(tmp_path):
    maps = write(tmp_path, "gray in three channels", lambda image: image.resize(SIZE, 0))
    Image.new("RGB", SIZE).save(tmp_path / "labels/0.png")
    assert init(tmp_path).CLASS_NAMES == ["background", "object"]
    maps[0] = maps[0] * 0
    assert min(shares_that_are_right(maps)) == 1


def test_photographs_in_gray_are_no_labels(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
        for i in range(COUNT):
            noise = rng.integers(0, 256, SIZE[::-1], np.uint8)
            photo = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))
            photo.save(tmp_path / f"{name}/{i}.png")
    with pytest.raises(SystemExit, match="nearly all of them in no area of their own: photographs"):
        init(tmp_path)


@pytest.mark.parametrize("height", [31, 1], ids=["a side", "a few pixels"])
def test_one_value_at_borders_may_be_a_class_and_is_said(height, tmp_path, capsys):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(COUNT):
        ids = np.zeros(SIZE[::-1], np.uint8)
        ids[9:40, 10 + i : 50] = 255
        ids[9 : 9 + height, 10 + i] = 128
        Image.new("RGB", SIZE).save(tmp_path / f"images/{i}.png")
        Image.fromarray(ids).save(tmp_path / f"labels/{i}.png")
    assert init(tmp_path).LABEL_IDS == [0, 128, 255]
    assert "128 is found at borders alone, between other values" in capsys.readouterr().out
    assert init(tmp_path, "--nearest").LABEL_IDS == [0, 255]
