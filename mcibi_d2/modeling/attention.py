"""The attention block that refines gathered context by the pixels (paper, Eq. 13-14)."""

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
        return self.out(refined.reshape(len(pixels), -1, *pixels.shape[-2:]))


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
