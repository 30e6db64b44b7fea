"""Building blocks shared by the head, its attention and its fusion."""

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NormFactory = Callable[[int], nn.Module]


def conv_norm_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm: NormFactory = nn.BatchNorm2d,
    dilation: int = 1,
) -> nn.Sequential:
    """Convolution of stride 1 that keeps the size, norm, ReLU (no bias before the norm)."""
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        bias=False,
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm(out_channels), nn.ReLU(inplace=True))


def apply_to_pooled(block: nn.Sequential, pooled: Tensor) -> Tensor:
    """Apply a :func:`conv_norm_relu` to a map that may have one value per channel only.

    One image pooled to 1x1 has no variance, so torch's batch norm refuses it in training. Such a
    map is normalised with the running statistics, which stay as they are; every other map, and
    every other norm, goes through the block as usual. What counts is the whole batch that the
    norm sees: with a norm that is synchronised over several processes, one image per process is
    a batch like any other.

    Args:
        block: the layers.
        pooled: (N, C, s, s).

    Returns:
        (N, C', s, s).
    """
    for layer in block:
        if _sees_one_value(layer, pooled):
            # Copies, because a further forward pass may change them before the backward pass.
            mean, var = layer.running_mean.clone(), layer.running_var.clone()
            pooled = F.batch_norm(pooled, mean, var, layer.weight, layer.bias, eps=layer.eps)
        else:
            pooled = layer(pooled)
    return pooled


def _sees_one_value(layer: nn.Module, maps: Tensor) -> bool:
    """Whether ``layer`` is a batch norm that would take the variance of a single value."""
    if not (isinstance(layer, _BatchNorm) and layer.training):
        return False
    if maps.numel() != maps.shape[1]:
        return False
    # A batch norm with a forward of its own gathers values from the other processes. It must then
    # be called on all of them, whatever the size of this one's share.
    alone = type(layer).forward is _BatchNorm.forward
    if not alone and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(getattr(layer, "process_group", None)) == 1
    return True


def make_leaky(module: nn.Module) -> None:
    """Put a LeakyReLU of slope 0.01 in the place of every ReLU in ``module``."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.LeakyReLU(0.01, inplace=child.inplace))


def classifier(in_channels: int, num_classes: int) -> nn.Conv2d:
    """The last 1x1 convolution of a classification head, with small initial weights."""
    conv = nn.Conv2d(in_channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def resolve_norm(name: str, device: str) -> str:
    """``SyncBN`` where there are several GPU processes to synchronise, plain ``BN`` elsewhere.

    torch's SyncBatchNorm raises on the CPU and needs a process group.

    Args:
        name: a norm of ``detectron2.layers.get_norm``.
        device: the value of ``MODEL.DEVICE``.
    """
    if name != "SyncBN":
        return name
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and torch.device(device).type == "cuda":
        return name
    _say_plain_bn("one process" if not several else "the CPU")
    return "BN"


@cache
def _say_plain_bn(where: str) -> None:
    logging.getLogger(__name__).info(f"SyncBN on {where} is plain BN.")
