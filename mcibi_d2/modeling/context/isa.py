"""Interlaced sparse self-attention (Huang et al., 2019; Yuan et al., IJCV 2021): OCNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import key_layers
from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class GroupedAttention(nn.Module):
    """Self-attention within groups of pixels: far apart ones, or neighbours.

    The map is cut into blocks of ``division`` x ``division`` pixels, padded on both sides to a
    whole number of them. ``far=True`` groups the pixels that have the same place in their blocks,
    ``far=False`` those of one block. In each group::

        y = g(softmax(phi(x) psi(x)^T / sqrt(key_channels)) delta(x))

    phi and psi are two 1x1 conv-BN-ReLU to ``key_channels``, delta a 1x1 convolution and g a 1x1
    conv-BN-ReLU. In the authors' code padding is attended to and counts in the batch norms. Here
    it is added behind phi, psi and delta, and masked: it has no part in any result.

    Args:
        channels: of the map and of the result.
        key_channels: channels of query and key; the value has ``channels``.
        division: side of a block, in pixels.
        far: see above.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(
        self, channels: int, key_channels: int, division: int, far: bool, norm: NormFactory
    ):
        super().__init__()
        self.division = division
        self.far = far
        self.query = key_layers(channels, key_channels, norm)
        self.key = key_layers(channels, key_channels, norm)
        self.value = nn.Conv2d(channels, channels, 1, bias=False)
        self.out = conv_norm_relu(channels, channels, 1, norm)

    def forward(self, pixels: Tensor) -> Tensor:
        """Attend within the groups of a map (N, channels, h, w); returns the same shape."""
        height, width = pixels.shape[-2:]
        blocks = self._blocks(height), self._blocks(width)
        above, below = self._padding(height)
        left, right = self._padding(width)

        def group(x: Tensor) -> Tensor:
            return self._group(F.pad(x, (left, right, above, below)), blocks)

        query, key, value = (
            group(project(pixels)) for project in (self.query, self.key, self.value)
        )
        mask = None
        # There may be padding of a size that is not known yet, in torch.export.
        padded = isinstance(height, torch.SymInt) or above + below + left + right
        if padded:
            real = group(pixels.new_ones(1, 1, height, width))[..., 0] > 0
            # A group of padding alone attends to itself: a softmax over nothing is not a number.
            mask = (real | ~real.any(dim=2, keepdim=True))[:, :, None]
        # The groups are in the place of heads: (N, groups, pixels of a group, channels).
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        context = self._ungroup(context, blocks)
        if padded:
            # No slice: torch.export would demand that it is smaller than the whole.
            context = F.pad(context, (-left, -right, -above, -below))
        return self.out(context)

    def _blocks(self, size: int) -> int:
        """Blocks that cover ``size`` pixels."""
        return (size + self.division - 1) // self.division

    def _padding(self, size: int) -> tuple[int, int]:
        """Pixels to add before and behind, for a multiple of ``division``."""
        missing = self._blocks(size) * self.division - size
        return missing // 2, missing - missing // 2

    def _group(self, x: Tensor, blocks: tuple[int, int]) -> Tensor:
        """(N, C, H, W) of so many blocks to (N, groups, pixels of a group, C)."""
        side = self.division
        # (N, C, blocks down, place down, blocks across, place across)
        x = x.unflatten(3, (blocks[1], side)).unflatten(2, (blocks[0], side))
        order = (0, 3, 5, 2, 4, 1) if self.far else (0, 2, 4, 3, 5, 1)
        return x.permute(order).flatten(3, 4).flatten(1, 2)

    def _ungroup(self, x: Tensor, blocks: tuple[int, int]) -> Tensor:
        """The inverse of ``_group``."""
        side = self.division
        if self.far:
            x = x.unflatten(2, blocks).unflatten(1, (side, side)).permute(0, 5, 3, 1, 4, 2)
        else:
            x = x.unflatten(2, (side, side)).unflatten(1, blocks).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)


class InterlacedContext(ContextModule):
    """Attention between far pixels, then between neighbours: every pixel reaches every other.

    With x = conv3x3-BN-ReLU(R)::

        C = dropout(conv1x1-BN-ReLU([x, near(far(x))]))

    far and near are :class:`GroupedAttention`. With blocks of 8 x 8 pixels the attention matrices
    have hw (hw / 64 + 64) entries in place of (hw)^2. The rate 0.05 of Dropout2d is that of the
    authors' code.

    Args:
        key_channels: channels of query and key.
        division: side of a block, in pixels.
        dropout: probability of Dropout2d on the result.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        key_channels: int = 256,
        division: int = 8,
        dropout: float = 0.05,
        **others: object,
    ):
        super().__init__(**others)
        self.pixels = conv_norm_relu(in_channels, channels, 3, norm)
        self.far = GroupedAttention(channels, key_channels, division, True, norm)
        self.near = GroupedAttention(channels, key_channels, division, False, norm)
        self.join = conv_norm_relu(2 * channels, channels, 1, norm)
        self.dropout = nn.Dropout2d(dropout)

    def _gather(self, features: Tensor) -> Tensor:
        pixels = self.pixels(features)
        context = self.near(self.far(pixels))
        return self.dropout(self.join(torch.cat([pixels, context], dim=1)))
