"""From the command line to a config that can be trained: every mistake is said before training."""

import argparse
import difflib
import importlib.util
import math
import os
import tempfile

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import Registry

from ..config import add_mcibi_config
from ..data import register_own_dataset
from ..data.augmentation import TEST_RESIZES
from ..data.datasets import load_records
from ..errors import InputError
from ..modeling.backbones import NORMS as BACKBONE_NORMS
from ..modeling.backbones import VARIANTS
from ..modeling.fusion import FUSIONS
from ..modeling.head import ACTIVATIONS, RCL_BATCH_NORMS
from ..modeling.memory import UPDATES
from ..modeling.necks import NECKS
from ..modeling.sliding import WEIGHTS as WINDOW_WEIGHTS
from .checkpoint import check_weights_exist
from .memory_hooks import SCHEDULES as MOMENTUM_SCHEDULES
from .memory_init import INITS
from .train_step import PRECISIONS

SCHEDULES = (
    "WarmupPolyLR",
    "WarmupMultiStepLR",
    "WarmupCosineLR",
    "WarmupStepWithFixedGammaLR",
)


def load_config(config_file: str = "", options: list[str] | None = None) -> CfgNode:
    """Detectron2's defaults, this project's keys, a file, and ``KEY VALUE`` options.

    The data set that ``DATASETS.OWN`` describes is registered.

    Args:
        config_file: YAML; "" for none.
        options: keys and values in turn.

    Raises:
        InputError: naming the file or the option, and the key.
    """
    cfg = get_cfg()
    add_mcibi_config(cfg)
    known = _keys(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise InputError(f"--config-file {config_file}: no such file")
        try:
            # Detectron2's own default lets a file run code.
            cfg.merge_from_file(config_file, allow_unsafe=False)
        except Exception as error:
            raise InputError(f"{config_file}: {_explain(error, known)}") from error
    try:
        cfg.merge_from_list(list(options or []))
    except Exception as error:
        raise InputError(f"command line: {_explain(error, known)}") from error
    register_own_dataset(cfg)
    return cfg


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys.append(prefix + name)
        if isinstance(value, CfgNode):
            keys += _keys(value, f"{prefix}{name}.")
    return keys


def _explain(error: Exception, known: list[str]) -> str:
    """One line of a yacs or YAML error, with the key that may have been meant."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, yaml.constructor.ConstructorError):
        place = error.problem_mark
        return (
            f"{place.name}, line {place.line + 1}: {error.problem}; expected plain YAML, for code "
            f"in files is never run"
        )
    text = " ".join(str(error.args[0] if error.args else error).split())
    key = text.rsplit(":", 1)[-1].strip().strip("'\"")
    if "Non-existent" not in text and "non-existent" not in text:
        return text
    close = difflib.get_close_matches(key, known, n=1)
    return text + (f"; did you mean {close[0]}?" if close else "")


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of a command line, checked against the machine and the data.

    Args:
        args: of Detectron2's ``default_argument_parser``.

    Raises:
        InputError: in one sentence, what is wrong.
    """
    cfg = load_config(args.config_file, args.opts)
    resuming = args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if args.eval_only or resuming:
        cfg.MODEL.TIMM.PRETRAINED = False
    if args.eval_only and not resuming and not cfg.MODEL.WEIGHTS:
        raise InputError("--eval-only needs MODEL.WEIGHTS <checkpoint>, or --resume")
    if args.eval_only and not cfg.DATASETS.TEST:
        raise InputError("--eval-only needs DATASETS.TEST, which is empty")
    if args.num_gpus < 1:
        raise InputError(f"--num-gpus is {args.num_gpus}, expected at least 1 process")
    if cfg.MODEL.WEIGHTS and not resuming:
        check_weights_exist(cfg.MODEL.WEIGHTS)
    cfg.freeze()
    check_config(cfg, args.num_gpus, args.num_machines, train=not args.eval_only)
    return cfg


def check_config(
    cfg: CfgNode, num_gpus: int = 1, num_machines: int = 1, train: bool = True
) -> None:
    """Raise an :class:`InputError` for what would go wrong later.

    Args:
        cfg: to check.
        num_gpus: number of processes on this machine.
        num_machines: number of machines.
        train: whether the training set is used.
    """
    for key, value, allowed in (
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, _names(META_ARCH_REGISTRY)),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, _names(BACKBONE_REGISTRY)),
        ("MODEL.SEM_SEG_HEAD.NAME", cfg.MODEL.SEM_SEG_HEAD.NAME, _names(SEM_SEG_HEADS_REGISTRY)),
        ("MODEL.MCIBI.FUSION", cfg.MODEL.MCIBI.FUSION, FUSIONS),
        ("MODEL.MCIBI.MEMORY.UPDATE", cfg.MODEL.MCIBI.MEMORY.UPDATE, UPDATES),
        ("MODEL.MCIBI.MEMORY.INIT", cfg.MODEL.MCIBI.MEMORY.INIT, INITS),
        (
            "MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE",
            cfg.MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE,
            MOMENTUM_SCHEDULES,
        ),
        ("MODEL.MCIBI.RCL_BN", cfg.MODEL.MCIBI.RCL_BN, RCL_BATCH_NORMS),
        ("MODEL.MCIBI.PROJECT_KERNEL", cfg.MODEL.MCIBI.PROJECT_KERNEL, (1, 3)),
        ("MODEL.MCIBI.FUSE_KERNEL", cfg.MODEL.MCIBI.FUSE_KERNEL, (1, 3)),
        ("MODEL.TIMM.NORM", cfg.MODEL.TIMM.NORM, BACKBONE_NORMS),
        ("MODEL.TIMM.NECK", cfg.MODEL.TIMM.NECK, NECKS),
        ("MODEL.TIMM.VARIANT", cfg.MODEL.TIMM.VARIANT, VARIANTS),
        ("MODEL.SEM_SEG_HEAD.ACTIVATION", cfg.MODEL.SEM_SEG_HEAD.ACTIVATION, ACTIVATIONS),
        ("SOLVER.AMP.PRECISION", cfg.SOLVER.AMP.PRECISION, PRECISIONS),
        ("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, SCHEDULES),
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, ("RGB", "BGR")),
        ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("none", "horizontal", "vertical")),
        ("INPUT.CROP.TYPE", cfg.INPUT.CROP.TYPE, ("absolute",)),
        ("TEST.INFERENCE", cfg.TEST.INFERENCE, ("whole", "slide")),
        ("TEST.SLIDE.WEIGHTS", cfg.TEST.SLIDE.WEIGHTS, WINDOW_WEIGHTS),
        ("INPUT.TEST_RESIZE", cfg.INPUT.TEST_RESIZE, TEST_RESIZES),
    ):
        if value not in allowed:
            raise InputError(f"{key} is {value!r}, expected one of {', '.join(map(str, allowed))}")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            "MODEL.LOAD_PROPOSALS is True, expected False: segmentation has no proposals, and the "
            "files of them could run code"
        )
    for key in ("IMS_PER_BATCH", "MAX_ITER"):
        if cfg.SOLVER[key] < 1:
            raise InputError(f"SOLVER.{key} is {cfg.SOLVER[key]}, expected at least 1")
    for key, least in (
        ("OUTPUT_STRIDE", 0),
        ("IMG_SIZE", 0),
        ("FREEZE_AT", -1),
        ("MLA_CHANNELS", 1),
    ):
        if cfg.MODEL.TIMM[key] < least:
            raise InputError(
                f"MODEL.TIMM.{key} is {cfg.MODEL.TIMM[key]}, expected at least {least}"
            )
    for key in ("AUX_CONVS", "AUX_UPSAMPLING"):
        if cfg.MODEL.SEM_SEG_HEAD[key] < 1:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.{key} is {cfg.MODEL.SEM_SEG_HEAD[key]}, expected at least 1"
            )
    if len(cfg.MODEL.MCIBI.ASPP_DILATIONS) not in (0, 3):
        raise InputError(
            f"MODEL.MCIBI.ASPP_DILATIONS is {cfg.MODEL.MCIBI.ASPP_DILATIONS}, expected three or ()"
        )
    if not 0 <= cfg.MODEL.TIMM.DROP_PATH < 1:
        raise InputError(
            f"MODEL.TIMM.DROP_PATH is {cfg.MODEL.TIMM.DROP_PATH}, expected 0 <= rate < 1"
        )
    _check_sizes(cfg.INPUT)
    try:
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    except RuntimeError as error:
        raise InputError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, expected cuda, cpu or another device of torch"
        ) from error
    if on_gpu and num_gpus > torch.cuda.device_count():
        raise InputError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs, expected {num_gpus} (--num-gpus); add "
            f"MODEL.DEVICE cpu to use the CPU"
        )
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_gpus * num_machines
    if train and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected a multiple of the "
            f"{reference} processes"
            + " it is for (SOLVER.REFERENCE_WORLD_SIZE; 0 takes the batch as it stands)"
            * bool(cfg.SOLVER.REFERENCE_WORLD_SIZE)
        )
    for key in ("LOSS_WEIGHT_W", "LOSS_WEIGHT_M", "LOSS_START_M"):
        if cfg.MODEL.MCIBI[key] < 0:
            raise InputError(f"MODEL.MCIBI.{key} is {cfg.MODEL.MCIBI[key]}, expected at least 0")
    _check_memory(cfg.MODEL.MCIBI.MEMORY, train and cfg.MODEL.MCIBI.ENABLED)
    if cfg.MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE == "lr" and not cfg.SOLVER.BASE_LR > 0:
        raise InputError(
            f"SOLVER.BASE_LR is {cfg.SOLVER.BASE_LR}, expected more than 0 for "
            f"MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE lr"
        )
    _check_test(cfg.TEST)
    _check_data(cfg, train)
    _check_output(cfg.OUTPUT_DIR)


def _names(registry: Registry) -> list[str]:
    return [name for name, _ in registry]


def _check_test(test: CfgNode) -> None:
    """The windows cover an image, and the numbers are in their ranges."""
    for key in ("WINDOW", "STRIDE"):
        if len(test.SLIDE[key]) != 2 or min(test.SLIDE[key]) < 1:
            raise InputError(f"TEST.SLIDE.{key} is {test.SLIDE[key]}, expected [height, width]")
    if any(s > w for s, w in zip(test.SLIDE.STRIDE, test.SLIDE.WINDOW, strict=True)):
        raise InputError(
            f"TEST.SLIDE.STRIDE is {test.SLIDE.STRIDE}, expected at most TEST.SLIDE.WINDOW "
            f"{test.SLIDE.WINDOW}: pixels between the windows would have no class"
        )
    if test.SLIDE.BATCH_SIZE < 1:
        raise InputError(f"TEST.SLIDE.BATCH_SIZE is {test.SLIDE.BATCH_SIZE}, expected at least 1")
    if not test.AUG.SCALES or min(test.AUG.SCALES) <= 0:
        raise InputError(f"TEST.AUG.SCALES is {test.AUG.SCALES}, expected factors above 0")
    if test.MEMORY_BUDGET_MB < 0:
        raise InputError(f"TEST.MEMORY_BUDGET_MB is {test.MEMORY_BUDGET_MB}, expected at least 0")
    if test.VIS_IMAGES < 0:
        raise InputError(f"TEST.VIS_IMAGES is {test.VIS_IMAGES}, expected at least 0")


def _check_sizes(inputs: CfgNode) -> None:
    """What the augmentation is told is possible."""
    for key, value, used in (
        ("CROP.SIZE", inputs.CROP.SIZE, inputs.CROP.ENABLED),
        ("FIXED_SIZE_TEST", inputs.FIXED_SIZE_TEST, inputs.TEST_RESIZE == "fixed"),
        ("SCALE_BASE", inputs.SCALE_BASE, tuple(inputs.SCALE_BASE) != (0, 0)),
    ):
        if used and (len(value) != 2 or any(x != int(x) or x < 1 for x in value)):
            raise InputError(f"INPUT.{key} is {value}, expected (height, width) in pixels")
    for key, value, least, most in (
        ("MIN_SIZE_TEST", inputs.MIN_SIZE_TEST, 0, math.inf),
        ("MAX_SIZE_TEST", inputs.MAX_SIZE_TEST, 1, math.inf),
        ("CROP.SINGLE_CATEGORY_MAX_AREA", inputs.CROP.SINGLE_CATEGORY_MAX_AREA, 0, 1),
        ("ROTATION_DEGREES", inputs.ROTATION_DEGREES, 0, 180),
        ("ROTATION_PROB", inputs.ROTATION_PROB, 0, 1),
    ):
        if not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"{least}..{most}"
            raise InputError(f"INPUT.{key} is {value}, expected {expected}")
    if len(inputs.SCALE_RANGE) != 2 or not 0 < inputs.SCALE_RANGE[0] <= inputs.SCALE_RANGE[1]:
        raise InputError(
            f"INPUT.SCALE_RANGE is {inputs.SCALE_RANGE}, expected (smallest, largest) factor"
        )
    if not inputs.SCALE_KEEP_RATIO and tuple(inputs.SCALE_BASE) == (0, 0):
        raise InputError(
            "INPUT.SCALE_KEEP_RATIO is False, but INPUT.SCALE_BASE is (0, 0), expected the "
            "(height, width) that images are brought to"
        )


def _check_memory(memory: CfgNode, train: bool) -> None:
    """The numbers are in their ranges, and what INIT needs is there."""
    for key in ("SLOTS", "INIT_PIXELS", "INIT_MAX_IMAGES"):
        if memory[key] < 1:
            raise InputError(f"MODEL.MCIBI.MEMORY.{key} is {memory[key]}, expected at least 1")
    if not 0 <= memory.MOMENTUM <= 1:
        raise InputError(f"MODEL.MCIBI.MEMORY.MOMENTUM is {memory.MOMENTUM}, expected 0..1")
    if memory.POWER < 0:
        raise InputError(f"MODEL.MCIBI.MEMORY.POWER is {memory.POWER}, expected at least 0")
    if train and memory.INIT == "file" and not PathManager.isfile(memory.INIT_FILE):
        raise InputError(
            f"MODEL.MCIBI.MEMORY.INIT_FILE: {memory.INIT_FILE or 'empty'}: no such file, expected "
            f"the rows of the memory (.npy or .pth)"
        )
    if train and memory.INIT == "clustering" and not importlib.util.find_spec("sklearn"):
        raise InputError(
            "MODEL.MCIBI.MEMORY.INIT is clustering, which needs scikit-learn: "
            "pip install 'scikit-learn>=1.3'"
        )


def check_number_of_classes(cfg: CfgNode, name: str) -> None:
    """Raise an :class:`InputError` if the head has not as many classes as a data set."""
    found = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    classes = MetadataCatalog.get(name).get("stuff_classes")
    if classes is not None and len(classes) != found:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {found}, but {name} has {len(classes)} classes"
        )


def _check_data(cfg: CfgNode, train: bool) -> None:
    """Every data set is known, has its folders, and as many classes as the head."""
    ignored = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    if not 0 <= ignored <= 65535:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignored}, expected 0..65535, such as 255: label "
            f"maps cannot hold another"
        )
    if train and not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is empty, expected the name of a data set")
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        if name not in DatasetCatalog.list():
            close = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
            raise InputError(
                f"DATASETS: {name!r} is not a registered data set"
                + (f"; close: {', '.join(close)}" if close else "")
            )
        classes = MetadataCatalog.get(name).get("stuff_classes")
        if classes is None:
            raise InputError(f"data set {name} has no stuff_classes in its metadata")
        check_number_of_classes(cfg, name)
        metadata, head = MetadataCatalog.get(name), cfg.MODEL.SEM_SEG_HEAD
        if metadata.get("ignore_label", head.IGNORE_VALUE) != head.IGNORE_VALUE:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {head.IGNORE_VALUE}, but {name} ignores "
                f"{metadata.ignore_label}"
            )
        if cfg.DATALOADER.SKIP_BAD and name not in cfg.DATASETS.TEST:
            continue  # the first may be one of the bad ones
        for record in load_records(name)[:1]:
            for file in (record["file_name"], record.get("sem_seg_file_name")):
                if file and not PathManager.exists(file):
                    raise InputError(f"{file}: no such file, but {name} lists it")


def _check_output(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"OUTPUT_DIR: {folder}: cannot be written to ({error.strerror or error})"
        ) from error
