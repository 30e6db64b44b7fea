"""The feature memory M: one vector per class for the whole data set (paper, section 3.2).

Three verbs, in the order of a training step::

    context = memory.read(probabilities)      # Eq. 12, in the forward pass
    memory.observe(features, labels)          # the sums of Eq. 8-10, in the forward pass
    memory.commit(momentum)                   # Eq. 6, after the optimiser step

The forward pass only ever reads ``rows``. ``observe`` adds to sums and ``commit`` turns the sums
of all micro-batches and all processes into one update, so that the memory does not depend on how
the global batch is spread.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

UPDATES = ("cosine", "mean", "zero")


class FeatureMemory(nn.Module):
    """Data-set-level class representations, updated by a moving average (Eq. 6-10, 12).

    Buffers saved in checkpoints:

    - ``rows`` (K, C) float32: the matrix M of the paper. Rows that were never initialised are 0.
    - ``initialized`` (K,) bool: whether a row has been set. A row that happens to be zero is
      initialised if this says so.

    Args:
        num_classes: K, at least 1.
        channels: C, the channels of the features that are observed.
        update: what ``commit`` makes of the observed pixels of a class. ``"cosine"``: Eq. 9-10,
            each pixel weighted by one minus its cosine similarity to the class's row. ``"mean"``:
            all pixels alike (Table 2, without "Cosine"). ``"zero"``: rows stay at zero, a control
            that keeps the network and takes the memory away; ``observe`` and ``commit`` do
            nothing.

    Documented results of the corner cases:

    - a row that was not initialised takes the plain mean of the first pixels that are committed;
    - where the weights of Eq. 10 vanish (every pixel parallel to the row), they are 0/0: the plain
      mean is used instead;
    - the cosine with a zero vector (pixel or row) counts as 0, so such a pixel has weight 1;
    - a class without pixels in the batch keeps its row;
    - a class whose sums are not finite keeps its row.
    """

    def __init__(self, num_classes: int, channels: int, update: str = "cosine"):
        super().__init__()
        if num_classes < 1 or channels < 1:
            raise ValueError(
                f"FeatureMemory needs at least one class and one channel, "
                f"got num_classes={num_classes}, channels={channels}"
            )
        if update not in UPDATES:
            raise ValueError(
                f"FeatureMemory(update={update!r}): expected one of {', '.join(UPDATES)}"
            )
        self.num_classes = num_classes
        self.channels = channels
        self.update = update
        self.register_buffer("rows", torch.zeros(num_classes, channels))
        self.register_buffer("initialized", torch.zeros(num_classes, dtype=torch.bool))
        # Sums over the pixels observed since the last commit, one row per class: C columns of
        # the weighted features, then their weights, their number and their norms.
        self.register_buffer("_sums", torch.zeros(num_classes, channels + 3), persistent=False)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"{self.num_classes}, {self.channels}, update={self.update!r}"

    def read(self, probabilities: Tensor) -> Tensor:
        """Gather the rows by each pixel's class distribution (Eq. 12).

        The weight of a class whose row is not initialised goes to the others in proportion; with
        no initialised row at all the result is zero. Gradients reach ``probabilities`` only.

        Args:
            probabilities: (N, K, h, w), the softmax of H1 over the classes (Eq. 11).

        Returns:
            C'_bi, (N, C, h, w).
        """
        known = self.initialized.to(probabilities.dtype)[:, None, None]
        weights = probabilities * known
        smallest = torch.finfo(weights.dtype).tiny
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(smallest)
        gathered = self.rows.t().to(weights.dtype) @ weights.flatten(2)
        return gathered.unflatten(2, probabilities.shape[-2:])

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor, ignore_value: int = 255) -> None:
        """Add the pixels of this batch to the sums of Eq. 8-10.

        The result is that of up-sampling ``features`` bilinearly (``align_corners=False``) to the
        size of ``labels`` and summing over the pixels of each class, but nothing of size
        C x H x W is made: see :func:`_add_class_sums`.

        Args:
            features: R', (N, C, h, w), any float type; summed in the type of ``rows``.
            labels: (N, H, W) integers. Pixels equal to ``ignore_value`` or outside 0..K-1 are
                left out.
            ignore_value: the label of pixels without ground truth.
        """
        if self.update == "zero":
            return
        if features.dim() != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"observe: features of shape {tuple(features.shape)}, "
                f"expected (N, {self.channels}, h, w)"
            )
        if labels.dim() != 3 or len(labels) != len(features):
            raise ValueError(
                f"observe: labels of shape {tuple(labels.shape)}, expected ({len(features)}, H, W)"
            )
        directions = None
        if self.update == "cosine":
            directions = _unit_rows(self.rows)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.rows.dtype)
            for image, label in zip(features, labels, strict=True):
                _add_class_sums(self._sums, image, label, directions, ignore_value)

    @torch.no_grad()
    def commit(self, momentum: float) -> None:
        """Update the rows by the observed pixels of all processes (Eq. 6), and clear the sums.

        A collective operation: every process of the default group must call it, whether it has
        observed anything or not. The sums of all processes are added in one all-reduce, so every
        process ends with the same rows.

        Args:
            momentum: m of Eq. 6, 0..1; the share of the new representation.
        """
        if self.update == "zero":
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        weighted, (weight, count, length) = self._sums[:, :-3], self._sums[:, -3:].t()
        finite = self._sums.isfinite().all(dim=1)
        seen = (count > 0) & finite

        # Eq. 10. Rounding leaves a cosine of one at 1 - 1e-7, hence the bound.
        vanishing = weight <= 8 * torch.finfo(weight.dtype).eps * count
        average = weighted / weight.clamp_min(torch.finfo(weight.dtype).tiny)[:, None]
        # Pixels parallel to the row: their mean is the row, brought to their mean length.
        parallel = _unit_rows(self.rows) * (length / count.clamp_min(1))[:, None]
        target = torch.where(vanishing[:, None], parallel, average)

        # Eq. 6; a row seen for the first time is set.
        moved = torch.where(
            self.initialized[:, None], self.rows + momentum * (target - self.rows), target
        )
        self.rows.copy_(torch.where(seen[:, None], moved, self.rows))
        self.initialized.logical_or_(seen)
        self._sums.zero_()

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Flags without their rows (left out for another shape) would declare zeros initialised.
        if f"{prefix}rows" not in state_dict:
            state_dict.pop(f"{prefix}initialized", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.update == "zero":
            self.rows.zero_()
            self.initialized.zero_()

    @torch.no_grad()
    def initialize(self, rows: Tensor, found: Tensor) -> None:
        """Set the rows of the classes in ``found`` that are not initialised yet.

        Args:
            rows: (K, C), one representation per class.
            found: (K,) bool, which of them to take.
        """
        if self.update == "zero":
            return
        take = found & ~self.initialized
        self.rows.copy_(torch.where(take[:, None], rows.to(self.rows), self.rows))
        self.initialized.logical_or_(take)


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows brought to length one; zero rows stay zero."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _add_class_sums(
    sums: Tensor, features: Tensor, labels: Tensor, directions: Tensor | None, ignore_value: int
) -> None:
    """Add one image's class sums to ``sums`` without up-sampling its features.

    Bilinear up-sampling is linear: pixel i is ``sum_n u[i, n] R[n]`` over four grid points n. So

    - its product with a row is the same combination of ``R^T M`` at those four points;
    - its squared norm is a quadratic form in the products of neighbouring grid points, of which
      there are five kinds: itself, right, below, and the two diagonals of a cell;
    - ``sum_i w_i R_up[i] = sum_n A[k, n] R[n]`` with ``A[k, n] = sum_i w_i u[i, n]`` over the
      pixels i of class k: four scatter-adds of one number per pixel, and one matrix product.

    Args:
        sums: (K, C + 3), changed in place.
        features: (C, h, w) in the type of ``sums``.
        labels: (H, W) integers.
        directions: (K, C), the rows at length one (zero where there is none), or None for equal
            weights.
        ignore_value: label to leave out.
    """
    num_classes = len(sums)
    channels, h, w = features.shape
    # A grid of at least 2 x 2, so that every pixel lies in a cell of four points.
    if h == 1 or w == 1:
        features = features.expand(channels, max(h, 2), max(w, 2))
        h, w = features.shape[1:]
    flat = features.flatten(1)

    labels = labels.long()
    known = (labels >= 0) & (labels < num_classes) & (labels != ignore_value)
    index = torch.where(known, labels, num_classes)
    # Work with the classes that occur. Finding them needs the host, which costs nothing on the
    # CPU; on an accelerator it would stall the queue, and all K classes are taken instead.
    if index.device.type == "cpu":
        present = index.flatten().bincount(minlength=num_classes + 1)[:num_classes].nonzero()[:, 0]
        position = index.new_full((num_classes + 1,), len(present))
        position[present] = torch.arange(len(present))
        index = position[index]
    else:
        present = torch.arange(num_classes, device=index.device)
    bins = len(present)  # bin number `bins` takes the pixels that are left out

    top, down = _cells(labels.shape[0], h, features)
    left, right = _cells(labels.shape[1], w, features)
    corner = (index * (h * w) + top[:, None] * w + left).flatten()
    down, right = down[:, None], right[None, :]
    shifts = (0, 1, w, w + 1)  # upper left, upper right, lower left, lower right
    shares = ((1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right)

    norm = _squared_norms(features, top, down, left, right).clamp_min_(0).sqrt_()
    if directions is None:
        weight = torch.ones_like(norm)
    else:
        products = torch.zeros((bins + 1) * h * w + w + 1, dtype=flat.dtype, device=flat.device)
        products[: bins * h * w] = (directions[present] @ flat).flatten()
        dot = torch.zeros_like(norm)
        for shift, share in zip(shifts, shares, strict=True):
            dot += share * products[shift:].index_select(0, corner).view_as(norm)
        cosine = dot / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        weight = (1 - cosine).clamp_min_(0)  # Eq. 10; never negative by rounding

    spread = torch.zeros((bins + 1) * h * w + w + 1, dtype=flat.dtype, device=flat.device)
    for shift, share in zip(shifts, shares, strict=True):
        spread[shift:].index_add_(0, corner, (weight * share).flatten())
    spread = spread[: bins * h * w].view(bins, h * w)

    totals = torch.zeros(3, bins + 1, dtype=flat.dtype, device=flat.device)
    index = index.flatten()
    totals[1].index_add_(0, index, torch.ones_like(norm).flatten())
    totals[2].index_add_(0, index, norm.flatten())
    totals[0, :bins] = spread.sum(dim=1)
    sums.index_add_(0, present, torch.cat([spread @ flat.t(), totals[:, :bins].t()], dim=1))


def _cells(size: int, grid: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where the centres of ``size`` pixels fall between ``grid`` >= 2 points, as in F.interpolate.

    Returns:
        The first point of each pixel's cell (size,) int64 and the share of the second one
        (size,), of ``align_corners=False`` up- or down-sampling without antialiasing.
    """
    pixel = torch.arange(size, dtype=torch.float64, device=like.device)
    place = ((pixel + 0.5) * (grid / size) - 0.5).clamp(0, grid - 1)
    first = place.long().clamp_max(grid - 2)
    return first, (place - first).to(like.dtype)


def _squared_norms(
    features: Tensor, top: Tensor, down: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    """|R_up|^2 (H, W) of the bilinearly interpolated features, from products of neighbours.

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
    return (
        rest.square() * same_row[top]
        + 2 * rest * down * two_rows[top]
        + down.square() * same_row[top + 1]
    )
