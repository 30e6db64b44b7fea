import argparse

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.tools.benchmark import data


def test_pipeline_is_measured_on_generated_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    before = DatasetCatalog.list()
    args = argparse.Namespace(pipelines=["camvid"], images=6, workers=1, rate=100.0)
    found = data.benchmark_data(args)["pipelines"][0]
    assert not found["real"] and found["mean_size"] == [360, 480]
    assert list(found["stages_ms"]) == ["read image", "read labels", "scale, crop", "flip",
                                        "colour", "pad", "to tensors"]  # fmt: skip
    assert all(ms > 0 for ms in found["stages_ms"].values())
    # The stages are the whole.
    whole = 1000 / found["images_per_second"]
    assert whole / 4 < sum(found["stages_ms"].values()) < whole * 4
    assert found["loader_images_per_second"] > 0
    assert "generated" in capsys.readouterr().out
    assert DatasetCatalog.list() == before


def test_real_files_are_taken_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for folder in ("train", "trainannot"):
        (tmp_path / "CamVid" / folder).mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (48, 36)).save(tmp_path / f"CamVid/train/{i}.png")
        Image.new("L", (48, 36)).save(tmp_path / f"CamVid/trainannot/{i}.png")
    lines = "\n".join(f"x/train/{i}.png x/trainannot/{i}.png" for i in range(3))
    (tmp_path / "CamVid/train.txt").write_text(lines)
    found = data.measure("camvid", 4, 0)
    assert found["real"] and found["files"] == 3 and found["mean_size"] == [36, 48]


def test_plain_pipeline_makes_the_same_sizes(tmp_path):
    pipeline = data.PIPELINES["ade20k"]
    cfg = data.load_config(pipeline.config, ["INPUT.ROTATION_DEGREES", "30"])
    np.random.seed(0)
    for record in data.make_files(tmp_path, pipeline, 150, 2):
        image = data.read_image(record["file_name"], "RGB")
        labels = np.asarray(Image.open(record["sem_seg_file_name"]))
        assert image.shape[:2] == labels.shape and labels.shape in pipeline.sizes
        inputs = data.T.AugInput(image, sem_seg=labels)
        data.T.AugmentationList(data.plain_augmentations(cfg))(inputs)
        assert inputs.image.shape == (512, 512, 3) and inputs.sem_seg.shape == (512, 512)


def test_unknown_pipeline_is_named():
    args = argparse.Namespace(pipelines=["voc"], images=6, workers=0, rate=100.0)
    with pytest.raises(InputError, match="'voc': unknown, expected one of ade20k, cityscapes, lip"):
        data.benchmark_data(args)
