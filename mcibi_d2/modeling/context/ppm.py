"""Pyramid pooling (PSPNet: Zhao, Shi, Qi, Wang and Jia, CVPR 2017)."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, apply_to_pooled, conv_norm_relu
from .base import ContextBeside

BINS = (1, 2, 3, 6)


class PyramidPooling(ContextBeside):
    """PSPNet's pyramid pooling module: averages of R over ever smaller regions, beside R itself.

    With pool_s the averages over s x s regions and up the bilinear up-sampling to (h, w)::

        C_wi = cbr3x3([R, up(cbr1x1(pool_1(R))), .., up(cbr1x1(pool_6(R)))])      s = 1, 2, 3, 6

    cbr is conv-BN-ReLU. In training, one image alone goes through the batch norm of its 1x1 pool
    as :func:`mcibi_d2.modeling.blocks.apply_to_pooled` says.
    """

    def __init__(
        self, in_channels: int, channels: int, norm: NormFactory = nn.BatchNorm2d, **others: object
    ):
        super().__init__(**others)
        self.levels = nn.ModuleList(conv_norm_relu(in_channels, channels, 1, norm) for _ in BINS)
        self.fuse = conv_norm_relu(in_channels + len(BINS) * channels, channels, 3, norm)

    def _maps(self, features: Tensor) -> Iterator[Tensor]:
        for bins, level in zip(BINS, self.levels, strict=True):
            pooled = apply_to_pooled(level, F.adaptive_avg_pool2d(features, bins))
            yield F.interpolate(pooled, features.shape[-2:], mode="bilinear", align_corners=False)
