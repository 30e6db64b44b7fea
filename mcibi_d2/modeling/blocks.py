"""Building blocks shared by the head, its attention and its fusion."""

import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.distributed as dist
from torch import nn

NormFactory = Callable[[int], nn.Module]


def conv_norm_relu(
    in_channels: int, out_channels: int, kernel_size: int, norm: NormFactory = nn.BatchNorm2d
) -> nn.Sequential:
    """Convolution of stride 1 that keeps the size, norm, ReLU (no bias before the norm)."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, norm(out_channels), nn.ReLU(inplace=True))


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
