import re
import sys
import time

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.engine import Checkpointer, load_config
from mcibi_d2.engine.setup import check_config
from mcibi_d2.modeling import TimmBackbone, build_timm_backbone
from mcibi_d2.modeling.necks import ConcatNeck, MLANeck

BRANCHES = {"output_stride": 0, "out_indices": (1, 2, 3, 4)}
BLOCKS = {"output_stride": 0, "out_indices": (5, 11, 17, 23)}
TINY_VIT = {"output_stride": 16, "out_indices": (0, 2, 3, 5)}


def shapes_of(backbone):
    return {name: (s.channels, s.stride) for name, s in backbone.output_shape().items()}


def run_on_meta(backbone, height, width):
    """Shapes of the features of an image, without computing them."""
    images = torch.empty(2, 3, height, width, device="meta")
    with torch.no_grad():
        return {name: tuple(f.shape) for name, f in backbone.eval()(images).items()}


@pytest.mark.parametrize(
    "name, arguments, shapes, divisibility",
    [
        ("resnet50c", {}, {"res4": (1024, 8), "res5": (2048, 8)}, 0),
        ("resnet50c", {"output_stride": 16}, {"res4": (1024, 16), "res5": (2048, 16)}, 0),
        ("resnet101c", {}, {"res4": (1024, 8), "res5": (2048, 8)}, 0),
        ("resnest50d", {}, {"res4": (1024, 8), "res5": (2048, 8)}, 0),
        ("resnest101e", {}, {"res4": (1024, 8), "res5": (2048, 8)}, 0),
        ("mobilenetv2_100", {}, {"res4": (96, 8), "res5": (320, 8)}, 0),
        ("mobilenetv2_100", {"output_stride": 16}, {"res4": (96, 16), "res5": (320, 16)}, 0),
        ("convnext_tiny", {"out_indices": (2, 3)}, {"res4": (384, 8), "res5": (768, 8)}, 8),
        ("convnext_tiny", {"out_indices": (0, 3), "output_stride": 16},
         {"res2": (96, 4), "res5": (768, 16)}, 16),
        ("hrnet_w48", BRANCHES,
         {"res2": (48, 4), "res3": (96, 8), "res4": (192, 16), "res5": (384, 32)}, 32),
        ("hrnet_w48", {**BRANCHES, "neck": "concat", "output_stride": 32},
         {"res2": (48, 4), "res3": (96, 8), "res4": (192, 16), "res5": (720, 4)}, 32),
        ("hrnet_w48", {**BRANCHES, "neck": "concat", "neck_stride": 8},
         {"res2": (48, 4), "res3": (96, 8), "res4": (192, 16), "res5": (720, 8)}, 32),
        ("vit_large_patch16_384", BLOCKS, {f"res{n}": (1024, 16) for n in range(2, 6)}, 16),
        ("vit_large_patch16_384", {**BLOCKS, "neck": "mla", "img_size": 512},
         {"res2": (256, 16), "res3": (256, 16), "res4": (256, 16), "res5_map": (256, 16),
          "res5": (1024, 4)}, 16),
        ("vit_small_patch14_dinov2", {"output_stride": 14, "out_indices": (7, 11)},
         {"res4": (384, 14), "res5": (384, 14)}, 14),
        ("vit_small_patch14_reg4_dinov2", {"output_stride": 0, "out_indices": (11,)},
         {"res5": (384, 14)}, 14),
    ],
)  # fmt: skip
def test_strides_and_channels(name, arguments, shapes, divisibility):
    with torch.device("meta"):
        backbone = TimmBackbone(name, **arguments)
    assert shapes_of(backbone) == shapes
    assert backbone.size_divisibility == divisibility
    height, width = (7 * divisibility, 9 * divisibility) if divisibility else (73, 97)
    for key, shape in run_on_meta(backbone, height, width).items():
        channels, stride = shapes[key]
        assert shape == (2, channels, -(-height // stride), -(-width // stride))


@pytest.mark.parametrize(
    "name, out_indices", [("test_resnet", (3, 4)), ("test_convnext", (2, 3)), ("test_vit", (3, 5))]
)
def test_real_features_have_the_shapes(name, out_indices):
    backbone = TimmBackbone(name, output_stride=0, out_indices=out_indices).eval()
    features = backbone(torch.randn(1, 3, 96, 64))
    assert list(features) == ["res4", "res5"]
    for key, feature in features.items():
        channels, stride = shapes_of(backbone)[key]
        assert feature.shape == (1, channels, 96 // stride, 64 // stride)


def test_is_built_by_name_from_a_config():
    cfg = load_config(options=[
        "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "test_resnet",
        "MODEL.TIMM.PRETRAINED", "False", "MODEL.DEVICE", "cpu",
    ])  # fmt: skip
    assert list(build_backbone(cfg).output_shape()) == ["res4", "res5"]


def test_every_key_of_a_config_arrives():
    cfg = load_config(options=[
        "MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.PRETRAINED", "False", "MODEL.DEVICE", "cpu",
        "MODEL.TIMM.OUTPUT_STRIDE", "16", "MODEL.TIMM.OUT_INDICES", "(0, 2, 3, 5)",
        "MODEL.TIMM.NECK", "mla", "MODEL.TIMM.MLA_CHANNELS", "8", "MODEL.TIMM.IMG_SIZE", "96",
        "MODEL.TIMM.DROP_PATH", "0.3", "MODEL.TIMM.FREEZE_AT", "1",
    ])  # fmt: skip
    cfg.MODEL.SEM_SEG_HEAD.NORM = "LN"
    backbone = build_timm_backbone(cfg)
    assert shapes_of(backbone)["res5"] == (32, 4)
    assert backbone.net.pos_embed.shape[1] == 1 + 6 * 6
    assert backbone.net.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert not backbone.net.patch_embed.proj.weight.requires_grad
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.neck.modules())


def test_deep_stem_is_that_of_the_paper():
    with torch.device("meta"):
        stem = TimmBackbone("resnet50c").net["conv1"]
    assert [m.out_channels for m in stem if isinstance(m, nn.Conv2d)] == [32, 32, 64]


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_100"])
def test_frozen_norm_is_the_norm_in_evaluation(name):
    plain = TimmBackbone(name).eval()
    frozen = TimmBackbone(name, norm="FrozenBN").train()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    images = torch.randn(1, 3, 64, 64)
    for key, feature in frozen(images).items():
        torch.testing.assert_close(feature, plain(images)[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("test_resnet", {}),
        ("test_convnext", {"out_indices": (2, 3), "drop_path": 0.1}),
        ("test_vit", TINY_VIT),
        ("test_vit", {**TINY_VIT, "neck": "mla"}),
        ("test_resnet", {**BRANCHES, "neck": "concat", "neck_stride": 8}),
    ],
)
def test_every_parameter_gets_a_gradient(name, arguments):
    backbone = TimmBackbone(name, **arguments).train()
    features = backbone(torch.randn(2, 3, 64, 96))
    # Not their sum, which a LayerNorm makes constant.
    used = features if "neck" not in arguments else {"res5": features["res5"]}
    sum((f * torch.randn_like(f)).sum() for f in used.values()).backward()
    without = [n for n, p in backbone.named_parameters() if p.grad is None]
    assert without == []


@pytest.mark.parametrize("freeze_at", [0, 1, 3, -1])
@pytest.mark.parametrize(
    "name, arguments, stages",
    [
        ("test_resnet", {}, [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]),
        ("test_convnext", {"out_indices": (2, 3)},
         [("stem",), ("stages.0",), ("stages.1",), ("stages.2",), ("stages.3",)]),
        ("test_vit", {**TINY_VIT, "drop_path": 0.5},
         [("cls_token", "pos_embed", "patch_embed"), *((f"blocks.{n}",) for n in range(6))]),
        ("test_efficientnet", {"out_indices": (4,)},
         [("conv_stem", "bn1"), *((f"blocks.{n}",) for n in range(5))]),
    ],
)  # fmt: skip
def test_frozen_stages_stay_as_they_are(name, arguments, stages, freeze_at):
    backbone = TimmBackbone(name, freeze_at=freeze_at, **arguments)
    frozen = [part for stage in (stages if freeze_at < 0 else stages[:freeze_at]) for part in stage]
    frozen = tuple(f"{part}." for part in frozen)
    of = {n: p for n, p in backbone.net.named_parameters()}
    assert {n for n, p in of.items() if not p.requires_grad} == {
        n for n in of if f"{n}.".startswith(frozen)
    }
    before = {n: t.clone() for n, t in backbone.net.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad] or
                                [torch.zeros(1, requires_grad=True)], lr=0.1)  # fmt: skip
    backbone.eval().train()
    features = backbone(torch.randn(2, 3, 64, 64))
    loss = sum((f * torch.randn_like(f)).sum() for f in features.values())
    if loss.requires_grad:
        loss.backward()
    optimizer.step()
    after = backbone.net.state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert not [n for n in moved if f"{n}.".startswith(frozen)]
    # And what is not frozen learns, batch norms' statistics included.
    if freeze_at >= 0:
        statistics = {n for n in before if n.endswith("running_mean")}
        assert {n for n in statistics if not n.startswith(frozen)} <= moved
        assert any(not n.endswith(("running_mean", "running_var")) for n in moved)


def test_all_frozen_is_the_same_in_training():
    backbone = TimmBackbone("test_vit", freeze_at=-1, drop_path=0.5, **TINY_VIT)
    images = torch.randn(2, 3, 32, 32)
    trained, evaluated = backbone.train()(images), backbone.eval()(images)
    for key in trained:
        torch.testing.assert_close(trained[key], evaluated[key])
    assert not any(p.requires_grad for p in backbone.net.parameters())
    assert all(p.requires_grad for p in backbone.norms.parameters())


def test_drop_path_acts_in_training_only():
    backbone = TimmBackbone("test_vit", drop_path=0.5, **TINY_VIT)
    images = torch.randn(2, 3, 32, 32)
    one, other = (backbone.train()(images)["res5"] for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (backbone.eval()(images)["res5"] for _ in range(2))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("neck", ["none", "mla"])
def test_vit_gives_the_same_alone_and_in_a_batch(neck):
    backbone = TimmBackbone("test_vit", neck=neck, **TINY_VIT).eval()
    images = torch.randn(3, 3, 48, 80)
    together = backbone(images)
    for number, image in enumerate(images):
        for key, feature in backbone(image[None]).items():
            torch.testing.assert_close(feature[0], together[key][number], atol=1e-5, rtol=1e-4)


def test_vit_takes_images_of_any_size_through_the_segmentor():
    cfg = load_config(str(ROOT / "configs/scenes/mcibi_tiny.yaml"), [
        "MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.OUTPUT_STRIDE", "16",
        "MODEL.TIMM.OUT_INDICES", "(3, 5)",
    ])  # fmt: skip
    model = build_model(cfg)
    sizes = [(37, 51), (64, 30)]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    results = model.eval()([{"image": image} for image in images])
    assert [r["sem_seg"].shape for r in results] == [(16, *size) for size in sizes]
    targets = [torch.randint(0, 16, size) for size in sizes]
    losses = model.train()(
        [{"image": i, "sem_seg": t} for i, t in zip(images, targets, strict=True)]
    )
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_concat_is_bilinear_and_finest_first():
    maps = [torch.randn(2, 3, 8, 12), torch.randn(2, 5, 4, 6), torch.randn(2, 1, 3, 5)]
    others, joined = ConcatNeck([3, 5, 1])(maps)
    assert others[0] is maps[0] and others[1] is maps[1] and len(others) == 2
    assert joined.shape == (2, 9, 8, 12)
    assert torch.equal(joined[:, :3], maps[0])
    up = F.interpolate(maps[2], size=(8, 12), mode="bilinear", align_corners=False)
    assert torch.equal(joined[:, 8:], up)
    neck = ConcatNeck([3, 5, 1], downsample=True)
    assert neck(maps)[1].shape == (2, 9, 4, 6)
    assert [tuple(p.shape) for p in neck.parameters()] == [(9, 9, 3, 3), (9,), (9,)]


def test_mla_sums_from_the_last_level_down():
    neck = MLANeck([6, 6, 6], out_channels=2).eval()
    maps = [torch.randn(1, 6, 4, 5) for _ in range(3)]
    smoothed, joined = neck(maps)
    y = [lateral(m) for lateral, m in zip(neck.lateral, maps, strict=True)]
    for level, sum_ in enumerate((y[0] + y[1] + y[2], y[1] + y[2], y[2])):
        expected = neck.smooth[level](sum_)
        torch.testing.assert_close(smoothed[level], expected)
        up = F.interpolate(expected, size=(16, 20), mode="bilinear", align_corners=False)
        torch.testing.assert_close(joined[:, 2 * level : 2 * level + 2], up)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_features_are_timms(name):
    backbone = TimmBackbone(name, out_indices=(2, 3)).eval()
    own = timm.create_model(name, features_only=True, out_indices=(2, 3), output_stride=8).eval()
    state = {
        re.sub(r"^(stem|stages)\.", r"\1_", k): v for k, v in backbone.net.state_dict().items()
    }
    own.load_state_dict(state)
    images = torch.randn(2, 3, 64, 96)
    for feature, expected in zip(backbone(images).values(), own(images), strict=True):
        torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize(
    "name, arguments",
    [("test_resnet", {}), ("test_vit", TINY_VIT), ("test_convnext", {"out_indices": (2, 3)}),
     ("hrnet_w18_small", {**BRANCHES, "neck": "concat"})],
)  # fmt: skip
def test_timm_files_load(tmp_path, name, arguments):
    """A state dict of the whole timm network, with its classifier."""
    whole = timm.create_model(name, pretrained=False)
    torch.save(whole.state_dict(), tmp_path / "timm.pth")
    model = nn.Module()
    model.backbone = TimmBackbone(name, **arguments)
    Checkpointer(model).load(str(tmp_path / "timm.pth"))
    loaded, state = whole.state_dict(), model.backbone.net.state_dict()
    assert state and not [n for n in state if not torch.equal(state[n], loaded[n])]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "resnet50z"}, "resnet50z.*close:.*resnet"),
        ({"name": "zzz"}, "'zzz'.*close: .*, .*"),
        ({"name": "test_resnet", "out_indices": ("a",)}, r"\('a',\), expected rising"),
        ({"name": "test_resnet", "out_indices": (-1, 3)}, r"\(-1, 3\), expected rising"),
        ({"name": "test_resnet", "output_stride": 7}, "output stride 7"),
        ({"name": "test_resnet", "out_indices": (3, 9)}, r"features \(3, 9\).*fewer features"),
        ({"name": "test_resnet", "out_indices": (4, 3)}, r"\(4, 3\), expected rising"),
        ({"name": "test_resnet", "out_indices": ()}, r"\(\), expected rising"),
        ({"name": "test_resnet", "norm": "LN"}, "'LN', expected BN, SyncBN or FrozenBN"),
        ({"name": "test_resnet", "neck": "fpn"}, "'fpn', expected none, concat or mla"),
        ({"name": "test_resnet", "neck": "mla"}, "NECK is mla, expected a vision transformer"),
        ({"name": "test_resnet", "neck_stride": 8}, "NECK_STRIDE is 8, expected 0"),
        ({"name": "test_resnet", "neck": "concat", "neck_stride": 32},
         "NECK_STRIDE is 32, expected 8 or 16"),
        ({"name": "test_resnet", "neck": "concat", "out_indices": (1, 2)}, "ends with res3"),
        ({"name": "test_resnet", "freeze_at": 6}, r"FREEZE_AT is 6, expected -1 \(all\) to 5"),
        ({"name": "test_resnet", "freeze_at": -2}, "FREEZE_AT is -2"),
        ({"name": "densenet121", "freeze_at": 2, "output_stride": 0}, "stages .* are not known"),
        ({"name": "test_resnet", "img_size": 64}, "64 pixels .*MODEL.TIMM.IMG_SIZE"),
        ({"name": "test_resnet", "drop_path": 1.5}, "DROP_PATH is 1.5"),
        ({"name": "hrnet_w18_small", "drop_path": 0.1, "output_stride": 0, "out_indices": (4,)},
         "drop path 0.1 .*MODEL.TIMM.DROP_PATH"),
        ({"name": "hrnet_w48"}, "output stride 8"),
        ({"name": "test_vit", "out_indices": (3, 5)}, "output stride 8"),
        ({"name": "test_vit", "out_indices": (3, 6), "output_stride": 16}, "index 6 .*0 to 5"),
        ({"name": "test_vit", "out_indices": (1, 2, 3, 4, 5), "output_stride": 0}, "at most 4"),
        ({"name": "test_vit", **TINY_VIT, "img_size": 100}, "IMG_SIZE is 100.*patch size, 16"),
        ({"name": "vit_small_patch14_dinov2", "output_stride": 14, "out_indices": (5, 11),
          "neck": "mla"}, "multiple of 4 pixels"),
        ({"name": "swin_tiny_patch4_window7_224", "output_stride": 0, "out_indices": (2, 3)},
         "cannot work on images of any size"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message), torch.device("meta"):
        TimmBackbone(**arguments)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("NECK", "fpn", "MODEL.TIMM.NECK is 'fpn'"),
        ("NORM", "LN", "MODEL.TIMM.NORM is 'LN'"),
        ("FREEZE_AT", -2, "MODEL.TIMM.FREEZE_AT is -2"),
        ("IMG_SIZE", -1, "MODEL.TIMM.IMG_SIZE is -1"),
        ("OUTPUT_STRIDE", -8, "MODEL.TIMM.OUTPUT_STRIDE is -8"),
        ("MLA_CHANNELS", 0, "MODEL.TIMM.MLA_CHANNELS is 0"),
        ("DROP_PATH", 1.0, "MODEL.TIMM.DROP_PATH is 1.0"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_built(tiny_cfg, key, value, message):
    tiny_cfg.MODEL.TIMM[key] = value
    with pytest.raises(InputError, match=message):
        check_config(tiny_cfg)


@pytest.mark.parametrize(
    "section, key, known",
    [
        ("MODEL", "META_ARCHITECTURE", "MCIBISegmentor"),
        ("BACKBONE", "NAME", "build_timm_backbone"),
        ("SEM_SEG_HEAD", "NAME", "MCIBIHead"),
    ],
)
def test_unknown_parts_of_the_model_list_the_known_ones(tiny_cfg, section, key, known):
    node = tiny_cfg.MODEL if section == "MODEL" else tiny_cfg.MODEL[section]
    node[key] = "build_tim_backbone"
    with pytest.raises(InputError, match=rf"{section}\.{key} is 'build_tim_backbone'.*{known}"):
        check_config(tiny_cfg)


def test_a_block_whose_norm_nobody_trains_is_refused(tiny_cfg):
    tiny_cfg.merge_from_list(
        ["MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.OUTPUT_STRIDE", "16",
         "MODEL.TIMM.OUT_INDICES", "(4, 5)", "MODEL.SEM_SEG_HEAD.AUX_FEATURES", "[]"]
    )  # fmt: skip
    with pytest.raises(InputError, match=r"OUT_INDICES \(4, 5\) gives res4, .*AUX_FEATURES"):
        build_model(tiny_cfg)


def test_without_a_network_weights_are_missed_at_once(monkeypatch, tmp_path):
    """The hub's library would try again for a minute."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(InputError, match="timm could not get the weights of mobilenetv2_100"):
        TimmBackbone("mobilenetv2_100", pretrained=True)
    assert time.monotonic() - start < 10
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_hub_out_of_reach_is_said(monkeypatch):
    build = timm.create_model

    def offline(*args, pretrained, **kwargs):
        if pretrained:
            raise OSError("offline")
        return build(*args, pretrained=False, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"weights of test_resnet .*MODEL\.WEIGHTS"):
        TimmBackbone("test_resnet", pretrained=True)


def dilated_cfg(*options):
    return load_config(
        str(ROOT / "configs/ade20k/mcibi_R50_d2.yaml"), ["MODEL.DEVICE", "cpu", *options]
    )


@pytest.mark.parametrize("dilation, stride", [(1, 32), (2, 16), (4, 8)])
def test_detectron2s_dilated_resnet(dilation, stride):
    cfg = dilated_cfg("MODEL.RESNETS.RES5_DILATION", str(dilation))
    with torch.device("meta"):
        backbone = build_backbone(cfg, ShapeSpec(channels=3))
    assert shapes_of(backbone) == {"res4": (1024, min(stride, 16)), "res5": (2048, stride)}
    for key, shape in run_on_meta(backbone, 64, 96).items():
        channels, step = shapes_of(backbone)[key]
        assert shape == (2, channels, 64 // step, 96 // step)
    convolutions = [m for m in backbone.stem.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size) for m in convolutions] == [
        (64, (3, 3)), (64, (3, 3)), (128, (3, 3))
    ]  # fmt: skip
    # No multi-grid: all blocks of the last stage are dilated alike.
    assert {block.conv2.dilation for block in backbone.res5} == {(dilation, dilation)}
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("key, value", [("RES5_DILATION", "3"), ("DEPTH", "18")])
def test_detectron2s_resnet_says_what_it_cannot_do(key, value):
    with pytest.raises(InputError, match=f"MODEL.RESNETS.{key} is {value}, expected"):
        build_backbone(dilated_cfg(f"MODEL.RESNETS.{key}", value))


def test_a_detectron2_without_its_projects_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.projects.deeplab", None)
    with pytest.raises(InputError, match=r"detectron2\.projects\.deeplab.*resnet50c"):
        build_backbone(dilated_cfg())
