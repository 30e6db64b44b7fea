"""One set of batch-norm statistics for all processes, where the norm is not synchronised."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .train_step import is_due


class AverageStatisticsHook(HookBase):
    """Average the running statistics of plain batch norms over all processes.

    Each process has statistics of its own share of the batches. Without this, what is evaluated
    on the others is not what the main process saves. It must run on every process, before the
    hooks that write checkpoints and evaluate.

    Args:
        periods: run when the number of done iterations is a multiple of one of these, or all.
    """

    def __init__(self, periods: Iterable[int]):
        self.periods = tuple(periods)

    def after_step(self) -> None:
        """Average, if something is about to be written or evaluated."""
        if is_due(self.trainer.iter + 1, self.trainer.max_iter, self.periods):
            average_statistics(self.trainer.model)


def _statistics(model: nn.Module) -> list[torch.Tensor]:
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


@torch.no_grad()
def set_statistics(model: nn.Module, joined: torch.Tensor) -> None:
    """Give plain batch norms their running means and variances, one after the other."""
    statistics = _statistics(model)
    parts = joined.split([len(buffer) for buffer in statistics])
    for buffer, part in zip(statistics, parts, strict=True):
        buffer.copy_(part)


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace the running means and variances by their averages over the processes."""
    statistics = _statistics(model)
    if not statistics:
        return
    joined = torch.cat(statistics)
    dist.all_reduce(joined)
    set_statistics(model, joined / dist.get_world_size())


@torch.no_grad()
def gather_statistics(model: nn.Module) -> list[torch.Tensor]:
    """Average as :func:`average_statistics`; returns what each process had, for each.

    On one process, and where all norms are synchronised, there is nothing to do, nor to return.
    """
    statistics = _statistics(model)
    if not statistics or comm.get_world_size() == 1:
        return []
    of_all = comm.all_gather(torch.cat(statistics).cpu())
    average_statistics(model)
    return of_all
