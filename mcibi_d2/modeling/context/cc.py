"""Criss-cross attention (CCNet: Huang, Wang, Huang, Huang, Wei and Liu, ICCV 2019)."""

import torch
from torch import Tensor, nn

from ..blocks import NormFactory, conv_norm_relu
from .base import ContextBeside

# The second time, every position hears of every other one.
RECURRENCE = 2


class CrissCrossAttention(nn.Module):
    """Attention from each position to the h + w - 1 positions of its own column and row.

    With query, key and value 1x1 convolutions of the map H and Omega_u the cross of u, in which u
    itself is once::

        H'_u = gamma * sum_{j in Omega_u} softmax_j(query_u . key_j) value_j + H_u

    gamma is learned, and 0 at first.

    Args:
        channels: of the map; query and key have an eighth of them.
    """

    def __init__(self, channels: int):
        super().__init__()
        depth = max(1, channels // 8)
        self.query = nn.Conv2d(channels, depth, 1)
        self.key = nn.Conv2d(channels, depth, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """H (N, C, h, w) to H' (N, C, h, w). Work space: N * h * w * (h + w) products."""
        height, width = maps.shape[-2:]
        query, key, value = self.query(maps), self.key(maps), self.value(maps)
        # Batched products of whole columns, (N, w, h, h), and of whole rows, (N, h, w, w).
        columns = query.permute(0, 3, 2, 1) @ key.permute(0, 3, 1, 2)
        rows = query.permute(0, 2, 3, 1) @ key.permute(0, 2, 1, 3)
        # A position is in its column and in its row: the row keeps it.
        itself = torch.eye(height, dtype=torch.bool, device=maps.device)
        columns = columns.masked_fill(itself, -torch.inf)
        # One softmax over both, (N, h, w, h + w).
        weights = torch.cat([columns.transpose(1, 2), rows], dim=-1).softmax(dim=-1)
        columns, rows = weights.split([height, width], dim=-1)
        columns = columns.transpose(1, 2) @ value.permute(0, 3, 2, 1)
        rows = rows @ value.permute(0, 2, 3, 1)
        gathered = columns.permute(0, 3, 2, 1) + rows.permute(0, 3, 1, 2)
        return self.gamma * gathered + maps


class CrissCross(ContextBeside):
    """CCNet's recurrent criss-cross attention module.

    With cc the one :class:`CrissCrossAttention`, used twice with the same weights::

        C_wi = cbr3x3([R, cbr3x3(cc(cc(cbr3x3(R))))])

    cbr is conv-BN-ReLU.
    """

    def __init__(
        self, in_channels: int, channels: int, norm: NormFactory = nn.BatchNorm2d, **others: object
    ):
        super().__init__(**others)
        self.before = conv_norm_relu(in_channels, channels, 3, norm)
        self.attention = CrissCrossAttention(channels)
        self.after = conv_norm_relu(channels, channels, 3, norm)
        self.fuse = conv_norm_relu(in_channels + channels, channels, 3, norm)

    def _maps(self, features: Tensor) -> list[Tensor]:
        maps = self.before(features)
        for _ in range(RECURRENCE):
            maps = self.attention(maps)
        return [self.after(maps)]
