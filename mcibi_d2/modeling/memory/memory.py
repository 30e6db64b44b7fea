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

from .class_sums import add_class_sums

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
        maps = []
        for slot in range(self.slots):
            rows, known = self.rows[slot :: self.slots], self.initialized[slot :: self.slots]
            weights = self.weights(probabilities, known)
            # With the channels last, as the network has them.
            gathered = weights.flatten(2).transpose(1, 2) @ rows.to(weights.dtype)
            maps.append(gathered.transpose(1, 2).unflatten(2, probabilities.shape[-2:]))
        return maps[0] if self.slots == 1 else torch.cat(maps, dim=1)

    def weights(self, probabilities: Tensor, known: Tensor) -> Tensor:
        """The weights of the classes that have a row; see :meth:`read`.

        Args:
            probabilities: (N, K, h, w).
            known: (K,) bool, which have one.

        Returns:
            (N, K, h, w), 0 for the others.
        """
        weights = probabilities * known.to(probabilities.dtype)[:, None, None]
        if self.renormalize:
            total = weights.sum(dim=1, keepdim=True)
            weights = weights / total.clamp_min(torch.finfo(weights.dtype).tiny)
        return weights

    @torch.no_grad()
    def observe(self, features: Tensor, labels: Tensor, ignore_value: int = 255) -> None:
        """Add the pixels of this batch to the sums of Eq. 8-10.

        The result is that of up-sampling ``features`` bilinearly (``align_corners=False``) to the
        size of ``labels`` and summing over the pixels of each class, but nothing of size
        C x H x W is made: see :func:`add_class_sums`.

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
                add_class_sums(
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


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows brought to length one; zero rows stay zero."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
