"""What every config key may be: one table of types and ranges, for the check and the documents."""

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.solver.build import GradientClipType
from detectron2.utils.registry import Registry

from ..data.augmentation import CROP_TYPES, FLIPS
from ..data.mapper import IMAGE_FORMATS
from ..input_size import TEST_RESIZES, WITHOUT_CITYSCAPES
from ..modeling.backbones import NORMS as BACKBONE_NORMS
from ..modeling.backbones import VARIANTS
from ..modeling.fusion import FUSIONS
from ..modeling.head import ACTIVATIONS, CONTEXT_NAMES, KERNELS
from ..modeling.losses import LOSSES
from ..modeling.memory import BATCH_NORMS, READERS, UPDATES
from ..modeling.necks import NECKS
from ..modeling.norms import NORMS as HEAD_NORMS
from ..modeling.segmentor import INFERENCES
from ..modeling.segmentor import PRECISIONS as TEST_PRECISIONS
from ..modeling.sliding import WEIGHTS as WINDOW_WEIGHTS
from .memory_hooks import SCHEDULES as MOMENTUM_SCHEDULES
from .memory_init import INITS
from .schedule import SCHEDULES as LR_SCHEDULES
from .train_step import PRECISIONS


class Rule:
    """What a value may be."""

    def describe(self) -> str:
        """The end of the sentence "KEY is VALUE, expected ..."."""
        raise NotImplementedError

    def accepts(self, value: object) -> bool:
        """Whether the value is of the type and in the range."""
        raise NotImplementedError


@dataclass(frozen=True)
class Switch(Rule):
    """True or False."""

    def describe(self) -> str:
        """See :class:`Rule`."""
        return "True or False"

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number; True and False are none."""

    least: int
    most: int

    def describe(self) -> str:
        """See :class:`Rule`."""
        return f"a whole number of {self.least}..{self.most}"

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.least <= value <= self.most


@dataclass(frozen=True)
class Number(Rule):
    """A number, whole or not.

    Args:
        least: smallest one.
        most: largest one.
        above: whether ``least`` itself is excluded.
        below: whether ``most`` itself is excluded.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def describe(self) -> str:
        """See :class:`Rule`."""
        if not self.above and not self.below:
            return f"a number of {self.least:g}..{self.most:g}"
        low = f"above {self.least:g}" if self.above else f"of at least {self.least:g}"
        return f"a number {low} and {'below' if self.below else 'at most'} {self.most:g}"

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`; NaN is in no range."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        if not self.least <= value <= self.most:
            return False
        return not (self.above and value == self.least or self.below and value == self.most)


@dataclass(frozen=True)
class Choice(Rule):
    """One of several values, which the module that knows them lists.

    Args:
        allowed: the values, or where they are registered.
        note: what else to say where another value was found.
    """

    allowed: Collection | Registry
    note: str = ""

    @property
    def values(self) -> list:
        """The values that there are now."""
        if isinstance(self.allowed, Registry):
            return [name for name, _ in self.allowed]
        return list(self.allowed)

    def describe(self) -> str:
        """See :class:`Rule`."""
        names = ", ".join(str(x) if x != "" else repr(x) for x in self.values)
        return f"one of {names}" + (f" ({self.note})" if self.note else "")

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`; 1 is not True."""
        return any(type(value) is type(x) and value == x for x in self.values)


@dataclass(frozen=True)
class Text(Rule):
    """A text.

    Args:
        what: what it says.
        accepted: whether a text is one, if not all but the empty one are.
    """

    what: str = "a text"
    accepted: Callable[[str], bool] = bool

    def describe(self) -> str:
        """See :class:`Rule`."""
        return self.what

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`; no path has a NUL."""
        return isinstance(value, str) and "\0" not in value and self.accepted(value)


@dataclass(frozen=True)
class Several(Rule):
    """A list or tuple.

    Args:
        what: how many, in words.
        counts: how many.
        each: of what.
    """

    what: str
    counts: Collection[int]
    each: Rule

    def describe(self) -> str:
        """See :class:`Rule`."""
        return f"{self.what}, each {self.each.describe()}"

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`."""
        if not isinstance(value, list | tuple) or len(value) not in self.counts:
            return False
        return all(map(self.each.accepts, value))


@dataclass(frozen=True)
class Row(Rule):
    """A list or tuple whose values differ in kind.

    Args:
        what: the values, in words.
        rules: of each.
    """

    what: str
    rules: tuple[Rule, ...]

    def describe(self) -> str:
        """See :class:`Rule`."""
        return self.what

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`."""
        if not isinstance(value, list | tuple) or len(value) != len(self.rules):
            return False
        return all(rule.accepts(x) for rule, x in zip(self.rules, value, strict=True))


@dataclass(frozen=True)
class Or(Rule):
    """One further value beside those of another rule."""

    value: object
    rule: Rule

    def describe(self) -> str:
        """See :class:`Rule`."""
        return f"{self.value} or {self.rule.describe()}"

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`."""
        same = type(value) is type(self.value) and value == self.value
        return same or self.rule.accepts(value)


@dataclass(frozen=True)
class Anything(Rule):
    """Whatever is not None, of keys that nobody here reads."""

    def describe(self) -> str:
        """See :class:`Rule`."""
        return "a value"

    def accepts(self, value: object) -> bool:
        """See :class:`Rule`."""
        return value is not None


def _is_device(name: str) -> bool:
    try:
        return torch.device(name).type != "meta"  # which has shapes and no values
    except RuntimeError:
        return False


# Bounds that no use passes; a value beyond them is a slip of the pen.
_ANY_COUNT = range(10**6)
_SOME = range(1, 10**6)
_ITERATIONS = 10**9
_PIXELS = 65536

# Of Detectron2's meta-architectures, the first of which is its default, those that need objects.
OBJECT_DETECTORS = ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "FCOS", "PanopticFPN")

# Of Detectron2's ResNet.
_STAGES = ("stem", "res2", "res3", "res4", "res5")

_switch = Switch()
_channels = Whole(1, 32768)
_iteration = Whole(0, _ITERATIONS)
_share = Number(0, 1)
_below_one = Number(0, 1, below=True)
_factor = Number(0.01, 100)
_weight = Number(0, 10000)
_decay = Number(0, 10)
_any_text = Text(accepted=lambda text: True)
_names = Several("a list", _ANY_COUNT, Text("a name"))
_some_names = Several("a list of at least one", _SOME, Text("a name"))
_size = Several("(height, width) in pixels", (2,), Whole(1, _PIXELS))
_byte = Whole(0, 255)
_colors = Several("a list", _ANY_COUNT, Several("[red, green, blue]", (3,), _byte))
_label = Whole(0, 65535)
_RESULT = Row(
    "[task, metric, value, tolerance]",
    (Text(), Text(), Number(-(10**9), 10**9), Number(0, 10**9)),
)
_source = Several(
    "[images, labels] or [list or manifest] or [folder of both]", (0, 1, 2), Text("a path")
)


def _section(name: str, rules: dict[str, Rule]) -> Iterable[tuple[str, Rule]]:
    return ((f"{name}.{key}", rule) for key, rule in rules.items())


TABLE: dict[str, Rule] = dict(
    [
        ("VERSION", Choice((2,))),
        # Of an address a local folder would be made, and TensorBoard write elsewhere.
        ("OUTPUT_DIR", Text("a folder", lambda text: text != "" and "://" not in text)),
        # numpy's generator takes no larger one, and each process adds its number.
        ("SEED", Whole(-1, 2**31)),
        ("CUDNN_BENCHMARK", _switch),
        ("VIS_PERIOD", _iteration),
        *_section(
            "MODEL",
            {
                "META_ARCHITECTURE": Choice(META_ARCH_REGISTRY),
                "DEVICE": Text("cuda, cpu or another device of torch", _is_device),
                "WEIGHTS": _any_text,
                "PIXEL_MEAN": Several("three values, one for each channel", (3,), Number(0, 255)),
                "PIXEL_STD": Several(
                    "three values, one for each channel", (3,), Number(0.001, 65535)
                ),
                "BACKBONE.NAME": Choice(BACKBONE_REGISTRY),
                "BACKBONE.FREEZE_AT": Whole(0, 5),
                "BACKBONE.CHECKPOINTING": _switch,
            },
        ),
        *_section(
            "MODEL.MCIBI",
            {
                "ENABLED": _switch,
                "CONTEXT": Choice(CONTEXT_NAMES),
                "AGGREGATION": Choice(READERS),
                "ROWS_BIAS": _switch,
                "HARD_AGGREGATION": _switch,
                "FUSION": Choice(FUSIONS),
                "PROJECT_KERNEL": Choice(KERNELS),
                "FUSE_KERNEL": Choice(KERNELS),
                "ATTENTION_DIM": _channels,
                "ASPP_DILATIONS": Several("three or ()", (0, 3), Whole(1, 1024)),
                "LOSS_WEIGHT_W": _weight,
                "LOSS_WEIGHT_M": _weight,
                "LOSS_START_M": _iteration,
                "RCL_BN": Choice(BATCH_NORMS),
                "MEMORY.INIT": Choice(INITS),
                "MEMORY.INIT_MAX_IMAGES": Whole(1, _ITERATIONS),
                "MEMORY.INIT_PIXELS": Whole(1, 10**6),
                "MEMORY.INIT_FILE": _any_text,
                "MEMORY.UPDATE": Choice(UPDATES),
                "MEMORY.MOMENTUM": _share,
                "MEMORY.POWER": Number(0, 100),
                "MEMORY.MOMENTUM_SCHEDULE": Choice(MOMENTUM_SCHEDULES),
                "MEMORY.RENORMALIZE": _switch,
                "MEMORY.SLOTS": Whole(1, 1024),
            },
        ),
        *_section(
            "MODEL.TIMM",
            {
                "NAME": Text("a network of timm.list_models()"),
                "OUTPUT_STRIDE": Whole(0, 64),
                "OUT_INDICES": Several("at least one, rising", range(1, 1000), Whole(0, 1000)),
                "PRETRAINED": _switch,
                "NORM": Choice(BACKBONE_NORMS),
                "FREEZE_AT": Whole(-1, 1000),
                "DROP_PATH": _below_one,
                "IMG_SIZE": Whole(0, _PIXELS),
                "VARIANT": Choice(VARIANTS),
                "STEM_RELU": _switch,
                "NECK": Choice(NECKS),
                "NECK_STRIDE": Whole(0, 128),
                "MLA_CHANNELS": _channels,
            },
        ),
        *_section(
            "MODEL.SEM_SEG_HEAD",
            {
                "NAME": Choice(SEM_SEG_HEADS_REGISTRY),
                "IN_FEATURES": _some_names,
                "IGNORE_VALUE": _label,
                "NUM_CLASSES": Whole(1, 65535),
                "CONVS_DIM": _channels,
                "COMMON_STRIDE": Whole(1, 128),
                "NORM": Choice(HEAD_NORMS),
                "LOSS_WEIGHT": _weight,
                "DROPOUT": _below_one,
                "ACTIVATION": Choice(ACTIVATIONS),
                "LOSS": Choice(LOSSES),
                "OHEM.THRESHOLD": _share,
                "OHEM.MIN_KEPT": Whole(1, 2**31),
                "AUX_FEATURES": _names,
                "AUX_LOSS_WEIGHT": _weight,
                "AUX_CONVS": Whole(1, 100),
                "AUX_UPSAMPLING": Whole(1, 64),
                "CLASS_WEIGHTS": Several("a list", _ANY_COUNT, _weight),
            },
        ),
        *_section(
            "MODEL.RESNETS",
            {
                "DEPTH": Choice((18, 34, 50, 101, 152)),
                "OUT_FEATURES": Several(
                    "a list of at least one",
                    _SOME,
                    Choice(_STAGES),
                ),
                "NUM_GROUPS": Whole(1, 1024),
                "NORM": Choice(HEAD_NORMS),
                "WIDTH_PER_GROUP": _channels,
                "STRIDE_IN_1X1": _switch,
                "RES5_DILATION": Choice((1, 2, 4)),
                "RES2_OUT_CHANNELS": _channels,
                "STEM_OUT_CHANNELS": _channels,
                "DEFORM_ON_PER_STAGE": Several("four values, one for each stage", (4,), _switch),
                "DEFORM_MODULATED": _switch,
                "DEFORM_NUM_GROUPS": Whole(1, 1024),
            },
        ),
        *_section(
            "MODEL.FPN",
            {
                "IN_FEATURES": _names,
                "OUT_CHANNELS": _channels,
                "NORM": Choice(HEAD_NORMS),
                "FUSE_TYPE": Choice(("sum", "avg")),
            },
        ),
        *_section(
            "INPUT",
            {
                "MIN_SIZE_TRAIN": Several("a list of at least one", _SOME, Whole(0, _PIXELS)),
                "MIN_SIZE_TRAIN_SAMPLING": Choice(("choice", "range")),
                "MAX_SIZE_TRAIN": Whole(1, _ITERATIONS),
                "MIN_SIZE_TEST": Whole(0, _PIXELS),
                "MAX_SIZE_TEST": Whole(1, _ITERATIONS),
                "RANDOM_FLIP": Choice(FLIPS),
                "CROP.ENABLED": _switch,
                "CROP.TYPE": Choice((*CROP_TYPES, "absolute_range", "relative", "relative_range")),
                "CROP.SIZE": Several("(height, width)", (2,), Number(0, _PIXELS, above=True)),
                "CROP.SINGLE_CATEGORY_MAX_AREA": Number(0, 1, above=True),
                "FORMAT": Choice(IMAGE_FORMATS),
                "MASK_FORMAT": Choice(("polygon", "bitmask")),
                "SCALE_RANGE": Several("(smallest, largest) factor", (2,), _factor),
                "SCALE_BASE": Several(
                    "(height, width) in pixels, or (0, 0)", (2,), Whole(0, _PIXELS)
                ),
                "SCALE_KEEP_RATIO": _switch,
                "ROTATION_DEGREES": Number(0, 180),
                "ROTATION_PROB": _share,
                "COLOR_AUG_SSD": _switch,
                "WHITE_LEVEL": Whole(0, 65535),
                "MAX_PIXELS": Whole(0, 2**53),
                "TEST_RESIZE": Choice(TEST_RESIZES, WITHOUT_CITYSCAPES),
                "FIXED_SIZE_TEST": _size,
            },
        ),
        *_section(
            "DATASETS",
            {
                "TRAIN": _names,
                "TEST": _names,
                "PROPOSAL_FILES_TRAIN": _names,
                "PROPOSAL_FILES_TEST": _names,
                "PRECOMPUTED_PROPOSAL_TOPK_TRAIN": Whole(0, _ITERATIONS),
                "PRECOMPUTED_PROPOSAL_TOPK_TEST": Whole(0, _ITERATIONS),
                "ALLOW_OTHER_CLASSES": _switch,
                "OWN.NAME": _any_text,
                "OWN.TRAIN": _source,
                "OWN.VAL": _source,
                "OWN.VAL_SHARE": _below_one,
                "OWN.IMAGE_SUFFIX": _any_text,
                "OWN.LABEL_SUFFIX": _any_text,
                "OWN.EXCLUDED": _names,
                "OWN.CLASS_NAMES": Several(
                    "a list of texts (quote numbers, yes and no)", _ANY_COUNT, Text("a name")
                ),
                "OWN.CLASS_COLORS": _colors,
                "OWN.LABEL_IDS": Several("a list", _ANY_COUNT, _label),
                # NumPy files may hold -1.
                "OWN.LABEL_IGNORED": Several("a list", _ANY_COUNT, Whole(-1, 65535)),
                "OWN.LABEL_COLORS": _colors,
                "OWN.IGNORED_COLORS": _colors,
                "OWN.LABEL_NEAREST": _switch,
                "OWN.LABEL_THRESHOLD": _label,
            },
        ),
        *_section(
            "DATALOADER",
            {
                "NUM_WORKERS": Whole(0, 1024),
                "ASPECT_RATIO_GROUPING": _switch,
                "SAMPLER_TRAIN": Choice(
                    (
                        "TrainingSampler",
                        "RepeatFactorTrainingSampler",
                        "RandomSubsetTrainingSampler",
                    )
                ),
                "REPEAT_THRESHOLD": _share,
                "REPEAT_SQRT": _switch,
                "FILTER_EMPTY_ANNOTATIONS": _switch,
                "SKIP_BAD": _switch,
                "TIMEOUT": Whole(0, 10**6),
            },
        ),
        *_section(
            "SOLVER",
            {
                "LR_SCHEDULER_NAME": Choice(LR_SCHEDULES),
                "MAX_ITER": Whole(1, _ITERATIONS),
                "BASE_LR": Number(0, 1000),
                "BASE_LR_END": Number(0, 1000),
                "MOMENTUM": _below_one,
                "NESTEROV": _switch,
                "WEIGHT_DECAY": _decay,
                "WEIGHT_DECAY_NORM": _decay,
                "WEIGHT_DECAY_BIAS": Or(None, _decay),
                "GAMMA": _share,
                "STEPS": Several("rising iterations", _ANY_COUNT, Whole(1, _ITERATIONS)),
                "NUM_DECAYS": Whole(0, 10000),
                "WARMUP_FACTOR": _share,
                "WARMUP_ITERS": _iteration,
                "WARMUP_METHOD": Choice(("linear", "constant")),
                "RESCALE_INTERVAL": _switch,
                "CHECKPOINT_PERIOD": Whole(1, _ITERATIONS),
                "CHECKPOINTS_KEPT": Whole(-1, _ITERATIONS),
                "IMS_PER_BATCH": Whole(1, 65536),
                "REFERENCE_WORLD_SIZE": Whole(0, 65536),
                "BIAS_LR_FACTOR": _weight,
                "CLIP_GRADIENTS.ENABLED": _switch,
                "CLIP_GRADIENTS.CLIP_TYPE": Choice([kind.value for kind in GradientClipType]),
                "CLIP_GRADIENTS.CLIP_VALUE": Number(0, 10**6, above=True),
                "CLIP_GRADIENTS.NORM_TYPE": Or(math.inf, Number(0, 100, above=True)),
                "AMP.ENABLED": _switch,
                "AMP.PRECISION": Choice(PRECISIONS),
                "HEAD_LR_FACTOR": _weight,
                "POLY_LR_POWER": Number(0, 100),
                "POLY_LR_CONSTANT_ENDING": _share,
            },
        ),
        *_section(
            "TEST",
            {
                "EXPECTED_RESULTS": Several("a list", _ANY_COUNT, _RESULT),
                "EVAL_PERIOD": _iteration,
                "KEYPOINT_OKS_SIGMAS": Several("a list", _ANY_COUNT, Number(0, 1)),
                "DETECTIONS_PER_IMAGE": Whole(1, 10**6),
                "AUG.ENABLED": _switch,
                "AUG.MIN_SIZES": Several("a list", _ANY_COUNT, Whole(1, _PIXELS)),
                "AUG.MAX_SIZE": Whole(1, _ITERATIONS),
                "AUG.FLIP": _switch,
                "AUG.SCALES": Several("factors, at least one", range(1, 1000), _factor),
                "AUG.SOFTMAX": _switch,
                "PRECISE_BN.ENABLED": _switch,
                "PRECISE_BN.NUM_ITER": Whole(1, _ITERATIONS),
                "INFERENCE": Choice(INFERENCES),
                "FOLD_BATCH_NORM": _switch,
                "PRECISION": Choice(TEST_PRECISIONS),
                "RELEASED": _switch,
                "SLIDE.WINDOW": _size,
                "SLIDE.STRIDE": _size,
                "SLIDE.WEIGHTS": Choice(WINDOW_WEIGHTS),
                "SLIDE.ACCUMULATE_ON_CPU": _switch,
                "SLIDE.BATCH_SIZE": Whole(1, 65536),
                "BOUNDARY_IOU": _switch,
                "VIS_IMAGES": Whole(0, 10000),
            },
        ),
    ]
)

# Of the metadata of a data set, what is read if it is there.
METADATA: dict[str, Rule] = {
    "stuff_classes": Several("a list of at least one", _SOME, Text("a name")),
    "ignore_label": _label,
    "evaluator_type": Text("a text such as sem_seg"),
}

# Keys that were there once, with what does the same.
REMOVED: dict[str, str] = {
    # Of Detectron2's first version.
    "MODEL.WEIGHT": "MODEL.WEIGHTS",
    "TEST.AUG_ON": "TEST.AUG.ENABLED",
    "TEST.MEMORY_BUDGET_MB": "none: the model gives logits of every size, and labels instead where "
    "labels_only is set",
}


def rule_of(key: str, default: object) -> Rule:
    """The rule of a key; of keys of Detectron2 that nobody here reads, the type of the default."""
    if key in TABLE:
        return TABLE[key]
    if default is None:
        return Or(None, Anything())
    if isinstance(default, bool):
        return _switch
    if isinstance(default, int):
        return Whole(-(10**9), 10**9)
    if isinstance(default, float):
        return Number(-(10**9), 10**9)
    if isinstance(default, str):
        return _any_text
    return Several("a list", _ANY_COUNT, Anything())
