"""Dynamic multi-scale filters (He, Deng, Qiao, ICCV 2019): DMNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class DynamicConvolution(nn.Module):
    """A depthwise convolution whose filter comes from the image itself.

    For filter size k::

        g = conv1x1(adaptive average pooling of R to k x k)
        y = ReLU(BN(g * conv1x1-BN-ReLU(R)))

    where * filters each channel of each image by its own k x k filter, with zeros around the map.
    No batch norm sees the pooled map, so one image is batch enough.

    Args:
        in_channels: of R.
        channels: of the result.
        size: k, odd.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(self, in_channels: int, channels: int, size: int, norm: NormFactory):
        super().__init__()
        self.size = size
        self.filters = nn.Conv2d(in_channels, channels, 1)
        self.reduce = conv_norm_relu(in_channels, channels, 1, norm)
        self.norm = norm(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Filter R (N, in_channels, h, w); returns (N, channels, h, w)."""
        filters = self.filters(F.adaptive_avg_pool2d(features, self.size))
        pixels = self.reduce(features)
        return F.relu(self.norm(filter_channels(pixels, filters)))


# The number of groups is the batch's: torch.jit.trace, on its own, would write down a number.
@torch.jit.script_if_tracing
def filter_channels(pixels: Tensor, filters: Tensor) -> Tensor:
    """Filter each channel of each image, (N, C, h, w), by its own k x k filter, (N, C, k, k)."""
    # All images' channels side by side, each a group of its own.
    filtered = F.conv2d(
        pixels.flatten(0, 1)[None],
        filters.flatten(0, 1)[:, None],
        padding=filters.shape[-1] // 2,
        groups=filters.shape[0] * filters.shape[1],
    )
    return filtered.view_as(pixels)


class DynamicFilterContext(ContextModule):
    """Joins R and what dynamic filters of several sizes make of it.

    ``C = conv3x3-BN-ReLU([R, y_1, y_3, y_5, y_7])``, y_k from :class:`DynamicConvolution`. As in
    the authors' code, no further 1x1 convolution follows each y_k: the last one mixes the channels
    anyway.

    Args:
        sizes: of the filters, odd.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        sizes: tuple[int, ...] = (1, 3, 5, 7),
        **others: object,
    ):
        super().__init__(**others)
        if any(size % 2 == 0 for size in sizes):
            raise ValueError(f"DynamicFilterContext found sizes {sizes}, expected odd ones")
        self.branches = nn.ModuleList(
            DynamicConvolution(in_channels, channels, size, norm) for size in sizes
        )
        self.join = conv_norm_relu(in_channels + len(sizes) * channels, channels, 3, norm)

    def _gather(self, features: Tensor) -> Tensor:
        parts = [features, *(branch(features) for branch in self.branches)]
        return self.join(torch.cat(parts, dim=1))
