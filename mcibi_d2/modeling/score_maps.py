"""Class scores of an image at its own size, made a few rows at a time.

What the network gives is small: logits at its stride, of the image or of each window. What is asked
for is large: K scores for every pixel. A :class:`ScoreMap` keeps the small part and makes the large
one when it is wanted, whole or by rows, so that labels need no more memory for a large image or for
many classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from .resize import best_class, label_type, positions, resize_argmax, resize_logits, resize_rows

# How much of the large map is there at a time: on a CPU, and on other devices.
CPU_BAND_BYTES = 8 * 2**20
DEVICE_BAND_BYTES = 64 * 2**20


class ScoreMap(ABC):
    """Scores of K classes for every pixel of one image.

    Attributes:
        probabilities: whether the scores are probabilities, not logits.

    Args:
        num_classes: K.
        size: (height, width) of the image.
        device: where the scores are.
    """

    probabilities = False

    def __init__(self, num_classes: int, size: tuple[int, int], device: torch.device):
        self.num_classes = num_classes
        self.size = tuple(size)
        self.device = device

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """The scores of some rows, (K, stop - start, width) float32."""

    @property
    def nbytes(self) -> int:
        """Bytes of the scores of all pixels."""
        return self.num_classes * self.size[0] * self.size[1] * 4

    def bands(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows that cover the image, with a bounded number of scores each."""
        band_bytes = CPU_BAND_BYTES if self.device.type == "cpu" else DEVICE_BAND_BYTES
        step = max(1, band_bytes * self.size[0] // self.nbytes)
        for start in range(0, self.size[0], step):
            yield start, min(start + step, self.size[0])

    def scores(self) -> Tensor:
        """All scores, (K, height, width) float32."""
        scores = torch.empty((self.num_classes, *self.size), device=self.device)
        for start, stop in self.bands():
            scores[:, start:stop] = self.rows(start, stop)
        return scores

    def labels(self) -> Tensor:
        """The class of every pixel, (height, width), as of :func:`best_class`."""
        labels = torch.empty(self.size, dtype=label_type(self.num_classes), device=self.device)
        for start, stop in self.bands():
            labels[start:stop] = best_class(self.rows(start, stop))
        return labels


class ResizedMap(ScoreMap):
    """The scores of a network, resized once.

    Args:
        logits: (K, h, w), covering the padded image.
        padded_size: (H, W) of the padded image.
        size: (H, W) of the image in its upper left corner.
        out_size: (height, width) that it is resized to.
    """

    def __init__(
        self,
        logits: Tensor,
        padded_size: tuple[int, int],
        size: tuple[int, int],
        out_size: tuple[int, int],
    ):
        super().__init__(len(logits), out_size, logits.device)
        self.logits = logits
        self._sizes = (padded_size, size, out_size)
        self._vertical, self._horizontal = (
            positions(*lengths)
            for lengths in zip(logits.shape[1:], padded_size, size, out_size, strict=True)
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`ScoreMap.rows`."""
        low, high, weight = (x[start:stop] for x in self._vertical)
        first = int(low[0])
        needed = self.logits[:, first : int(high[-1]) + 1]
        return resize_rows(needed, (low - first, high - first, weight), self._horizontal)

    def scores(self) -> Tensor:
        """See :meth:`ScoreMap.scores`."""
        return resize_logits(self.logits, *self._sizes)

    def labels(self) -> Tensor:
        """See :meth:`ScoreMap.labels`."""
        return resize_argmax(self.logits, *self._sizes)
