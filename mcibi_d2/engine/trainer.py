"""Detectron2's DefaultTrainer for semantic segmentation with a feature memory."""

import logging
import weakref

import torch
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier, WarmupParamScheduler
from detectron2.solver.build import (
    build_lr_scheduler,
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
)
from detectron2.utils import comm
from fvcore.common.param_scheduler import ParamScheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import SemSegMapper, build_train_loader
from ..data.loader import move_to_iteration
from ..evaluation import SemSegEvaluator
from .checkpoint import Checkpointer
from .memory_hooks import MemoryInitHook, MemoryUpdateHook, find_memories
from .train_step import TrainStep

LOG_PERIOD = 20


class Trainer(DefaultTrainer):
    """Train and evaluate from a config; the parts can be overridden one by one.

    Beyond ``DefaultTrainer``: several CPU processes, mixed precision on the CPU and in bf16, poly
    learning rate, a learning-rate factor for the head, the memory's hooks, the best checkpoint
    by mIoU, and a ``--resume`` after which a run is the same as one that was never stopped.

    Args:
        cfg: a config with :func:`mcibi_d2.add_mcibi_config`.
    """

    def __init__(self, cfg):
        # DefaultTrainer.__init__ wraps the model for GPUs only and has no bf16: the same order of
        # steps, with our own parts.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        # Of the order of the data, the augmentation and dropout. Kept in checkpoints, so that a
        # run with SEED -1 can be resumed too.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        if comm.get_world_size() > 1:
            on_gpu = next(model.parameters()).is_cuda
            model = DistributedDataParallel(
                model,
                device_ids=[comm.get_local_rank()] if on_gpu else None,
                # The memory is equal on all processes by its own all-reduce.
                broadcast_buffers=False,
            )
        self._trainer = TrainStep(
            model,
            data_loader,
            optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
            seed=self.seed,
            flush_periods=(LOG_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
            max_iter=self.max_iter,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume)
        logger = logging.getLogger(__name__)
        if self.start_iter > 0:
            logger.info(f"Resuming at iteration {self.start_iter} of {self.max_iter}.")
        elif resume:
            logger.info(f"Nothing to resume in {self.cfg.OUTPUT_DIR}: starting at iteration 0.")

    def before_train(self) -> None:
        """Put the data in place for the first iteration, then run the hooks."""
        self._trainer.seed = self.seed
        move_to_iteration(self._trainer.data_loader, self.cfg, self.seed, self.start_iter)
        super().before_train()

    def state_dict(self) -> dict:
        """Everything that a resumed run needs beside the model."""
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the iteration, the hooks, the optimiser and the seed."""
        super().load_state_dict(state_dict)
        self.seed = state_dict.get("seed", self.seed)

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, the memory's, and the keeper of the best checkpoint."""
        cfg, memory = self.cfg, self.cfg.MODEL.MCIBI.MEMORY
        built = super().build_hooks()
        if find_memories(self.model):
            # Before the hook that steps the learning rate and before the checkpoint.
            built.insert(1, MemoryUpdateHook(memory.MOMENTUM, memory.POWER))
            if memory.INIT == "random_pixel":
                ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
                built.insert(1, MemoryInitHook(self.seed, memory.INIT_MAX_IMAGES, ignore))
        if comm.is_main_process() and cfg.DATASETS.TEST:
            metric = "sem_seg/mIoU"
            if len(cfg.DATASETS.TEST) > 1:
                metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
            # Between the evaluation and the writers.
            built.insert(-1, KeepBest(cfg.TEST.EVAL_PERIOD, self.checkpointer, metric))
        return built

    @classmethod
    def build_train_loader(cls, cfg):
        """See :func:`mcibi_d2.data.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        """Images only, one at a time: the evaluator reads the labels."""
        return build_detection_test_loader(cfg, dataset_name, mapper=SemSegMapper(cfg, False))

    @classmethod
    def build_evaluator(cls, cfg, dataset_name: str) -> DatasetEvaluator:
        """See :class:`mcibi_d2.evaluation.SemSegEvaluator`."""
        return SemSegEvaluator(dataset_name, output_dir=f"{cfg.OUTPUT_DIR}/inference")

    @classmethod
    def build_optimizer(cls, cfg, model: nn.Module) -> torch.optim.Optimizer:
        """SGD; the head's learning rate is ``SOLVER.HEAD_LR_FACTOR`` times the backbone's."""
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            lr_factor_func=lambda name: (
                cfg.SOLVER.HEAD_LR_FACTOR if name.startswith("sem_seg_head.") else 1.0
            ),
        )
        sgd = torch.optim.SGD(
            params,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            foreach=True,
        )
        return maybe_add_gradient_clipping(cfg, sgd)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer: torch.optim.Optimizer):
        """``WarmupPolyLR`` as the paper, or any schedule of Detectron2."""
        solver = cfg.SOLVER
        if solver.LR_SCHEDULER_NAME != "WarmupPolyLR":
            return build_lr_scheduler(cfg, optimizer)
        poly = PolyParamScheduler(solver.POLY_LR_POWER, solver.POLY_LR_CONSTANT_ENDING)
        warmup = WarmupParamScheduler(
            poly,
            solver.WARMUP_FACTOR,
            min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
            solver.WARMUP_METHOD,
        )
        return LRMultiplier(optimizer, multiplier=warmup, max_iter=solver.MAX_ITER)


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


class KeepBest(hooks.BestCheckpointer):
    """Write ``model_best.pth`` when a metric improves, and remember the best over ``--resume``.

    Args:
        eval_period: of the evaluation.
        checkpointer: that writes.
        metric: name in the event storage.
    """

    def __init__(self, eval_period: int, checkpointer: Checkpointer, metric: str):
        super().__init__(eval_period, checkpointer, metric, file_prefix="model_best")

    def state_dict(self) -> dict:
        """The best value and its iteration."""
        return {"metric": self.best_metric, "iteration": self.best_iter}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what :meth:`state_dict` gives."""
        self.best_metric = state_dict["metric"]
        self.best_iter = state_dict["iteration"]
