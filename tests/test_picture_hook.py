"""What training draws after every evaluation."""

import numpy as np
import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcibi_d2 import InputError
from mcibi_d2.data.labels import read_labels
from mcibi_d2.engine import Trainer, picture_hook
from mcibi_d2.engine.picture_hook import PictureHook, overlays
from mcibi_d2.engine.setup import check_config
from mcibi_d2.visualization import blend


def pictures(folder):
    """Tag -> [(iteration, width, height)] of the images in the event files of a folder."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return {
        tag: [(x.step, x.width, x.height) for x in events.Images(tag)]
        for tag in events.Tags()["images"]
    }


def train(folder, *options):
    torch.manual_seed(0)
    Trainer(make_tiny_cfg(folder, "TEST.EVAL_PERIOD", "2", *options)).train()


def test_every_evaluation_is_drawn_and_the_training_is_the_same(tmp_path, three_scenes):
    train(tmp_path / "drawn", *three_scenes)
    drawn = pictures(tmp_path / "drawn")
    assert drawn.keys() == {"memory/cosines", "memory/lengths", "validation"}
    for images in drawn.values():
        assert [step for step, *_ in images] == [1, 4]
        assert all(min(size) > 200 for _, *size in images)
    with Image.open(tmp_path / "drawn/overlays.png") as sheet:
        assert sheet.size == drawn["validation"][-1][1:]

    train(tmp_path / "plain", *three_scenes, "TEST.VIS_IMAGES", "0")
    assert pictures(tmp_path / "plain") == {}
    assert not (tmp_path / "plain/overlays.png").exists()
    states = [
        torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("drawn", "plain")
    ]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_without_a_memory_only_the_images_are_drawn(tmp_path, three_scenes):
    train(tmp_path / "fcn", *three_scenes, "MODEL.MCIBI.ENABLED", "False")
    assert pictures(tmp_path / "fcn").keys() == {"validation"}
    train(tmp_path / "zero", *three_scenes, "MODEL.MCIBI.MEMORY.UPDATE", "zero")
    assert pictures(tmp_path / "zero").keys() == {"validation"}


def test_nothing_is_drawn_after_an_error(tmp_path, three_scenes):
    trainer = Trainer(make_tiny_cfg(tmp_path, *three_scenes))

    def fail():
        raise RuntimeError("stop")

    trainer.run_step = fail
    with pytest.raises(RuntimeError, match="stop"):
        trainer.train()
    assert not (tmp_path / "overlays.png").exists()


def test_overlays_show_image_truth_and_prediction(tmp_path, monkeypatch, three_scenes):
    cfg = make_tiny_cfg(tmp_path, *three_scenes)
    model = Trainer.build_model(cfg).train()
    shown = []
    real = picture_hook.comparison_sheet
    monkeypatch.setattr(
        picture_hook,
        "comparison_sheet",
        lambda rows, *args, **options: shown.extend(rows) or real(rows, *args, **options),
    )
    figure = overlays(cfg, model, 2)
    colors = MetadataCatalog.get("test_scenes_three").stuff_colors
    for axis, row in zip(figure.axes[::3], shown, strict=True):
        assert np.array_equal(axis.images[0].get_array(), row["image"])
    drawn = figure.axes[2].images[0].get_array()
    assert np.array_equal(drawn, blend(shown[0]["image"], shown[0]["prediction"], colors, 0.7))
    assert model.training and model.backbone.training
    records = DatasetCatalog.get("test_scenes_three")
    assert len(shown) == 2
    for row, record in zip(shown, (records[0], records[1]), strict=True):
        truth = read_labels(record["sem_seg_file_name"], "test_scenes_three")
        assert np.array_equal(row["ground truth"], truth)
        assert row["image"].shape == (*truth.shape, 3) and row["image"].dtype == np.uint8
        with torch.no_grad():
            image = torch.from_numpy(row["image"].transpose(2, 0, 1).copy())
            expected = model.eval()([{"image": image}])[0]["sem_seg"].argmax(0)
        assert np.array_equal(row["prediction"], expected.numpy())
    shown.clear()
    overlays(cfg, model, 99)
    assert len(shown) == 3
    # Without labels and colours, as another project's data set may be.
    shown.clear()
    monkeypatch.setattr(DatasetCatalog, "get", lambda _: [{"file_name": records[0]["file_name"]}])
    monkeypatch.delattr(MetadataCatalog.get("test_scenes_three"), "stuff_colors")
    overlays(cfg, model, 1)
    assert list(shown[0]) == ["image", "prediction"]


def test_a_config_cannot_ask_for_less_than_none(tiny_cfg):
    tiny_cfg.TEST.VIS_IMAGES = -1
    with pytest.raises(InputError, match="TEST.VIS_IMAGES is -1, expected a whole number"):
        check_config(tiny_cfg)


def test_no_test_set_no_pictures(tiny_cfg):
    assert PictureHook not in {type(hook) for hook in Trainer(tiny_cfg)._hooks}
