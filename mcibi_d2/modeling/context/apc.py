"""Adaptive pyramid context (APCNet: He, Deng, Zhou, Wang and Qiao, CVPR 2019)."""

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, apply_to_pooled, conv_norm_relu
from .base import ContextBeside

SCALES = (1, 2, 3, 6)


class AdaptiveContext(nn.Module):
    """APCNet's adaptive context module: s x s regions, weighted anew at every position.

    With x = cbr(R), the regions y_1 .. y_{s*s} = cbr(pool_s(R)) and the image's g = cbr(mean(x))::

        alpha_i = sigmoid(conv(x_i + g))           s * s affinities, "global-guided local affinity"
        z_i     = sum_j alpha_ij y_j
        Z_i     = cbr(cbr(z_i) + x_i)

    Each cbr is another 1x1 conv-BN-ReLU, conv a 1x1 convolution. In training, one image alone
    goes through the batch norms of g, and of y if s is 1, as
    :func:`mcibi_d2.modeling.blocks.apply_to_pooled` says.

    Args:
        in_channels: of R.
        channels: of x, y, g, z and Z.
        scale: s.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(self, in_channels: int, channels: int, scale: int, norm: NormFactory):
        super().__init__()
        self.scale = scale
        self.local = conv_norm_relu(in_channels, channels, 1, norm)
        self.regions = conv_norm_relu(in_channels, channels, 1, norm)
        self.image = conv_norm_relu(channels, channels, 1, norm)
        self.affinity = nn.Conv2d(channels, scale * scale, 1)
        self.residual = conv_norm_relu(channels, channels, 1, norm)
        self.out = conv_norm_relu(channels, channels, 1, norm)

    def forward(self, features: Tensor) -> Tensor:
        """R (N, in_channels, h, w) to Z (N, channels, h, w)."""
        local = self.local(features)
        regions = apply_to_pooled(self.regions, F.adaptive_avg_pool2d(features, self.scale))
        image = apply_to_pooled(self.image, F.adaptive_avg_pool2d(local, 1))
        affinities = self.affinity(local + image).sigmoid()
        # (N, channels, s * s) times (N, s * s, hw).
        gathered = regions.flatten(2) @ affinities.flatten(2)
        residual = self.residual(gathered.view_as(local))
        return self.out(residual + local)


class AdaptivePyramid(ContextBeside):
    """APCNet's adaptive context modules of four scales, beside R.

    With acm_s an :class:`AdaptiveContext`::

        C_wi = cbr3x3([R, acm_1(R), acm_2(R), acm_3(R), acm_6(R)])

    cbr is conv-BN-ReLU.
    """

    def __init__(
        self, in_channels: int, channels: int, norm: NormFactory = nn.BatchNorm2d, **others: object
    ):
        super().__init__(**others)
        self.contexts = nn.ModuleList(
            AdaptiveContext(in_channels, channels, scale, norm) for scale in SCALES
        )
        self.fuse = conv_norm_relu(in_channels + len(SCALES) * channels, channels, 3, norm)

    def _maps(self, features: Tensor) -> Iterator[Tensor]:
        return (module(features) for module in self.contexts)
