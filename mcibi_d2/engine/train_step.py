"""One training step, on any device and in any precision, without waiting for the device."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..errors import InputError

PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def is_due(done: int, max_iter: int, periods: Iterable[int]) -> bool:
    """Whether something with several periods is to be done after ``done`` iterations.

    Args:
        done: number of iterations that are done.
        max_iter: of the training; the end is always due.
        periods: 0 is never.
    """
    return done == max_iter or any(period > 0 and done % period == 0 for period in periods)


class TrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with mixed precision on CPU and GPU, made reproducible.

    Losses stay on the device until they are wanted: they are read, checked and logged at the end
    of each of ``flush_periods``, before anything is written or evaluated. A loss that is not
    finite then stops the run, naming the loss, the iteration and the batch, before a checkpoint
    could be written with its weights.

    Samples that the loader left out (``DATALOADER.SKIP_BAD``) are counted: each batch says so in
    ``skipped`` of its records.

    The random state of each iteration (dropout) is a function of the seed, the process and the
    iteration, so that a resumed run goes on as if it had not been stopped.

    Args:
        model: gives a dict of losses; wrapped in DDP or not.
        data_loader: yields batches, lists of records.
        optimizer: of the model.
        precision: None for float32, else ``float16`` (with a gradient scaler) or ``bfloat16``.
        seed: of the run.
        flush_periods: read the losses whenever the number of done iterations is a multiple of
            one of these.
        max_iter: ... or equal to this.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str | None = None,
        seed: int = 0,
        flush_periods: Iterable[int] = (20,),
        max_iter: int = 0,
    ):
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self.max_iter = max_iter
        self._flush_periods = tuple(flush_periods)
        self._device = next(model.parameters()).device.type
        self._precision = PRECISIONS[precision] if precision else None
        self._scaler = torch.amp.GradScaler(self._device, enabled=precision == "float16")
        # Called on all processes with the iteration of a loss that is not finite, for what else is
        # known about it. A hook may put something here.
        self.explain: Callable[[int], str] = lambda iteration: ""
        # Why samples were skipped, and how often each, in all processes until the last flush.
        self.skipped: Counter[str] = Counter()
        self._own_skipped: Counter[str] = Counter()
        self._said: set[str] = set()
        self._names: list[str] = []
        self._pending: list[tuple[int, list[str], torch.Tensor]] = []

    def run_step(self) -> None:
        """Load a batch, run the model forward and backward, and step."""
        assert self.model.training, "the model was left in evaluation mode"
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        get_event_storage().put_scalar("data_time", time.perf_counter() - start)
        self._note_skipped(batch)

        state = np.random.SeedSequence([self.seed, self.iter, comm.get_rank()]).generate_state(1)
        torch.manual_seed(int(state[0]))
        with torch.autocast(
            self._device, dtype=self._precision, enabled=self._precision is not None
        ):
            losses = self.model(batch)
        self.optimizer.zero_grad()
        self._scaler.scale(sum(losses.values())).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()

        self._names = list(losses)
        values = torch.stack([value.detach().float() for value in losses.values()])
        self._pending.append((self.iter, [x.get("file_name", "?") for x in batch], values))
        if is_due(self.iter + 1, self.max_iter, self._flush_periods):
            self.flush()

    def _note_skipped(self, batch: list[dict]) -> None:
        """Count what the loader left out for this batch, and log what is new."""
        for reason in (reason for x in batch for reason in x.pop("skipped", ())):
            self._own_skipped[reason] += 1
            if reason not in self._said:
                self._said.add(reason)
                logging.getLogger(__name__).warning(
                    f"Skipped a sample of iteration {self.iter}: {reason}"
                )

    def flush(self) -> None:
        """Read the losses of the iterations since the last time, check and log them.

        Raises:
            InputError: a loss was not finite.
        """
        if not self._pending:
            return
        iterations, files, values = zip(*self._pending, strict=True)
        self._pending = []
        values = torch.stack(values).cpu().numpy()
        bad = None
        if not np.isfinite(values).all():
            row, column = np.argwhere(~np.isfinite(values))[0]
            bad = (iterations[row], self._names[column], values[row, column], files[row])
        means = dict(zip(self._names, values.mean(axis=0).tolist(), strict=True))
        # Every process hears of the first bad loss of any, and stops with the same words.
        of_all = comm.all_gather((bad, means, self._own_skipped))
        self._own_skipped = Counter()
        self.skipped = sum((skipped for _, _, skipped in of_all), self.skipped)
        bad = min((b for b, _, _ in of_all if b), default=None, key=lambda b: b[0])
        if bad:
            iteration, name, value, names = bad
            raise InputError(
                f"{name} became {value} at iteration {iteration}; the files of that batch are "
                f"{', '.join(names)}{self.explain(iteration)}; expected a finite loss (a lower "
                f"SOLVER.BASE_LR, a warm-up, SOLVER.AMP.PRECISION bfloat16?)"
            )
        if comm.is_main_process():
            storage = get_event_storage()
            means = {name: float(np.mean([m[name] for _, m, _ in of_all])) for name in means}
            storage.put_scalar("total_loss", sum(means.values()))
            storage.put_scalars(**means)

    def state_dict(self) -> dict:
        """Of the optimiser, the gradient scaler, and what was skipped."""
        state = super().state_dict()
        state["skipped"] = dict(self.skipped)
        if self._scaler.is_enabled():
            state["grad_scaler"] = self._scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the optimiser, the gradient scaler, and what was skipped."""
        super().load_state_dict(state_dict)
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                # A fused step takes for granted that both lie in memory in the same order, which
                # in files of another version or machine they need not.
                if torch.is_tensor(value) and value.shape == parameter.shape and value.dim() > 1:
                    state[name] = torch.empty_like(parameter.detach()).copy_(value)
        self.skipped = Counter(state_dict.get("skipped", {}))
        if self._scaler.is_enabled() and "grad_scaler" in state_dict:
            self._scaler.load_state_dict(state_dict["grad_scaler"])
