"""Cross-entropy of logits that are resized to their labels, without the resized logits.

Labels are several times as large as the logits of a network, whose up-sampling and whose gradient
take more memory than anything else in a training step. Here tiles of a fixed number of bytes are
up-sampled one after the other, and each is brought back to the gradient at the size of the logits
in the same turn. Nothing of size K x H x W is ever made.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bilinear import places
from .labels import classes_of

# The bytes of a tile and its largest width in pixels. On a CPU a tile stays in the cache; others
# want enough work for each of their kernels.
HOST_TILE = (5 * 2**19, 128)
DEVICE_TILE = (2**25, 2048)
# Of a head's predictions: see PixelLoss.
LOSSES = ("cross_entropy", "ohem")


class PixelLoss(nn.Module):
    """The loss of the predictions of pixels, with what is the same for all predictions of a head.

    Args:
        kind: ``cross_entropy``, over all valid pixels (:func:`resized_cross_entropy`), or ``ohem``,
            over the hard ones of each prediction alone (:func:`hard_pixels_cross_entropy`).
        class_weights: K weights of the classes; empty for equal ones.
        ignore_value: label of pixels without ground truth.
        threshold: of ``ohem``, the probability below which a pixel is hard.
        min_kept: of ``ohem``, the least number of pixels in a batch of one process.
    """

    def __init__(
        self,
        kind: str = "cross_entropy",
        class_weights: Sequence[float] = (),
        ignore_value: int = 255,
        threshold: float = 0.7,
        min_kept: int = 100_000,
    ):
        super().__init__()
        self.kind = kind
        self.ignore_value = ignore_value
        self.threshold = threshold
        self.min_kept = min_kept
        weights = torch.tensor(class_weights, dtype=torch.float32) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of logits (N, K, h, w) at the size of targets (N, H, W); an average (Eq. 16, 18)."""
        arguments = (logits, targets, self.class_weights, self.ignore_value)
        if self.kind == "ohem":
            return hard_pixels_cross_entropy(*arguments, self.threshold, self.min_kept)
        return resized_cross_entropy(*arguments)


def resized_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, ignore_value: int = 255
) -> Tensor:
    """Cross-entropy of bilinearly resized logits, averaged over the valid pixels.

    With z = ``F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)``, the
    labels y and the class weights w, over the pixels i whose label is valid::

        - sum_i w_{y_i} log softmax(z_i)_{y_i} / sum_i w_{y_i}

    It is differentiable once, in the logits. The gradient is made in the forward pass, and takes
    the memory of the logits.

    Args:
        logits: (N, K, h, w), any float type; it is computed in float32, or in float64 for that.
        labels: (N, H, W) class ids of any integer type. Pixels equal to ``ignore_value`` or outside
            0..K-1 are not valid.
        weight: (K,) of the classes; None for equal ones. Constants.
        ignore_value: label of pixels without ground truth.

    Returns:
        A 0-d tensor of the type it is computed in; 0, with a gradient of 0, without valid pixels.

    Raises:
        ValueError: shapes or types are others.
    """
    index, valid = _classes(logits, labels, ignore_value)
    return _mean_loss(logits, index, valid, weight)


def hard_pixels_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore_value: int = 255,
    threshold: float = 0.7,
    min_kept: int = 100_000,
) -> Tensor:
    """:func:`resized_cross_entropy` over the hard pixels alone (online hard example mining).

    Shrivastava, Gupta and Girshick (CVPR 2016) train on the regions with the largest losses. For
    pixels it is done as in the public code of OCNet and HRNet, whose values are the defaults: those
    are hard to whose own class the network gives less than ``threshold``; if they are fewer than
    ``min_kept``, the so many pixels with the largest losses are taken. Both are counted over the
    batch of this process.

    Args:
        logits: see :func:`resized_cross_entropy`.
        labels: see :func:`resized_cross_entropy`.
        weight: see :func:`resized_cross_entropy`; it has no say in what is hard.
        ignore_value: see :func:`resized_cross_entropy`.
        threshold: probability, 0..1.
        min_kept: number of pixels; with fewer valid ones all are taken.

    Returns:
        See :func:`resized_cross_entropy`.

    Raises:
        ValueError: see :func:`resized_cross_entropy`.
    """
    index, valid = _classes(logits, labels, ignore_value)
    if min_kept < index.numel():
        losses, _ = _pixel_losses(logits, index)
        losses.masked_fill_(~valid, -torch.inf)
        # What is no number must be seen in the mean.
        hard = ~(losses <= (-math.log(threshold) if threshold > 0 else torch.inf))
        if min_kept > 0:
            hard |= losses >= losses.flatten().kthvalue(losses.numel() - min_kept + 1).values
        valid &= hard
    return _mean_loss(logits, index, valid, weight)


def resized_pixel_losses(logits: Tensor, labels: Tensor, ignore_value: int = 255) -> Tensor:
    """The cross-entropy of each pixel, (N, H, W), 0 where it is not valid; without a gradient.

    Args:
        logits: see :func:`resized_cross_entropy`.
        labels: see :func:`resized_cross_entropy`.
        ignore_value: see :func:`resized_cross_entropy`.
    """
    index, valid = _classes(logits, labels, ignore_value)
    losses, _ = _pixel_losses(logits, index)
    return losses.masked_fill_(~valid, 0)


def _classes(logits: Tensor, labels: Tensor, ignore_value: int) -> tuple[Tensor, Tensor]:
    """The class of each pixel (N, H, W) int64, 0 where it is not valid, and whether it is."""
    if logits.dim() != 4 or not logits.is_floating_point() or 0 in logits.shape[1:]:
        raise ValueError(
            f"logits are {logits.dtype} of shape {tuple(logits.shape)}, "
            f"expected floats (N, K, h, w)"
        )
    whole = not (labels.is_floating_point() or labels.is_complex())
    if labels.dim() != 3 or len(labels) != len(logits) or not whole:
        raise ValueError(
            f"labels are {labels.dtype} of shape {tuple(labels.shape)}, "
            f"expected integers ({len(logits)}, H, W)"
        )
    index, valid = classes_of(labels, logits.shape[1], ignore_value)
    return index.masked_fill_(~valid, 0), valid


def _computed_in(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _mean_loss(logits: Tensor, index: Tensor, valid: Tensor, weight: Tensor | None) -> Tensor:
    """The mean over the valid pixels by their classes' weights, with its gradient if wanted."""
    weights = valid.to(_computed_in(logits))
    if weight is not None:
        if weight.shape != logits.shape[1:2] or weight.requires_grad:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} and requires_grad {weight.requires_grad}, "
                f"expected {logits.shape[1]} constants"
            )
        weights *= weight.to(weights)[index]
    weights /= weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
    if torch.is_grad_enabled() and logits.requires_grad:
        return _WeightedLoss.apply(logits, index, weights)
    return _weighted(_pixel_losses(logits, index)[0], weights)


def _weighted(losses: Tensor, weights: Tensor) -> Tensor:
    # What is left out may be no number.
    return losses.mul_(weights).masked_fill_(weights == 0, 0).sum()


class _WeightedLoss(torch.autograd.Function):
    """sum_i weights_i loss_i, whose gradient is there when the loss is."""

    @staticmethod
    def forward(ctx, logits: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        losses, gradient = _pixel_losses(logits, index, weights)
        # In the type it was computed in: a gradient scaler's factor comes with the backward pass,
        # and without it float16 would round small gradients to zero.
        ctx.save_for_backward(gradient, logits)
        return _weighted(losses, weights)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        gradient, logits = ctx.saved_tensors
        with torch.no_grad():
            gradient = (gradient * grad).to(logits.dtype).permute(0, 3, 1, 2)
        if torch.is_grad_enabled():  # create_graph
            gradient = _Once.apply(gradient, logits, grad)
        return gradient, None, None


class _Once(torch.autograd.Function):
    """The gradient, which has no derivative that could be asked for."""

    @staticmethod
    def forward(ctx, gradient: Tensor, *depends: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        raise RuntimeError(
            "the cross-entropy of resized logits was differentiated twice, but its gradient is a "
            "number made in the forward pass; take F.cross_entropy(F.interpolate(logits, ...)) "
            "for second derivatives"
        )


@torch.no_grad()
def _pixel_losses(
    logits: Tensor, index: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The loss of each pixel, and the gradient of their weighted sum.

    Args:
        logits: (N, K, h, w).
        index: (N, H, W) int64, the class of each pixel.
        weights: (N, H, W) of the type that is computed in; None: no gradient.

    Returns:
        Losses (N, H, W), and the gradient with the classes last, (N, h, w, K), or None.
    """
    dtype, device = _computed_in(logits), logits.device
    batch, classes, *grid = logits.shape
    size = index.shape[1:]
    losses = torch.empty(index.shape, dtype=dtype, device=device)
    gradient = None
    if weights is not None:
        gradient = torch.zeros(batch, *grid, classes, dtype=dtype, device=device)
    on_host = _on_host(logits)
    limit, width = HOST_TILE if on_host else DEVICE_TILE
    pixels = max(1, limit // (classes * losses.itemsize))
    width = min(width, pixels)
    # Where maps are made smaller, the rows of the map that are stretched are more than the pixels.
    height = max(1, pixels // (width * max(1, -(-grid[0] // max(1, size[0])))))
    columns = list(_pieces(size[1], grid[1], width, dtype, device))
    room = _Room(dtype, device)
    with torch.autocast(device.type, enabled=False):
        for rows in _pieces(size[0], grid[0], height, dtype, device):
            for image in range(batch):
                classes_last = logits[image, :, rows.points].permute(1, 2, 0).to(dtype).contiguous()
                for piece in columns:
                    pixels = (image, rows.pixels, piece.pixels)
                    wide = piece.interpolate(classes_last[:, piece.points], 1, room)
                    scores = rows.interpolate(wide, 0, room).flatten(0, 1)
                    own = index[pixels].reshape(-1, 1)
                    of_pixels, shares = _softmax(scores, own, room, on_host)
                    losses[pixels] = of_pixels.view_as(losses[pixels])
                    if gradient is None:
                        continue
                    # The gradient of z is w (softmax(z) - onehot(y)); that of the logits is it
                    # transposed through the two interpolations.
                    factors = weights[pixels].reshape(-1, 1)
                    shares.mul_(factors).scatter_add_(1, own, -factors)
                    shares = rows.spread @ shares.view(rows.spread.shape[1], -1)
                    shares = shares.view(len(shares), -1, classes)
                    gradient[image, rows.points, piece.points] += piece.spread @ shares
    return losses, gradient


def _softmax(scores: Tensor, own: Tensor, room: "_Room", on_host: bool) -> tuple[Tensor, Tensor]:
    """-log softmax at the class ``own`` (n, 1), and the softmax (n, K), of scores (n, K)."""
    shares = room.take("shares", scores.shape)
    if on_host:
        torch.softmax(scores, 1, out=shares)
        of_own = shares.gather(1, own)
        # What is too small for its logarithm is looked for where that costs no waiting.
        if not bool((of_own < 1e3 * torch.finfo(scores.dtype).tiny).any()):
            return of_own.log_().neg_(), shares
        return scores.log_softmax(dim=1).gather(1, own).neg_(), shares
    torch.log_softmax(scores, 1, out=shares)
    return shares.gather(1, own).neg_(), shares.exp_()


class _Room:
    """Memory that is used again for each tile, which the cache then has already."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.like = torch.empty(0, dtype=dtype, device=device)
        self.of: dict[str, Tensor] = {}

    def take(self, what: str, shape: tuple[int, ...]) -> Tensor:
        """A contiguous tensor, of any content; the one of the same name is given up."""
        count = math.prod(shape)
        if what not in self.of or self.of[what].numel() < count:
            self.of[what] = self.like.new_empty(count)
        return self.of[what][:count].view(shape)


def _on_host(tensor: Tensor) -> bool:
    """Whether a value can be asked for without stalling a device's queue."""
    return tensor.device.type == "cpu"


@dataclass(frozen=True)
class _Piece:
    """Some neighbouring pixels of one axis, and the points of the grid that they lie between.

    Attributes:
        pixels: which.
        points: which.
        lower: of each pixel, the point before it, counted from the first one.
        upper: the point behind it.
        share: of the point behind it.
        spread: the interpolation's matrix transposed, (points, pixels).
    """

    pixels: slice
    points: slice
    lower: Tensor
    upper: Tensor
    share: Tensor
    spread: Tensor

    def interpolate(self, maps: Tensor, dim: int, room: _Room) -> Tensor:
        """The pixels from the points, along one dimension of (., ., K)."""
        shape = (*maps.shape[:dim], len(self.share), *maps.shape[dim + 1 :])
        lower, upper = room.take(f"lower {dim}", shape), room.take(f"upper {dim}", shape)
        torch.index_select(maps, dim, self.lower, out=lower)
        torch.index_select(maps, dim, self.upper, out=upper)
        share = self.share.view(-1, *(1 for _ in shape[dim + 1 :]))
        return torch.lerp(lower, upper, share, out=lower)


def _pieces(
    size: int, grid: int, length: int, dtype: torch.dtype, device: torch.device
) -> Iterator[_Piece]:
    """``size`` pixels between ``grid`` points, as ``F.interpolate`` lays them, in pieces."""
    lower, share = places(size, grid, grid / size, dtype, device)
    # The same again where the host can read it.
    firsts = places(size, grid, grid / size, dtype)[0].tolist()
    for start in range(0, size, length):
        pixels = slice(start, min(start + length, size))
        first = firsts[start]
        stop = min(firsts[pixels.stop - 1] + 2, grid)
        before = lower[pixels] - first
        after = (before + 1).clamp_max(stop - first - 1)
        part = share[pixels]
        spread = torch.zeros(stop - first, len(part), dtype=dtype, device=device)
        spread.scatter_add_(0, before[None], 1 - part[None])
        spread.scatter_add_(0, after[None], part[None])
        yield _Piece(pixels, slice(first, stop), before, after, part, spread)
