"""Scales and mirror images, averaged."""

import weakref

import numpy as np
import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.utils.events import get_event_storage
from PIL import Image
from test_inference import CLASSES, agree, image, make
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer
from mcibi_d2.evaluation import SemanticSegmentorWithTTA
from mcibi_d2.modeling import SlidingWindow

SCALES = (0.5, 1.0, 1.75)
SLIDING = SlidingWindow((20, 30), (15, 20))


@pytest.mark.parametrize("sliding", [None, SLIDING])
def test_scale_1_without_mirror_is_plain(sliding):
    model, x = make(sliding, stride=4), image(height=91, width=70)
    (plain,) = model([x])
    (result,) = SemanticSegmentorWithTTA(model=model, scales=(1.0,), flip=False)([x])
    torch.testing.assert_close(result["sem_seg"], plain["sem_seg"].softmax(dim=0))
    assert agree(result["sem_seg"].argmax(dim=0), plain["sem_seg"])


def literal(model, x, scales, flip, swap=tuple(range(CLASSES))):
    """Every augmentation one by one, on the whole image."""
    picture = x["image"].permute(1, 2, 0).numpy()
    height, width = picture.shape[:2]
    size = x.get("height", height), x.get("width", width)
    parts = []
    for scale in scales:
        resized = T.ResizeTransform(height, width, round(height * scale), round(width * scale))
        resized = resized.apply_image(picture)
        for mirrored in (False, True)[: 1 + flip]:
            shown = torch.from_numpy((np.fliplr(resized) if mirrored else resized).copy())
            (result,) = model(
                [{"image": shown.permute(2, 0, 1), "height": size[0], "width": size[1]}]
            )
            part = result["sem_seg"].exp() / result["sem_seg"].exp().sum(dim=0)
            if mirrored:
                part = torch.stack([part[swap[k]].fliplr() for k in range(CLASSES)])
            parts.append(part)
    return sum(parts) / len(parts)


@pytest.mark.parametrize("sliding", [None, SLIDING])
@pytest.mark.parametrize("flip", [False, True])
@torch.no_grad()
def test_against_a_literal_average(sliding, flip):
    model, x = make(sliding, stride=4), image(height=91, width=141)
    tta = SemanticSegmentorWithTTA(model=model, scales=SCALES, flip=flip, flip_pairs=[(1, 3)])
    (result,) = tta([x])
    expected = literal(model, x, SCALES, flip, swap=(0, 3, 2, 1, 4))
    torch.testing.assert_close(result["sem_seg"], expected, atol=1e-5, rtol=1e-4)
    tta.labels_only = True
    assert agree(tta([x])[0]["labels"], expected)


@pytest.mark.parametrize("pairs", [(), [(0, 2)], [(1, 3), (4, 2)]])
def test_mirrored_image_gives_the_mirrored_answer(pairs):
    tta = SemanticSegmentorWithTTA(model=make(stride=4), scales=SCALES, flip_pairs=pairs)
    x = image()
    swapped = list(range(CLASSES))
    for i, j in pairs:
        swapped[i], swapped[j] = j, i
    (plain,), (mirrored,) = tta([x]), tta([{**x, "image": x["image"].flip(2)}])
    expected = plain["sem_seg"][swapped].flip(2)
    torch.testing.assert_close(mirrored["sem_seg"], expected, atol=1e-5, rtol=1e-4)


def test_pairs_come_from_the_data_set_of_the_image():
    tta = SemanticSegmentorWithTTA(model=make(), scales=(1.0,), flip_pairs=[(0, 1)])
    MetadataCatalog.get("test_tta_pairs").set(flip_pairs=[[2, 3]])
    MetadataCatalog.get("test_tta_none").set(stuff_classes=list("abcde"))
    x = image()

    def run(**changes):
        return tta([{**x, **changes}])[0]["sem_seg"]

    for name, pairs in (("test_tta_pairs", [(2, 3)]), ("test_tta_none", [(0, 1)])):
        other = SemanticSegmentorWithTTA(model=tta.model, scales=(1.0,), flip_pairs=pairs)
        assert torch.equal(run(dataset_name=name), other([x])[0]["sem_seg"])
    assert not torch.equal(run(dataset_name="test_tta_pairs"), run())
    MetadataCatalog.remove("test_tta_pairs")
    MetadataCatalog.remove("test_tta_none")


def test_scaled_images_come_from_the_file(tmp_path):
    path = str(tmp_path / "x.png")
    picture = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    Image.fromarray(picture).save(path)
    small = T.ResizeTransform(90, 140, 45, 70).apply_image(picture).copy()
    x = {"image": torch.from_numpy(small).permute(2, 0, 1), "height": 90, "width": 140}
    shown = []
    model = make()
    score_maps = model.score_maps

    def watched(batch, **options):
        shown.append(batch[0]["image"])
        return score_maps(batch, **options)

    model.score_maps = watched
    tta = SemanticSegmentorWithTTA(model=model, scales=(1.0, 2.0, 0.6), flip=False)
    tta([{**x, "file_name": path}])
    assert torch.equal(shown[0], x["image"])
    assert torch.equal(shown[1], torch.from_numpy(picture).permute(2, 0, 1))
    expected = T.ResizeTransform(90, 140, 27, 42).apply_image(picture).copy()
    assert torch.equal(shown[2], torch.from_numpy(expected).permute(2, 0, 1))
    # Without a file, or where the file is not the image, from the image.
    for changes in ({}, {"file_name": path, "height": 140, "width": 90}):
        shown.clear()
        tta([{**x, **changes}])
        expected = T.ResizeTransform(45, 70, 27, 42).apply_image(small).copy()
        assert torch.equal(shown[2], torch.from_numpy(expected).permute(2, 0, 1))
    with pytest.raises(InputError, match=r"gone.png: cannot be read as an image"):
        tta([{**x, "file_name": str(tmp_path / "gone.png")}])


def test_memory_does_not_grow_with_the_augmentations():
    model, alive = make(stride=4), []
    score_maps = model.score_maps

    def counted(batch, **options):
        assert sum(reference() is not None for reference in alive) <= 1
        maps = score_maps(batch, **options)
        alive.extend(weakref.ref(x.logits) for x in maps)
        return maps

    model.score_maps = counted
    tta = SemanticSegmentorWithTTA(model=model, scales=(0.5, 0.75, 1.0, 1.25, 1.5))
    tta([image()])
    assert len(alive) == 10


def test_model_of_another_class():
    class Other(nn.Module):
        def forward(self, batch):
            return [{"sem_seg": x["image"].float().repeat(2, 1, 1)[:CLASSES]} for x in batch]

    x = image()
    (result,) = SemanticSegmentorWithTTA(model=Other(), scales=(1.0,))([x])
    expected = Other()([x])[0]["sem_seg"].softmax(dim=0)
    torch.testing.assert_close(result["sem_seg"], expected)


def test_one_run_reports_both_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("mcibi_d2.data.scenes.SPLITS", {"train": 4, "val": 3})
    cfg = make_tiny_cfg(
        tmp_path, "DATASETS.TEST", "('scenes_val',)", "SOLVER.MAX_ITER", "2",
        "TEST.AUG.ENABLED", "True", "TEST.AUG.SCALES", "(0.5, 1.0)", "TEST.EVAL_PERIOD", "1",
        "MODEL.MCIBI.ENABLED", "False",
    )  # fmt: skip
    evaluated = []
    test = Trainer.test.__func__

    class Counting(Trainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            results = test(cls, cfg, model, evaluators)
            evaluated.append(type(model).__name__)
            return results

        def after_train(self):
            super().after_train()
            self.logged = get_event_storage().latest()

    trainer = Counting(cfg)
    trainer.train()
    # Twice as it is, with augmentation at the end alone.
    assert evaluated == ["MCIBISegmentor", "MCIBISegmentor", "SemanticSegmentorWithTTA"]
    results = trainer._last_eval_results
    assert set(results) == {"sem_seg", "sem_seg_TTA"}
    assert trainer.logged["sem_seg_TTA/mIoU"][0] == results["sem_seg_TTA"]["mIoU"]
    assert not trainer.model.labels_only


def test_is_built_from_a_config(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "TEST.AUG.FLIP", "False", "TEST.AUG.SCALES", "(1.0, 0.5)")
    tta = SemanticSegmentorWithTTA(cfg, build_model(cfg))
    assert tta.scales == (1.0, 0.5) and not tta.flip
