"""Where pixels lie between the points of a map, in bilinear interpolation."""

import torch
from torch import Tensor


def places(
    size: int, grid: int, scale: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The neighbours of pixels along one axis, as ``F.interpolate(align_corners=False)`` has them.

    Args:
        size: number of pixels.
        grid: number of points.
        scale: points per pixel, ``grid / size`` if both cover the same.
        dtype: what it is computed in.
        device: of the result.

    Returns:
        Of each pixel the point before it (size,) int64, and the share of the one behind it
        (size,), which is 0 where there is none.
    """
    place = torch.arange(size, dtype=dtype, device=device)
    place = ((place + 0.5) * scale - 0.5).clamp_(0, grid - 1)
    lower = place.long()
    return lower, place - lower
