"""The paper's learning-rate schedule, beside those of Detectron2."""

import torch
from detectron2.config import CfgNode
from detectron2.engine import defaults
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver import build_lr_scheduler as build_detectron2s
from fvcore.common.param_scheduler import ParamScheduler

POLY = "WarmupPolyLR"
# Detectron2's WarmupStepWithFixedGammaLR ends every training in an IndexError, after its last step.
SCHEDULES = (POLY, "WarmupMultiStepLR", "WarmupCosineLR")


class PolyParamScheduler(ParamScheduler):
    """(1 - t / T) ** power, and never below a floor (paper, section 4.1).

    Args:
        power: 0.9 in the paper.
        floor: the smallest value.
    """

    def __init__(self, power: float, floor: float = 0.0):
        self.power = power
        self.floor = floor

    def __call__(self, where: float) -> float:
        """The multiplier at a share 0 <= where < 1 of the training."""
        return max((1 - where) ** self.power, self.floor)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LRMultiplier:
    """``WarmupPolyLR`` as the paper, or any schedule of Detectron2 (``SOLVER.LR_SCHEDULER_NAME``).

    Detectron2's ``DefaultTrainer`` has it from here, too, once this package is imported.
    """
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME != POLY:
        return build_detectron2s(cfg, optimizer)
    poly = PolyParamScheduler(solver.POLY_LR_POWER, solver.POLY_LR_CONSTANT_ENDING)
    warmup = WarmupParamScheduler(
        poly,
        solver.WARMUP_FACTOR,
        min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        solver.WARMUP_METHOD,
    )
    return LRMultiplier(optimizer, multiplier=warmup, max_iter=solver.MAX_ITER)


# Detectron2's own knows no other names than its own, and cannot be told of more.
defaults.build_lr_scheduler = build_lr_scheduler
