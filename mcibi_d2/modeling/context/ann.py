"""Asymmetric non-local blocks (ANN: Zhu, Xu, Bai, Huang and Bai, ICCV 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attend
from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule

POOLS = (1, 3, 6, 8)


def sample(maps: Tensor) -> Tensor:
    """Averages over 1x1, 3x3, 6x6 and 8x8 regions, one after the other: the 110 anchors.

    Args:
        maps: (N, D, h, w).

    Returns:
        (N, D, 110).
    """
    return torch.cat([F.adaptive_avg_pool2d(maps, size).flatten(2) for size in POOLS], dim=2)


class AsymmetricAttention(nn.Module):
    """Attention from every position of a map to the anchors of a map.

    With the map X of the queries, the map Y of the keys, and :func:`sample`::

        O = conv1x1(softmax(query(X) sample(key(Y))^T / sqrt(D)) sample(value(Y)))

    query and key are 1x1 conv-BN-ReLU to D channels, value a 1x1 convolution to D, without bias
    like the outer one.

    Args:
        query_channels: of X.
        key_channels: of Y; 0 if Y is X, whose queries are then also its keys.
        depth: D.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(self, query_channels: int, key_channels: int, depth: int, norm: NormFactory):
        super().__init__()
        self.query = conv_norm_relu(query_channels, depth, 1, norm)
        self.key = conv_norm_relu(key_channels, depth, 1, norm) if key_channels else None
        self.value = nn.Conv2d(key_channels or query_channels, depth, 1, bias=False)
        self.out = nn.Conv2d(depth, query_channels, 1, bias=False)

    def forward(self, maps: Tensor, others: Tensor | None = None) -> Tensor:
        """X (N, C, h, w) and Y (N, C', h', w'), None for X itself, to O (N, C, h, w)."""
        query = self.query(maps)
        # Shared layers run once for each use, as in the network that the paper's Table 3 counts.
        key = self.query(maps) if self.key is None else self.key(others)
        value = self.value(maps if self.key is None else others)
        gathered = attend(query.flatten(2), sample(key), sample(value))
        return self.out(gathered.unflatten(2, maps.shape[-2:]))


class AsymmetricNonLocal(ContextModule):
    """ANN's two blocks: one that fuses the lower feature L into R, one within the result.

    With a_1 from R to L and a_2 from F to itself, both an :class:`AsymmetricAttention`::

        F    = cbr3x3(cb1x1([a_1(R, L), R]))       asymmetric fusion non-local block, AFNB
        C_wi = cbr1x1([a_2(F), F])                 asymmetric pyramid non-local block, APNB

    cb is conv-BN, cbr conv-BN-ReLU. L may have another size than R. The dropout that the authors'
    code has between the two lines is left out, as in the other modules.

    Args:
        lower_channels: of L, at least 1.

    Raises:
        ValueError: without ``lower_channels``.
    """

    needs_lower = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        lower_channels: int = 0,
        **others: object,
    ):
        super().__init__(**others)
        if lower_channels < 1:
            raise ValueError(
                f"lower_channels of AsymmetricNonLocal is {lower_channels}, "
                "expected the channels of the feature below R"
            )
        depth = max(1, channels // 2)
        self.fusion = AsymmetricAttention(in_channels, lower_channels, depth, norm)
        # Without the ReLU.
        self.join = conv_norm_relu(2 * in_channels, in_channels, 1, norm)[:2]
        self.project = conv_norm_relu(in_channels, channels, 3, norm)
        self.pyramid = AsymmetricAttention(channels, 0, depth, norm)
        self.fuse = conv_norm_relu(2 * channels, channels, 1, norm)

    def forward(
        self,
        features: Tensor,
        lower: Tensor | None = None,
        coarse: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R (N, in_channels, h, w), L (N, lower_channels, h', w') to C_wi (N, channels, h, w)."""
        fused = self.join(torch.cat([self.fusion(features, lower), features], dim=1))
        fused = self.project(fused)
        return self.fuse(torch.cat([self.pyramid(fused), fused], dim=1)), {}
