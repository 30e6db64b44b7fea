"""From the scores of a small map to scores or labels of an image's size, in one interpolation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bilinear import places

# Rows are made and compared a few at a time, as many as stay in the cache of a CPU core.
CACHED_BYTES = 4 * 2**20


def resize_logits(
    logits: Tensor, padded_size: tuple[int, int], size: tuple[int, int], out_size: tuple[int, int]
) -> Tensor:
    """Bring logits from the head's stride to an image's size in one bilinear interpolation.

    Args:
        logits: (K, h, w), covering the padded image.
        padded_size: (H, W) of the padded image.
        size: (H, W) of the image in its upper left corner.
        out_size: (height, width) of the result, which covers the image without its padding.

    Returns:
        (K, height, width) float32.
    """
    # Of channels-last logits torch makes the large map at a fifth of the speed.
    logits = logits[None].float().contiguous()
    if tuple(padded_size) == tuple(size):
        return F.interpolate(logits, size=out_size, mode="bilinear", align_corners=False)[0]
    # The whole map is scaled so that the image alone gets `out_size`; the rest is cut away. The
    # factor is above the exact one by less than float32 resolves, so that the size of the result
    # never rounds to one too few.
    factors = [
        padded / grid * out / valid * (1 + 1e-9)
        for padded, grid, out, valid in zip(
            padded_size, logits.shape[-2:], out_size, size, strict=True
        )
    ]
    resized = F.interpolate(
        logits,
        scale_factor=factors,
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )
    return resized[0, :, : out_size[0], : out_size[1]]


def resize_argmax(
    logits: Tensor, padded_size: tuple[int, int], size: tuple[int, int], out_size: tuple[int, int]
) -> Tensor:
    """``resize_logits(...).argmax(dim=0)``, without ever holding the resized logits.

    The interpolation is done along the rows of the small map first, then between them, for a few
    rows of the result at a time. It differs from :func:`resize_logits` by rounding, so labels can
    differ only where the two best logits are that close.

    Args:
        logits: (K, h, w), covering the padded image.
        padded_size: (H, W) of the padded image.
        size: (H, W) of the image in its upper left corner.
        out_size: (height, width) of the result, which covers the image without its padding.

    Returns:
        (height, width) labels as of :func:`best_class`.
    """
    device = logits.device
    lower, upper, between = positions(logits.shape[1], padded_size[0], size[0], out_size[0])
    left, right, across = (
        x.to(device) for x in positions(logits.shape[2], padded_size[1], size[1], out_size[1])
    )
    between = between.to(device)[:, None, None]
    # (h, K, w): one row's classes together.
    rows = logits.detach().float().transpose(0, 1).contiguous()
    labels = torch.empty(out_size, dtype=label_type(len(logits)), device=device)
    # Memory that is used again for every strip: taking it anew is slower, and lets a process grow.
    wide, neighbours = rows.new_empty(2, 2, len(logits), out_size[1])
    held = [-1, -1]

    def widened(y: int) -> Tensor:
        """Row y at the width of the result, (K, width); it and its neighbour are kept."""
        slot = y % 2
        if held[slot] != y:
            for side, neighbour in zip((left, right), neighbours, strict=True):
                torch.index_select(rows[y], 1, side, out=neighbour)
            torch.lerp(*neighbours, across, out=wide[slot])
            held[slot] = y
        return wide[slot]

    # Rows of the result between the same two rows of the map are made together.
    most = max(1, CACHED_BYTES // (len(logits) * out_size[1] * 4))
    lower, upper = lower.tolist(), upper.tolist()
    strip = rows.new_empty(min(most, out_size[0]), len(logits), out_size[1])
    start = 0
    while start < out_size[0]:
        stop = start + 1
        while stop < min(start + most, out_size[0]) and lower[stop] == lower[start]:
            stop += 1
        scores = strip[: stop - start]
        first, second = widened(lower[start]), widened(upper[start])
        torch.lerp(first, second, between[start:stop], out=scores)
        labels[start:stop] = best_class(scores, dim=1)
        start = stop
    return labels


def resize_rows(
    scores: Tensor,
    vertical: tuple[Tensor, Tensor, Tensor],
    horizontal: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Bilinear interpolation at given places.

    Args:
        scores: (K, h, w).
        vertical: of the rows of the result, as of :func:`positions`.
        horizontal: of its columns.

    Returns:
        (K, rows, columns) float32.
    """
    device, (classes, height, width) = scores.device, scores.shape
    left, right, across = (x.to(device, non_blocking=True) for x in horizontal)
    lower, upper, between = (x.to(device, non_blocking=True) for x in vertical)
    # In two dimensions `index_select` is faster.
    rows = scores.float().reshape(-1, width)
    rows = torch.lerp(rows.index_select(1, left), rows.index_select(1, right), across)
    rows = rows.view(classes, height, -1)
    return torch.lerp(rows.index_select(1, lower), rows.index_select(1, upper), between[:, None])


def best_class(scores: Tensor, dim: int = 0, best: Tensor | None = None) -> Tensor:
    """``argmax`` over the classes, several times faster on a CPU. Overwrites ``scores``.

    Args:
        scores: float32, whose dimension ``dim`` is that of K classes.
        dim: 0 or above.
        best: ``scores.amax(dim)``, if it is known.

    Returns:
        Labels: uint8 up to 255 classes, else int32. Of equal scores the first class wins. Where
        there is a NaN, the label is K, which is no class.
    """
    classes = scores.shape[dim]
    # The first of the best has the largest code. NaN equals nothing, so its code is 0.
    codes = torch.arange(classes, 0, -1, dtype=torch.float32, device=scores.device)
    codes = codes.view(-1, *(1 for _ in scores.shape[dim + 1 :]))
    best = scores.amax(dim=dim, keepdim=True) if best is None else best.unsqueeze(dim)
    code = scores.eq_(best).mul_(codes).amax(dim=dim)
    return code.neg_().add_(classes).to(label_type(classes))


def label_type(classes: int) -> torch.dtype:
    """The type of labels of so many classes, and one more."""
    return torch.uint8 if classes < 256 else torch.int32


def positions(grid: int, padded: int, valid: int, out: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the pixels of a resized image lie in a map, along one axis, as ``F.interpolate`` does.

    Args:
        grid: length of the map.
        padded: length of the image that the map covers.
        valid: the part of it that is resized, from its start.
        out: the length that it is resized to.

    Returns:
        Indices of the two neighbours and the weight of the second, (out,) each, on the CPU.
    """
    lower, share = places(out, grid, grid / padded * valid / out, torch.float32)
    return lower, (lower + 1).clamp_(max=grid - 1), share
