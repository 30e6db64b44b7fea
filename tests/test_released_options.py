"""What the released models compute otherwise, each against the same thing written down slowly."""

import conftest
import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny_cfg
from detectron2.layers import ShapeSpec
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.data.augmentation import build_test_augmentation
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.setup import check_config
from mcibi_d2.evaluation import SemanticSegmentorWithTTA
from mcibi_d2.modeling import FeatureMemory, TimmBackbone
from mcibi_d2.modeling.context import CONTEXTS


def test_a_class_without_a_row_loses_its_weight():
    memory = FeatureMemory(4, 6, renormalize=False)
    memory.rows.copy_(torch.rand(4, 6))
    memory.rows[2] = 0
    memory.initialized.copy_(torch.tensor([True, True, False, True]))
    weights = torch.rand(2, 4, 3, 5).softmax(dim=1)
    expected = torch.einsum("nkhw,kc->nchw", weights, memory.rows)
    torch.testing.assert_close(memory.read(weights), expected)


SHAPES = {"res3": ShapeSpec(channels=5, stride=16), "res5": ShapeSpec(channels=7, stride=16)}


def make_head(**options):
    return conftest.make_head(SHAPES, num_classes=3, channels=8, attention_dim=4, **options)


def test_leaky_relu_is_in_every_layer():
    head = make_head(context="aspp", aux_features=["res3"], activation="leaky_relu")
    kinds = [type(m) for m in head.modules() if isinstance(m, nn.ReLU | nn.LeakyReLU)]
    plain = make_head(context="aspp", aux_features=["res3"])
    count = sum(isinstance(m, nn.ReLU) for m in plain.modules())
    assert kinds == [nn.LeakyReLU] * count
    head.eval()
    x = -torch.rand(1, 7, 4, 4)
    conv, norm, _ = head.project
    values = norm(conv(x))
    assert torch.equal(head.project(x), torch.where(values > 0, values, 0.01 * values))


def test_dilations_of_aspp():
    aspp = CONTEXTS["aspp"](7, 8, output_stride=16, dilations=(12, 24, 36))
    assert [b[0].dilation[0] for b in aspp.branches] == [1, 12, 24, 36]
    head = make_head(context="aspp", aspp_dilations=[2, 3, 4])
    assert [b[0].dilation[0] for b in head.context.branches] == [1, 2, 3, 4]


def test_auxiliary_heads_of_two_convolutions_that_up_sample():
    head = make_head(aux_features=["res3"], aux_convs=2, aux_upsampling=4).eval()
    kinds = [type(m).__name__ for m in head.aux["res3"]]
    assert kinds == ["Sequential", "Upsample", "Sequential", "Upsample", "Dropout2d", "Conv2d"]
    x = torch.rand(1, 5, 2, 3)
    first, up, second, *_, last = head.aux["res3"]
    expected = last(up(second(up(first(x)))))
    assert torch.equal(head.aux["res3"](x), expected) and expected.shape == (1, 3, 32, 48)


def released(name, **options):
    return TimmBackbone(name, output_stride=0, variant="released", **options).eval()


@torch.no_grad()
def test_hrnet_joins_its_branches_bilinearly_at_any_size():
    options = {"out_indices": (1, 2, 3, 4), "neck": "concat"}
    backbone = released("hrnet_w18_small", **options)
    other = TimmBackbone("hrnet_w18_small", output_stride=0, **options)
    assert backbone.state_dict().keys() == other.state_dict().keys()
    assert (backbone.size_divisibility, other.size_divisibility) == (0, 32)
    module = backbone.net.stage2[0]
    fine, coarse = torch.rand(1, 16, 5, 7), torch.rand(1, 32, 3, 4)
    found = module([fine, coarse])
    fine, coarse = module.branches[0](fine), module.branches[1](coarse)
    conv, norm, _ = module.fuse_layers[0][1]
    up = F.interpolate(norm(conv(coarse)), scale_factor=2, mode="bilinear")
    up = F.interpolate(up, (5, 7), mode="bilinear")
    torch.testing.assert_close(found[0], (fine + up).relu())
    torch.testing.assert_close(found[1], (module.fuse_layers[1][0](fine) + coarse).relu())


def test_hrnet_without_its_first_relu():
    backbone = released("hrnet_w18_small", out_indices=(1, 2, 3, 4), neck="concat", stem_relu=False)
    seen = []
    backbone.net.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 64))
    assert (seen[0] < 0).any()
    with pytest.raises(InputError, match="STEM_RELU is False, which is for HRNet"):
        TimmBackbone("test_resnet", stem_relu=False)


def test_resnest_has_no_pooling_in_dilated_shortcuts():
    backbone = TimmBackbone("resnest14d", output_stride=8, variant="released")
    pools = [getattr(backbone.net, f"layer{i}")[0].downsample[0] for i in (1, 2, 3, 4)]
    assert [type(pool) for pool in pools] == [nn.Identity, nn.AvgPool2d, nn.Identity, nn.Identity]


@torch.no_grad()
def test_positions_of_a_vision_transformer_are_resampled_bilinearly():
    backbone = released("test_vit", out_indices=(5,), img_size=64)
    net = backbone.net
    nn.init.normal_(net.pos_embed)
    x = torch.rand(1, 3, 48, 96)
    patches = net.patch_embed(x)
    grid = net.pos_embed[:, 1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (3, 6), mode="bilinear").flatten(2).transpose(1, 2)
    expected = torch.cat([net.cls_token + net.pos_embed[:, :1], patches.flatten(1, 2) + grid], 1)
    torch.testing.assert_close(net._pos_embed(patches), expected)


def test_test_images_are_resized_by_opencv(tiny_cfg):
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 40, 90
    image = np.random.default_rng(0).integers(256, size=(100, 160, 3), dtype=np.uint8)
    (pillow,) = build_test_augmentation(tiny_cfg)
    tiny_cfg.TEST.RELEASED = True
    (opencv,) = build_test_augmentation(tiny_cfg)
    found = opencv.get_transform(image).apply_image(image)
    assert np.array_equal(found, cv2.resize(image, (64, 40), interpolation=cv2.INTER_LINEAR))
    other = pillow.get_transform(image).apply_image(image)
    assert found.shape == other.shape and not np.array_equal(found, other)


def literal_inference(model, image, probabilities, window=None, stride=None):
    """Logits or probabilities of an image by the released rules: whole or in windows."""

    def run(part):
        logits, _ = model.sem_seg_head(model.backbone((part - model.pixel_mean) / model.pixel_std))
        return logits

    if window is None:
        return run(image[None]).softmax(1) if probabilities else run(image[None])
    total = torch.zeros(1, model.sem_seg_head.num_classes, *image.shape[1:])
    count = torch.zeros(image.shape[1:])
    for i in range(-(-max(image.shape[1] - window, 0) // stride) + 1):
        for j in range(-(-max(image.shape[2] - window, 0) // stride) + 1):
            bottom = min(i * stride + window, image.shape[1])
            right = min(j * stride + window, image.shape[2])
            top, left = max(bottom - window, 0), max(right - window, 0)
            part = image[None, :, top:bottom, left:right]
            logits = F.interpolate(run(part), part.shape[2:], mode="bilinear")
            total[:, :, top:bottom, left:right] += logits.softmax(1)
            count[top:bottom, left:right] += 1
    return total / count


@pytest.mark.parametrize("inference", ["whole", "slide"])
@pytest.mark.parametrize("softmax", [True, False])
@torch.no_grad()
def test_augmentation_as_released(tmp_path, inference, softmax):
    """Scaled from the input; probabilities before the resizing, of windows always."""
    cfg = make_tiny_cfg(
        tmp_path, "TEST.RELEASED", "True", "TEST.INFERENCE", inference, "TEST.SLIDE.WINDOW",
        "(64, 64)", "TEST.SLIDE.STRIDE", "(40, 40)", "TEST.AUG.SCALES", "(0.75, 1.0)",
        "TEST.AUG.SOFTMAX", str(softmax),
    )  # fmt: skip
    model = Trainer.build_model(cfg).eval()
    model.sem_seg_head.memory.draw(0)
    nn.init.normal_(model.sem_seg_head.h2[-1].weight)
    image = torch.randint(256, (3, 90, 121), dtype=torch.uint8)
    sliding = (64, 40) if inference == "slide" else ()
    results = []
    for scale in (0.75, 1.0):
        scaled = F.interpolate(image[None].float(), scale_factor=scale, mode="bilinear")[0]
        results.append(literal_inference(model, scaled, softmax, *sliding))
        mirrored = literal_inference(model, scaled.flip(2), softmax, *sliding)
        results.append(mirrored.flip(3))
    expected = sum(F.interpolate(x, (180, 242), mode="bilinear") for x in results)[0] / 4
    whole = SemanticSegmentorWithTTA(cfg, model)
    found = whole([{"image": image, "height": 180, "width": 242}])[0]["sem_seg"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("key, value, message", [
    ("MODEL.TIMM.VARIANT", "theirs", "VARIANT is 'theirs', expected one of timm, released"),
    ("MODEL.SEM_SEG_HEAD.ACTIVATION", "gelu", "ACTIVATION is 'gelu'"),
    ("MODEL.SEM_SEG_HEAD.AUX_CONVS", 0, "AUX_CONVS is 0, expected a whole number of 1"),
    ("MODEL.SEM_SEG_HEAD.AUX_UPSAMPLING", 0, "AUX_UPSAMPLING is 0, expected a whole number of 1"),
    ("MODEL.MCIBI.ASPP_DILATIONS", (6, 12), "ASPP_DILATIONS is .*, expected three"),
])  # fmt: skip
def test_wrong_values_are_said(tiny_cfg, key, value, message):
    tiny_cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=message):
        check_config(tiny_cfg)


def test_the_released_configs_say_what_was_released():
    """Facts of the released configs that no other test looks at."""

    def cfg(name):
        return load_config(str(ROOT / f"configs/released/{name}.yaml"))

    windows = {
        name: (c.TEST.INFERENCE, tuple(c.TEST.SLIDE.WINDOW), tuple(c.TEST.SLIDE.STRIDE))
        for name in ("ade20k/mcibi_deeplabv3_ViTL", "cityscapes/mcibi_deeplabv3_R50",
                     "coco_stuff_10k/mcibi_deeplabv3_ViTL")
        for c in [cfg(name)]
    }  # fmt: skip
    assert list(windows.values()) == [
        ("slide", (512, 512), (341, 341)),
        ("slide", (1024, 512), (341, 341)),
        ("slide", (512, 512), (341, 341)),
    ]
    assert cfg("coco_stuff_10k/mcibi_deeplabv3_S101").TEST.AUG.SCALES[-1] == 1.5
    assert cfg("coco_stuff_10k/mcibi_deeplabv3_R101").TEST.AUG.SCALES[-1] == 1.75
    weights = [
        cfg(f"{data}/mcibi_deeplabv3_S101").MODEL.MCIBI.LOSS_WEIGHT_M
        for data in ("ade20k", "cityscapes", "lip", "coco_stuff_10k")
    ]
    assert weights == [1.0, 0.0, 0.0, 0.0]
