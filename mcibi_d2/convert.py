"""The models that the paper's authors released, turned into checkpoints of this project.

The released files are of the package sssegmentation. Every tensor of a file must have a place in
our model and every tensor of our model one in the file, or the file is refused.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from .errors import InputError

# What a checkpoint may be wrapped in.
_WRAPPERS = ("model", "state_dict")
_MEMORY = "memory_module.memory"
_BACKBONE = "backbone_net."
_COUNTER = "num_batches_tracked"

# Names of modules: the released ones (a regular expression) and ours. What follows is the same.
_HEAD_NAMES = (
    (r"downsample_backbone", "backbone.neck.step"),
    (r"norm_layers", "backbone.norms"),
    (r"bottleneck", "sem_seg_head.project"),
    (r"decoder_stage1", "sem_seg_head.h1"),
    (r"decoder_stage2", "sem_seg_head.h2"),
    (r"context_within_image_module\.parallel_branches", "sem_seg_head.context.branches"),
    (r"context_within_image_module\.global_branch\.1", "sem_seg_head.context.image.0"),
    (r"context_within_image_module\.global_branch\.2", "sem_seg_head.context.image.1"),
    (r"context_within_image_module\.bottleneck", "sem_seg_head.context.fuse"),
    (r"memory_module\.self_attention\.(\w+)_project", r"sem_seg_head.attention.\1"),
    (
        r"memory_module\.self_attentions\.(\d+)\.(\w+)_project",
        r"sem_seg_head.attention.of_slot.\1.\2",
    ),
    (r"memory_module\.fuse_memory_conv", "sem_seg_head.attention.join"),
    (r"memory_module\.bottleneck", "sem_seg_head.fuse.conv"),
    (r"memory_module\.self_attention_ms\.(\w+)_project", r"sem_seg_head.within_attention.\1"),
    (r"memory_module\.bottleneck_ms", "sem_seg_head.within_fuse.conv"),
)
# Within the backbone; what is not here has timm's name. The stem of three convolutions, and the
# vision transformer.
_BACKBONE_NAMES = (
    (r"stem\.([013456])", r"conv1.\1"),
    (r"stem\.7", "bn1"),
    (r"patch_embed\.projection", "patch_embed.proj"),
    (r"layers\.(\d+)\.ln(\d)", r"blocks.\1.norm\2"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj", r"blocks.\1.attn.qkv"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj", r"blocks.\1.attn.proj"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0", r"blocks.\1.mlp.fc1"),
    (r"layers\.(\d+)\.ffn\.layers\.1", r"blocks.\1.mlp.fc2"),
)
# What a pretrained backbone has for ImageNet alone.
_CLASSIFIER = re.compile(
    r"(fc|head|classifier|incre_modules|downsamp_modules|final_layer|norm|ln1|pre_logits)\."
)


@dataclass(frozen=True)
class Fate:
    """What has become of one tensor.

    Attributes:
        source: the released name; "" for a tensor of ours that the file does not have.
        target: our name; "" for a tensor that is left out.
        what: ``mapped`` (the same name within the backbone), ``renamed``, or why it is left out,
            missing or made.
    """

    source: str
    target: str
    what: str


def convert_released(state_dict: Mapping, cfg: CfgNode) -> dict[str, Tensor]:
    """The state dict of our model for that of a released one, or of a backbone alone.

    Args:
        state_dict: of a DeepLabV3 + MCIBI model of sssegmentation, or of a backbone that such a
            training starts from (OpenMMLab's ``-v1c`` ResNets, its ResNeSt and HRNet, timm's ViT),
            with or without prefixes ``module.`` and in or without a key ``model`` or
            ``state_dict``.
        cfg: of our model, such as one of ``configs/released``.

    Returns:
        Tensors by our names: all of the model, or those of the backbone. Memory rows that are not
        zero are initialised.

    Raises:
        InputError: if it is a model of another kind or of other sizes, if a tensor is missing, or
            if one is left over.
    """
    return convert(state_dict, cfg)[0]


def convert(state_dict: Mapping, cfg: CfgNode) -> tuple[dict[str, Tensor], list[Fate]]:
    """As :func:`convert_released`; also says what has become of every tensor."""
    source = _unwrap(state_dict)
    _refuse_others(source)
    expected = _expected(cfg)
    if any(name.startswith(_BACKBONE) for name in source):
        _check_sizes(source, cfg)
        rename = _model_renamer(cfg)
    else:
        expected = {k: v for k, v in expected.items() if k.startswith("backbone.net.")}
        rename = _backbone_renamer

    state: dict[str, Tensor] = {}
    fates, unknown = [], []
    for name, value in source.items():
        target, reason = rename(name)
        if reason:
            fates.append(Fate(name, "", reason))
        elif target not in expected or target in state:
            unknown.append(name)
        else:
            state[target] = value.detach()
            same = target == "backbone.net." + name.removeprefix(_BACKBONE)
            fates.append(Fate(name, target, "mapped" if same else "renamed"))
    if "sem_seg_head.memory.rows" in state:
        rows = state["sem_seg_head.memory.rows"].flatten(0, 1)
        state["sem_seg_head.memory.rows"] = rows
        state["sem_seg_head.memory.initialized"] = (rows != 0).any(dim=1)
        target = "sem_seg_head.memory.initialized"
        fates.append(Fate("", target, "made: which rows are not zero"))
    if rename is _backbone_renamer and "backbone.net.pos_embed" in state:
        _fit_positions(state, expected)
    missing = [name for name in expected if name not in state]
    for name in missing:
        if name.endswith(_COUNTER):
            state[name] = torch.zeros((), dtype=torch.int64)
            fates.append(Fate("", name, "missing: a counter, set to 0"))
    missing = [name for name in missing if name not in state]
    wrong = [name for name, value in state.items() if not _alike(value, expected[name])]
    if unknown or missing or wrong:
        raise InputError(_misfit(unknown, missing, wrong, state, expected, cfg))
    return {name: state[name].to(expected[name].dtype).contiguous() for name in expected}, fates


def _unwrap(loaded: object) -> dict[str, Tensor]:
    """The state dict within a checkpoint, without prefixes of wrapped modules."""
    for _ in range(len(_WRAPPERS) + 1):
        for key in _WRAPPERS:
            if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
                loaded = loaded[key]
                break
    if not isinstance(loaded, Mapping) or not loaded:
        raise InputError(f"holds a {type(loaded).__name__}, expected the tensors of a model")
    strange = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor)]
    if strange:
        raise InputError(
            f"holds no state dict, but {_some(strange)}, expected the tensors of a model"
        )
    state = {re.sub(r"^(module\.)+", "", str(name)): value for name, value in loaded.items()}
    if len(state) < len(loaded):
        twice = [name for name in map(str, loaded) if f"module.{name}" in loaded]
        raise InputError(f"holds {_some(twice)} with and without module., expected one of the two")
    return state


def _refuse_others(source: Mapping[str, Tensor]) -> None:
    """Say what a file of the same package is that is not MCIBI."""
    if any(name.startswith(("backbone.net.", "sem_seg_head.")) for name in source):
        raise InputError("is a checkpoint of this project already, expected a released model")
    plus = any(name.startswith(("decoder_pr.", "decoder_cwi.")) for name in source)
    memory = source.get(_MEMORY)
    if plus or (memory is not None and memory.dim() == 2):
        raise InputError(
            "holds an MCIBI++ model (sssegmentation's mcibiplusplus, whose memory is a mean and a "
            "deviation per class), expected one of MCIBI"
        )
    if memory is None and any(name.startswith(_BACKBONE) for name in source):
        raise InputError(
            f"holds a model of sssegmentation without a memory ({_MEMORY}), expected one of MCIBI"
        )


def _check_sizes(source: Mapping[str, Tensor], cfg: CfgNode) -> None:
    """Say in the user's words if the memory is of another model."""
    head, shape = cfg.MODEL.SEM_SEG_HEAD, tuple(source[_MEMORY].shape)
    expected = (head.NUM_CLASSES, cfg.MODEL.MCIBI.MEMORY.SLOTS, head.CONVS_DIM)
    if shape != expected:
        raise InputError(
            f"holds a memory of shape {shape}, expected {expected}: MODEL.SEM_SEG_HEAD.NUM_CLASSES "
            f"classes, MODEL.MCIBI.MEMORY.SLOTS rows of each, MODEL.SEM_SEG_HEAD.CONVS_DIM channels"
        )


def _expected(cfg: CfgNode) -> dict[str, Tensor]:
    """Our model's tensors, without their values."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    cfg.MODEL.TIMM.PRETRAINED = False
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def _rename(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """The name by the first rule that fits to its beginning, None if there is none."""
    for pattern, ours in rules:
        new, count = re.subn(rf"^{pattern}(?=\.)", ours, name)
        if count:
            return new
    return None


def _rename_backbone(name: str) -> str:
    name = name.removeprefix(_BACKBONE).replace("in_proj_", "in_proj.")
    return "backbone.net." + (_rename(name, _BACKBONE_NAMES) or name)


def _backbone_renamer(name: str) -> tuple[str, str]:
    """Our name of a tensor of a backbone alone, or why it is left out."""
    if _CLASSIFIER.match(name):
        return "", "left out: ImageNet's classifier"
    return _rename_backbone(name), ""


def _model_renamer(cfg: CfgNode) -> Callable[[str], tuple[str, str]]:
    """A function from a released name to ours, or to why it is left out."""
    head = cfg.MODEL.SEM_SEG_HEAD
    step = 2 if head.AUX_UPSAMPLING > 1 else 1  # our modules of a convolution in an auxiliary head
    flat = 4 if head.AUX_UPSAMPLING > 1 else 3  # theirs: convolution, norm, activation, up-sampling
    last = head.AUX_CONVS * flat + 1  # after the dropout

    def rename(name: str) -> tuple[str, str]:
        if name == _MEMORY:
            return "sem_seg_head.memory.rows", ""
        if name.startswith(_BACKBONE):
            return _rename_backbone(name), ""
        match = re.match(r"auxiliary_decoder\.(?:(\d+)\.)?(\d+)\.(\w+)$", name)
        if not match:
            return _rename(name, _HEAD_NAMES) or "", ""
        if not head.AUX_FEATURES:
            return "", "left out: an auxiliary head, which the config has none of"
        which, layer = int(match[1] or 0), int(match[2])
        if which >= len(head.AUX_FEATURES):
            return "", ""
        ours = f"{layer // flat * step}.{layer % flat}"
        if layer == last:
            ours = str(head.AUX_CONVS * step + 1)
        return f"sem_seg_head.aux.{head.AUX_FEATURES[which]}.{ours}.{match[3]}", ""

    return rename


def _fit_positions(state: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Resample the position embedding of a pretrained ViT, as the released trainings did."""
    name = "backbone.net.pos_embed"
    count = expected[name].shape[1] - 1
    side = round(count**0.5)
    if state[name].dim() == 3 and state[name].shape[1] != count + 1 == side * side + 1:
        state[name] = resample_abs_pos_embed(
            state[name], (side, side), interpolation="bilinear", antialias=False
        )


def _alike(value: Tensor, ours: Tensor) -> bool:
    """Whether a tensor can take the place of one of ours: same shape, dense, and numbers alike."""
    return (
        value.shape == ours.shape
        and value.layout == torch.strided
        and value.is_floating_point() == ours.is_floating_point()
        and not value.is_complex()
    )


def _misfit(unknown, missing, wrong, state, expected, cfg) -> str:
    """One sentence on what does not fit."""
    found = []
    if unknown:
        found.append(f"{len(unknown)} tensors that have no place in it: {_some(unknown)}")
    if missing:
        found.append(f"{len(missing)} tensors of it missing: {_some(missing)}")
    if wrong:
        name = wrong[0]
        found.append(
            f"{len(wrong)} tensors of another kind, such as {name} {_kind(state[name])} "
            f"instead of {_kind(expected[name])}"
        )
    return (
        f"is not the model of the config ({cfg.MODEL.TIMM.NAME}, "
        f"{cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES} classes): " + "; ".join(found)
    )


def _kind(value: Tensor) -> str:
    dense = "" if value.layout == torch.strided else " sparse"
    return f"{tuple(value.shape)}{dense} {str(value.dtype).removeprefix('torch.')}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
