"""Atrous spatial pyramid pooling (DeepLabV3: Chen, Papandreou, Schroff and Adam, 2017)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, apply_to_pooled, conv_norm_relu
from .base import ContextModule

# Of a feature of stride 8.
DILATIONS = (12, 24, 36)


class AtrousPyramid(ContextModule):
    """DeepLabV3's ASPP: convolutions of several dilations beside the mean of the whole image.

    With d_1, d_2, d_3 = 12, 24, 36 (6, 12, 18 at stride 16)::

        C_wi = cbr3x3([cbr1x1(R), cbr3x3_d1(R), cbr3x3_d2(R), cbr3x3_d3(R), cbr1x1(mean(R))])

    cbr is conv-BN-ReLU; the mean is spread over all positions. In training, one image alone goes
    through the batch norm of its mean as :func:`mcibi_d2.modeling.blocks.apply_to_pooled` says.
    (DeepLabV3 joins by a 1x1 convolution; MCIBI's Table 3 counts a 3x3 one.)

    Args:
        output_stride: the dilations are those of stride 16 from 16 on, else those of stride 8.
        dilations: d_1, d_2, d_3 where they shall be others.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        output_stride: int = 8,
        dilations: Sequence[int] = (),
        **others: object,
    ):
        super().__init__(**others)
        if not dilations:
            dilations = [d // 2 for d in DILATIONS] if output_stride >= 16 else DILATIONS
        self.branches = nn.ModuleList(
            [
                conv_norm_relu(in_channels, channels, 1, norm),
                *(conv_norm_relu(in_channels, channels, 3, norm, dilation=d) for d in dilations),
            ]
        )
        self.image = conv_norm_relu(in_channels, channels, 1, norm)
        self.fuse = conv_norm_relu((len(self.branches) + 1) * channels, channels, 3, norm)

    def _gather(self, features: Tensor) -> Tensor:
        maps = [branch(features) for branch in self.branches]
        image = apply_to_pooled(self.image, F.adaptive_avg_pool2d(features, 1))
        maps.append(image.expand(-1, -1, *features.shape[-2:]))
        return self.fuse(torch.cat(maps, dim=1))
