"""The 18 released models as the package sssegmentation builds them: facts of its configs.

Stated apart from our YAML files, so that one is checked against the other.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

# ours: (data set, backbone); theirs: what differs from its default of MCIBI.
CLASSES = {"ade20k": 150, "cityscapes": 19, "lip": 20, "coco_stuff_10k": 182}
RESNETS = {"R50": 50, "R101": 101}
# Of a reduced network, by our keys: a head, HRNet and ViT of fewer channels and layers.
SMALL = {"": ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 64, "MODEL.MCIBI.ATTENTION_DIM", 32]}
SMALL["HRW48"] = ["MODEL.TIMM.NAME", "hrnet_w18_small_v2"]
SMALL["ViTL"] = ["MODEL.TIMM.NAME", "vit_tiny_patch16_384"]
SMALL["ViTL"] += ["MODEL.TIMM.OUT_INDICES", "(2, 5, 8, 11)"]
MODELS = [
    (data, backbone)
    for data in CLASSES
    for backbone in ("R50", "R101", "S101", "HRW48", "ViTL")
    if backbone != "ViTL" or data in ("ade20k", "coco_stuff_10k")
]


def small_options(backbone):
    """Our config keys and values for the reduced network of ``released_config``."""
    return [*SMALL[""], *SMALL.get(backbone, [])]


def released_config(data, backbone, slots=1, small=False):
    """The configuration of a released network, with plain batch norm and no pretrained weights.

    Args:
        data: the data set.
        backbone: as in our config's name.
        slots: rows per class.
        small: with fewer channels and layers, for the same code in less time.
    """
    channels, dilations, auxiliary = 2048, [1, 12, 24, 36], {"in_channels": 1024}
    net = {"pretrained": False, "selected_indices": (0, 1, 2, 3)}
    norms, stride, leaky = None, 1, False
    if backbone in RESNETS:
        depth = RESNETS[backbone]
        net |= {"type": "ResNet", "depth": depth, "structure_type": f"resnet{depth}conv3x3stem"}
        net |= {"outstride": 8, "use_conv3x3_stem": True}
        leaky = data == "lip"
    elif backbone == "S101":
        net |= {"type": "ResNeSt", "depth": 101, "structure_type": "resnest101", "outstride": 8}
    elif backbone == "HRW48":
        arch, width = ("hrnetv2_w18_small", 18) if small else ("hrnetv2_w48", 48)
        net |= {"type": "HRNet", "structure_type": arch, "arch": arch}
        net["selected_indices"] = (0, 0, 0, 0)
        channels, auxiliary = 15 * width, None
        stride = 2 if data in ("cityscapes", "lip") else 1
    else:
        channels, layers, heads, blocks = 1024, 24, 16, (9, 14, 19, 23)
        if small:
            channels, layers, heads, blocks = 192, 12, 3, (2, 5, 8, 11)
        net |= {
            "type": "VisionTransformer", "structure_type": "vit", "img_size": (512, 512),
            "patch_size": 16, "embed_dims": channels, "num_layers": layers, "num_heads": heads,
            "mlp_ratio": 4, "out_indices": blocks, "qkv_bias": True,
            "norm_cfg": {"type": "LayerNorm", "eps": 1e-6}, "with_cls_token": True,
            "output_cls_token": False, "patch_norm": False, "final_norm": False, "num_fcs": 2,
        }  # fmt: skip
        norms = {"in_channels_list": [channels] * 4, "type": "LayerNorm", "eps": 1e-6}
        if data == "ade20k":
            dilations = [1, 6, 12, 18]
        auxiliary = [
            {"in_channels": channels, "num_convs": 2, "upsample": {"scale_factor": 4}}
            for _ in range(3)
        ]
    width_of_head = 64 if small else 512
    for one in [auxiliary] if isinstance(auxiliary, dict) else auxiliary or []:
        one |= {"out_channels": width_of_head, "dropout": 0.1}
    act = {"type": "LeakyReLU", "negative_slope": 0.01} if leaky else {"type": "ReLU"}
    head = {
        "downsample_backbone": {"kernel_size": 3, "stride": stride, "padding": 1, "bias": False},
        "context_within_image": {"is_on": True, "type": "aspp", "cfg": {"dilations": dilations}},
        "use_hard_aggregate": False, "in_channels": channels,
        "feats_channels": width_of_head, "out_channels": width_of_head,
        "transform_channels": width_of_head // 2, "num_feats_per_cls": slots,
        "use_loss": False, "dropout": 0.1,
    }  # fmt: skip
    if norms:
        head["norm_cfg"] = norms
    return {
        "type": "MCIBI", "num_classes": CLASSES[data], "align_corners": False,
        "norm_cfg": {"type": "BatchNorm2d"}, "act_cfg": {**act, "inplace": True},
        "backbone": net, "head": head, "auxiliary": auxiliary,
    }  # fmt: skip


def build_released(data, backbone, slots=1, small=False):
    """The network of sssegmentation in evaluation mode; without it the test is skipped."""
    pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ssseg.modules.models.backbones.hrnet import HRModule
        from ssseg.modules.models.segmentors.mcibi import MCIBI
    HRModule.use_checkpoint = False  # version 1.7.0 reads it before it sets it
    net = MCIBI(released_config(data, backbone, slots, small), "TEST").eval()
    if (data, backbone) == ("cityscapes", "HRW48"):
        # Version 1.7.0 has no option for it; the released model was trained without this ReLU.
        net.backbone_net.relu = SkipFirst(net.backbone_net.relu)
    return net


class SkipFirst(torch.nn.Module):
    """Every other call, beginning with the first, gives back its input."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x if self.calls % 2 else self.activation(x)


def run_released(net, images):
    """Logits of a network of sssegmentation."""
    from ssseg.modules import SSSegInputStructure

    with torch.no_grad():
        return net(SSSegInputStructure(images=images, mode="TEST")).seg_logits


def random_images(count, height, width, generator):
    """Normalised images with coarse shapes, each of its own brightness."""
    shapes = torch.randn(count, 3, 4, 5, generator=generator)
    images = F.interpolate(shapes, (height, width), mode="bilinear")
    images += torch.randn(count, 3, 1, 1, generator=generator)
    return images + 0.3 * torch.randn(images.shape, generator=generator)


def randomize(net, seed=0, damped=False):
    """Random weights, memory and running statistics, near those of random images.

    With statistics that have nothing to do with the activations, the logits would hardly depend on
    the image, and a difference would not show.

    Args:
        net: a network of sssegmentation.
        seed: of the random numbers.
        damped: small residual branches and smooth attention, as training makes them. Without, the
            network is chaotic: sssegmentation's own ResNeSt-101 labels 6 % of a photograph's pixels
            otherwise in float64 than in float32.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(shape, low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.LayerNorm | _BatchNorm):
                module.weight.copy_(draw(module.weight.shape, 0.5, 1.5))
                module.bias.copy_(draw(module.bias.shape, -0.3, 0.3))
        for module in net.modules() if damped else ():
            norm = getattr(module, "bn3", getattr(module, "bn2", None))
            if norm is not None:  # the last one of a residual branch
                norm.weight.mul_(0.2)
            if hasattr(module, "query_project"):
                for last in (module.query_project[-1][1], module.key_project[-1][1]):
                    last.weight.mul_(0.2)
                    last.bias.mul_(0.2)
        for name in ("cls_token", "pos_embed"):
            if hasattr(net.backbone_net, name):
                token = getattr(net.backbone_net, name)
                token.copy_(draw(token.shape, -0.5, 0.5))
        memory = net.memory_module.memory
        memory.copy_(draw(memory.shape, 0, 2))
        memory[3] = 0  # a class that never occurred
        for norm in calibrate(net, lambda images: run_released(net, images), generator):
            deviation = norm.running_var.sqrt()
            norm.running_mean += deviation * draw(deviation.shape, -0.1, 0.1)
            norm.running_var *= draw(deviation.shape, 0.8, 1.25)
    return net


def calibrate(net, run, generator):
    """Give the batch norms of ``net`` the statistics of random images; returns them."""
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train().momentum = 1.0
    run(random_images(8, 64, 64, generator))
    for norm in norms:
        norm.eval().momentum = 0.1
        # Where random images hardly differ, another one must not be far outside.
        norm.running_var.clamp_(min=0.1 * norm.running_mean.square())
    return norms
