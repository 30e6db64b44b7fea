"""Folded batch norms and half precision beside the model as it was trained."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_cfg
from detectron2.layers import Conv2d
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer
from mcibi_d2.engine.inference import inference_copy, prepare_inference
from mcibi_d2.evaluation import SemSegEvaluator
from mcibi_d2.modeling import MCIBISegmentor
from mcibi_d2.modeling.context import CONTEXTS
from mcibi_d2.modeling.folding import _NORMS, fold_batch_norms
from mcibi_d2.predict import Predictor

AUX = "sem_seg_head.aux"


def norms_of(model):
    """Names of the batch norms, without those that are for training alone."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) and not name.startswith(AUX)
    ]


def trained(model):
    """Everything has a say: norms that change what they are given, a memory with rows."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    memory = getattr(getattr(model, "sem_seg_head", None), "memory", None)
    if memory is not None:
        memory.initialize(torch.rand_like(memory.rows), memory.classes % 3 > 0)
    return model.eval()


def make_model(folder, *options):
    cfg = make_tiny_cfg(folder, "MODEL.TIMM.PRETRAINED", "False", *options)
    return cfg, trained(Trainer.build_model(cfg))


@torch.no_grad()
def scores(model):
    image = torch.randint(0, 256, (3, 65, 97), generator=torch.Generator().manual_seed(0))
    return model([{"image": image}])[0]["sem_seg"]


def assert_close(found, expected, share):
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found - expected).abs().max() <= share * (expected.max() - expected.min())


NAME, STRIDE, INDICES = "MODEL.TIMM.NAME", "MODEL.TIMM.OUTPUT_STRIDE", "MODEL.TIMM.OUT_INDICES"
NETWORKS = {
    "resnet50c": (NAME, "resnet50c"),
    "mobilenet": (NAME, "mobilenetv2_100", STRIDE, "16"),
    "hrnet": (NAME, "hrnet_w18_small", STRIDE, "0", INDICES, "(1, 2, 3, 4)",
              "MODEL.TIMM.NECK", "concat"),
    "resnest": (NAME, "resnest14d", "MODEL.TIMM.VARIANT", "released"),
    "frozen": (NAME, "resnet18", "MODEL.TIMM.NORM", "FrozenBN"),
    "frozen with activation": (NAME, "regnetx_002", "MODEL.TIMM.NORM", "FrozenBN"),
    "convnext": (NAME, "convnext_atto", STRIDE, "32", INDICES, "(2, 3)"),
    "detectron2": ("MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone",
                   "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.OUT_FEATURES",
                   "['res4', 'res5']", "MODEL.RESNETS.RES5_DILATION", "4"),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_every_batch_norm_of_a_network_is_folded(tmp_path, network):
    cfg, model = make_model(tmp_path, *NETWORKS[network])
    expected, before = scores(model), len(norms_of(model))
    prepare_inference(cfg, model)
    assert before > 5 and norms_of(model) == []
    assert_close(scores(model), expected, 2e-5)


@pytest.mark.parametrize("context", ["none", *CONTEXTS])
def test_every_context_is_folded(tmp_path, context):
    cfg, model = make_model(tmp_path, "MODEL.MCIBI.CONTEXT", context)
    model.double()  # some sharpen what rounding leaves
    image = torch.randint(0, 256, (3, 65, 97))
    with torch.no_grad():
        expected, _ = model._logits([{"image": image}])
        rows = model.sem_seg_head.classify_rows()
        fold_batch_norms(model, lambda: model([{"image": image}]))
        found, _ = model._logits([{"image": image}])
    # Of `dm` one follows filters that the network makes, of `enc` one is not of a map.
    left = norms_of(model)
    assert bool(left) == (context in ("dm", "enc")) and all("context" in name for name in left)
    assert (found - expected).abs().max() <= 1e-5 * (expected.max() - expected.min())
    torch.testing.assert_close(model.sem_seg_head.classify_rows(), rows)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Net(nn.Module):
    """A convolution with a norm, joined by what is given."""

    def __init__(self, join, conv=None):
        super().__init__()
        self.conv = conv or nn.Conv2d(3, 3, 1)
        self.norm, self.other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.join = join

    def forward(self, x):
        return self.join(self, x)


def used_by_both(net, x):
    y = net.conv(x)
    return net.norm(y) + y


def changed_between(net, x):
    return net.norm(net.conv(x).relu_())


def norm_of_two(net, x):
    return net.norm(net.conv(x)) + net.norm(x)


def conv_for_two(net, x):
    return net.norm(net.conv(x)) + net.other(net.conv(x))


def conv_used_alone(net, x):
    return net.norm(net.conv(x)) + net.conv(x)


def weight_used(net, x):
    return net.norm(net.conv(x)) * net.conv.weight.sum()


def norm_first(net, x):
    return net.conv(net.norm(x))


UNPROVEN = (
    used_by_both, changed_between, norm_of_two, conv_for_two, conv_used_alone, weight_used,
    norm_first,
)  # fmt: skip


def in_a_row(net, x):
    return net.norm(net.conv(x))


def called_twice(net, x):
    return net.norm(net.conv(x)) + net.norm(net.conv(x + 1))


def reflected(net, x):
    return net.norm(net.conv(F.pad(x, (1, 1, 1, 1))))


def fold(net):
    x = torch.randn(2, 3, 5, 6)
    with torch.no_grad():
        expected = net(x)
        folded = fold_batch_norms(net, lambda: net(x))
        torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    return folded


@pytest.mark.parametrize("join", UNPROVEN)
def test_what_is_not_proven_is_not_folded(join):
    assert fold(trained(Net(join))) == 0


@pytest.mark.parametrize("join", [in_a_row, called_twice, reflected])
def test_what_is_proven_is_folded(join):
    assert fold(trained(Net(join))) == 1
    grouped = nn.Conv2d(3, 3, 3, groups=3, bias=False, padding=1, padding_mode="reflect")
    assert fold(trained(Net(join, grouped))) == 1
    assert (
        fold(trained(Net(lambda net, x: net.conv(x), Conv2d(3, 3, 1, norm=nn.BatchNorm2d(3))))) == 1
    )


def test_other_weights_than_the_convolutions_own_are_not_folded():
    assert fold(trained(Net(in_a_row, Standardized(3, 3, 1)))) == 0
    tied = Net(lambda net, x: net.other(net.more(net.norm(net.conv(x)))))
    tied.more = nn.Conv2d(3, 3, 1)
    tied.more.weight = tied.conv.weight
    assert fold(trained(tied)) == 0
    frozen = trained(Net(in_a_row))
    frozen.norm.train()  # takes the statistics of each batch
    assert fold_batch_norms(frozen, lambda: frozen(torch.randn(2, 3, 5, 6))) == 0
    unknown = trained(Net(in_a_row))
    unknown.norm = nn.BatchNorm2d(3, track_running_stats=False).eval()
    assert fold(unknown) == 0


def test_nothing_is_folded_twice(tmp_path):
    cfg, model = make_model(tmp_path)
    prepare_inference(cfg, model)
    state = copy.deepcopy(model.state_dict())
    prepare_inference(cfg, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("checkpointing", ["False", "True"])
def test_the_copy_leaves_the_training_alone(tmp_path, checkpointing):
    cfg, model = make_model(tmp_path, "MODEL.BACKBONE.CHECKPOINTING", checkpointing)
    model.train()
    state = copy.deepcopy(model.state_dict())
    copied = inference_copy(cfg, model)
    assert norms_of(copied) == [] and not copied.training
    assert model.training and norms_of(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    expected = scores(model.eval())
    nn.init.zeros_(model.sem_seg_head.h2[-1].weight)
    nn.init.zeros_(next(model.backbone.parameters()))
    assert_close(scores(copied), expected, 1e-5)
    copied.train()
    with pytest.raises(InputError, match="batch norms .* are folded .* TEST.FOLD_BATCH_NORM"):
        copied([])


def test_every_evaluation_obeys_the_keys(tmp_path, three_scenes, monkeypatch):
    seen = []
    run = MCIBISegmentor.score_maps

    def score_maps(model, inputs, *args, **kwargs):
        maps = run(model, inputs, *args, **kwargs)
        if "height" in inputs[0]:
            seen.append((model.dtype, not norms_of(model), maps[0].rows(0, 1).dtype))
        return maps

    monkeypatch.setattr(MCIBISegmentor, "score_maps", score_maps)
    cfg, model = make_model(tmp_path, *three_scenes, "TEST.AUG.SCALES", "(0.5, 1.0)")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    for dtype, fold in ((torch.float32, True), (torch.bfloat16, False)):
        cfg.TEST.PRECISION = str(dtype).removeprefix("torch.")
        cfg.TEST.FOLD_BATCH_NORM = fold
        evaluator = SemSegEvaluator("test_scenes_three")
        for evaluate in (
            lambda cfg=cfg, e=evaluator: Trainer.test(cfg, model, e),
            lambda cfg=cfg: Trainer.test_with_TTA(cfg, model),
            lambda cfg=cfg: Predictor(cfg)(torch.zeros(70, 90, 3).byte().numpy()),
        ):
            seen.clear()
            evaluate()
            assert set(seen) == {(dtype, fold, torch.float32)}
        assert model.dtype == torch.float32 and norms_of(model)


def test_images_are_normalised_in_float32(tmp_path):
    cfg, model = make_model(tmp_path, "TEST.PRECISION", "bfloat16")
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    expected = model.preprocess([{"image": image}]).tensor.bfloat16()
    prepare_inference(cfg, model)
    found = model.preprocess([{"image": image}]).tensor
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)
    expected = (image - model.pixel_mean) / model.pixel_std
    assert model.pixel_mean.dtype == torch.float32
    torch.testing.assert_close(found[0], expected.bfloat16())


def test_depthwise_convolutions_stay_in_float32(tmp_path):
    cfg = make_tiny_cfg(
        "unused", "MODEL.TIMM.NAME", "mobilenetv2_050", "MODEL.TIMM.OUTPUT_STRIDE", "16"
    )
    model = Trainer.build_model(cfg).eval()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    depthwise = [m for m in convolutions if m.groups > 1]
    assert len(depthwise) == 17
    model.to_precision(torch.bfloat16)
    assert all(m.weight.dtype == torch.float32 for m in depthwise)
    others = [m for m in convolutions if m.groups == 1]
    assert all(m.weight.dtype == torch.bfloat16 for m in others) and model.dtype == torch.bfloat16
    with torch.no_grad():
        result = model([{"image": torch.zeros(3, 64, 64, dtype=torch.uint8)}])
    assert result[0]["sem_seg"].dtype == torch.float32
