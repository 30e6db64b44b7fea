"""The converted models against the released networks of sssegmentation, which must be installed.

Each of the 18 at a reduced size; at its own, with ``pytest tests/test_released.py -m "slow or not
slow" -s``, which prints the differences.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model
from ssseg_models import (
    CLASSES,
    MODELS,
    build_released,
    calibrate,
    random_images,
    randomize,
    run_released,
    small_options,
)
from test_convert import released_cfg

from mcibi_d2.convert import convert_released
from mcibi_d2.data import SemSegMapper, read_image
from mcibi_d2.engine import MemoryUpdateHook, Trainer
from mcibi_d2.evaluation import SemanticSegmentorWithTTA
from mcibi_d2.modeling import FeatureMemory

SLOW = pytest.mark.slow


def convert_to_ours(net, cfg, monkeypatch):
    """Our model with the weights of a released network, in evaluation mode."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg).eval()
    # What it would find by building the model again.
    monkeypatch.setattr("mcibi_d2.convert._expected", lambda cfg: model.state_dict())
    model.load_state_dict(convert_released(net.state_dict(), cfg), assign=True)
    # Buffers that are no weights.
    for name in ("pixel_mean", "pixel_std"):
        value = torch.tensor(getattr(cfg.MODEL, name.upper())).view(-1, 1, 1)
        model.register_buffer(name, value, persistent=False)
    return model


def run_ours(model, images):
    """Logits of our model for images that are padded as its patch embedding pads them."""
    unit = model.backbone.size_divisibility or 1
    padded = F.pad(images, (0, -images.shape[3] % unit, 0, -images.shape[2] % unit))
    return model.sem_seg_head(model.backbone(padded))[0]


@pytest.mark.parametrize("small", [True, pytest.param(False, marks=SLOW)], ids=["small", "full"])
@pytest.mark.parametrize("data, backbone, slots", [*[(*m, 1) for m in MODELS], ("lip", "R50", 2)])
@torch.no_grad()
def test_same_logits(data, backbone, slots, small, monkeypatch):
    net = randomize(build_released(data, backbone, slots, small))
    options = ["MODEL.MCIBI.MEMORY.SLOTS", slots, *(small_options(backbone) if small else [])]
    model = convert_to_ours(net, released_cfg(data, backbone, *options), monkeypatch)
    # Sizes that no stride divides.
    images = random_images(1, 75, 109, torch.Generator().manual_seed(5))
    expected = run_released(net, images)
    found = run_ours(model, images)
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


def released_labels(run, cfg, file_name):
    """A label map by the released code's test pipeline.

    Args:
        run: the network, from normalised images to logits.
        cfg: of the data set.
        file_name: of the image.
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
            return SSSegOutputStructure(mode="TEST", seg_logits=run(data_meta.images))

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
    "coco": "coco_stuff/images/val2017",
}


def spread_classes(run, last, images):
    """Make a network give each class to some pixels of images.

    Args:
        run: the network, from images to logits.
        last: its last layer, a convolution.
        images: normalised.
    """
    logits = run(images).transpose(0, 1).flatten(1)
    mean, deviation = logits.mean(dim=1), logits.std(dim=1)
    last.weight.div_(deviation[:, None, None, None])
    last.bias.copy_((last.bias - mean) / deviation)


def samples(cfg, folder):
    """Sample images of the config's data set."""
    sample = folder / "samples" / SAMPLES[cfg.DATASETS.TEST[0].split("_")[0]]
    return [sample] if sample.is_file() else sorted(sample.rglob("*.*g"))[:2]


def small_image(cfg, file_name):
    """An image, normalised and scaled down, (1, 3, 128, 160)."""
    image = torch.tensor(read_image(file_name, cfg.INPUT.FORMAT)).permute(2, 0, 1)[None].float()
    mean, std = (
        torch.tensor(x).view(-1, 1, 1) for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    return (F.interpolate(image, (128, 160), mode="area") - mean) / std


def compare_labels(run, model, cfg, folder):
    """The share of equal pixels of the two label maps of each sample image, which is asserted."""
    for file_name in samples(cfg, folder):
        expected = released_labels(run, cfg, file_name)
        found = our_labels(model, cfg, file_name)
        classes = len(expected.unique())
        assert classes > 3
        share = (found == expected).double().mean()
        print(f"\n{cfg.OUTPUT_DIR} {file_name.name}: {100 * share:.4f} % equal, {classes} classes")
        assert share >= 0.9999


@pytest.mark.parametrize("data, backbone, tiny, augmented", [
    ("ade20k", "R50", TINY_RESNET, False), ("ade20k", "ViTL", TINY_VIT, False),
    ("lip", "R50", TINY_RESNET, True), ("cityscapes", "R50", TINY_RESNET, False),
    ("coco_stuff_10k", "R50", TINY_RESNET, False),
    pytest.param("ade20k", "R50", TINY_RESNET, True, marks=SLOW),
    pytest.param("ade20k", "ViTL", TINY_VIT, True, marks=SLOW),
    pytest.param("coco_stuff_10k", "R101", TINY_RESNET, True, marks=SLOW),
])  # fmt: skip
@torch.no_grad()
def test_same_labels_from_the_same_file(data, backbone, tiny, augmented, real_data):
    """The same network in the two test pipelines; for what is around it a small one will do."""
    pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    cfg = released_cfg(data, backbone, *TINY, *tiny, "TEST.AUG.ENABLED", augmented)
    model = Trainer.build_model(cfg).eval()
    model.sem_seg_head.memory.draw(0)
    generator = torch.Generator().manual_seed(1)

    def run(images):
        return run_ours(model, images)

    calibrate(model, run, generator)
    spread_classes(run, model.sem_seg_head.h2[-1], random_images(8, 64, 64, generator))
    compare_labels(run, model, cfg, real_data)


@SLOW
@pytest.mark.parametrize("data, backbone, augmented", [
    ("ade20k", "R50", False), ("ade20k", "ViTL", False), ("cityscapes", "R50", False),
    ("lip", "R50", True), ("lip", "HRW48", False), ("coco_stuff_10k", "R50", False),
    ("coco_stuff_10k", "S101", False),
])  # fmt: skip
@torch.no_grad()
def test_same_labels_of_the_whole_networks(data, backbone, augmented, real_data, monkeypatch):
    """The released network in its pipeline, the converted one in ours."""
    net = randomize(build_released(data, backbone), damped=True)

    def run(images):
        return run_released(net, images)

    cfg = released_cfg(data, backbone, "TEST.AUG.ENABLED", augmented)
    spread_classes(run, net.decoder_stage2[-1], small_image(cfg, samples(cfg, real_data)[0]))
    compare_labels(run, convert_to_ours(net, cfg, monkeypatch), cfg, real_data)
