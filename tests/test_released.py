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
    calibrate,
    random_images,
    randomize,
    run_released,
)
from test_convert import released_cfg

from mcibi_d2.convert import convert_released
from mcibi_d2.data import SemSegMapper
from mcibi_d2.engine import MemoryUpdateHook, Trainer
from mcibi_d2.evaluation import SemanticSegmentorWithTTA
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


def released_labels(model, cfg, file_name, unit):
    """A label map by the released code's test pipeline, around our model's network.

    Args:
        model: in evaluation mode.
        cfg: of the data set.
        file_name: of the image.
        unit: what the network's input is padded to a multiple of, as by its patch embedding.
    """
    import cv2
    from ssseg.modules import SSSegOutputStructure
    from ssseg.modules.datasets.pipelines.transforms import Normalize, Resize, ToTensor
    from ssseg.modules.models.segmentors.base import BaseSegmentor

    class Network(BaseSegmentor):
        def __init__(self, cfg):
            torch.nn.Module.__init__(self)
            self.cfg, self.mode, self.align_corners = cfg, "TEST", False
            self.of_a_device = torch.nn.Parameter(torch.zeros(1))

        def forward(self, data_meta):
            images = data_meta.images
            padded = F.pad(images, (0, -images.shape[3] % unit, 0, -images.shape[2] % unit))
            logits, _ = model.sem_seg_head(model.backbone(padded))
            return SSSegOutputStructure(mode="TEST", seg_logits=logits)

    lip = cfg.DATASETS.TEST[0].startswith("lip")
    slide, augmented = cfg.TEST.INFERENCE == "slide", cfg.TEST.AUG.ENABLED
    forward = {"mode": "whole", "cropsize": None, "stride": None}
    if slide:
        wide = cfg.DATASETS.TEST[0].startswith("cityscapes")
        forward = {"mode": "slide", "cropsize": (1024, 512) if wide else (512, 512)}
        forward["stride"] = (341, 341)
    scales = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75] if augmented and not lip else [1]
    network = Network({
        "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
        "inference": {
            "forward": forward,
            "tta": {
                "multiscale": scales, "flip": augmented,
                "use_probs_before_resize": slide or (augmented and not lip),
                "fixed_seg_target_pairs": [(15, 14), (17, 16), (19, 18)] if lip else None,
            },
        },
        "dataset": {"train": {"data_pipelines": []}},
    })  # fmt: skip
    sizes = {"lip": (473, 473), "cityscapes": (2048, 1024)}
    size = sizes.get(cfg.DATASETS.TEST[0].split("_")[0], (2048, 512))
    image = cv2.imread(str(file_name))
    height, width = image.shape[:2]
    sample = {"image": image}
    sample = Resize(size, keep_ratio=not lip, scale_range=None)(sample)
    sample = Normalize([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])(sample)
    sample = ToTensor()(sample)
    all_logits = network.auginference(sample["image"][None])
    resized = [F.interpolate(x, (height, width), mode="bilinear") for x in all_logits]
    return sum(resized)[0].argmax(dim=0)


def our_labels(model, cfg, file_name):
    """A label map as ``train_net.py --eval-only`` makes it."""
    record = {"file_name": str(file_name), "dataset_name": cfg.DATASETS.TEST[0]}
    record = SemSegMapper(cfg, False)(record)
    whole = SemanticSegmentorWithTTA(cfg, model) if cfg.TEST.AUG.ENABLED else model
    whole.labels_only = True
    return whole([record])[0]["labels"].long()


TINY = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 8, "MODEL.MCIBI.ATTENTION_DIM", 4]
TINY_RESNET = ["MODEL.TIMM.NAME", "test_resnet"]
TINY_VIT = ["MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.OUT_INDICES", "(0, 1, 2, 3)"]
SAMPLES = {
    "ade20k": "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg",
    "cityscapes": "cityscapes/leftImg8bit/val",
    "lip": "LIP/TrainVal_images/val_images",
    "coco_stuff_10k": "coco_stuff/images/val2017",
}


def spread_classes(model, generator):
    """Make a model, as it was built, give each class to some pixels of random images."""
    head = model.sem_seg_head
    head.memory.draw(0)
    calibrate(model, lambda images: head(model.backbone(images)), generator)
    logits, _ = head(model.backbone(random_images(8, 64, 64, generator)))
    logits = logits.transpose(0, 1).flatten(1)
    last = head.h2[-1]
    last.weight.div_(logits.std(dim=1)[:, None, None, None])
    last.bias.copy_(-logits.mean(dim=1) / logits.std(dim=1))


@pytest.mark.parametrize("data, backbone, tiny, augmented", [
    ("ade20k", "R50", TINY_RESNET, False), ("ade20k", "ViTL", TINY_VIT, False),
    ("lip", "R50", TINY_RESNET, True), ("cityscapes", "R50", TINY_RESNET, False),
    pytest.param("ade20k", "R50", TINY_RESNET, True, marks=pytest.mark.slow),
    pytest.param("ade20k", "ViTL", TINY_VIT, True, marks=pytest.mark.slow),
    pytest.param("coco_stuff_10k", "R101", TINY_RESNET, True, marks=pytest.mark.slow),
])  # fmt: skip
@torch.no_grad()
def test_same_labels_from_the_same_file(data, backbone, tiny, augmented, real_data):
    """The same network in the two test pipelines; for what is around it a small one will do."""
    pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    cfg = released_cfg(data, backbone, *TINY, *tiny, "TEST.AUG.ENABLED", augmented)
    model = Trainer.build_model(cfg).eval()
    spread_classes(model, torch.Generator().manual_seed(1))
    sample = real_data / "samples" / SAMPLES[data]
    files = [sample] if sample.is_file() else sorted(sample.rglob("*.*g"))[:2]
    for file_name in files:
        expected = released_labels(model, cfg, file_name, model.backbone.size_divisibility or 1)
        found = our_labels(model, cfg, file_name)
        assert len(expected.unique()) > 3
        share = (found == expected).double().mean()
        print(f"\n{data} {backbone} {file_name.name}: {100 * share:.4f} % of the labels are equal")
        assert share >= 0.9999
