"""Sums over the pixels of each class, without up-sampling the features to the labels."""

import torch
from torch import Tensor

from ..bilinear import places
from ..labels import classes_of


def add_class_sums(
    sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_value: int,
    directions: Tensor | None = None,
    vacant: Tensor | None = None,
    weighted: bool = False,
) -> None:
    """Add one image's class sums to ``sums`` without up-sampling its features.

    Bilinear up-sampling is linear: pixel i is ``sum_n u[i, n] R[n]`` over four grid points n. So

    - its product with a row is the same combination of ``R^T M`` at those four points;
    - its squared norm is a quadratic form in the products of neighbouring grid points, of which
      there are five kinds: itself, right, below, and the two diagonals of a cell;
    - ``sum_i w_i R_up[i] = sum_n A[k, n] R[n]`` with ``A[k, n] = sum_i w_i u[i, n]`` over the
      pixels i of class k: four scatter-adds of one number per pixel, and one matrix product.

    Args:
        sums: (K * S, C + 3), changed in place: C columns of the weighted features, then their
            weights, their number and their norms.
        features: (C, h, w) in the type of ``sums``.
        labels: (H, W) integers.
        ignore_value: label to leave out.
        directions: (K, S, C), the rows at length one (zero where there is none), or None where
            they are not needed: one slot and equal weights.
        vacant: (K, S) bool, slots that all pixels of their class go to; needed if S > 1.
        weighted: whether the weights are those of Eq. 10, else equal.
    """
    slots = 1 if directions is None else directions.shape[1]
    num_classes = len(sums) // slots
    features = _two_by_two(features)
    channels, h, w = features.shape
    flat = features.flatten(1)

    index, _ = classes_of(labels, num_classes, ignore_value)
    # Work with the classes that occur. Finding them needs the host, which costs nothing on the
    # CPU; on an accelerator it would stall the queue, and all K classes are taken instead.
    on_host = _on_host(index)
    if on_host:
        present = index.flatten().bincount(minlength=num_classes + 1)[:num_classes].nonzero()[:, 0]
        position = index.new_full((num_classes + 1,), len(present))
        position[present] = torch.arange(len(present))
        index = position[index]
    else:
        present = torch.arange(num_classes, device=index.device)

    top, down = _cells(labels.shape[0], h, features)
    left, right = _cells(labels.shape[1], w, features)
    cell = top[:, None] * w + left
    down, right = down[:, None], right[None, :]
    shifts = (0, 1, w, w + 1)  # upper left, upper right, lower left, lower right
    shares = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)
    norm = _squared_norms(features, top, down, left, right).sqrt_()

    def products(slot: int) -> Tensor:
        """Of each pixel with the given slot of its class, (H, W)."""
        maps = flat.new_zeros((len(present) + 1) * h * w + w + 1)
        maps[: len(present) * h * w] = (directions[present, slot] @ flat).flatten()
        corner = (index * (h * w) + cell).flatten()
        result = torch.zeros_like(norm)
        for shift, share in zip(shifts, shares, strict=True):
            result += share * maps[shift:].index_select(0, corner).view_as(norm)
        return result

    dot = products(0) if directions is not None else None
    if slots > 1:
        # The most similar slot: all have the pixel's norm in common. A vacant one wins.
        always = torch.cat([vacant[present], vacant.new_zeros(1, slots)])
        best, choice = dot.masked_fill(always[index, 0], torch.inf), torch.zeros_like(index)
        for slot in range(1, slots):
            other = products(slot)
            score = other.masked_fill(always[index, slot], torch.inf)
            better = score > best
            best = torch.where(better, score, best)
            dot = torch.where(better, other, dot)
            choice.masked_fill_(better, slot)
        index = index * slots + choice.masked_fill_(index == len(present), 0)
        offset = torch.arange(slots, device=index.device)
        present = (present[:, None] * slots + offset).flatten()
    bins = len(present)  # bin number `bins` takes the pixels that are left out

    if weighted:
        # Eq. 10. Rounding must not take the cosine beyond what it can be.
        cosine = torch.where(norm == 0, 0, dot / norm)
        weight = 1 - cosine.clamp_(-1, 1)
    else:
        weight = torch.ones_like(norm)

    spread = flat.new_zeros((bins + 1) * h * w + w + 1)
    corner = (index * (h * w) + cell).flatten()
    for shift, share in zip(shifts, shares, strict=True):
        spread[shift:].index_add_(0, corner, (weight * share).flatten())
    spread = spread[: bins * h * w].view(bins, h * w)

    def per_bin(values: Tensor) -> Tensor:
        """Sums of (H, W) values; by grid cell first, or small numbers would be lost in large."""
        cells = flat.new_zeros((bins + 1) * h * w).index_add_(0, corner, values.flatten())
        return cells.view(bins + 1, h * w)[:bins].sum(dim=1)

    totals = [spread.sum(dim=1), per_bin(torch.ones_like(norm)), per_bin(norm)]
    # A point that is not finite has spoilt the norms of the classes it belongs to. It must not
    # reach the others as 0 x nan.
    if not (on_host and flat.sum().isfinite()):
        flat = flat.nan_to_num(0, 0, 0)
    totals = torch.stack(totals, dim=1)
    sums.index_add_(0, present, torch.cat([spread @ flat.t(), totals], dim=1))


class ClassMeans:
    """The mean of each class's pixels, over batches of maps that are smaller than their labels.

    Args:
        num_classes: K.
        channels: C.
        dtype: of the sums.
        device: of the maps.
    """

    def __init__(
        self, num_classes: int, channels: int, dtype: torch.dtype, device: torch.device | str
    ):
        self._sums = torch.zeros(num_classes, channels + 3, dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, maps: Tensor, labels: Tensor, ignore_value: int) -> None:
        """Add the pixels of maps (N, C, h, w), which cover labels (N, H, W)."""
        for image, label in zip(maps.to(self._sums.dtype), labels, strict=True):
            add_class_sums(self._sums, image, label, ignore_value)

    def means(self) -> Tensor:
        """(K, C), nan for a class without pixels, or with one that is not finite."""
        total, weight = self._sums[:, :-3], self._sums[:, -3:-2]
        finite = self._sums.isfinite().all(dim=1, keepdim=True)
        return (total / weight).masked_fill(~finite, torch.nan)


def interpolate_pixels(features: Tensor, size: tuple[int, int], pixels: Tensor) -> Tensor:
    """Some pixels of the bilinearly up-sampled features, without making the others.

    Args:
        features: (C, h, w).
        size: (H, W) to which they are up-sampled.
        pixels: (n,) int64, the wanted ones as y * W + x.

    Returns:
        (n, C).
    """
    features = _two_by_two(features)
    top, down = _cells(size[0], features.shape[1], features)
    left, right = _cells(size[1], features.shape[2], features)
    y, x = pixels // size[1], pixels % size[1]
    top, down, left, right = top[y], down[y], left[x], right[x]
    upper = features[:, top, left] * (1 - right) + features[:, top, left + 1] * right
    lower = features[:, top + 1, left] * (1 - right) + features[:, top + 1, left + 1] * right
    return (upper * (1 - down) + lower * down).t()


def _on_host(tensor: Tensor) -> bool:
    """Whether a value can be asked for without stalling a device's queue."""
    return tensor.device.type == "cpu"


def _two_by_two(features: Tensor) -> Tensor:
    """A grid of at least 2 x 2, so that every pixel lies in a cell of four points."""
    channels, h, w = features.shape
    return features.expand(channels, max(h, 2), max(w, 2)) if min(h, w) == 1 else features


def _cells(size: int, grid: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the centres of ``size`` pixels fall between ``grid`` >= 2 points, as in F.interpolate.

    Returns:
        The first point of each pixel's cell (size,) int64 and the share of the second one
        (size,), of ``align_corners=False`` up- or down-sampling without antialiasing.
    """
    lower, share = places(size, grid, grid / size, torch.float64, like.device)
    first = lower.clamp_max(grid - 2)
    return first, (share + (lower - first)).to(like.dtype)


def _squared_norms(
    features: Tensor, top: Tensor, down: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """|R_up|^2 (H, W) of the bilinearly interpolated features, from products of neighbours.

    Exactly 0 where it is too small to be told from 0.

    Args:
        features: (C, h, w).
        top: (H,) upper row of each pixel's cell, ``down`` (H, 1) the share of the row below it.
        down: see ``top``.
        left: (W,) left column of each pixel's cell, ``right`` (1, W) the share of the next one.
        right: see ``left``.
    """
    own = features.square().sum(dim=0)
    across = (features[:, :, :-1] * features[:, :, 1:]).sum(dim=0)
    below = (features[:, :-1] * features[:, 1:]).sum(dim=0)
    diagonals = (features[:, :-1, :-1] * features[:, 1:, 1:]).sum(dim=0)
    diagonals += (features[:, :-1, 1:] * features[:, 1:, :-1]).sum(dim=0)

    def along(ends: Tensor, mixed: Tensor) -> Tensor:
        """Interpolate the products of two grid rows along x."""
        rest = 1 - right
        return (
            rest.square() * ends[:, left]
            + 2 * rest * right * mixed[:, left]
            + right.square() * ends[:, left + 1]
        )

    same_row = along(own, across)
    two_rows = along(below, diagonals / 2)
    rest = 1 - down
    squared = (
        rest.square() * same_row[top]
        + 2 * rest * down * two_rows[top]
        + down.square() * same_row[top + 1]
    )
    # The interpolated squares bound it. Where the points cancel, there is only rounding left.
    bound = (1 - right) * own[:, left] + right * own[:, left + 1]
    bound = rest * bound[top] + down * bound[top + 1]
    return squared.masked_fill_(squared < 8 * torch.finfo(bound.dtype).eps * bound, 0)
