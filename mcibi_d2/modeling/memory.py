"""The feature memory M: one vector per class for the whole data set (paper, section 3.2).

Three verbs, in the order of a training step::

    context = memory.read(probabilities)      # Eq. 12, in the forward pass
    memory.observe(features, labels)          # the sums of Eq. 8-10, in the forward pass
    memory.commit(momentum)                   # Eq. 6, after the optimiser step

The forward pass only ever reads ``rows``. ``observe`` adds to sums and ``commit`` turns the sums
of all micro-batches and all processes into one update, so that the memory does not depend on how
the global batch is spread.
"""

import logging

import torch
import torch.distributed as dist
from torch import Tensor, nn

# Rows that commit moves; rows that it leaves to others.
MOVING = ("cosine", "mean")
UPDATES = (*MOVING, "zero", "random", "learned")
# Batches that are observed without a commit before that is said: more than gradients are
# accumulated over.
MAX_WAITING = 32


class FeatureMemory(nn.Module):
    """Data-set-level class representations, updated by a moving average (Eq. 6-10, 12).

    Tensors saved in checkpoints:

    - ``rows`` (K, C) float32: the matrix M of the paper. Rows that were never initialised are 0.
      With S slots per class it is (K * S, C), slot s of class k in row k * S + s.
    - ``initialized`` (K,) or (K * S,) bool: whether a row has been set. A row that happens to be
      zero is initialised if this says so.

    Args:
        num_classes: K, at least 1.
        channels: C, the channels of the features that are observed.
        update: where the rows come from.

            - ``"cosine"``: Eq. 9-10, each pixel weighted by one minus its cosine similarity to the
              row. ``"mean"``: all pixels alike (Table 2, without "Cosine").
            - Controls, which keep the network and take away what the paper's memory is.
              ``"zero"``: rows stay zero. ``"random"``: rows are frozen as :meth:`draw` gives them.
              ``"learned"``: rows are parameters, which ``commit`` initialises and the optimiser
              trains.
        renormalize: whether the weight of a class without a row goes to the others in
            :meth:`read`.
        slots: S, rows per class. A pixel belongs to its class's most similar slot; a slot without
            pixels keeps its row. Empty slots are filled one per commit, each by the mean of the
            class's pixels.

    Documented results of the corner cases:

    - a row that was not initialised takes the plain mean of the first pixels that are committed;
    - where the weights of Eq. 10 vanish (every pixel parallel to the row), they are 0/0: the plain
      mean is used instead;
    - the cosine with a zero vector (pixel or row) counts as 0, so such a pixel has weight 1; so
      does a pixel between grid points that cancel each other to what rounding leaves;
    - a class without pixels in the batch keeps its row;
    - a class keeps its row if one of its pixels lies between grid points of which one is not
      finite (or too large to be squared), and ``rejected`` says so until the next ``commit``;
      other classes are not touched by it.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        update: str = "cosine",
        slots: int = 1,
        renormalize: bool = True,
    ):
        super().__init__()
        if min(num_classes, channels, slots) < 1:
            raise ValueError(
                f"FeatureMemory needs at least one class, channel and slot, got "
                f"num_classes={num_classes}, channels={channels}, slots={slots}"
            )
        if update not in UPDATES:
            raise ValueError(
                f"FeatureMemory(update={update!r}): expected one of {', '.join(UPDATES)}"
            )
        self.num_classes = num_classes
        self.channels = channels
        self.update = update
        self.slots = slots
        self.renormalize = renormalize
        count = num_classes * slots
        rows = torch.zeros(count, channels)
        if update == "learned":
            self.rows = nn.Parameter(rows)
        else:
            self.register_buffer("rows", rows)
        self.register_buffer("initialized", torch.zeros(count, dtype=torch.bool))
        # Sums over the pixels observed since the last commit, one row per row: C columns of the
        # weighted features, then their weights, their number and their norms.
        self.register_buffer("_sums", torch.zeros(count, channels + 3), persistent=False)
        # (K * S,) bool: rows that the last commit left alone because a pixel was not finite.
        self.register_buffer("rejected", torch.zeros(count, dtype=torch.bool), persistent=False)
        # Batches that were observed since the last commit.
        self._waiting = 0
        # Whether was said, once each, that nothing is committed, and that there are no rows.
        self._said_waiting = self._said_empty = False
        # Whether it was looked for rows since the weights were loaded.
        self._looked = False
        if update == "random":
            self.draw(0)

    def extra_repr(self) -> str:
        """Describe the module in ``print(model)``."""
        return f"{self.num_classes}, {self.channels}, update={self.update!r}, slots={self.slots}"

    @property
    def classes(self) -> Tensor:
        """The class of each row, (K * S,) int64."""
        classes = torch.arange(self.num_classes, device=self.rows.device)
        return classes.repeat_interleave(self.slots)

    def read(self, probabilities: Tensor) -> Tensor:
        """Gather the rows by each pixel's class distribution (Eq. 12).

        The weight of a class whose row is not initialised goes to the others in proportion, or is
        lost without ``renormalize`` (the row counts as zero); with no initialised row at all the
        result is zero. Gradients reach ``probabilities``, and the
        rows where they are learned.

        Args:
            probabilities: (N, K, h, w), the softmax of H1 over the classes (Eq. 11).

        Returns:
            C'_bi, (N, C, h, w). With S slots (N, S * C, h, w): one such map per slot, each from
            the rows of that slot alone.
        """
        slots = self.slots
        gathered = [
            _gather(
                self.rows[slot::slots],
                self.initialized[slot::slots],
                probabilities,
                self.renormalize,
            )
            for slot in range(slots)
        ]
        return gathered[0] if slots == 1 else torch.cat(gathered, dim=1)

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
        if self.update in ("zero", "random"):
            return
        if torch.finfo(self.rows.dtype).bits < 32:
            raise ValueError(
                f"observe: the rows are {self.rows.dtype}, expected float32: sums over pixels "
                f"are not exact in half precision"
            )
        if features.dim() != 4 or features.shape[1] != self.channels:
            raise ValueError(
                f"observe: features of shape {tuple(features.shape)}, "
                f"expected (N, {self.channels}, h, w)"
            )
        if labels.dim() != 3 or len(labels) != len(features):
            raise ValueError(
                f"observe: labels of shape {tuple(labels.shape)}, expected ({len(features)}, H, W)"
            )
        directions = vacant = None
        if self.update == "cosine" or self.slots > 1:
            directions = _unit_rows(self.rows).view(self.num_classes, self.slots, -1)
        if self.slots > 1:
            empty = ~self.initialized.view(self.num_classes, self.slots)
            vacant = empty & (empty.cumsum(dim=1) == 1)
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.rows.dtype)
            for image, label in zip(features, labels, strict=True):
                _add_class_sums(
                    self._sums,
                    image,
                    label,
                    ignore_value,
                    directions,
                    vacant,
                    weighted=self.update == "cosine",
                )
        if not torch.compiler.is_compiling():
            self._waiting += 1
            if self._waiting > MAX_WAITING and not self._said_waiting:
                self._said_waiting = True
                logging.getLogger(__name__).warning(
                    f"The feature memory has observed {self._waiting} batches, and none was "
                    f"committed: its rows never change. Register mcibi_d2.engine.MemoryUpdateHook "
                    f"with the trainer, or call commit() after the optimiser's step."
                )

    @torch.no_grad()
    def commit(self, momentum: float) -> None:
        """Update the rows by the observed pixels of all processes (Eq. 6), and clear the sums.

        A collective operation: every process of the default group must call it, whether it has
        observed anything or not. The sums of all processes are added in one all-reduce, so every
        process ends with the same rows. Learned rows are initialised, but not moved.

        Args:
            momentum: m of Eq. 6, 0..1; the share of the new representation.
        """
        self._waiting = 0
        if self.update in ("zero", "random"):
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        weighted, (weight, count, length) = self._sums[:, :-3], self._sums[:, -3:].t()
        finite = self._sums.isfinite().all(dim=1)
        self.rejected.copy_(~finite)
        seen = (count > 0) & finite

        # Eq. 10. Rounding leaves a cosine of one at 1 - 1e-7, hence the bound.
        vanishing = weight <= 8 * torch.finfo(weight.dtype).eps * count
        average = weighted / weight.clamp_min(torch.finfo(weight.dtype).tiny)[:, None]
        # Pixels parallel to the row: their mean is the row, brought to their mean length.
        parallel = _unit_rows(self.rows) * (length / count.clamp_min(1))[:, None]
        target = torch.where(vanishing[:, None], parallel, average)

        # Eq. 6; a row seen for the first time is set.
        moved = self.rows + momentum * (target - self.rows) if self.update in MOVING else self.rows
        moved = torch.where(self.initialized[:, None], moved, target)
        self.rows.copy_(torch.where(seen[:, None], moved, self.rows))
        self.initialized.logical_or_(seen)
        self._sums.zero_()

    @torch.no_grad()
    def initialize(self, rows: Tensor, found: Tensor) -> None:
        """Set the rows in ``found`` that are not initialised yet.

        Args:
            rows: like ``self.rows``; those that are not finite are not taken.
            found: like ``self.initialized``, which of them to take.
        """
        if self.update == "zero":
            return
        take = found & ~self.initialized & rows.isfinite().all(dim=1)
        self.rows.copy_(torch.where(take[:, None], rows.to(self.rows), self.rows))
        self.initialized.logical_or_(take)

    @torch.no_grad()
    def draw(self, seed: int) -> None:
        """Set all rows to the positive part of normally distributed numbers, as a ReLU gives them.

        Args:
            seed: of the draw, which is the same on every process and device.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(self.rows.shape, generator=generator, device="cpu").relu()
        self.rows.copy_(rows)
        self.initialized.fill_(True)

    def warn_if_empty(self) -> None:
        """Say once that no row was ever initialised; for what is not training.

        It asks the device at the first call after the weights were loaded, and not again.
        """
        if self._looked or self.update == "zero" or self.initialized.is_meta:
            return
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if self.initialized.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._looked = True
        if not self._said_empty and not self.initialized.any():
            self._said_empty = True
            logging.getLogger(__name__).warning(
                "The feature memory of this model was never initialised: all of its rows are zero, "
                "and what is predicted makes no use of it. Was it trained without "
                "mcibi_d2.engine.MemoryInitHook and MemoryUpdateHook, or are its weights not "
                "loaded?"
            )

    @torch.no_grad()
    def health(self) -> dict[str, Tensor]:
        """How the memory is doing, as scalars on its device.

        Returns:
            ``initialized``: the share of initialised rows; ``row_norm``: their mean length;
            ``cosine``: the mean cosine between initialised rows of different classes, 0 where
            there is one class.
        """
        known = self.initialized.to(self.rows.dtype)
        units = (_unit_rows(self.rows) * known[:, None]).view(self.num_classes, self.slots, -1)
        per_class, count = units.sum(dim=1), known.view(self.num_classes, self.slots).sum(dim=1)
        # Over all pairs of rows, less the pairs within a class.
        products = per_class.sum(dim=0).square().sum() - per_class.square().sum()
        pairs = count.sum().square() - count.square().sum()
        norms = self.rows.norm(dim=1) * known
        return {
            "initialized": known.mean(),
            "row_norm": norms.sum() / known.sum().clamp_min(1),
            "cosine": products / pairs.clamp_min(1),
        }

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # Flags without their rows (left out for another shape) would declare zeros initialised.
        if f"{prefix}rows" not in state_dict:
            state_dict.pop(f"{prefix}initialized", None)
        self._looked = False
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.update == "zero":
            self.rows.zero_()
            self.initialized.zero_()


def _gather(rows: Tensor, initialized: Tensor, probabilities: Tensor, renormalize: bool) -> Tensor:
    """Eq. 12 over the initialised ones of K rows (K, C): (N, K, h, w) -> (N, C, h, w)."""
    weights = probabilities * initialized.to(probabilities.dtype)[:, None, None]
    if renormalize:
        total = weights.sum(dim=1, keepdim=True)
        weights = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
    # With the channels last, as the network has them.
    gathered = weights.flatten(2).transpose(1, 2) @ rows.to(weights.dtype)
    return gathered.transpose(1, 2).unflatten(2, probabilities.shape[-2:])


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows brought to length one; zero rows stay zero."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def _add_class_sums(
    sums: Tensor,
    features: Tensor,
    labels: Tensor,
    ignore_value: int,
    directions: Tensor | None,
    vacant: Tensor | None,
    weighted: bool,
) -> None:
    """Add one image's class sums to ``sums`` without up-sampling its features.

    Bilinear up-sampling is linear: pixel i is ``sum_n u[i, n] R[n]`` over four grid points n. So

    - its product with a row is the same combination of ``R^T M`` at those four points;
    - its squared norm is a quadratic form in the products of neighbouring grid points, of which
      there are five kinds: itself, right, below, and the two diagonals of a cell;
    - ``sum_i w_i R_up[i] = sum_n A[k, n] R[n]`` with ``A[k, n] = sum_i w_i u[i, n]`` over the
      pixels i of class k: four scatter-adds of one number per pixel, and one matrix product.

    Args:
        sums: (K * S, C + 3), changed in place.
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

    labels = labels.long()
    known = (labels >= 0) & (labels < num_classes) & (labels != ignore_value)
    index = torch.where(known, labels, num_classes)
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
    pixel = torch.arange(size, dtype=torch.float64, device=like.device)
    place = ((pixel + 0.5) * (grid / size) - 0.5).clamp(0, grid - 1)
    first = place.long().clamp_max(grid - 2)
    return first, (place - first).to(like.dtype)


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
