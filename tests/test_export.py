"""Files for the servers, from a config and weights, and what is refused."""

import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper
from mcibi_d2.engine import load_config
from mcibi_d2.evaluation.server_files import ServerFiles
from mcibi_d2.tools import export_predictions

NAME = "test_export"
CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
CONFIG = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]",
          "MODEL.MCIBI.ENABLED", "False", "DATALOADER.NUM_WORKERS", "0",
          "INPUT.MIN_SIZE_TEST", "0"]  # fmt: skip


def make_dataset(folder, names, classes, sizes=((40, 60), (33, 50), (64, 64)), **metadata):
    rng = np.random.default_rng(0)
    for name, size in zip(names, sizes, strict=True):
        picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / name)
    records = [{"file_name": str(folder / name)} for name in names]
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        stuff_classes=[str(k) for k in range(classes)], ignore_label=255, **metadata
    )


@pytest.fixture
def weights(tmp_path):
    """A function that writes weights for so many classes."""
    yield lambda classes: _write_weights(tmp_path, classes)
    if NAME in DatasetCatalog:
        DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME, None)


def _write_weights(folder, classes):
    cfg = make_tiny_cfg(folder, *CONFIG, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes))
    path = folder / f"weights{classes}.pth"
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return path


def export(monkeypatch, output, weights, classes, form, *options):
    monkeypatch.setattr(sys, "argv", [
        "export_predictions", "--config-file", str(ROOT / "configs/scenes/mcibi_tiny.yaml"),
        "--format", form, "--dataset", NAME, "--output", str(output), "--opts", *CONFIG,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes), "MODEL.WEIGHTS", str(weights),
        "DATASETS.ALLOW_OTHER_CLASSES", "True", *options,
    ])  # fmt: skip
    export_predictions.main()


def read_zip(path):
    with zipfile.ZipFile(path) as archive:
        return {name: np.asarray(Image.open(archive.open(name))) for name in archive.namelist()}


def plain_labels(weights, classes, image, size=None):
    cfg = load_config(
        str(ROOT / "configs/scenes/mcibi_tiny.yaml"),
        [*CONFIG, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes)],
    )
    model = build_model(cfg).eval()
    model.load_state_dict(torch.load(weights)["model"])
    x = SemSegMapper(cfg, False)({"file_name": str(image)})
    if size:
        x["height"], x["width"] = size
    with torch.no_grad():
        return model([x])[0]["sem_seg"].argmax(dim=0).numpy()


CITYSCAPES = [f"berlin_00000{i}_000019_leftImg8bit.png" for i in range(3)]


def test_cityscapes(tmp_path, monkeypatch, weights):
    make_dataset(tmp_path, CITYSCAPES, 19, server_ids=CITYSCAPES_IDS)
    path = weights(19)
    export(monkeypatch, tmp_path / "out", path, 19, "cityscapes")
    written = read_zip(tmp_path / "out" / f"{NAME}.zip")
    assert sorted(written) == [f"berlin_00000{i}_000019.png" for i in range(3)]
    for i, name in enumerate(CITYSCAPES):
        labels = plain_labels(path, 19, tmp_path / name, (1024, 2048))
        got = written[f"berlin_00000{i}_000019.png"]
        assert got.dtype == np.uint8 and got.shape == (1024, 2048)
        assert (got == np.array(CITYSCAPES_IDS)[labels]).mean() > 0.9999


@pytest.mark.parametrize(
    ("form", "classes", "ids"), [("ade20k", 150, range(1, 151)), ("lip", 20, range(20))]
)
def test_ids_and_sizes(tmp_path, monkeypatch, weights, form, classes, ids):
    names = [f"{form}_{i}.jpg" for i in range(3)]
    make_dataset(tmp_path, names, classes, server_ids=list(ids))
    path = weights(classes)
    export(monkeypatch, tmp_path / "out", path, classes, form)
    written = read_zip(tmp_path / "out" / f"{NAME}.zip")
    assert sorted(written) == [f"{form}_{i}.png" for i in range(3)]
    for name, size in zip(names, ((40, 60), (33, 50), (64, 64)), strict=True):
        got = written[name.replace("jpg", "png")]
        assert got.shape == size
        labels = plain_labels(path, classes, tmp_path / name)
        assert (got == labels + min(ids)).mean() > 0.999


def test_goes_on_where_it_was_stopped(tmp_path, monkeypatch, weights, capsys):
    make_dataset(tmp_path, ["a.png", "b.png", "c.png"], 16)
    path = weights(16)
    slide = ("TEST.INFERENCE", "slide", "TEST.SLIDE.WINDOW", "(48, 48)",
             "TEST.SLIDE.STRIDE", "(32, 32)", "TEST.AUG.ENABLED", "True",
             "TEST.AUG.SCALES", "(1.0,)")  # fmt: skip
    output, written = tmp_path / "out", []
    write = ServerFiles.write

    def stopped(self, image, labels):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(image)
        write(self, image, labels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ServerFiles, "write", stopped)
        export(monkeypatch, output, path, 16, "png", *slide)
    assert len(list((output / "predictions").iterdir())) == 2
    assert not (output / f"{NAME}.zip").exists()
    first = (output / "predictions" / "a.png").stat().st_mtime_ns
    export(monkeypatch, output, path, 16, "png", *slide)
    assert "2 of 3 predictions are there already" in capsys.readouterr().out
    assert (output / "predictions" / "a.png").stat().st_mtime_ns == first
    resumed = read_zip(output / f"{NAME}.zip")
    assert set(resumed) == {"a.png", "b.png", "c.png"}
    export(monkeypatch, tmp_path / "whole", path, 16, "png", *slide)
    for name, labels in read_zip(tmp_path / "whole" / f"{NAME}.zip").items():
        assert np.array_equal(labels, resumed[name])
    # With another configuration, or other weights, predictions are not mixed.
    with pytest.raises(InputError, match=r"out: holds predictions made with another TEST, expect"):
        export(monkeypatch, output, path, 16, "png")
    torch.save({"model": {k: v + 0.5 for k, v in torch.load(path)["model"].items()}}, path)
    with pytest.raises(InputError, match=r"made with another MODEL.WEIGHTS, expected the same"):
        export(monkeypatch, output, path, 16, "png", *slide)


def test_what_is_missing_is_said(tmp_path, monkeypatch, weights):
    make_dataset(tmp_path, ["a.png", "b.png", "c.png"], 16)
    path = weights(16)
    with pytest.raises(InputError, match=f"{NAME} has no server_ids in its metadata, which --form"):
        export(monkeypatch, tmp_path / "out", path, 16, "lip")
    MetadataCatalog.get(NAME).set(server_ids=list(range(16)))
    with pytest.raises(InputError, match="--format lip has 20 classes, but the data set has 16"):
        export(monkeypatch, tmp_path / "out", path, 16, "lip")
    with pytest.raises(InputError, match="MODEL.WEIGHTS is empty, expected a checkpoint"):
        export(monkeypatch, tmp_path / "out", "", 16, "png")


def write_all(folder, count=3):
    images = [str(folder / f"{i}.jpg") for i in range(count)]
    for image in images:
        Image.new("RGB", (9, 7)).save(image)
    files = ServerFiles("png", images, [10, 20, 30], folder / "predictions")
    for image in images:
        files.write(image, np.arange(63).reshape(7, 9) % 3)
    return files, images


def test_zip_is_checked(tmp_path):
    files, images = write_all(tmp_path)
    predictions = tmp_path / "predictions"
    for image in images:
        files.check(image)
    wrong = {
        "a prediction of shape (9, 7) and type uint8, expected 7 x 9": np.full((9, 7), 10),
        "a prediction of shape (7, 9, 3) and type uint8, expected 7 x 9": np.full((7, 9, 3), 10),
        "value 11, expected the 3 ids from 10 to 30": np.where(np.eye(7, 9), 11, 10),
    }
    for said, values in wrong.items():
        Image.fromarray(values.astype(np.uint8)).save(predictions / "1.png")
        with pytest.raises(InputError) as raised:
            files.check(images[1])
        assert str(raised.value).startswith(f"{predictions / '1.png'}: {said}")
    (predictions / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1.png: cannot be read as a prediction"):
        files.check(images[1])
    (predictions / "1.png").unlink()
    with pytest.raises(InputError, match=r"2 predictions, expected 3; there is none for .*1.jpg"):
        files.zip(tmp_path / "x.zip")
    files.write(images[1], np.zeros((7, 9), dtype=np.int64))
    assert files.missing() == []
    for image, name, size in ((images[0], "0.png", 0), (images[2], "2.png", -9)):
        whole = (predictions / name).read_bytes()
        (predictions / name).write_bytes(whole[:size])  # cut off: to be made again
        assert files.missing() == [image]
        (predictions / name).write_bytes(whole)
    (predictions / "other.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"other.png: is the prediction of no image"):
        files.zip(tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()


def test_an_image_without_a_class_or_a_name_is_refused(tmp_path):
    files, images = write_all(tmp_path)
    labels = np.zeros((7, 9), dtype=np.int64)
    labels[2, :4] = 3
    with pytest.raises(InputError, match=r"0.jpg: 4 pixels have no class \(NaN logits\)"):
        files.write(images[0], labels)
    with pytest.raises(InputError, match=r"x.png: expected a name of Cityscapes"):
        ServerFiles("cityscapes", ["x.png"], CITYSCAPES_IDS, tmp_path / "c")
    with pytest.raises(InputError, match=r"b/x.jpg: its prediction would be x.png, as that of a/x"):
        ServerFiles("png", ["a/x.jpg", "b/x.jpg"], [0, 1], tmp_path / "c")


def test_a_turned_image_may_have_either_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = str(tmp_path / "x.jpg")
    Image.new("RGB", (9, 7)).save(path, exif=exif)
    files = ServerFiles("png", [path], [0], tmp_path / "predictions")
    for shape in ((9, 7), (7, 9)):
        files.write(path, np.zeros(shape, dtype=np.int64))
        files.check(path)
