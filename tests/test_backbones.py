import pytest
import timm
import torch
from detectron2.modeling import build_backbone

from mcibi_d2 import InputError
from mcibi_d2.engine import load_config
from mcibi_d2.modeling import TimmBackbone


@pytest.mark.parametrize(
    "name, channels", [("resnet50c", (1024, 2048)), ("mobilenetv2_100", (96, 320))]
)
@pytest.mark.parametrize("stride", [8, 16])
def test_strides_and_channels(name, channels, stride):
    backbone = TimmBackbone(name, output_stride=stride).eval()
    shapes = backbone.output_shape()
    assert {k: (s.channels, s.stride) for k, s in shapes.items()} == {
        "res4": (channels[0], min(stride, 16)), "res5": (channels[1], stride)
    }  # fmt: skip
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 73, 97))
    for key, feature in features.items():
        step = shapes[key].stride
        assert feature.shape[1:] == (shapes[key].channels, -(-73 // step), -(-97 // step))


def test_is_built_by_name_from_a_config():
    cfg = load_config(options=[
        "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "test_resnet",
        "MODEL.TIMM.PRETRAINED", "False", "MODEL.DEVICE", "cpu",
    ])  # fmt: skip
    assert list(build_backbone(cfg).output_shape()) == ["res4", "res5"]


def test_deep_stem_is_that_of_the_paper():
    stem = TimmBackbone("resnet50c").net["conv1"]
    assert [m.out_channels for m in stem if isinstance(m, torch.nn.Conv2d)] == [32, 32, 64]


@pytest.mark.parametrize("name", ["test_resnet", "mobilenetv2_100"])
def test_frozen_norm_is_the_norm_in_evaluation(name):
    plain = TimmBackbone(name).eval()
    frozen = TimmBackbone(name, norm="FrozenBN").train()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    images = torch.randn(1, 3, 64, 64)
    for key, feature in frozen(images).items():
        torch.testing.assert_close(feature, plain(images)[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "resnet50z"}, "resnet50z.*close:.*resnet"),
        ({"name": "test_resnet", "output_stride": 7}, "output stride 7"),
        ({"name": "test_resnet", "out_indices": (3, 9)}, r"features \(3, 9\)"),
        ({"name": "test_resnet", "norm": "LN"}, "'LN', expected BN, SyncBN or FrozenBN"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        TimmBackbone(**arguments)


def test_a_hub_out_of_reach_is_said(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"weights of test_resnet .*MODEL\.WEIGHTS"):
        TimmBackbone("test_resnet", pretrained=True)
