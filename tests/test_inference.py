"""Whole images and sliding windows, logits and labels: what the model gives at test time."""

import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper
from mcibi_d2.engine.setup import check_config
from mcibi_d2.modeling import MCIBISegmentor, SlidingWindow, resize, score_maps
from mcibi_d2.modeling.resize import best_class, resize_argmax, resize_logits
from mcibi_d2.modeling.score_maps import ResizedMap
from mcibi_d2.modeling.segmentor import labels_only
from mcibi_d2.modeling.sliding import WindowedMap

CLASSES = 5


class Backbone(nn.Module):
    """Stride 1, 2 or 4, by pooling; `size_divisibility` pads as vision transformers do."""

    def __init__(self, stride=1, size_divisibility=0):
        super().__init__()
        self.stride = stride
        self.size_divisibility = size_divisibility

    def forward(self, x):
        return {"res5": F.avg_pool2d(x, self.stride, ceil_mode=True)}


class Head(nn.Module):
    ignore_value = 255

    def __init__(self, constant=False):
        super().__init__()
        self.layer = nn.Conv2d(3, CLASSES, 1)
        if constant:
            nn.init.zeros_(self.layer.weight)

    def forward(self, features, targets=None):
        return self.layer(features["res5"]), {}


def make(sliding=None, constant=False, stride=1, size_divisibility=0, **arguments):
    torch.manual_seed(0)
    return MCIBISegmentor(
        backbone=Backbone(stride, size_divisibility), sem_seg_head=Head(constant),
        pixel_mean=(100.0,) * 3, pixel_std=(50.0,) * 3, sliding=sliding, **arguments,
    ).eval()  # fmt: skip


def image(height=45, width=70, **size):
    return {"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8), **size}


def agree(labels, logits):
    """The labels are the largest logits', wherever the two best differ."""
    best, second = logits.topk(2, dim=0).values
    clear = (best - second) > 1e-4 * logits.abs().amax(dim=0)
    assert clear.float().mean() > 0.99
    return torch.equal(labels.long()[clear], logits.argmax(dim=0)[clear])


SIZES = [  # map, padded, image, result
    ((9, 13), (72, 104), (72, 104), (72, 104)),  # stride 8
    ((9, 13), (72, 104), (65, 90), (131, 77)),  # padded
    ((45, 70), (45, 70), (45, 70), (20, 31)),  # made smaller
    ((1, 1), (8, 8), (8, 8), (30, 40)),
]


@pytest.mark.parametrize(("grid", "padded", "size", "out"), SIZES)
@pytest.mark.parametrize("cached", [1, 4000, 2**21])
def test_labels_are_the_largest_resized_logits(monkeypatch, grid, padded, size, out, cached):
    monkeypatch.setattr(resize, "CACHED_BYTES", cached)
    logits = torch.randn(CLASSES, *grid)
    labels = resize_argmax(logits, padded, size, out)
    assert labels.dtype == torch.uint8 and labels.shape == out
    assert agree(labels, resize_logits(logits, padded, size, out))


@pytest.mark.parametrize(("grid", "padded", "size", "out"), SIZES)
@pytest.mark.parametrize("band", [1, 3000, 2**23])
def test_rows_are_those_of_the_whole(monkeypatch, grid, padded, size, out, band):
    monkeypatch.setattr(score_maps, "CPU_BAND_BYTES", band)
    logits = torch.randn(CLASSES, *grid)
    scores = ResizedMap(logits, padded, size, out)
    by_rows = torch.cat([scores.rows(*rows) for rows in scores.bands()], dim=1)
    torch.testing.assert_close(by_rows, scores.scores(), atol=2e-5, rtol=1e-4)


def test_equal_logits_go_to_the_first_class_and_nan_to_none():
    scores = torch.tensor([[1.0, 2, -torch.inf, torch.nan], [1, 3, -torch.inf, 7], [0, 3, 2, 1]])
    assert best_class(scores.clone()).tolist() == [0, 1, 2, 3]
    assert best_class(scores.T.clone(), dim=1).tolist() == [0, 1, 2, 3]
    many = torch.randn(1000, 3, 4)
    assert best_class(many.clone()).dtype == torch.int32
    assert torch.equal(best_class(many.clone()).long(), many.argmax(dim=0))
    logits = torch.randn(CLASSES, 4, 4)
    logits[2, 1, 1] = torch.nan
    labels = resize_argmax(logits, (32, 32), (32, 32), (32, 32))
    assert (labels[8:16, 8:16] == CLASSES).all() and (labels[24:] < CLASSES).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_and_layout(layout, dtype):
    logits = torch.randn(1, CLASSES, 6, 7).to(dtype).contiguous(memory_format=layout)[0]
    sizes = ((48, 56), (48, 56), (50, 60))
    assert agree(resize_argmax(logits, *sizes), resize_logits(logits, *sizes))


@pytest.mark.parametrize("sliding", [None, SlidingWindow((20, 30), (15, 20))])
def test_labels_only_where_asked_for(sliding):
    x, model = image(), make(sliding, stride=4)
    (plain,) = model([x])
    with labels_only(model):
        (small,) = model([x])
    assert set(plain) == {"sem_seg"} and set(small) == {"labels"}
    assert agree(small["labels"], plain["sem_seg"])
    assert set(model([x])[0]) == {"sem_seg"}


def test_detectron2s_consumers_of_a_photograph(tmp_path):
    """150 classes at 1080 x 1920 are 1187 MiB of logits, which they get all the same."""
    options = ("INPUT.MIN_SIZE_TEST", "0", "MODEL.MCIBI.ENABLED", "False",
               "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "150")  # fmt: skip
    cfg = make_tiny_cfg(tmp_path, *options)
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 108, 192
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    picture = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), dtype=np.uint8)
    predictor = DefaultPredictor(cfg)
    assert predictor(picture)["sem_seg"].shape == (150, 1080, 1920)
    picture = picture[:54, :96]
    logits = predictor(picture)["sem_seg"]
    # Detectron2's evaluator; numpy 2 needs another reader than its own.
    file, name = tmp_path / "labels.png", "test_photograph"
    labels = logits.argmax(dim=0).byte().numpy()
    Image.fromarray(labels).save(file)
    record = {"file_name": "photograph.jpg", "sem_seg_file_name": str(file)}
    DatasetCatalog.register(name, lambda: [record])
    metadata = MetadataCatalog.get(name)
    metadata.set(stuff_classes=[f"class {k}" for k in range(150)], ignore_label=255)
    try:
        evaluator = Detectron2SemSegEvaluator(
            name,
            distributed=False,
            sem_seg_loading_fn=lambda file, dtype: np.asarray(Image.open(file)).astype(dtype),
        )
        evaluator.reset()
        evaluator.process([record], [{"sem_seg": logits}])
        assert evaluator.evaluate()["sem_seg"]["pACC"] == 100
        drawn = Visualizer(picture, metadata).draw_sem_seg(logits.argmax(dim=0))
        assert drawn.get_image().shape == picture.shape
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


WINDOWS = [
    SlidingWindow((20, 30), (15, 20)),
    SlidingWindow((20, 30), (20, 30)),
    SlidingWindow((20, 30), (13, 11), "gaussian", batch_size=4),
    SlidingWindow((16, 100), (5, 100), "gaussian"),
    SlidingWindow((512, 512), (341, 341), accumulate_on_cpu=True),
]


@pytest.mark.parametrize("sliding", WINDOWS)
@pytest.mark.parametrize("divisibility", [0, 16])
def test_windows_of_a_constant_network_give_what_the_whole_gives(sliding, divisibility):
    x = image(height=91, width=140)
    (whole,) = make(constant=True, stride=4, size_divisibility=divisibility)([x])
    (slide,) = make(sliding, constant=True, stride=4, size_divisibility=divisibility)([x])
    assert slide["sem_seg"].shape == (CLASSES, 91, 140)
    torch.testing.assert_close(slide["sem_seg"], whole["sem_seg"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sliding", WINDOWS)
@pytest.mark.parametrize("size", [{}, {"height": 91, "width": 141}, {"height": 20, "width": 30}])
def test_windows_of_a_1x1_network_give_what_the_whole_gives(sliding, size):
    batch = [{**image(), **size}, {**image(33, 41), **size}]
    for x, slide in zip(batch, make(sliding)(batch), strict=True):
        (whole,) = make()([x])
        torch.testing.assert_close(slide["sem_seg"], whole["sem_seg"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["flat", "gaussian"])
def test_windows_against_a_literal_sum(weights):
    (height, width), (window_h, window_w), (down, right) = (45, 70), (20, 32), (13, 20)
    sliding = SlidingWindow((window_h, window_w), (down, right), weights)
    model, x = make(sliding, stride=4), image(height, width)
    normalised = (x["image"] - model.pixel_mean) / model.pixel_std
    total = torch.zeros(CLASSES, height, width, dtype=torch.float64)
    counted = torch.zeros(height, width, dtype=torch.float64)
    tops, lefts = [0, 13, 25], [0, 20, 38]  # the last ones moved back
    for top in tops:
        for left in lefts:
            part = normalised[None, :, top : top + window_h, left : left + window_w]
            logits = model.sem_seg_head.layer(F.avg_pool2d(part, 4))
            logits = F.interpolate(logits, (window_h, window_w), mode="bilinear")[0].detach()
            for i in range(window_h):
                for j in range(window_w):
                    weight = 1.0
                    if weights == "gaussian":
                        y = (i - (window_h - 1) / 2) / (window_h / 8)
                        z = (j - (window_w - 1) / 2) / (window_w / 8)
                        weight = torch.tensor(-(y * y + z * z) / 2, dtype=torch.float64).exp()
                    total[:, top + i, left + j] += weight * logits[:, i, j]
                    counted[top + i, left + j] += weight
    (result,) = model([x])
    torch.testing.assert_close(result["sem_seg"], (total / counted).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("out", [(45, 70), (100, 90)])
def test_windows_by_rows(monkeypatch, out):
    monkeypatch.setattr(score_maps, "CPU_BAND_BYTES", 5000)
    sliding = SlidingWindow((20, 32), (13, 20))
    logits = [torch.randn(CLASSES, 5, 8) for _ in range(9)]
    scores = WindowedMap(sliding, logits, (20, 32), (45, 70), out)
    assert len(list(scores.bands())) > 3
    torch.testing.assert_close(scores.scores(), scores.rows(0, out[0]), atol=1e-5, rtol=1e-4)


def test_windows_are_run_in_batches():
    model, x, sizes = make(SlidingWindow((20, 32), (13, 20), batch_size=4)), image(), []
    model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape)))
    model([x])
    assert sizes == [(4, 3, 20, 32), (4, 3, 20, 32), (1, 3, 20, 32)]


@pytest.mark.parametrize(
    "options",
    [
        ("INPUT.TEST_RESIZE", "fixed", "INPUT.FIXED_SIZE_TEST", "(97, 65)"),
        ("INPUT.TEST_RESIZE", "fixed", "INPUT.FIXED_SIZE_TEST", "(97, 65)",
         "TEST.RELEASED", "True", "TEST.INFERENCE", "slide",
         "TEST.SLIDE.WINDOW", "(64, 64)", "TEST.SLIDE.STRIDE", "(43, 43)"),
        ("INPUT.MIN_SIZE_TEST", "1024", "INPUT.MAX_SIZE_TEST", "1000000"),
        ("INPUT.MIN_SIZE_TEST", "33"),
    ],
)  # fmt: skip
def test_default_predictor_does_as_the_evaluation(tmp_path, options):
    path = str(tmp_path / "x.png")
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(path)
    cfg = make_tiny_cfg(tmp_path, "INPUT.MIN_SIZE_TEST", "0", "MODEL.MCIBI.ENABLED", "False",
                        "DATASETS.TEST", "('scenes_val',)", *options)  # fmt: skip
    model = build_model(cfg).eval()
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": model.state_dict()}, cfg.MODEL.WEIGHTS)
    with torch.no_grad():
        (expected,) = model([SemSegMapper(cfg, False)({"file_name": path})])
    found = DefaultPredictor(cfg)(picture[:, :, ::-1])
    assert found["sem_seg"].shape[1:] == (40, 60)
    assert torch.equal(found["sem_seg"], expected["sem_seg"])


def test_only_images_of_a_file_are_brought_to_the_test_size(tmp_path):
    """Others, such as those that a memory is initialised from, are taken as they are."""
    options = ("INPUT.TEST_RESIZE", "fixed", "INPUT.FIXED_SIZE_TEST", "(97, 65)")
    model, sizes = build_model(make_tiny_cfg(tmp_path, *options)).eval(), []
    model.backbone.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[2:]))
    x = {"image": torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)}
    with torch.no_grad():
        for given in (x, {**x, "height": 50, "width": 75}):
            model([given])
        with_size = {**x, "height": 50, "width": 75}
        scores = model.score_maps([with_size])[0].scores()
        model.score_maps([with_size], resize=False)
        assert torch.equal(scores, model([with_size])[0]["sem_seg"])
    assert [tuple(size) for size in sizes] == [(40, 60), (97, 65), (97, 65), (40, 60), (97, 65)]


def test_mode_comes_from_the_config(tmp_path):
    options = ("TEST.SLIDE.WINDOW", "(64, 64)", "TEST.SLIDE.STRIDE", "(43, 43)")
    x = {"image": torch.randint(0, 256, (3, 96, 97), dtype=torch.uint8)}
    results = {}
    for mode in ("whole", "slide"):
        torch.manual_seed(0)
        cfg = make_tiny_cfg(tmp_path, "TEST.INFERENCE", mode, *options)
        with torch.no_grad():
            results[mode] = build_model(cfg).eval()([x])[0]["sem_seg"]
    assert results["slide"].shape == results["whole"].shape == (16, 96, 97)
    assert not torch.allclose(results["slide"], results["whole"], atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("TEST.INFERENCE", "tiles", "TEST.INFERENCE is 'tiles', expected one of whole, slide"),
        ("TEST.SLIDE.WEIGHTS", "cone", "TEST.SLIDE.WEIGHTS is 'cone', expected one of flat, gauss"),
        ("TEST.SLIDE.WINDOW", "(0, 9)", r"TEST.SLIDE.WINDOW is \(0, 9\), expected \(height, width"),
        ("TEST.SLIDE.STRIDE", "(600, 5)", r"STRIDE is \(600, 5\), expected at most TEST.SLIDE.WI"),
        ("TEST.SLIDE.BATCH_SIZE", "0", "TEST.SLIDE.BATCH_SIZE is 0, expected a whole number of 1"),
        (
            "TEST.AUG.SCALES",
            "(1.0, 0.0)",
            r"TEST.AUG.SCALES is \(1.0, 0.0\), expected factors, at le",
        ),
        ("TEST.MEMORY_BUDGET_MB", "9", "MEMORY_BUDGET_MB is no config key any more, expected none"),
    ],
)
def test_wrong_keys(tmp_path, key, value, said):
    with pytest.raises(InputError, match=said):
        check_config(make_tiny_cfg(tmp_path, key, value))


@pytest.mark.parametrize("sliding", WINDOWS)
@pytest.mark.parametrize("size", [{}, {"height": 131, "width": 99}, {"height": 20, "width": 30}])
def test_windows_that_are_too_many_are_not_there_together(monkeypatch, sliding, size):
    """A row of them at a time, each computed once, for the same labels; the first ones twice."""
    monkeypatch.setattr("mcibi_d2.modeling.score_maps.CPU_BAND_BYTES", 4000)
    x = {**image(91, 140), **size}
    (scores,) = make(sliding)([x])
    monkeypatch.setattr("mcibi_d2.modeling.segmentor.WINDOW_BYTES", 0)
    model = make(sliding)
    model.labels_only = True
    kept, most, computed = weakref.WeakSet(), [0], [0]

    def watch(module, inputs, output):
        parts = list(output[0])
        computed[0] += len(parts)
        kept.add(output[0].untyped_storage())
        most[0] = max(most[0], sum(storage.nbytes() for storage in kept))

    model.sem_seg_head.register_forward_hook(watch)
    (labels,) = model([x])
    assert agree(labels["labels"], scores["sem_seg"])
    tops, lefts = sliding.starts((91, 140))
    first = min(sliding.batch_size, len(tops) * len(lefts))
    assert computed[0] == len(tops) * len(lefts) + first
    if size.get("height", 91) < 91:
        return  # a row of the result is made of many of the image
    height, width = sliding.window_on((91, 140))
    window = CLASSES * height * width * 4
    overlapping = -(-height // sliding.stride[0]) + 1
    assert most[0] <= (overlapping * len(lefts) + 2 * first) * window
    if len(tops) > 2 * overlapping:
        assert most[0] < 0.7 * len(tops) * len(lefts) * window


@pytest.mark.parametrize("most", [0, 2**28])
def test_logits_of_windows_are_kept_in_one_tensor(monkeypatch, most):
    """One by one they would lie between freed pixels, whose place could not be used again."""
    monkeypatch.setattr("mcibi_d2.modeling.segmentor.WINDOW_BYTES", most)
    model, outputs = make(SlidingWindow((20, 32), (13, 20))), weakref.WeakSet()
    model.sem_seg_head.register_forward_hook(lambda *x: outputs.add(x[2][0].untyped_storage()))
    with torch.no_grad():
        (scores,) = model.score_maps([image()])
        assert len(outputs) == 0
        assert scores.labels().shape == (45, 70)
