"""Boundary IoU (Cheng et al., "Boundary IoU", CVPR 2021), for label maps of many classes."""

import torch
import torch.nn.functional as F
from torch import Tensor

DILATION_RATIO = 0.02


def boundaries(labels: Tensor, num_classes: int) -> Tensor:
    """Keep the pixels near the contour of their own class; all others become ``num_classes``.

    The boundary region of a mask is its pixels within d of its contour: those that an erosion by a
    square of side 2 d + 1 removes, with nothing but background around the image. d is 0.02 of the
    image's diagonal, rounded, at least 1. A pixel survives the erosion of its own class's mask
    exactly where its window has no other label, so the erosions of all classes are one comparison
    of a sliding maximum with a sliding minimum.

    Args:
        labels: (H, W) integers 0..K, K for pixels in no mask.
        num_classes: K.

    Returns:
        (H, W) of the same type.
    """
    height, width = labels.shape
    distance = max(1, round(DILATION_RATIO * (height**2 + width**2) ** 0.5))
    padded = F.pad(labels, (distance,) * 4, value=-1)
    side = 2 * distance + 1
    largest = _sliding_maximum(_sliding_maximum(padded, side, 0), side, 1)
    smallest = -_sliding_maximum(_sliding_maximum(-padded, side, 0), side, 1)
    return torch.where(largest == smallest, num_classes, labels)


def _sliding_maximum(x: Tensor, side: int, dim: int) -> Tensor:
    """Maxima of all windows of ``side`` along ``dim``, from windows twice as long each time."""
    covered = 1
    while covered < side:
        step = min(covered, side - covered)
        count = x.shape[dim] - step
        x = torch.maximum(x.narrow(dim, 0, count), x.narrow(dim, step, count))
        covered += step
    return x
