"""The converted models against the released networks of sssegmentation, which must be installed.

All 18: ``pytest tests/test_released.py -m "slow or not slow" -s`` prints the differences.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from ssseg_models import (
    CLASSES,
    MODELS,
    build_released,
    random_images,
    randomize,
    run_released,
)
from test_convert import released_cfg

from mcibi_d2.convert import convert_released
from mcibi_d2.engine import MemoryUpdateHook, Trainer
from mcibi_d2.modeling import FeatureMemory

# Each kind of network once, each option once; the others are slow for their number.
QUICK = [("lip", "R50"), ("ade20k", "S101"), ("cityscapes", "HRW48"), ("coco_stuff_10k", "ViTL")]
CASES = [pytest.param(*case, 1, marks=[] if case in QUICK else pytest.mark.slow) for case in MODELS]


def convert_to_ours(net, cfg, monkeypatch):
    """Our model with the weights of a released network, in evaluation mode."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = Trainer.build_model(cfg).eval()
    # What it would find by building the model again.
    monkeypatch.setattr("mcibi_d2.convert._expected", lambda cfg: model.state_dict())
    model.load_state_dict(convert_released(net.state_dict(), cfg), assign=True)
    # Buffers that are no weights.
    for name in ("pixel_mean", "pixel_std"):
        value = torch.tensor(getattr(cfg.MODEL, name.upper())).view(-1, 1, 1)
        model.register_buffer(name, value, persistent=False)
    return model


@pytest.mark.parametrize("data, backbone, slots", [*CASES, ("lip", "R50", 2)])
@torch.no_grad()
def test_same_logits(data, backbone, slots, monkeypatch):
    net = randomize(build_released(data, backbone, slots))
    model = convert_to_ours(
        net, released_cfg(data, backbone, "MODEL.MCIBI.MEMORY.SLOTS", slots), monkeypatch
    )
    # Sizes that no stride divides.
    images = random_images(1, 75, 109, torch.Generator().manual_seed(5))
    expected = run_released(net, images)
    unit = model.backbone.size_divisibility or 1
    padded = F.pad(images, (0, -109 % unit, 0, -75 % unit))
    found, _ = model.sem_seg_head(model.backbone(padded))
    assert found.shape == expected.shape
    # The logits depend on the image: what is compared is not a constant.
    assert expected.std(dim=(2, 3)).mean() > 0.01 * expected.std()
    difference = (found - expected).abs().max() / (expected.max() - expected.min())
    print(f"\n{data} {backbone}, {slots} rows per class: {difference:.1e} of the logits' range")
    assert difference <= 1e-4


@pytest.mark.parametrize("data", CLASSES)
def test_same_memory_after_three_updates(data):
    pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    from ssseg.modules.models.segmentors.mcibi.memory import FeaturesMemory

    # Released facts: the learning rate, and what the momentum is divided by.
    rate, base = {
        "ade20k": (0.01, 0.01), "cityscapes": (0.01, 0.009), "lip": (0.01, 0.01),
        "coco_stuff_10k": (0.001, 0.0009),
    }[data]  # fmt: skip
    classes, channels = CLASSES[data], 24
    released = FeaturesMemory(
        classes, channels, 8, channels, norm_cfg={"type": "BatchNorm2d"}, act_cfg={"type": "ReLU"}
    )
    preset = released_cfg(data, "R50").MODEL.MCIBI.MEMORY
    memory = FeatureMemory(classes, channels, preset.UPDATE, preset.SLOTS)
    assert preset.INIT == "first_batch_mean"  # nothing before the first batch
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    hook = MemoryUpdateHook(preset.MOMENTUM, preset.POWER, preset.MOMENTUM_SCHEDULE)
    hook.trainer = SimpleNamespace(model=memory, optimizer=optimizer, iter=0, max_iter=100)
    hook.before_train()
    for share in (1.0, 0.9, 0.8):
        optimizer.param_groups[0]["lr"] = rate * share
        features = torch.randn(2, channels, 9, 13).relu()
        labels = torch.randint(0, classes, (2, 5, 6)).repeat_interleave(13, 1)
        labels = labels.repeat_interleave(17, 2)
        labels[:, :9] = -100
        with torch.no_grad():
            released.update(
                F.interpolate(features, labels.shape[1:], mode="bilinear"), labels,
                momentum_cfg={"base_momentum": 0.9, "base_lr": base,
                              "adjust_by_learning_rate": True},
                learning_rate=rate * share,
            )  # fmt: skip
        memory.observe(features, labels, ignore_value=-100)
        hook._commit()
        expected = released.memory.data[:, 0]
        assert (memory.rows - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(memory.initialized, (expected != 0).any(dim=1))
