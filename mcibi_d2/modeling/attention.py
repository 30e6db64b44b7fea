"""Attention between positions, and the block that refines a map by the pixels (Eq. 13-14)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import NormFactory, conv_norm_relu

# Queries whose scores are there together, where attention goes by bands.
_BAND = 256


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention between positions that are given channels first, without storing its matrix.

    The result at position i is ``sum_j softmax_j(scale * query_i . key_j) value_j``.

    Args:
        query: (N, D, P).
        key: (N, D, Q).
        value: (N, V, Q).
        scale: of the products; 1 / sqrt(D) if None.
        mask: (1 or N, 1, 1 or P, Q), added to the scaled products.

    Returns:
        (N, V, P).
    """
    heads, depth = 1, query.shape[1]
    if value.shape[1] > depth and value.shape[1] % depth == 0:
        # torch's kernels that never store the P x Q matrix want values as deep as the keys. So
        # deep values are cut into heads, which all have the same queries and keys.
        heads = value.shape[1] // depth
    # They also want the channels last in memory, whatever the layout of the maps.
    query, key, value = (x.transpose(1, 2).contiguous() for x in (query, key, value))
    query, key = (x[:, None].expand(-1, heads, -1, -1) for x in (query, key))
    value = value.unflatten(2, (heads, -1)).transpose(1, 2)
    if _by_bands(query, key, value):
        attended = _attend_by_bands(query, key, value, mask, scale)
    else:
        attended = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return attended.transpose(2, 3).flatten(1, 2)


def _by_bands(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's kernel is slow: in bfloat16 on a CPU it is no faster than in float32."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    recorded = torch.jit.is_tracing() or torch.compiler.is_compiling()
    on_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return on_cpu and not learns and not recorded and query.shape[2] >= 4 * _BAND


def _attend_by_bands(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """``F.scaled_dot_product_attention`` of (N, heads, P, D), for some queries at a time."""
    query = query * (scale or query.shape[-1] ** -0.5)
    attended = query.new_empty(*query.shape[:-1], value.shape[-1])
    for start in range(0, query.shape[2], _BAND):
        band = slice(start, start + _BAND)
        scores = query[:, :, band] @ key.transpose(-2, -1)
        if mask is not None:
            scores += mask[:, :, band] if mask.shape[2] > 1 else mask
        attended[:, :, band] = scores.softmax(dim=-1) @ value
    return attended


def key_layers(channels: int, depth: int, norm: NormFactory) -> nn.Sequential:
    """Makes queries or keys of ``depth`` channels from a map: two 1x1 conv-BN-ReLU."""
    return nn.Sequential(
        conv_norm_relu(channels, depth, 1, norm), conv_norm_relu(depth, depth, 1, norm)
    )


class Attention(nn.Module):
    """Single-head attention from every pixel of a map to every pixel of a context map.

    With query R and context C' (Eq. 13-14)::

        P = softmax(g_q(R) g_k(C')^T / sqrt(attention_dim))      (hw x hw)
        C = g_o(P g_v(C'))

    g_q and g_k are two 1x1 conv-BN-ReLU, g_v and g_o one. P is never stored, see
    :func:`attend`.

    Args:
        channels: channels of the query map, of the context map and of the result (512).
        attention_dim: channels of query, key and value (256, which is C / 2 in Eq. 13).
        norm: makes the norm layer for a number of channels.
    """

    def __init__(
        self, channels: int = 512, attention_dim: int = 256, norm: NormFactory = nn.BatchNorm2d
    ):
        super().__init__()
        self.query = key_layers(channels, attention_dim, norm)
        self.key = key_layers(channels, attention_dim, norm)
        self.value = conv_norm_relu(channels, attention_dim, 1, norm)
        self.out = conv_norm_relu(attention_dim, channels, 1, norm)

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """Refine ``context`` (N, C, h, w) by ``pixels`` (N, C, h, w); returns (N, C, h, w)."""
        # Without names, query, key and value are gone before the last layers make more.
        refined = attend(
            self.query(pixels).flatten(2),
            self.key(context).flatten(2),
            self.value(context).flatten(2),
        )
        return self.out(refined.unflatten(2, pixels.shape[-2:]))
