"""What makes one feature of several: concatenation (HRNet) and multi-level aggregation (SETR)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import NormFactory, conv_norm_relu


class ConcatNeck(nn.Module):
    """Bring maps to the size of the finest one, bilinearly, and concatenate their channels.

    With ``downsample``, a 3x3 convolution of stride 2 with norm and ReLU follows, which keeps the
    channels: the released MCIBI has it for HRNet on Cityscapes and LIP, so that the attention
    works at stride 8.

    Args:
        channels: of each map.
        downsample: halve the size of the result.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(
        self,
        channels: list[int],
        downsample: bool = False,
        norm: NormFactory = nn.BatchNorm2d,
    ):
        super().__init__()
        self.step = nn.Identity()
        if downsample:
            self.step = conv_norm_relu(sum(channels), sum(channels), 3, norm)
            self.step[0].stride = (2, 2)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Maps (N, C_i, h_i, w_i), finest first; returns all but the last, and their join.

        The join is (N, sum of C_i, h_0, w_0), or half that size.
        """
        size = maps[0].shape[-2:]
        same = [
            F.interpolate(map_, size=size, mode="bilinear", align_corners=False)
            if map_.shape[-2:] != size
            else map_
            for map_ in maps
        ]
        return maps[:-1], self.step(torch.cat(same, dim=1))


class MLANeck(nn.Module):
    """Multi-level feature aggregation of SETR-MLA (Zheng et al., CVPR 2021).

    Each level x_i, of one size, becomes a 1x1 conv-BN-ReLU y_i; from the last level to the first,
    each takes up the sum of those after it::

        z_i = 3x3 conv-BN-ReLU(y_i + y_{i+1} + ... + y_n)
        result = [z_1, ..., z_n], each up-sampled 4 times

    Args:
        channels: of each level.
        out_channels: of each z_i; the result has as many times that.
        norm: makes the norm layer for a number of channels.
    """

    UPSAMPLING = 4

    def __init__(
        self, channels: list[int], out_channels: int = 256, norm: NormFactory = nn.BatchNorm2d
    ):
        super().__init__()
        self.lateral = nn.ModuleList(conv_norm_relu(c, out_channels, 1, norm) for c in channels)
        self.smooth = nn.ModuleList(
            conv_norm_relu(out_channels, out_channels, 3, norm) for _ in channels
        )

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Levels (N, C_i, h, w), first to last; returns z_1 .. z_n and the join of them.

        The z_i are (N, out_channels, h, w), what SETR's auxiliary heads work on; the join is
        (N, n * out_channels, 4 h, 4 w).
        """
        total, sums = 0, []
        for map_, lateral in zip(reversed(maps), reversed(self.lateral), strict=True):
            total = total + lateral(map_)
            sums.insert(0, total)
        smoothed = [smooth(s) for s, smooth in zip(sums, self.smooth, strict=True)]
        up = [
            F.interpolate(z, scale_factor=self.UPSAMPLING, mode="bilinear", align_corners=False)
            for z in smoothed
        ]
        return smoothed, torch.cat(up, dim=1)


NECKS = ("none", "concat", "mla")
