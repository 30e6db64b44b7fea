"""Point-wise spatial attention (Zhao et al., ECCV 2018): PSANet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class PointwiseAttention(nn.Module):
    """One direction of the attention: each point collects from all others, or distributes to them.

    With x = conv1x1-BN-ReLU(R), shrunk to half its size, f = conv1x1-BN-ReLU(x), and a vector w_o
    for each of the ``mask_size``^2 offsets o of an over-completed map that is centered at a
    point::

        l_ij = w_(j-i) . f_i                    what i says of j
        collect:    z_i = sum_j softmax_j(l_ij) x_j
        distribute: z_j = sum_i softmax_i(l_ij) x_i

    The softmax in place of the paper's division by the number of points is the authors' code's.

    No position-to-position matrix is stored, nor the over-completed maps: the result is made row
    by row, and each row once more in the backward pass. A map of at most (``mask_size`` + 1) / 2
    points on a side uses the offsets that occur on it, and no others. Offsets beyond the mask, on
    a larger one, have l_ij = 0, as in the authors' code.

    Args:
        in_channels: of R.
        channels: of x, f and z.
        mask_size: odd; 97 covers the shrunk map of a crop of 769 at stride 8.
        collect: direction.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(
        self, in_channels: int, channels: int, mask_size: int, collect: bool, norm: NormFactory
    ):
        super().__init__()
        self.mask_size = mask_size
        self.collect = collect
        self.reduce = conv_norm_relu(in_channels, channels, 1, norm)
        self.hidden = conv_norm_relu(channels, channels, 1, norm)
        self.offsets = nn.Conv2d(channels, mask_size * mask_size, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Attend over R (N, in_channels, h, w); returns z, (N, channels, ~h/2, ~w/2)."""
        pixels = self.reduce(features)
        size = [_shrunk(side) for side in pixels.shape[-2:]]
        pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
        hidden = self.hidden(pixels)
        height, width = size
        # w by offset, (2h - 1, 2w - 1, channels): cut to what occurs, or continued by zeros.
        table = self.offsets.weight.view(self.mask_size, self.mask_size, -1)
        down, across = (side - 1 - self.mask_size // 2 for side in size)
        table = F.pad(table, (0, 0, across, across, down, down))
        positions = torch.arange(width, device=pixels.device)
        across_offsets = positions[:, None] - positions + width - 1  # of u from x, (u, x)
        row = self._collect_row if self.collect else self._distribute_row
        rows = []
        for y in range(height):
            inputs = (table, hidden, pixels, across_offsets, y)
            if torch.is_grad_enabled():
                inputs = (row, *inputs)
                made = checkpoint(*inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                made = row(*inputs)
            rows.append(made)
        return torch.stack(rows, dim=2)

    @staticmethod
    def _collect_row(table, hidden, pixels, across_offsets, y: int) -> Tensor:
        """z of the points in row y, (N, C, w)."""
        height = hidden.shape[2]
        # l_ij for i = (y, x) in the row and j = (v, u): first by v and the offset across.
        offsets = table[height - 1 - y : 2 * height - 1 - y]
        logits = torch.einsum("voc,ncx->nvox", offsets, hidden[:, :, y])
        return _weigh(_by_position(logits, across_offsets), pixels)

    @staticmethod
    def _distribute_row(table, hidden, pixels, across_offsets, v: int) -> Tensor:
        """z of the points in row v, (N, C, w)."""
        height = hidden.shape[2]
        # l_ij for i = (y, x) and j = (v, u) in the row: first by y, x and the offset across.
        offsets = table[v : v + height].flip(0)
        logits = torch.einsum("yoc,ncyx->nyox", offsets, hidden)
        return _weigh(_by_position(logits, across_offsets).transpose(2, 3), pixels)


def _shrunk(side: int) -> int:
    """Half a side, counted as the authors do; but batch norm on one image wants two points."""
    return max((side - 1) // 2 + 1, min(side, 2))


def _by_position(logits: Tensor, across_offsets: Tensor) -> Tensor:
    """(N, rows, offsets across, x) to (N, rows, u, x)."""
    return logits.gather(2, across_offsets.expand(*logits.shape[:2], -1, -1))


def _weigh(logits: Tensor, pixels: Tensor) -> Tensor:
    """Softmax over the sources, logits (N, h, w, targets), and the sum of their pixels."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    weights = logits.flatten(1, 2).softmax(dim=1, dtype=dtype)
    return pixels.flatten(2) @ weights.to(pixels.dtype)


class PointwiseContext(ContextModule):
    """Bi-directional attention whose weights depend on a point and an offset from it.

    With z_c and z_d from two :class:`PointwiseAttention`, side by side::

        C = conv3x3-BN-ReLU([R, up(conv1x1-BN-ReLU([z_c, z_d]))])

    where the inner convolution gives ``in_channels`` channels. Any size of R will do: the offsets
    belong to distances on the map, which mean the same on a map of another size.

    Args:
        mask_size: of the over-completed maps, odd.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        mask_size: int = 97,
        **others: object,
    ):
        super().__init__(**others)
        if mask_size % 2 == 0:
            raise ValueError(f"PointwiseContext found mask_size {mask_size}, expected an odd one")
        self.collect = PointwiseAttention(in_channels, channels, mask_size, True, norm)
        self.distribute = PointwiseAttention(in_channels, channels, mask_size, False, norm)
        self.project = conv_norm_relu(2 * channels, in_channels, 1, norm)
        self.join = conv_norm_relu(2 * in_channels, channels, 3, norm)

    def _gather(self, features: Tensor) -> Tensor:
        context = torch.cat([self.collect(features), self.distribute(features)], dim=1)
        context = F.interpolate(
            self.project(context), size=features.shape[-2:], mode="bilinear", align_corners=True
        )
        return self.join(torch.cat([features, context], dim=1))
