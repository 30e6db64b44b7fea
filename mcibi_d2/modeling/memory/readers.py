"""The ways to read the memory: what it holds for each pixel, by the names of a config."""

import torch
from torch import Tensor, nn

from ..attention import Attention, attend, key_layers
from ..blocks import NormFactory, conv_norm_relu
from .memory import FeatureMemory


class MemoryReader(nn.Module):
    """Gives each pixel what the memory holds for it, C_bi.

    A new way is a subclass and a line in :data:`READERS`. Every reader is built with

    - ``channels``: C, of the pixels, of the memory's rows and of the result;
    - ``attention_dim``: channels of query, key and value;
    - ``norm``: makes the norm layer for a number of channels;
    - ``slots``: S, the memory's rows per class;
    - ``rows_bias``: whether H1 has a say, where a reader could do without.

    Attributes:
        hard: whether a pixel asks for the row of its most likely class alone.
    """

    hard = False
    # Whether W, which `hard` changes, is what the rows are mixed by.
    mixes = False

    def weights(self, coarse: Tensor) -> Tensor:
        """W of Eq. 11 (N, K, h, w) from the logits of H1: what each pixel asks of each class."""
        if not self.hard:
            return coarse.softmax(dim=1)
        best = coarse.argmax(dim=1, keepdim=True)
        return torch.zeros_like(coarse).scatter_(1, best, 1.0)

    def read(self, pixels: Tensor, coarse: Tensor, memory: FeatureMemory) -> Tensor:
        """Read the memory.

        Args:
            pixels: R', (N, C, h, w).
            coarse: the logits of H1, (N, K, h, w), float32 at least.
            memory: of the same classes and channels.

        Returns:
            C_bi (N, C, h, w).
        """
        raise NotImplementedError


class MixtureReader(MemoryReader):
    """Mixes the rows by W at each position (Eq. 12), and calls itself on pixels and mixtures."""

    mixes = True

    def read(self, pixels: Tensor, coarse: Tensor, memory: FeatureMemory) -> Tensor:
        """C_bi (N, C, h, w); the arguments are those of every reader."""
        return self(pixels, memory.read(self.weights(coarse)).to(pixels.dtype))


class PixelReader(Attention, MixtureReader):
    """Eq. 12-14: the pixels attend to the mixtures at all positions.

    Its layers are those of :class:`mcibi_d2.modeling.Attention`.
    """

    def __init__(
        self,
        channels: int = 512,
        attention_dim: int = 256,
        norm: NormFactory = nn.BatchNorm2d,
        slots: int = 1,
        rows_bias: bool = True,
    ):
        super().__init__(channels, attention_dim, norm)


class SlotReader(MixtureReader):
    """Eq. 12-14 with an attention block for each slot, joined by a 1x1 conv-BN-ReLU.

    For a memory with several rows per class, as in the code that the paper's authors released.
    """

    def __init__(
        self,
        channels: int = 512,
        attention_dim: int = 256,
        norm: NormFactory = nn.BatchNorm2d,
        slots: int = 1,
        rows_bias: bool = True,
    ):
        super().__init__()
        self.of_slot = nn.ModuleList(Attention(channels, attention_dim, norm) for _ in range(slots))
        self.join = conv_norm_relu(slots * channels, channels, 1, norm)

    def forward(self, pixels: Tensor, context: Tensor) -> Tensor:
        """Refine ``context`` (N, S * C, h, w) by ``pixels`` (N, C, h, w); returns (N, C, h, w)."""
        contexts = context.chunk(len(self.of_slot), dim=1)
        refined = [of(pixels, c) for of, c in zip(self.of_slot, contexts, strict=True)]
        return self.join(torch.cat(refined, dim=1))


class RowReader(MemoryReader):
    """Attention from every pixel to the memory's rows themselves, instead of to every position.

    In place of Eq. 12-14: with query R and the memory M ::

        P = softmax(g_q(R) g_k(M)^T / sqrt(attention_dim) + log W)      (hw x K)
        C = g_o(P g_v(M))

    where W is H1's class distribution (Eq. 11), left out with ``rows_bias=False``. There are K keys
    in place of hw, so it costs hw K instead of (hw)^2. g_q and g_o are those of
    :class:`mcibi_d2.modeling.Attention`; g_k and g_v are linear maps of the rows brought to zero
    mean and unit variance, because a batch norm over K rows would depend on which of them are
    initialised.
    """

    def __init__(
        self,
        channels: int = 512,
        attention_dim: int = 256,
        norm: NormFactory = nn.BatchNorm2d,
        slots: int = 1,
        rows_bias: bool = True,
    ):
        super().__init__()
        self.biased = rows_bias
        self.query = key_layers(channels, attention_dim, norm)
        self.normalize = nn.LayerNorm(channels)
        self.key = nn.Linear(channels, attention_dim)
        self.value = nn.Linear(channels, attention_dim)
        self.out = conv_norm_relu(attention_dim, channels, 1, norm)

    def read(self, pixels: Tensor, coarse: Tensor, memory: FeatureMemory) -> Tensor:
        """C_bi (N, C, h, w); the arguments are those of every reader."""
        log_weights = coarse.log_softmax(dim=1).repeat_interleave(memory.slots, dim=1)
        return self(pixels, memory.rows, memory.initialized, log_weights)

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
        query = self.query(pixels).flatten(2)
        key, value = (
            layer(rows).t().to(query.dtype).expand(len(pixels), -1, -1)
            for layer in (self.key, self.value)
        )
        any_row = initialized.any()
        mask = torch.zeros_like(initialized, dtype=query.dtype)
        mask = mask.masked_fill(~initialized & any_row, -torch.inf)[None, None, None]
        if self.biased:
            mask = mask + log_probabilities.flatten(2).transpose(1, 2)[:, None].to(query.dtype)
        gathered = attend(query, key, value, mask=mask) * any_row
        return self.out(gathered.unflatten(2, pixels.shape[-2:]))


# By MODEL.MCIBI.AGGREGATION; ``pixels`` of several slots is ``slots``.
READERS: dict[str, type[MemoryReader] | None] = {
    "slots": SlotReader,
    "pixels": PixelReader,
    "rows": RowReader,
    "none": None,
}
