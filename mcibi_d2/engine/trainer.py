"""Detectron2's DefaultTrainer for semantic segmentation with a feature memory."""

import contextlib
import json
import logging
import math
import os
import weakref
from collections import OrderedDict

import torch
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data import build_test_loader, build_train_loader, register_own_dataset
from ..data.classes import CLASSES_FILE, Classes
from ..data.loader import move_to_iteration
from ..errors import InputError
from ..evaluation import SemanticSegmentorWithTTA, SemSegEvaluator
from ..modeling.segmentor import labels_only
from .batch_norm_hook import AverageStatisticsHook, gather_statistics, set_statistics
from .checkpoint import Checkpointer, replacing
from .class_names import class_names
from .config_check import check_metadata, check_values
from .inference import inference_copy
from .memory_hooks import MemoryUpdateHook, find_bases, find_memories
from .memory_init import MemoryInitHook
from .picture_hook import PictureHook
from .resume import RunConfig, regroup
from .schedule import build_lr_scheduler
from .stop import StoppableLoader, Stopped, stop_asked, watching_for_signals
from .train_step import TrainStep

LOG_PERIOD = 20
# Parameters that no file of backbone weights holds, and SOLVER.HEAD_LR_FACTOR is for.
_NEW = ("sem_seg_head.", "backbone.neck.", "backbone.norms.")
# Skipped samples that are named at the end of the training.
MAX_REPORTED = 20


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
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            for name in ("detectron2", "mcibi_d2"):  # default_setup was not called
                setup_logger(name=name)
        check_values(cfg)
        register_own_dataset(cfg)
        check_metadata(cfg)
        self._run_config = RunConfig(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        # Of the order of the data, the augmentation and dropout. Kept in checkpoints, so that a
        # run with SEED -1 can be resumed too.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()

        # Of a checkpoint at which the run was stopped: whether its iteration has still to be
        # evaluated, and the statistics of plain batch norms of each process.
        self._evaluation_is_due = False
        self._statistics: list[torch.Tensor] = []

        # When something leaves the device: losses, and how the memory is.
        self._flush_periods = (LOG_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
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
            flush_periods=self._flush_periods,
            max_iter=self.max_iter,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            kept=cfg.SOLVER.CHECKPOINTS_KEPT,
            class_names=class_names(cfg),
            allow_other_classes=cfg.DATASETS.ALLOW_OTHER_CLASSES,
            trainer=weakref.proxy(self),
        )
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the last checkpoint in ``OUTPUT_DIR``, or load ``MODEL.WEIGHTS``."""
        super().resume_or_load(resume)
        logger = logging.getLogger(__name__)
        if self.start_iter > 0:
            logger.info(f"Resuming at iteration {self.start_iter} of {self.max_iter}.")
        elif resume:
            logger.info(f"Nothing to resume in {self.cfg.OUTPUT_DIR}: starting at iteration 0.")

    def train(self):
        """Train; see ``DefaultTrainer.train``.

        SIGTERM and SIGUSR1 end the iteration, write a checkpoint of it, and raise
        :class:`~.stop.Stopped`, which ends the program; a second one ends it at once. In an
        evaluation it is the checkpoint of the iteration before, after which a resumed run
        evaluates first.
        """
        with watching_for_signals():
            return super().train()

    def before_train(self) -> None:
        """Put the data in place for the first iteration, then run the hooks.

        What the classes are goes to ``OUTPUT_DIR/classes.json``, so that the run can be used
        where its data set is not.
        """
        if comm.is_main_process():
            with replacing(os.path.join(self.cfg.OUTPUT_DIR, CLASSES_FILE)) as file:
                file.write(Classes.of(self.cfg.DATASETS.TRAIN[0]).dumps())
        self._trainer.seed = self.seed
        move_to_iteration(self._trainer.data_loader, self.cfg, self.seed, self.start_iter)
        try:
            super().before_train()
            if self._evaluation_is_due:
                self._repeat_evaluation()
        except Stopped as stopped:
            what = "this run has done no iteration, and left the folder's checkpoints as they were"
            self._say_stopped(stopped, what)
            raise

    def _repeat_evaluation(self) -> None:
        """Do what the iteration before had still to do when it was stopped."""
        first = next(i for i, hook in enumerate(self._hooks) if isinstance(hook, hooks.EvalHook))
        self.iter = self.storage.iter = self.start_iter - 1
        for hook in self._hooks[first:]:
            hook.after_step()
        self.iter = self.storage.iter = self.start_iter
        self._evaluation_is_due = False

    def after_step(self) -> None:
        """Run the hooks; end the run, if it was told to."""
        try:
            super().after_step()
            stopped = stop_asked()
        except Stopped as error:
            # In an evaluation, which changes nothing.
            stopped = error.signal
            self._evaluation_is_due = True
        if stopped and self.iter + 1 < self.max_iter:
            self._stop(Stopped(stopped))

    def _stop(self, stopped: Stopped) -> None:
        """Write a checkpoint of this iteration and end; every process calls it."""
        self._trainer.flush()
        for hook in self._hooks:
            if isinstance(hook, MemoryUpdateHook):
                hook.check_finite()
        # What each process has of its own goes along, for the run to go on as it would have.
        self._statistics = gather_statistics(self.model)
        name = f"model_{self.iter:07d}"
        self.checkpointer.save(name)
        # Who ends makes the launcher end the others.
        comm.synchronize()
        path = os.path.join(self.cfg.OUTPUT_DIR, f"{name}.pth")
        self._say_stopped(stopped, f"{path} is written, and --resume goes on from there")
        raise stopped

    def _say_stopped(self, stopped: Stopped, what: str) -> None:
        logging.getLogger(__name__).warning(
            f"Stopped by {stopped.signal.name} at iteration {self.iter} of {self.max_iter}: {what}."
        )

    def after_train(self) -> None:
        """Run the hooks; after an error, without evaluating or keeping what it left behind."""
        self._report_skipped()
        if self.iter < self.max_iter:
            final = (hooks.EvalHook, KeepBest, PictureHook)
            self._hooks = [hook for hook in self._hooks if not isinstance(hook, final)]
        try:
            super().after_train()
        except Stopped as stopped:
            self._say_stopped(
                stopped, "all iterations are done and written, and --resume evaluates them"
            )
            for hook in self._hooks:
                if isinstance(hook, hooks.PeriodicWriter):
                    hook.after_train()
            raise

    def _report_skipped(self) -> None:
        skipped = getattr(self._trainer, "skipped", None)
        if not skipped or not comm.is_main_process():
            return
        lines = [f"{times} times: {reason}" for reason, times in skipped.most_common(MAX_REPORTED)]
        if len(skipped) > len(lines):
            lines.append(
                f"... and {len(skipped) - len(lines)} more, each in the log of its process"
            )
        logging.getLogger(__name__).warning(
            f"DATALOADER.SKIP_BAD: {skipped.total()} samples were skipped and replaced, "
            f"{len(skipped)} different ones:\n" + "\n".join(lines)
        )

    @staticmethod
    def auto_scale_workers(cfg, num_workers: int):
        """The same recipe on another number of processes (``SOLVER.REFERENCE_WORLD_SIZE``).

        Detectron2's rule: batch and learning rate in proportion, iterations, warm-up, steps and
        periods in inverse proportion. So does the first iteration with the memory loss; the
        memory's momentum follows the iterations by itself. No period becomes 0, which is never.
        """
        before, cfg = cfg, DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if cfg is before:
            return cfg
        scale = num_workers / before.SOLVER.REFERENCE_WORLD_SIZE
        frozen = cfg.is_frozen()
        cfg.defrost()
        cfg.MODEL.MCIBI.LOSS_START_M = round(before.MODEL.MCIBI.LOSS_START_M / scale)
        for room, key in (
            ("SOLVER", "MAX_ITER"),
            ("SOLVER", "CHECKPOINT_PERIOD"),
            ("TEST", "EVAL_PERIOD"),
        ):
            if before[room][key] > 0:
                cfg[room][key] = max(1, cfg[room][key])
        if frozen:
            cfg.freeze()
        return cfg

    def state_dict(self) -> dict:
        """Everything that a resumed run needs beside the model."""
        return {
            **super().state_dict(),
            "config": self._run_config.dump(),
            "seed": self.seed,
            "ims_per_batch": self.cfg.SOLVER.IMS_PER_BATCH,
            "max_iter": self.max_iter,
            "evaluation_is_due": self._evaluation_is_due,
            "statistics": self._statistics,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore the iteration, the hooks, the optimiser and the seed.

        A checkpoint of the same recipe with another batch size, so one that was written on another
        number of processes, goes on after as many images. Learning rates, their schedule, momentum
        and weight decay are those of this run's config from here on; what cannot take effect
        (:data:`~.resume.FIXED`) is named in the log.

        Raises:
            InputError: it is not the state of a training, or not of this one.
        """
        try:
            self._load_state_dict(state_dict)
        except InputError:
            raise
        except Exception as error:
            # Whatever comes of a file in which another program has written.
            raise InputError(
                f"the checkpoint's state of the training cannot be taken up "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}), expected that of "
                f"a checkpoint which this project has written"
            ) from error

    def _load_state_dict(self, state_dict: dict) -> None:
        groups = self.optimizer.param_groups
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in groups]
        rates = [group["initial_lr"] for group in groups]
        if isinstance(state_dict.get("config"), str):
            changed = self._run_config.follow(state_dict["config"])
            if any(key.startswith("SOLVER.") for key in changed):
                state_dict = self._regrouped(state_dict, changed)
        try:
            super().load_state_dict(state_dict)
        except ValueError as error:
            raise InputError(
                f"the checkpoint's optimiser is not this one: {error} (another "
                f"SOLVER.HEAD_LR_FACTOR, BIAS_LR_FACTOR or WEIGHT_DECAY_NORM, or another "
                f"MODEL.BACKBONE.FREEZE_AT than the run had?)"
            ) from error
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        if isinstance(self.scheduler, LRMultiplier) and self.iter < self.max_iter:
            self._continue_schedule(rates, self.iter + 1)
        for param, state in self.optimizer.state.items():
            for name, value in state.items():
                if torch.is_tensor(value) and value.shape not in ((), param.shape):
                    raise ValueError(f"{name} of shape {tuple(value.shape)}")
        if self.iter < 0:
            raise ValueError(f"iteration {self.iter}")
        self.seed = int(state_dict.get("seed", self.seed))
        self._evaluation_is_due = state_dict.get("evaluation_is_due", False)
        statistics = state_dict.get("statistics") or ()
        if len(statistics) == comm.get_world_size():
            set_statistics(self.model, statistics[comm.get_rank()])
        before, now = state_dict.get("ims_per_batch"), self.cfg.SOLVER.IMS_PER_BATCH
        if before in (None, now):
            return
        logger = logging.getLogger(__name__)
        # Iterations are whole numbers, so that the two need not have the same images exactly.
        if abs(before * state_dict.get("max_iter", 0) - now * self.max_iter) <= max(before, now):
            done = round((self.iter + 1) * before / now)
            logger.info(
                f"The checkpoint was written after {self.iter + 1} iterations of "
                f"{before} images; these are {done} of {now}."
            )
            self.iter = done - 1
            self._continue_schedule(rates, done)
        else:
            logger.warning(
                f"The checkpoint was written with SOLVER.IMS_PER_BATCH {before}, now it is {now}: "
                f"the iterations done count as many of the new size, and the order of the data is "
                f"another"
            )

    def _regrouped(self, state_dict: dict, changed: dict[str, object]) -> dict:
        """A checkpoint with the optimiser's state in the groups of this run's config."""
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.merge_from_list([x for item in changed.items() for x in item])
        step = state_dict["_trainer"]
        state = regroup(step["optimizer"], self.build_optimizer(cfg, self.model), self.optimizer)
        return {**state_dict, "_trainer": {**step, "optimizer": state}}

    def _continue_schedule(self, rates: list[float], done: int) -> None:
        """Take this run's learning rates, instead of those of the checkpoint."""
        self.scheduler.base_lrs = rates
        self.scheduler.last_epoch = done
        values = self.scheduler.get_lr()
        for group, initial, value in zip(self.optimizer.param_groups, rates, values, strict=True):
            group["initial_lr"], group["lr"] = initial, value

    def build_hooks(self) -> list[HookBase]:
        """Detectron2's hooks, the memory's, the keeper of the best checkpoint, and the pictures."""
        cfg, memory = self.cfg, self.cfg.MODEL.MCIBI.MEMORY
        built = super().build_hooks()
        if cfg.TEST.AUG.ENABLED and cfg.DATASETS.TEST:
            evaluation = next(i for i, h in enumerate(built) if isinstance(h, hooks.EvalHook))
            built.insert(evaluation + 1, hooks.EvalHook(0, self._evaluate_with_tta))
        if find_memories(self.model) or find_bases(self.model):
            # Before the hook that steps the learning rate and before the checkpoint.
            update = MemoryUpdateHook(
                memory.MOMENTUM,
                memory.POWER,
                memory.MOMENTUM_SCHEDULE,
                cfg.MODEL.MCIBI.LOSS_START_M,
                self._flush_periods,
                class_names(cfg),
            )
            initialize = MemoryInitHook(
                memory.INIT,
                self.seed,
                memory.INIT_MAX_IMAGES,
                memory.INIT_PIXELS,
                memory.INIT_FILE,
                class_names(cfg),
                cfg.DATASETS.ALLOW_OTHER_CLASSES,
            )
            built[1:1] = [initialize, update]
        if comm.get_world_size() > 1:
            periods = (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD)
            built.insert(1, AverageStatisticsHook(periods))
        if comm.is_main_process() and cfg.DATASETS.TEST:
            metric = "sem_seg/mIoU"
            if len(cfg.DATASETS.TEST) > 1:
                metric = f"{cfg.DATASETS.TEST[0]}/{metric}"
            # Between the evaluation and the writers.
            built.insert(-1, KeepBest(self.checkpointer, metric, cfg.DATASETS.TEST[0]))
            if cfg.TEST.VIS_IMAGES:
                built.insert(-1, PictureHook(cfg))
        return built

    @classmethod
    def build_model(cls, cfg) -> nn.Module:
        """The model of a config whose values are checked, on ``MODEL.DEVICE``."""
        check_values(cfg)
        return super().build_model(cfg)

    @classmethod
    def build_train_loader(cls, cfg):
        """See :func:`mcibi_d2.data.build_train_loader`."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg, dataset_name: str):
        """Images only, one at a time: the evaluator reads the labels."""
        return StoppableLoader(build_test_loader(cfg, dataset_name))

    @classmethod
    def build_evaluator(
        cls, cfg, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :class:`mcibi_d2.evaluation.SemSegEvaluator`."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return SemSegEvaluator(dataset_name, output_dir=folder, boundary_iou=cfg.TEST.BOUNDARY_IOU)

    @classmethod
    def test(
        cls, cfg, model: nn.Module, evaluators: DatasetEvaluator | list | None = None
    ) -> OrderedDict:
        """Evaluate on ``DATASETS.TEST``; see ``DefaultTrainer.test``.

        A model that can gives labels instead of logits to :class:`SemSegEvaluator`, which is
        faster. Other evaluators get logits. What is evaluated is a copy of the model as
        ``TEST.FOLD_BATCH_NORM`` and ``TEST.PRECISION`` say; the model itself is not changed.
        """
        if evaluators is None:
            evaluators = [cls.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
        elif isinstance(evaluators, DatasetEvaluator):
            evaluators = [evaluators]
        if cfg.DATASETS.TEST:
            model = inference_copy(cfg, model)
        with contextlib.ExitStack() as stack:
            if all(isinstance(evaluator, SemSegEvaluator) for evaluator in evaluators):
                stack.enter_context(labels_only(model))
            try:
                return super().test(cfg, model, evaluators)
            except InputError as error:
                for evaluator in evaluators:
                    if isinstance(evaluator, SemSegEvaluator):
                        evaluator.break_off(error)
                raise

    @classmethod
    def test_with_TTA(cls, cfg, model: nn.Module) -> OrderedDict:
        """Evaluate with test-time augmentation (``TEST.AUG``); keys end in ``_TTA``."""
        mirrored = " and mirror images" if cfg.TEST.AUG.FLIP else ""
        logging.getLogger(__name__).info(
            f"Evaluating with test-time augmentation: scales {tuple(cfg.TEST.AUG.SCALES)}{mirrored}"
        )
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [
            cls.build_evaluator(cfg, name, output_folder=folder) for name in cfg.DATASETS.TEST
        ]
        results = cls.test(
            cfg, SemanticSegmentorWithTTA(cfg, inference_copy(cfg, model)), evaluators
        )
        return OrderedDict({f"{key}_TTA": value for key, value in results.items()})

    def _evaluate_with_tta(self) -> OrderedDict:
        results = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results.update(results)
        return results

    @classmethod
    def build_optimizer(cls, cfg, model: nn.Module) -> torch.optim.Optimizer:
        """SGD; ``SOLVER.HEAD_LR_FACTOR`` is for the head, and the backbone's neck and norms."""
        params = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            lr_factor_func=lambda name: cfg.SOLVER.HEAD_LR_FACTOR if name.startswith(_NEW) else 1.0,
        )
        sgd = torch.optim.SGD(
            params,
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            # Fused, a step under fp16 need not ask the device whether gradients were finite.
            **({"fused": True} if next(model.parameters()).is_cuda else {"foreach": True}),
        )
        return maybe_add_gradient_clipping(cfg, sgd)

    @classmethod
    def build_lr_scheduler(cls, cfg, optimizer: torch.optim.Optimizer):
        """See :func:`mcibi_d2.engine.build_lr_scheduler`."""
        return build_lr_scheduler(cfg, optimizer)


class KeepBest(HookBase):
    """Write ``model_best.pth`` when a metric improves.

    Its value goes to ``model_best.json``, from which a resumed run learns what to beat.
    ``--resume`` never starts from ``model_best.pth``. It must run after the evaluation, on the main
    process.

    Args:
        checkpointer: that writes.
        metric: name in the event storage.
        dataset: that it is of. The value of another one is nothing to beat.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, dataset: str):
        self.checkpointer = checkpointer
        self.metric = metric
        self.dataset = dataset
        self.best = -math.inf
        self._record = os.path.join(checkpointer.save_dir, "model_best.json")

    def before_train(self) -> None:
        """Read the best value so far, if this run goes on."""
        if self.trainer.start_iter > 0 and os.path.isfile(self._record):
            try:
                with open(self._record, encoding="utf-8") as file:
                    record = json.load(file)
                before = record.get("dataset", self.dataset)
                if before == self.dataset:
                    self.best = float(record["value"])
                else:
                    logging.getLogger(__name__).warning(
                        f"model_best.pth is the best on {before}, which is no longer the first of "
                        f"DATASETS.TEST: the next evaluation, on {self.dataset}, replaces it."
                    )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self._record}: cannot be read ({type(error).__name__}: {error}), expected "
                    f"the value of model_best.pth; without the file, the next one is the best"
                ) from error

    def after_step(self) -> None:
        """Look at the evaluation of this iteration, if there was one."""
        value, iteration = self.trainer.storage.latest().get(self.metric, (-math.inf, None))
        if iteration == self.trainer.iter:
            self._keep(value, iteration)

    def after_train(self) -> None:
        """Look at the evaluation after the last iteration."""
        value, iteration = self.trainer.storage.latest().get(self.metric, (-math.inf, None))
        self._keep(value, iteration)

    def _keep(self, value: float, iteration: int) -> None:
        if not value > self.best:  # nor when it is nan
            return
        self.best = value
        self.checkpointer.save("model_best", tag=False)
        record = {
            "metric": self.metric, "value": value, "iteration": iteration, "dataset": self.dataset
        }  # fmt: skip
        with replacing(self._record) as file:
            file.write(json.dumps(record).encode())
        logging.getLogger(__name__).info(f"Best {self.metric} so far: {value:.4f}")
