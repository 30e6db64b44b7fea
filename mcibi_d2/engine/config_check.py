"""Every mistake in a config is said in one sentence: while it is read, and before it is used."""

import ast
import difflib
import importlib.util
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..config_files import read_config
from ..data.augmentation import CROP_TYPES
from ..data.classes import Classes
from ..data.datasets import check_registered, load_records
from ..errors import InputError
from ..modeling.backbones import check_name
from ..modeling.memory import READERS
from .class_names import check_data_sets
from .config_table import METADATA as _METADATA
from .config_table import OBJECT_DETECTORS, REMOVED, TABLE, Rule, rule_of


def merge_file(cfg: CfgNode, path: str, older: bool = False) -> None:
    """Put the values of a YAML file, and of those that it is based on, into a config.

    Args:
        cfg: that gets them.
        path: of the file.
        older: pass over keys that there were once, for the config of an older run.

    Raises:
        InputError: naming the file, the key, its value and what was expected.
    """
    try:
        values = read_config(path)
    except InputError as error:
        raise InputError(f"{path}: _BASE_: {error}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.filename}: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{path}: _BASE_ leads back to the file itself") from error
    except yaml.constructor.ConstructorError as error:
        place = error.problem_mark
        raise InputError(
            f"{path}: {place.name}, line {place.line + 1}: {error.problem}; expected plain YAML, "
            f"for code in files is never run"
        ) from error
    # Besides YAML's own errors Detectron2 raises what comes of a file that is no mapping.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read as a config of KEY: VALUE ({' '.join(str(error).split())})"
        ) from error
    _merge(cfg, values, path, older=older)


def merge_options(cfg: CfgNode, options: Sequence) -> None:
    """Put ``KEY VALUE`` options into a config.

    Raises:
        InputError: naming the key, its value and what was expected.
    """
    where, known = "command line", dict(_leaves(cfg))
    for key, value in zip(options[::2], options[1::2], strict=False):
        _set(cfg, str(key), value, where, known)
    if len(options) % 2:
        key = str(options[-1])
        _find(cfg, key, where, known)
        raise InputError(f"{where}: {key} has no value, expected KEY VALUE pairs")


def _merge(cfg: CfgNode, values: object, where: str, prefix: str = "", older: bool = False) -> None:
    """Put nested values below ``prefix`` into a config."""
    if not isinstance(values, Mapping):
        name = prefix.rstrip(".") or "the file"
        raise InputError(f"{where}: {name} is {shown(values)}, expected keys with their values")
    known = dict(_leaves(cfg))
    for name, value in values.items():
        key = f"{prefix}{name}"
        if older and key in REMOVED:
            continue
        if isinstance(_find(cfg, key, where, known), CfgNode):
            _merge(cfg, value, where, f"{key}.", older)
        else:
            _set(cfg, key, value, where, known)


def _set(cfg: CfgNode, key: str, value: object, where: str, known: dict[str, object]) -> None:
    """Set a key to a value that its rule accepts."""
    before = _find(cfg, key, where, known)
    value = _decoded(value)
    if isinstance(before, CfgNode):
        some = next(name for name in known if name.startswith(f"{key}."))
        raise InputError(
            f"{where}: {key} is {shown(value)}, expected a key below it, such as {some}"
        )
    rule = rule_of(key, before)
    if isinstance(value, str) and rule.accepts(_infinity(value)):
        value = _infinity(value)
    _require(key, value, rule, f"{where}: ")
    for kind in (list, tuple, float):
        if isinstance(before, kind) and isinstance(value, list | tuple | int | float):
            value = kind(value)
    section, _, name = key.rpartition(".")
    (_find(cfg, section, where, known) if section else cfg)[name] = value


def _find(cfg: CfgNode, key: str, where: str, known: Iterable[str]) -> object:
    """The value or section of a key."""
    node = cfg
    for name in key.split("."):
        if not isinstance(node, CfgNode) or name not in node:
            raise InputError(f"{where}: {_unknown(key, known)}")
        node = node[name]
    return node


def _unknown(key: str, known: Iterable[str]) -> str:
    if key in REMOVED:
        return f"{key} is no config key any more, expected {REMOVED[key]}"
    pair = key.split("=", 1)
    if len(pair) == 2 and pair[0] in known:
        return f"{key} is no config key, expected a key and its value: {' '.join(pair)}"
    sections = {key.rpartition(".")[0] for key in known} - {""}
    close = difflib.get_close_matches(key, [*known, *sections], n=1)
    return f"{shown(key)} is no config key" + (f"; did you mean {close[0]}?" if close else "")


def _leaves(node: CfgNode, prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _decoded(value: object) -> object:
    """A Python literal in a text as its value: YAML has no tuples, a command line text alone."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return value


def _infinity(text: str) -> object:
    return float("inf") if text.lower() in ("inf", ".inf") else text


def shown(value: object, most: int = 100) -> str:
    """A value for a sentence: on one line, and cut if it is long."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # a number of thousands of digits; a list in itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= most else f"{text[:most]}..."


def _require(key: str, value: object, rule: Rule, where: str = "") -> None:
    if not rule.accepts(value):
        raise InputError(f"{where}{key} is {shown(value)}, expected {rule.describe()}")


def check_values(cfg: CfgNode) -> None:
    """Raise an :class:`InputError` for a value of a wrong type, out of its range, or at odds.

    It looks at the config alone, which takes milliseconds.

    Args:
        cfg: a config with :func:`mcibi_d2.add_mcibi_config`, however its values came into it.
    """
    for key, rule in TABLE.items():
        node, path = cfg, ""
        for name in key.split("."):
            if not isinstance(node, CfgNode):
                raise InputError(f"{path} is {shown(node)}, expected a section with {key}")
            if name not in node:
                raise InputError(f"{key} is not in the config, expected mcibi_d2.add_mcibi_config")
            node, path = node[name], f"{path}.{name}".lstrip(".")
        _require(key, node, rule)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise InputError(
            "MODEL.LOAD_PROPOSALS is True, expected False: segmentation has no proposals, and the "
            "files of them could run code"
        )
    _check_schedule(cfg.SOLVER)
    _check_head(cfg.MODEL)
    _check_sizes(cfg.INPUT)
    _check_windows(cfg.TEST.SLIDE)


def check_config(
    cfg: CfgNode,
    num_gpus: int = 1,
    num_machines: int = 1,
    train: bool = True,
    output: bool = True,
) -> None:
    """Raise an :class:`InputError` for what would go wrong later.

    Args:
        cfg: to check.
        num_gpus: number of processes on this machine.
        num_machines: number of machines.
        train: whether the training set is used.
        output: whether ``OUTPUT_DIR`` is written to.
    """
    check_values(cfg)
    _check_device(cfg.MODEL.DEVICE, num_gpus)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE or num_gpus * num_machines
    if train and cfg.SOLVER.IMS_PER_BATCH % reference:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected a multiple of the "
            f"{reference} processes"
            + " it is for (SOLVER.REFERENCE_WORLD_SIZE; 0 takes the batch as it stands)"
            * bool(cfg.SOLVER.REFERENCE_WORLD_SIZE)
        )
    if train and cfg.TEST.EXPECTED_RESULTS and not cfg.DATASETS.TEST:
        raise InputError(
            f"TEST.EXPECTED_RESULTS is {shown(cfg.TEST.EXPECTED_RESULTS)}, but DATASETS.TEST is "
            f"(), expected a data set that gives results"
        )
    if train and cfg.MODEL.MCIBI.ENABLED:
        _check_memory_init(cfg.MODEL.MCIBI.MEMORY)
    check_metadata(cfg, train)
    _check_files(cfg, train)
    if output:
        _check_output(cfg.OUTPUT_DIR)


def _check_schedule(solver: CfgNode) -> None:
    """The schedule of the learning rate and the optimiser can be built."""
    if solver.NESTEROV and not solver.MOMENTUM:
        raise InputError("SOLVER.NESTEROV is True, but SOLVER.MOMENTUM is 0, expected more than 0")
    name, last = solver.LR_SCHEDULER_NAME, solver.MAX_ITER
    if name == "WarmupCosineLR" and not (0 < solver.BASE_LR >= solver.BASE_LR_END):
        raise InputError(
            f"SOLVER.BASE_LR is {solver.BASE_LR}, expected more than 0 and at least "
            f"SOLVER.BASE_LR_END {solver.BASE_LR_END} for SOLVER.LR_SCHEDULER_NAME {name}"
        )
    steps = list(solver.STEPS)
    if steps != sorted(set(steps)):
        raise InputError(f"SOLVER.STEPS is {solver.STEPS}, expected rising iterations")
    if name == "WarmupMultiStepLR" and last in steps:
        raise InputError(
            f"SOLVER.STEPS is {solver.STEPS}, expected iterations before SOLVER.MAX_ITER {last}"
        )


def _check_head(model: CfgNode) -> None:
    """The keys of the head, the memory and the backbone fit together."""
    head, mcibi = model.SEM_SEG_HEAD, model.MCIBI
    weights = head.CLASS_WEIGHTS
    if weights and len(weights) != head.NUM_CLASSES:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS has {len(weights)} values, expected one for each "
            f"of the {head.NUM_CLASSES} classes (MODEL.SEM_SEG_HEAD.NUM_CLASSES)"
        )
    if weights and not any(weights):
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS is {shown(weights)}, expected one above 0"
        )
    if mcibi.HARD_AGGREGATION and not getattr(READERS[mcibi.AGGREGATION], "mixes", False):
        raise InputError(
            f"MODEL.MCIBI.HARD_AGGREGATION is True, which needs MODEL.MCIBI.AGGREGATION pixels, "
            f"not {mcibi.AGGREGATION}"
        )
    names = list(head.AUX_FEATURES)
    if len(set(names)) < len(names):
        raise InputError(f"MODEL.SEM_SEG_HEAD.AUX_FEATURES is {names}, expected each name once")
    if model.META_ARCHITECTURE in OBJECT_DETECTORS:
        raise InputError(
            f"MODEL.META_ARCHITECTURE is {model.META_ARCHITECTURE!r}, which finds objects, "
            f"expected MCIBISegmentor or another that labels pixels"
        )
    if model.BACKBONE.NAME.startswith(("build_resnet", "build_retinanet")):
        _check_resnets(model)
    check_name(model.TIMM.NAME)
    indices = list(model.TIMM.OUT_INDICES)
    if indices != sorted(set(indices)):
        raise InputError(f"MODEL.TIMM.OUT_INDICES is {tuple(indices)}, expected rising indices")


def _check_resnets(model: CfgNode) -> None:
    """What Detectron2's own ResNet and its feature pyramids assert."""
    resnets, given = model.RESNETS, list(model.RESNETS.OUT_FEATURES)
    shallow = resnets.DEPTH in (18, 34)
    for key, allowed in (
        ("RES5_DILATION", (1,) if shallow else (1, 2)),
        *((("RES2_OUT_CHANNELS", (64,)), ("NUM_GROUPS", (1,))) if shallow else ()),
    ):
        if resnets[key] not in allowed:
            raise InputError(
                f"MODEL.RESNETS.{key} is {resnets[key]}, expected {' or '.join(map(str, allowed))} "
                f"for Detectron2's ResNet-{resnets.DEPTH}"
            )
    name, taken = model.BACKBONE.NAME, list(model.FPN.IN_FEATURES)
    if "_fpn_" in name and (not taken or not set(taken) <= set(given)):
        raise InputError(
            f"MODEL.FPN.IN_FEATURES is {taken}, expected some of MODEL.RESNETS.OUT_FEATURES {given}"
        )
    if "_retinanet_" in name and "res5" not in given:
        raise InputError(f"MODEL.RESNETS.OUT_FEATURES is {given}, expected res5 in it for {name}")


def _check_device(device: str, num_gpus: int) -> None:
    """The device is there, for every process."""
    kind, index = torch.device(device).type, torch.device(device).index or 0
    if kind == "cuda" and max(num_gpus, index + 1) > torch.cuda.device_count():
        raise InputError(
            f"MODEL.DEVICE is {device!r}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} GPUs, expected {max(num_gpus, index + 1)} (--num-gpus); "
            f"add MODEL.DEVICE cpu to use the CPU"
        )
    if kind not in ("cpu", "cuda"):
        try:
            torch.empty(1, device=device)
        except Exception as error:  # whatever a backend that is not there raises
            raise InputError(
                f"MODEL.DEVICE is {device!r}, which torch {torch.__version__} cannot use here, "
                f"expected cuda, cpu or another device that is there"
            ) from error


def _check_windows(slide: CfgNode) -> None:
    """The windows cover an image."""
    if any(s > w for s, w in zip(slide.STRIDE, slide.WINDOW, strict=True)):
        raise InputError(
            f"TEST.SLIDE.STRIDE is {slide.STRIDE}, expected at most TEST.SLIDE.WINDOW "
            f"{slide.WINDOW}: pixels between the windows would have no class"
        )


def _check_sizes(inputs: CfgNode) -> None:
    """What the augmentation is told is possible."""
    crop = inputs.CROP
    if crop.ENABLED and crop.TYPE not in CROP_TYPES:
        raise InputError(
            f"INPUT.CROP.TYPE is {crop.TYPE!r}, expected one of {', '.join(CROP_TYPES)}"
        )
    if crop.ENABLED and any(x != int(x) or x < 1 for x in crop.SIZE):
        raise InputError(f"INPUT.CROP.SIZE is {crop.SIZE}, expected (height, width) in pixels")
    for name, size in (("CROP.SIZE", crop.SIZE), ("FIXED_SIZE_TEST", inputs.FIXED_SIZE_TEST)):
        if inputs.MAX_PIXELS and size[0] * size[1] > inputs.MAX_PIXELS:
            raise InputError(
                f"INPUT.{name} is {size}, expected at most {inputs.MAX_PIXELS} pixels "
                f"(INPUT.MAX_PIXELS)"
            )
    base = tuple(inputs.SCALE_BASE)
    if base != (0, 0) and 0 in base:
        raise InputError(
            f"INPUT.SCALE_BASE is {base}, expected (height, width) in pixels, or (0, 0)"
        )
    if inputs.SCALE_RANGE[0] > inputs.SCALE_RANGE[1]:
        raise InputError(
            f"INPUT.SCALE_RANGE is {inputs.SCALE_RANGE}, expected (smallest, largest) factor"
        )
    if not inputs.SCALE_KEEP_RATIO and base == (0, 0):
        raise InputError(
            "INPUT.SCALE_KEEP_RATIO is False, but INPUT.SCALE_BASE is (0, 0), expected the "
            "(height, width) that images are brought to"
        )


def _check_memory_init(memory: CfgNode) -> None:
    """What INIT needs is there."""
    if memory.INIT == "file" and not PathManager.isfile(memory.INIT_FILE):
        raise InputError(
            f"MODEL.MCIBI.MEMORY.INIT_FILE: {memory.INIT_FILE or 'empty'}: no such file, expected "
            f"the rows of the memory (.npy or .pth)"
        )
    if memory.INIT == "clustering" and not importlib.util.find_spec("sklearn"):
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


def check_metadata(cfg: CfgNode, train: bool = True) -> None:
    """Raise an :class:`InputError` for a data set that is not known, or not of this model.

    No file is looked at, and no records are made.

    Args:
        cfg: with the names of the data sets.
        train: whether the training set is used.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is (), expected the name of a data set")
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        check_registered(name, "DATASETS")
        metadata, ignored = MetadataCatalog.get(name), cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
        for key, rule in _METADATA.items():
            if metadata.get(key) is not None:
                _require(f"{key} in the metadata of data set {name}", metadata.get(key), rule)
        label = Classes.of(metadata).ignore_label
        check_number_of_classes(cfg, name)
        if label != ignored:
            default = metadata.get("ignore_label") is None
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {ignored}, but {name} ignores {label}"
                + " (it has no ignore_label in its metadata)" * default
            )
    check_data_sets(cfg)


def _check_files(cfg: CfgNode, train: bool) -> None:
    """Every data set has its folders, and the files of its first image."""
    for name in (*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST):
        if cfg.DATALOADER.SKIP_BAD and name not in cfg.DATASETS.TEST:
            continue  # the first may be one of the bad ones
        first = load_records(name, labelled=train and name in cfg.DATASETS.TRAIN)[0]
        for file in (first["file_name"], first.get("sem_seg_file_name")):
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
