"""When the memory is updated, and how it is watched."""

from collections.abc import Iterable, Sequence

import torch
from detectron2.engine import HookBase, TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn

from ..errors import InputError
from ..modeling import FeatureMemory, MCIBIHead
from ..modeling.context import EMContext
from ..modeling.memory import MOVING
from .train_step import TrainStep, is_due


def find_memories(model: nn.Module) -> list[FeatureMemory]:
    """The feature memories of a model, wrapped or not."""
    return [m for m in model.modules() if isinstance(m, FeatureMemory)]


def find_bases(model: nn.Module) -> list[EMContext]:
    """The modules of EMANet, whose bases are committed as a memory is."""
    return [m for m in model.modules() if isinstance(m, EMContext)]


def unwrap(model: nn.Module) -> nn.Module:
    """The model itself, out of DDP, ``torch.compile`` or another wrapper that calls it so."""
    while True:
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def part_of(trainer: TrainerBase, name: str, hook: HookBase) -> object:
    """An attribute that the trainers of Detectron2 have, and another's may lack.

    Raises:
        InputError: it is not there.
    """
    part = getattr(trainer, name, None)
    if part is None:
        raise InputError(
            f"{type(hook).__name__} found no {name} in {type(trainer).__name__}, expected it as an "
            f"attribute, as Detectron2's SimpleTrainer has it"
        )
    return part


def poly_momentum(iteration: int, max_iter: int, momentum: float, power: float) -> float:
    """m_t of Eq. 7: from m_0 down to m_0 / 100.

    Args:
        iteration: t, 0..max_iter.
        max_iter: T.
        momentum: m_0.
        power: p.
    """
    floor = momentum / 100
    return (1 - iteration / max_iter) ** power * (momentum - floor) + floor


SCHEDULES = ("poly", "constant", "lr")


class MemoryUpdateHook(HookBase):
    """Commit the observed features after every step (Eq. 6), with the momentum of Eq. 7.

    The running bases of the context ``ema`` (EMANet) are committed, too, with a memory or without.

    It is for any trainer of Detectron2, not ours alone. It must run on every process, after the
    optimiser's step and before the hook that changes the learning rate and the one that writes
    checkpoints: before all hooks of ``DefaultTrainer.build_hooks``, but ``IterationTimer``.

    Nothing is read from the device in between, but when a period is over it is, once: a class with
    a feature that was not finite stops the run, and these go to the event storage (TensorBoard,
    ``metrics.json``), each under ``memory/``: ``initialized``, the share of rows that are;
    ``momentum``; ``row_norm``, their mean length; ``cosine``, the mean over pairs of rows of
    different classes; ``h2_accuracy``, the share of rows that H2 gives to their own class.

    Args:
        momentum: m_0 of Eq. 7.
        power: p of Eq. 7.
        schedule: ``poly``: Eq. 7. ``constant``: m_0. ``lr``: m_0 times the optimiser's current
            share of its initial learning rate.
        loss_start: first iteration with the memory loss.
        periods: look at the memory when the number of done iterations is a multiple of one of
            these, or all.
        class_names: for the error.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        power: float = 0.9,
        schedule: str = "poly",
        loss_start: int = 0,
        periods: Iterable[int] = (20,),
        class_names: Sequence[str] = (),
    ):
        if schedule not in SCHEDULES:
            raise InputError(
                f"MemoryUpdateHook(schedule={schedule!r}): expected one of {', '.join(SCHEDULES)}"
            )
        self.momentum = momentum
        self.power = power
        self.schedule = schedule
        self.loss_start = loss_start
        self.periods = tuple(periods)
        self.class_names = class_names

    def before_train(self) -> None:
        """Find the memories of the trainer's model."""
        model = part_of(self.trainer, "model", self)
        if self.schedule == "lr":
            part_of(self.trainer, "optimizer", self)
        self._memories, self._bases = find_memories(model), find_bases(model)
        self._heads = [m for m in model.modules() if isinstance(m, MCIBIHead) and m.enabled]
        # Per memory: the first iteration in which a row was rejected, -1 for none.
        self._rejected = [
            torch.full(memory.rejected.shape, -1, device=memory.rejected.device)
            for memory in self._memories
        ]
        step = getattr(self.trainer, "_trainer", None)
        if isinstance(step, TrainStep):
            step.explain = self._explain

    def before_step(self) -> None:
        """Switch the memory loss on when its time has come."""
        for head in self._heads:
            head.memory_loss.active = self.trainer.iter >= self.loss_start

    def after_step(self) -> None:
        """Update the rows; look at them, if it is time."""
        momentum = self._commit()
        if is_due(self.trainer.iter + 1, self.trainer.max_iter, self.periods):
            self.check_finite()
            if comm.is_main_process():
                self._log(momentum)

    def check_finite(self) -> None:
        """Raise an :class:`InputError` if the features of a class were not finite until now."""
        bad = self._describe_rejected(self.trainer.iter)
        if bad:
            raise InputError(
                f"{bad}, expected finite ones; the memory kept its rows (a lower "
                f"SOLVER.BASE_LR, a warm-up, SOLVER.AMP.PRECISION bfloat16?)"
            )

    def _commit(self) -> float:
        momentum = self._momentum()
        for context in self._bases:
            context.commit()
        for memory, rejected in zip(self._memories, self._rejected, strict=True):
            memory.commit(momentum)
            rejected.masked_fill_(memory.rejected & (rejected < 0), self.trainer.iter)
        return momentum

    def _explain(self, iteration: int) -> str:
        """What the memory has to say of a loss that is not finite; ends the run's updates."""
        self._commit()
        bad = self._describe_rejected(iteration)
        return f"; {bad}" if bad else ""

    def _momentum(self) -> float:
        if self.schedule == "constant":
            return self.momentum
        if self.schedule == "lr":
            optimizer = self.trainer.optimizer
            group = optimizer.param_groups[0]
            return self.momentum * group["lr"] / group.get("initial_lr", optimizer.defaults["lr"])
        return poly_momentum(self.trainer.iter, self.trainer.max_iter, self.momentum, self.power)

    def _describe_rejected(self, until: int) -> str:
        """The classes whose features were the first that were not finite, "" if none until then."""
        for memory, rejected in zip(self._memories, self._rejected, strict=True):
            bad = {
                (iteration, row // memory.slots)
                for row, iteration in enumerate(rejected.tolist())
                if 0 <= iteration <= until
            }
            if bad:
                first = min(iteration for iteration, _ in bad)
                names = [
                    f"{k} ({self.class_names[k]})" if k < len(self.class_names) else str(k)
                    for iteration, k in sorted(bad)
                    if iteration == first
                ]
                return (
                    f"the features of class {', '.join(names)} were not finite, or too large to "
                    f"be squared, at iteration {first}"
                )
        return ""

    def _log(self, momentum: float) -> None:
        scalars = {}
        for memory in self._memories:
            if memory.update == "zero":
                continue
            scalars.update(memory.health())
            if memory.update in MOVING:
                scalars["momentum"] = momentum
        for head in self._heads:
            if head.memory.update != "zero":
                scalars["h2_accuracy"] = head.rows_accuracy()
        on_device = {name: value for name, value in scalars.items() if torch.is_tensor(value)}
        if on_device:
            values = torch.stack([value.float() for value in on_device.values()]).tolist()
            scalars.update(zip(on_device, values, strict=True))
        for name, value in scalars.items():
            get_event_storage().put_scalar(f"memory/{name}", value, smoothing_hint=False)
