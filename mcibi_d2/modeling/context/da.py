"""Dual attention (DANet: Fu, Liu, Tian, Li, Bao, Fang and Lu, CVPR 2019)."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..attention import attend
from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class PositionAttention(nn.Module):
    """Attention from every position to every position (DANet, Eq. 1-2).

    With query, key and value 1x1 convolutions of the map A, without bias::

        E_j = sum_i softmax_i(query_j . key_i) value_i + A_j

    The paper multiplies the sum by a learned alpha, 0 at first. A factor of a linear map is part
    of the map, so here it is: value has weights of 0 at first, and no alpha beside them.

    Args:
        channels: of the map; query and key have an eighth of them.
    """

    def __init__(self, channels: int):
        super().__init__()
        depth = max(1, channels // 8)
        self.query = nn.Conv2d(channels, depth, 1, bias=False)
        self.key = nn.Conv2d(channels, depth, 1, bias=False)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.value.weight)

    def forward(self, maps: Tensor) -> Tensor:
        """A (N, C, h, w) to E (N, C, h, w). The (hw x hw) matrix is never stored."""
        query, key, value = (x(maps).flatten(2) for x in (self.query, self.key, self.value))
        return attend(query, key, value, scale=1.0).view_as(maps) + maps


class ChannelAttention(nn.Module):
    """Attention from every channel to every channel (DANet, Eq. 3-4).

    With A_i the values of channel i at all positions::

        E_j = beta * sum_i softmax_i(max_k(A_j . A_k) - A_j . A_i) A_i + A_j

    beta is learned, and 0 at first. This is what DANet's authors released, and what has been
    measured as DANet since. Their Eq. 3 has ``softmax_i(A_j . A_i)``, which gives nearly all of
    the weight to j itself, as products over all positions are large: ``as_printed`` is for that.

    Args:
        as_printed: take Eq. 3 as it stands in the paper.
    """

    def __init__(self, as_printed: bool = False):
        super().__init__()
        self.as_printed = as_printed
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """A (N, C, h, w) to E (N, C, h, w)."""
        rows = maps.flatten(2)
        # A softmax of sums over thousands of positions: in half precision their rounding alone
        # is larger than what the softmax tells apart, and float16 overflows. (The meta device,
        # which only counts, knows no autocast.)
        precisely = (
            nullcontext() if maps.is_meta else torch.autocast(maps.device.type, enabled=False)
        )
        with precisely:
            precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
            energy = precise @ precise.transpose(1, 2)
            # The maximum of a row is the same for its whole softmax, so it need not be added.
            weights = (energy if self.as_printed else -energy).softmax(dim=-1)
        return self.beta * (weights.to(rows.dtype) @ rows).view_as(maps) + maps


class DualAttention(ContextModule):
    """DANet's two attentions side by side, over positions and over channels.

    With pa a :class:`PositionAttention` and ca a :class:`ChannelAttention`::

        C_wi = cbr3x3(pa(cbr3x3(R))) + cbr3x3(ca(cbr3x3(R)))

    cbr is conv-BN-ReLU, four of them. DANet's further classifiers on the two summands, which
    serve its losses, are not part of the module.

    Args:
        as_printed: whether the channels attend by Eq. 3 as it stands in the paper.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        as_printed: bool = False,
        **others: object,
    ):
        super().__init__(**others)
        self.position = nn.Sequential(
            conv_norm_relu(in_channels, channels, 3, norm),
            PositionAttention(channels),
            conv_norm_relu(channels, channels, 3, norm),
        )
        self.channel = nn.Sequential(
            conv_norm_relu(in_channels, channels, 3, norm),
            ChannelAttention(as_printed),
            conv_norm_relu(channels, channels, 3, norm),
        )

    def _gather(self, features: Tensor) -> Tensor:
        return self.position(features) + self.channel(features)
