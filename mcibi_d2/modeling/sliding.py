"""Sliding windows: where they lie, what each counts, and the map that they make together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .resize import positions, resize_rows
from .score_maps import ResizedMap, ScoreMap

WEIGHTS = ("flat", "gaussian")


@dataclass(frozen=True)
class SlidingWindow:
    """How an image is cut into windows.

    Args:
        window: (height, width) in pixels of the network's input; an image that is smaller has
            windows of its own size.
        stride: (height, width) from one window to the next. The last one of a row or column is
            moved back so that it ends with the image.
        weights: flat: the logits of all windows on a pixel count alike. gaussian: by their distance
            from the window's centre, with a standard deviation of 1/8 of the window, so that pixels
            at a window's edge, which see least around them, count least.
        accumulate_on_cpu: keep the logits of the windows on the CPU, and add them up there.
        batch_size: windows in one forward pass.
        probabilities: average the windows' probabilities instead of their logits.
    """

    window: tuple[int, int]
    stride: tuple[int, int]
    weights: str = "flat"
    accumulate_on_cpu: bool = False
    batch_size: int = 1
    probabilities: bool = False

    def starts(self, size: tuple[int, int]) -> tuple[list[int], list[int]]:
        """Upper and left edges of the windows on an image of ``size``: they form a grid."""
        return tuple(
            [min(i, length - window) for i in range(0, length - window + stride, stride)]
            for length, window, stride in zip(size, self.window_on(size), self.stride, strict=True)
        )

    def window_on(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the windows on an image of ``size``."""
        return tuple(min(pair) for pair in zip(self.window, size, strict=True))

    def shares(self, starts: list[int], window: int, length: int) -> Tensor:
        """What each window counts along one axis; the windows of every pixel add up to 1.

        The weight of a pixel in a window is the product of its two axes, so that this holds for the
        image when it holds for both.

        Returns:
            (windows, length of a window).
        """
        weight = torch.ones(window, dtype=torch.float64)
        if self.weights == "gaussian":
            distance = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
            weight = torch.exp(-((distance / (window / 8)) ** 2) / 2)
        total = torch.zeros(length, dtype=torch.float64)
        for start in starts:
            total[start : start + window] += weight
        return torch.stack([weight / total[start : start + window] for start in starts]).float()


class WindowedMap(ScoreMap):
    """The weighted mean of the logits of windows, at the network's input size, resized once.

    Each window's logits are brought to the window's size and averaged there, as logits, before any
    softmax, or as probabilities, if ``sliding`` says so. Only the logits are kept, at the network's
    stride.

    Args:
        sliding: of which the windows are.
        logits: (K, h, w) of each window, row by row of the grid of :meth:`SlidingWindow.starts`; or
            what gives those of row i of the grid. It is called for each row when it is needed, and
            they are let go when all is below them: once for each, if the map is read from above.
        padded_window: (H, W) that the logits of a window cover.
        size: (H, W) of the image that the windows cover.
        out_size: (height, width) that it is resized to.
    """

    def __init__(
        self,
        sliding: SlidingWindow,
        logits: list[Tensor] | Callable[[int], list[Tensor]],
        padded_window: tuple[int, int],
        size: tuple[int, int],
        out_size: tuple[int, int],
    ):
        tops, lefts = sliding.starts(size)
        if callable(logits):
            self._row_of_windows = logits
        else:
            self._row_of_windows = lambda i: logits[i * len(lefts) : (i + 1) * len(lefts)]
        first = self._row_of_windows(0)
        super().__init__(len(first[0]), out_size, first[0].device)
        self.probabilities = sliding.probabilities
        self._input_size = size
        self._window = sliding.window_on(size)
        self._starts = (tops, lefts)
        self._shares = [
            sliding.shares(*lengths).to(self.device)
            for lengths in zip(self._starts, self._window, size, strict=True)
        ]
        self._padded_window = padded_window
        self._maps = {0: self._maps_of(first)}
        self._vertical, self._horizontal = (
            positions(length, length, length, out)
            for length, out in zip(size, out_size, strict=True)
        )

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`ScoreMap.rows`."""
        if self._input_size == self.size:
            return self._input_rows(start, stop)
        low, high, weight = (x[start:stop] for x in self._vertical)
        first = int(low[0])
        needed = self._input_rows(first, int(high[-1]) + 1)
        return resize_rows(needed, (low - first, high - first, weight), self._horizontal)

    def _maps_of(self, row: list[Tensor]) -> list[ResizedMap]:
        return [ResizedMap(x, self._padded_window, self._window, self._window) for x in row]

    def _input_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the mean at the input's size, (K, stop - start, W)."""
        total = torch.zeros(
            (self.num_classes, stop - start, self._input_size[1]), device=self.device
        )
        (tops, lefts), (height, width) = self._starts, self._window
        self._maps = {i: maps for i, maps in self._maps.items() if tops[i] + height > start}
        for i, top in enumerate(tops):
            first, last = max(start, top), min(stop, top + height)
            if first >= last:
                continue
            if i not in self._maps:
                self._maps[i] = self._maps_of(self._row_of_windows(i))
            for j, left in enumerate(lefts):
                part = self._maps[i][j].rows(first - top, last - top)
                if self.probabilities:
                    part = part.softmax(dim=0)
                share = self._shares[0][i, first - top : last - top, None] * self._shares[1][j]
                total[:, first - start : last - start, left : left + width].addcmul_(part, share)
        return total
