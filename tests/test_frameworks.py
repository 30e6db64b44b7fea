"""Every framework, with and without the memory, on a tiny backbone."""

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from detectron2.modeling import build_model

from mcibi_d2 import InputError
from mcibi_d2.engine import Checkpointer, Trainer, load_config
from mcibi_d2.evaluation import MemoryContents, SemanticSegmentorWithTTA
from mcibi_d2.modeling.context import CONTEXTS
from mcibi_d2.predict import Predictor

SIZE = (65, 97)
AGGREGATION = "MODEL.MCIBI.AGGREGATION"


def make_model(tmp_path, context, enabled, *options):
    cfg = make_tiny_cfg(
        tmp_path,
        "MODEL.MCIBI.CONTEXT", context,
        "MODEL.MCIBI.ENABLED", str(enabled),
        *options,
    )  # fmt: skip
    return build_model(cfg)


def make_batch(count=2):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randint(0, 256, (3, *SIZE), generator=generator),
            "sem_seg": torch.randint(0, 16, SIZE, generator=generator),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "mcibi"])
@pytest.mark.parametrize("context", ["none", *CONTEXTS])
def test_trains_and_evaluates(tmp_path, context, enabled):
    model = make_model(tmp_path, context, enabled)
    batch = make_batch()
    losses = model.train()(batch)
    expected = {"loss_o", "loss_aux"} | ({"loss_w", "loss_m"} if enabled else set())
    assert set(losses) - {"loss_se"} == expected
    assert ("loss_se" in losses) == (context == "enc")
    sum(losses.values()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if enabled:
        model.sem_seg_head.memory.commit(0.9)
        assert model.sem_seg_head.memory.initialized.all()

    model.eval()
    with torch.no_grad():
        together = [x["sem_seg"] for x in model(batch)]
        alone = [model([x])[0]["sem_seg"] for x in batch]
    for a, b in zip(together, alone, strict=True):
        assert a.shape == (16, *SIZE)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("enabled", [False, True], ids=["plain", "mcibi"])
@pytest.mark.parametrize("context", list(CONTEXTS))
def test_one_image_is_enough_to_train(tmp_path, context, enabled):
    model = make_model(tmp_path, context, enabled).train()
    losses = model(make_batch(1))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "options, expected",
    [
        ((AGGREGATION, "rows"), {"loss_w", "loss_m"}),
        ((AGGREGATION, "rows", "MODEL.MCIBI.ROWS_BIAS", "False"), {"loss_w", "loss_m"}),
        ((AGGREGATION, "rows", "MODEL.MCIBI.MEMORY.SLOTS", "2"), {"loss_w", "loss_m"}),
        ((AGGREGATION, "none"), {"loss_m"}),
        (("MODEL.MCIBI.HARD_AGGREGATION", "True"), {"loss_w", "loss_m"}),
        ((AGGREGATION, "none", "MODEL.MCIBI.CONTEXT", "aspp"), {"loss_m"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("filled", [False, True])
def test_ways_to_read_the_memory(tmp_path, options, expected, filled):
    model = make_model(tmp_path, "none", True, *options).train()
    memory = model.sem_seg_head.memory
    if filled:
        memory.initialize(torch.rand_like(memory.rows), memory.classes % 3 > 0)
    losses = model(make_batch())
    assert set(losses) == {"loss_o", "loss_aux"} | expected
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(make_batch(1))[0]["sem_seg"].isfinite().all()


def test_hard_aggregation_reads_the_most_likely_row(tmp_path):
    model = make_model(tmp_path, "none", True, "MODEL.MCIBI.HARD_AGGREGATION", "True").eval()
    head = model.sem_seg_head
    rows = torch.rand_like(head.memory.rows)
    head.memory.initialize(rows, torch.ones(16, dtype=torch.bool))
    caught = {}
    head.h1.register_forward_hook(lambda *args: caught.update(coarse=args[-1]))
    head.attention.register_forward_hook(lambda _, args, out: caught.update(context=args[1]))
    model(make_batch(1))
    expected = rows[caught["coarse"].argmax(dim=1)].permute(0, 3, 1, 2)
    torch.testing.assert_close(caught["context"], expected)


@pytest.mark.parametrize(
    "options, message",
    [
        (("MODEL.MCIBI.CONTEXT", "aspq"), "'aspq'.*none, ppm, aspp"),
        ((AGGREGATION, "row"), "'row'.*pixels, rows, none"),
        (
            ("MODEL.MCIBI.CONTEXT", "ocr", "MODEL.SEM_SEG_HEAD.AUX_FEATURES", "[]"),
            "AUX_FEATURES is empty.*ocr",
        ),
        ((AGGREGATION, "rows", "MODEL.MCIBI.HARD_AGGREGATION", "True"), "HARD_AGGREGATION.*rows"),
    ],
)  # fmt: skip
def test_wrong_choices_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        make_model(tmp_path, "none", True, *options)


@pytest.mark.parametrize("framework", ["fcn", "pspnet", "deeplabv3", "ocrnet"])
def test_frameworks_of_table_5_differ_from_their_baselines_in_one_key(framework):
    method = "mcibi" if framework == "fcn" else f"mcibi_{framework}"
    a, b = (
        load_config(str(ROOT / "configs/ade20k" / f"{name}_R50.yaml"))
        for name in (method, framework)
    )
    assert a.MODEL.MCIBI.ENABLED and not b.MODEL.MCIBI.ENABLED
    a.MODEL.MCIBI.ENABLED, a.OUTPUT_DIR = b.MODEL.MCIBI.ENABLED, b.OUTPUT_DIR
    assert a == b


HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}


@pytest.mark.parametrize(
    "options",
    [
        (),
        (AGGREGATION, "rows"),
        (AGGREGATION, "rows", "MODEL.MCIBI.MEMORY.SLOTS", "2"),
        (AGGREGATION, "none"),
        ("MODEL.MCIBI.HARD_AGGREGATION", "True"),
        ("MODEL.MCIBI.MEMORY.SLOTS", "2"),
        ("MODEL.MCIBI.FUSION", "weighted_add"),
        ("MODEL.MCIBI.ENABLED", "False"),
        *(("MODEL.MCIBI.CONTEXT", context) for context in CONTEXTS),
    ],
    ids=lambda options: "-".join(options[1::2]) or "pixels",
)
def test_the_whole_model_in_half_precision(tmp_path, options):
    model = make_model(tmp_path, "none", True, *options).eval()
    for parameter in model.parameters():
        if not parameter.any():  # what begins at zero and would hide what it is multiplied with
            torch.nn.init.normal_(parameter, std=0.1)
    memory = getattr(model.sem_seg_head, "memory", None)
    if memory is not None:
        memory.initialize(torch.rand_like(memory.rows), memory.classes % 3 > 0)
    image = torch.randint(0, 256, (3, 65, 97), dtype=torch.uint8)
    with torch.no_grad():
        expected = model([{"image": image}])[0]["sem_seg"]
        for dtype, share in HALF.items():
            half = copy.deepcopy(model).to(dtype)
            assert {p.dtype for p in half.parameters()} == {dtype}
            for given in (image, image.float()):
                found = half([{"image": given}])[0]["sem_seg"]
                assert found.dtype == torch.float32 and found.isfinite().all()
                span = expected.max() - expected.min()
                assert (found - expected).abs().max() < share * span, dtype
            half.train()
            with pytest.raises(InputError, match=f"was cast to {dtype}.*SOLVER.AMP"):
                half(make_batch(1))


def test_windows_augmentation_and_predictor_in_half_precision(tmp_path):
    options = ("TEST.INFERENCE", "slide", "TEST.SLIDE.WINDOW", "[48, 48]")
    options += ("TEST.SLIDE.STRIDE", "[32, 32]", "TEST.AUG.SCALES", "[0.75, 1.0]")
    cfg = make_tiny_cfg(tmp_path, *options)
    model = Trainer.build_model(cfg).eval()
    memory = model.sem_seg_head.memory
    memory.initialize(torch.rand_like(memory.rows), memory.classes > 1)
    Checkpointer(model, str(tmp_path)).save("a")
    cfg.MODEL.WEIGHTS = str(tmp_path / "a.pth")
    predictor = Predictor(cfg)
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    x = {"image": torch.from_numpy(image.transpose(2, 0, 1).copy()), "height": 70, "width": 90}

    def everything():
        augmented = SemanticSegmentorWithTTA(cfg, predictor.model)([x])[0]["sem_seg"]
        predictor.model.labels_only = True
        labels = predictor.model([x])[0]["labels"]
        predictor.model.labels_only = False
        scores = predictor.model([x])[0]["sem_seg"]
        return augmented, scores, torch.from_numpy(predictor(image).scores), labels

    with torch.no_grad():
        whole = everything()
        predictor.model.bfloat16()
        half = everything()
    for a, b in zip(whole[:3], half[:3], strict=True):
        assert a.dtype == b.dtype and b.isfinite().all()
        assert (a - b).abs().max() < 0.05 * (a.max() - a.min())
    assert (whole[3] == half[3]).float().mean() > 0.9
    assert MemoryContents.of(predictor.model.sem_seg_head.memory).rows.dtype == torch.float32
