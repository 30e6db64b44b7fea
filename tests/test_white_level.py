"""Images of 16 bits whose values are those of fewer: found, written, and read everywhere."""

import sys

import cv2
import numpy as np
import pytest
from conftest import ROOT
from detectron2.data import DatasetCatalog
from PIL import Image
from test_own import _no_own_data_sets, argv, write_labels  # noqa: F401

from mcibi_d2.data import SemSegMapper, read_image
from mcibi_d2.data.mapper import bright_values, fitting_white_level
from mcibi_d2.engine import load_config
from mcibi_d2.evaluation.tta import SemanticSegmentorWithTTA
from mcibi_d2.tools import check_dataset, init_dataset

TINY = str(ROOT / "configs/scenes/mcibi_tiny.yaml")
SIZE = (24, 32)


def values_of(bits, channels=1):
    shape = SIZE if channels == 1 else (*SIZE, channels)
    values = np.random.default_rng(0).integers(0, 1 << bits, shape).astype(np.uint16)
    values.flat[:6] = (1 << bits) - 1
    return values


@pytest.mark.parametrize(
    # OpenCV's TIFFs do not say that a fourth band is alpha.
    "channels, suffix",
    [(1, ".png"), (3, ".png"), (4, ".png"), (1, ".tif"), (3, ".tif"), (3, ".ppm")],
)
def test_white_level(channels, suffix, tmp_path):
    values = values_of(12, channels)
    path = str(tmp_path / f"x{suffix}")
    cv2.imwrite(path, values)
    assert bright_values(path)[0] == 4095
    rgb = values[..., None].repeat(3, 2) if channels == 1 else values[..., 2::-1]
    found = read_image(path, "RGB", white_level=4095)
    assert found.dtype == np.uint8
    assert np.array_equal(found, np.round(rgb * 255.0 / 4095))
    assert np.array_equal(read_image(path, "BGR", white_level=4095), found[..., ::-1])
    # Above it is white; without it, as before.
    assert np.array_equal(
        read_image(path, "RGB", white_level=1000), np.round(np.minimum(rgb, 1000) * 0.255)
    )
    # Pillow rounds a PPM's.
    upper = rgb >> 8 if suffix != ".ppm" else np.round(rgb / 257)
    assert np.array_equal(read_image(path, "RGB"), upper)


def test_images_of_8_bits_and_turned_ones(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), image)
    assert bright_values(str(tmp_path / "x.png")) == (0, 0)
    assert np.array_equal(read_image(str(tmp_path / "x.png"), "BGR", white_level=4095), image)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values_of(12)).save(tmp_path / "y.png", exif=exif)
    turned = read_image(str(tmp_path / "y.png"), "RGB", white_level=4095)
    assert np.array_equal(turned[..., 0], np.rot90(np.round(values_of(12) * 255.0 / 4095), -1))


def test_values_of_12_bits_in_a_file_that_says_so(tmp_path):
    values = values_of(12, 3)
    (tmp_path / "x.ppm").write_bytes(b"P6\n32 24\n4095\n" + values.astype(">u2").tobytes())
    assert bright_values(str(tmp_path / "x.ppm")) == (0, 0)
    for level in (0, 1000):
        found = read_image(str(tmp_path / "x.ppm"), "RGB", white_level=level)
        assert np.abs(found - values * 255.0 / 4095).max() < 1


@pytest.mark.parametrize("form", ["faulty pixels", "beside others"])
def test_dark_images_whose_highest_value_hides_it_are_said(form, tmp_path, argv, capsys):  # noqa: F811
    (tmp_path / "images").mkdir()
    for i in range(5):
        values = np.tile(values_of(16 if form == "beside others" and i < 2 else 12), (4, 4))
        if form == "faulty pixels":
            values //= 2
            values.flat[i] = 65535
        Image.fromarray(values).save(tmp_path / f"images/{i}.png")
    write_labels(tmp_path / "labels", [0, 1, 2])
    for path in (tmp_path / "labels").iterdir():
        image = Image.open(path)
        image.resize((128, 96), Image.NEAREST).save(path)
    output = tmp_path / "mine.yaml"
    sys.argv = ["init_dataset", str(tmp_path / "images"), str(tmp_path / "labels"), "--output",
                str(output), "--base", TINY, "--val-share", "0"]  # fmt: skip
    init_dataset.main()
    assert load_config(str(output)).INPUT.WHITE_LEVEL == 0
    assert check_dataset.check("mine_train", 0, tmp_path / "out")
    said = capsys.readouterr().out
    wanted = (
        "5 of 5 images of 16 bits have values up to 2,047 alone in nearly all of their pixels, of "
        "65,535: too dark. INPUT.WHITE_LEVEL 2047"
        if form == "faulty pixels"
        else "3 of 5 images of 16 bits have values up to 4,095 alone in nearly all"
    )
    assert said.count(wanted) == 2


@pytest.mark.parametrize(
    "highest, level",
    [(0, 0), (200, 255), (1000, 1023), (4012, 4095), (4095, 4095), (16000, 16383), (40000, 0)],
)
def test_level_that_fits(highest, level):
    assert fitting_white_level(highest) == level


def test_it_is_found_written_and_read_everywhere(tmp_path, argv, capsys):  # noqa: F811
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(values_of(10 + 2 * (i == 3))).save(tmp_path / f"images/{i}.png")
    write_labels(tmp_path / "labels", [0, 1, 2])
    output = tmp_path / "mine.yaml"
    sys.argv = ["init_dataset", str(tmp_path / "images"), str(tmp_path / "labels"), "--output",
                str(output), "--base", TINY]  # fmt: skip
    init_dataset.main()
    assert "values up to 4,095 of 65,535, so that 4,095 becomes white" in capsys.readouterr().out
    cfg = load_config(str(output))
    assert cfg.INPUT.WHITE_LEVEL == 4095
    records = [r for s in ("train", "val") for r in DatasetCatalog.get(f"mine_{s}")]
    bright = next(r for r in records if r["file_name"].endswith("3.png"))
    for train in (True, False):
        mapper = SemSegMapper(cfg, train)
        mapper.augmentations = mapper.augmentations.__class__([])
        assert mapper(bright)["image"].max() == 255
    tta = SemanticSegmentorWithTTA(cfg, model=mapper_model())
    assert tta._original({**bright, "image": mapper(bright)["image"]}).max() == 255
    for split in ("train", "val"):
        assert check_dataset.check(f"mine_{split}", 0, tmp_path / "out")
    assert "too dark" not in capsys.readouterr().out
    # Without it, check_dataset says which would fit.
    output.write_text(output.read_text().replace("WHITE_LEVEL: 4095", "WHITE_LEVEL: 0"))
    load_config(str(output))
    for split in ("train", "val"):
        check_dataset.check(f"mine_{split}", 0, tmp_path / "out")
    said = capsys.readouterr().out
    assert "values up to 4,095 alone, of 65,535: too dark. INPUT.WHITE_LEVEL 4095 fits" in said


def mapper_model():
    import torch

    return torch.nn.Identity()
