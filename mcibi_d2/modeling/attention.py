"""The attention blocks that refine gathered context by the pixels (paper, Eq. 13-14)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import NormFactory, conv_norm_relu


class Attention(nn.Module):
    """Single-head attention from every pixel of a map to every pixel of a context map.

    With query R and context C' (Eq. 13-14)::

        P = softmax(g_q(R) g_k(C')^T / sqrt(attention_dim))      (hw x hw)
        C = g_o(P g_v(C'))

    g_q and g_k are two 1x1 conv-BN-ReLU, g_v and g_o one. P is never stored:
    ``scaled_dot_product_attention`` works through it block by block.

    Args:
        channels: channels of the query map, of the context map and of the result (512).
        attention_dim: channels of query, key and value (256, which is C / 2 in Eq. 13).
        norm: makes the norm layer for a number of channels.
    """

    def __init__(
        self, channels: int = 512, attention_dim: int = 256, norm: NormFactory = nn.BatchNorm2d
    ):
        super().__init__()
        self.query = nn.Sequential(
            conv_norm_relu(channels, attention_dim, 1, norm),
            conv_norm_relu(attention_dim, attention_dim, 1, norm),
        )
        self.key = nn.Sequential(
            conv_norm_relu(channels, attention_dim, 1, norm),
            conv_norm_relu(attention_dim, attention_dim, 1, norm),
        )
        self.value = conv_norm_relu(channels, attention_dim, 1, norm)
        self.out = conv_norm_relu(attention_dim, channels, 1, norm)

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """Refine ``context`` (N, C, h, w) by ``pixels`` (N, C, h, w); returns (N, C, h, w)."""
        query, key, value = (
            # One head: (N, 1, hw, attention_dim). The scale is 1 / sqrt(attention_dim). torch's
            # kernels that do not store P want the channels last in memory.
            projected.flatten(2).transpose(1, 2)[:, None].contiguous()
            for projected in (self.query(pixels), self.key(context), self.value(context))
        )
        refined = F.scaled_dot_product_attention(query, key, value)[:, 0].transpose(1, 2)
        del query, key, value  # not needed beside what the last layers make
        return self.out(refined.reshape(pixels.shape[0], -1, *pixels.shape[-2:]))


class SlotAttention(nn.Module):
    """One :class:`Attention` per memory slot, joined by a 1x1 conv-BN-ReLU.

    For a memory with several rows per class, as in the code that the paper's authors released.

    Args:
        slots: S, at least 2.
        channels: see :class:`Attention`.
        attention_dim: see :class:`Attention`.
        norm: see :class:`Attention`.
    """

    def __init__(
        self,
        slots: int,
        channels: int = 512,
        attention_dim: int = 256,
        norm: NormFactory = nn.BatchNorm2d,
    ):
        super().__init__()
        self.of_slot = nn.ModuleList(Attention(channels, attention_dim, norm) for _ in range(slots))
        self.join = conv_norm_relu(slots * channels, channels, 1, norm)

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """Refine ``context`` (N, S * C, h, w) by ``pixels`` (N, C, h, w); returns (N, C, h, w)."""
        contexts = context.chunk(len(self.of_slot), dim=1)
        refined = [of(pixels, c) for of, c in zip(self.of_slot, contexts, strict=True)]
        return self.join(torch.cat(refined, dim=1))


class RowAttention(nn.Module):
    """Attention from every pixel to the memory's rows themselves, instead of to every position.

    In place of Eq. 12-14: with query R and the memory M ::

        P = softmax(g_q(R) g_k(M)^T / sqrt(attention_dim) + log W)      (hw x K)
        C = g_o(P g_v(M))

    where W is H1's class distribution (Eq. 11), left out with ``biased=False``. There are K keys
    in place of hw, so it costs hw K instead of (hw)^2. g_q and g_o are those of
    :class:`Attention`; g_k and g_v are linear maps of the rows brought to zero mean and unit
    variance, because a batch norm over K rows would depend on which of them are initialised.

    Args:
        channels: channels of the pixels, of the rows and of the result (512).
        attention_dim: channels of query, key and value.
        norm: makes the norm layer for a number of channels.
        biased: whether W is used.
    """

    def __init__(
        self,
        channels: int = 512,
        attention_dim: int = 256,
        norm: NormFactory = nn.BatchNorm2d,
        biased: bool = True,
    ):
        super().__init__()
        self.biased = biased
        self.query = nn.Sequential(
            conv_norm_relu(channels, attention_dim, 1, norm),
            conv_norm_relu(attention_dim, attention_dim, 1, norm),
        )
        self.normalize = nn.LayerNorm(channels)
        self.key = nn.Linear(channels, attention_dim)
        self.value = nn.Linear(channels, attention_dim)
        self.out = conv_norm_relu(attention_dim, channels, 1, norm)

    def forward(
        self, pixels: Tensor, rows: Tensor, initialized: Tensor, log_probabilities: Tensor
    ) -> Tensor:
        """Gather what the rows hold for each pixel.

        Args:
            pixels: R', (N, C, h, w).
            rows: M, (K * S, C).
            initialized: (K * S,) bool; other rows take no part. With none at all, what is
                gathered is zero.
            log_probabilities: log W for the class of each row, (N, K * S, h, w).

        Returns:
            (N, C, h, w).
        """
        rows = self.normalize(rows)
        query = self.query(pixels).flatten(2).transpose(1, 2)[:, None].contiguous()
        batch = pixels.shape[0]
        key, value = (f(rows).expand(batch, 1, -1, -1) for f in (self.key, self.value))
        any_row = initialized.any()
        bias = torch.zeros_like(initialized, dtype=query.dtype)
        bias = bias.masked_fill(~initialized & any_row, -torch.inf)[None, None, None]
        if self.biased:
            bias = bias + log_probabilities.flatten(2).transpose(1, 2)[:, None].to(query.dtype)
        gathered = F.scaled_dot_product_attention(
            query, key.to(query.dtype), value.to(query.dtype), attn_mask=bias
        )
        gathered = gathered * any_row
        gathered = gathered[:, 0].transpose(1, 2).reshape(batch, -1, *pixels.shape[-2:])
        return self.out(gathered)
