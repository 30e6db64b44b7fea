"""Pyramid pooling (PSPNet: Zhao, Shi, Qi, Wang and Jia, CVPR 2017)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, apply_to_pooled, conv_norm_relu
from .base import ContextModule

BINS = (1, 2, 3, 6)


class PyramidPooling(ContextModule):
    """PSPNet's pyramid pooling module: averages of R over ever smaller regions, beside R itself.

    With pool_s the averages over s x s regions and up the bilinear up-sampling to (h, w)::

        C_wi = cbr3x3([R, up(cbr1x1(pool_1(R))), .., up(cbr1x1(pool_6(R)))])      s = 1, 2, 3, 6

    cbr is conv-BN-ReLU. In training, one image alone goes through the batch norm of its 1x1 pool
    as :func:`mcibi_d2.modeling.blocks.apply_to_pooled` says.

    Args:
        in_channels: see :class:`ContextModule`.
        channels: see :class:`ContextModule`.
        norm: see :class:`ContextModule`.
        **others: see :class:`ContextModule`; not used.
    """

    def __init__(
        self, in_channels: int, channels: int, norm: NormFactory = nn.BatchNorm2d, **others: object
    ):
        super().__init__(**others)
        self.levels = nn.ModuleList(conv_norm_relu(in_channels, channels, 1, norm) for _ in BINS)
        self.fuse = conv_norm_relu(in_channels + len(BINS) * channels, channels, 3, norm)

    def forward(
        self,
        features: Tensor,
        lower: Tensor | None = None,
        coarse: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R (N, in_channels, h, w) to C_wi (N, channels, h, w), and no losses."""
        maps = [features]
        for bins, level in zip(BINS, self.levels, strict=True):
            pooled = apply_to_pooled(level, F.adaptive_avg_pool2d(features, bins))
            maps.append(
                F.interpolate(pooled, features.shape[-2:], mode="bilinear", align_corners=False)
            )
        return self.fuse(torch.cat(maps, dim=1)), {}
