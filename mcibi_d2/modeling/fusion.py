"""The transform F that joins pixels and context (paper, Eq. 4 and Table 1)."""

import torch
from torch import Tensor, nn

from .blocks import NormFactory, conv_norm_relu


class ConcatFusion(nn.Module):
    """``concatenation``: conv-BN-ReLU of [R, C_bi] (the paper's choice).

    Args:
        channels: channels of each input and of the result.
        kernel_size: of the convolution, 1 or 3.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(self, channels: int, kernel_size: int, norm: NormFactory = nn.BatchNorm2d):
        super().__init__()
        self.conv = conv_norm_relu(2 * channels, channels, kernel_size, norm)

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """R (N, C, h, w) and C_bi (N, C, h, w) to R_aug (N, C, h, w)."""
        return self.conv(torch.cat([pixels, context], dim=1))


class AddFusion(nn.Module):
    """``add``: R + C_bi. Takes the arguments of :class:`ConcatFusion`; has no parameters."""

    def __init__(self, channels: int, kernel_size: int, norm: NormFactory = nn.BatchNorm2d):
        super().__init__()

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """R (N, C, h, w) and C_bi (N, C, h, w) to R_aug (N, C, h, w)."""
        return pixels + context


class WeightedAddFusion(nn.Module):
    """``weighted add``: w_1 R + w_2 C_bi, the two weights predicted per pixel by a 1x1 conv.

    The weights are a softmax over the two inputs, so they sum to one. Takes the arguments of
    :class:`ConcatFusion`.
    """

    def __init__(self, channels: int, kernel_size: int, norm: NormFactory = nn.BatchNorm2d):
        super().__init__()
        self.weights = nn.Conv2d(2 * channels, 2, 1)

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """R (N, C, h, w) and C_bi (N, C, h, w) to R_aug (N, C, h, w)."""
        weights = self.weights(torch.cat([pixels, context], dim=1)).softmax(dim=1)
        return weights[:, :1] * pixels + weights[:, 1:] * context


FUSIONS = {"concat": ConcatFusion, "add": AddFusion, "weighted_add": WeightedAddFusion}
