"""Conversion without the released package: by a list of the released tensors."""

import io
import os
import pickle
import re
import sys
from functools import cache
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from detectron2.modeling import build_model
from ssseg_models import CLASSES, MODELS

from mcibi_d2 import InputError
from mcibi_d2.convert import convert, convert_released
from mcibi_d2.engine import Checkpointer, Trainer, load_config
from mcibi_d2.tools import convert_released as tool

LIST = Path(__file__).parent / "data" / "released_tensors.txt"
CHANNELS = {"HRW48": 720, "ViTL": 1024}


def config_file(data, backbone):
    return str(ROOT / f"configs/released/{data}/mcibi_deeplabv3_{backbone}.yaml")


def released_cfg(data, backbone, *options):
    plain = ["MODEL.TIMM.PRETRAINED", "False", "MODEL.DEVICE", "cpu"]
    return load_config(config_file(data, backbone), [*plain, *map(str, options)])


@cache
def sections():
    parts = re.split(r"^\[(.+)\]$", LIST.read_text(), flags=re.MULTILINE)
    return {name: text.split("\n")[1:] for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def expand(piece):
    """The numbers from a to b for a-b."""
    match = re.fullmatch(r"(\d+)-(\d+)", piece)
    return map(str, range(int(match[1]), int(match[2]) + 1)) if match else [piece]


def released_shapes(data, backbone):
    """Names and shapes of a released model's tensors, from the list."""
    names = [backbone, "head"]
    if backbone == "ViTL":
        names.append("norms and auxiliary of ViTL")
    elif backbone != "HRW48":
        names.append("auxiliary of ResNet")
    elif data in ("cityscapes", "lip"):
        names.append("downsampling of HRW48")
    symbols = {"K": CLASSES[data], "C": CHANNELS.get(backbone, 2048)}
    shapes = {}
    for line in filter(None, (line for name in names for line in sections()[name])):
        pattern, *shape = line.split()
        for pieces in product(*map(expand, pattern.split("."))):
            name = ".".join(pieces)
            if shape[0] == "bn":
                for leaf in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"{name}.{leaf}"] = (int(shape[1]),)
                shapes[f"{name}.num_batches_tracked"] = ()
            else:
                shapes[name] = tuple(symbols.get(n) or int(n) for n in shape)
    return shapes


def released_state(data, backbone, device="cpu"):
    """A released state dict in which tensor number i holds i everywhere."""
    return {
        name: torch.full(shape, i, device=device, dtype=torch.float32 if shape else torch.int64)
        for i, (name, shape) in enumerate(released_shapes(data, backbone).items())
    }


@pytest.fixture(scope="module")
def source():
    """LIP's ResNet-50: tensor number i holds i everywhere; three rows of the memory are zero."""
    state = released_state("lip", "R50")
    state["memory_module.memory"][[2, 3, 7]] = 0
    return state


# Released name and ours; tensors that a look at the two networks' code puts together.
PAIRS = {
    "backbone_net.stem.0.weight": "backbone.net.conv1.0.weight",
    "backbone_net.stem.4.running_var": "backbone.net.conv1.4.running_var",
    "backbone_net.stem.7.bias": "backbone.net.bn1.bias",
    "backbone_net.layer3.5.bn2.running_mean": "backbone.net.layer3.5.bn2.running_mean",
    "backbone_net.layer4.0.downsample.1.weight": "backbone.net.layer4.0.downsample.1.weight",
    "bottleneck.0.weight": "sem_seg_head.project.0.weight",
    "memory_module.bottleneck.1.running_mean": "sem_seg_head.fuse.conv.1.running_mean",
    "memory_module.bottleneck_ms.0.weight": "sem_seg_head.within_fuse.conv.0.weight",
    "memory_module.self_attention.key_project.1.0.weight": "sem_seg_head.attention.key.1.0.weight",
    "memory_module.self_attention_ms.out_project.0.weight":
        "sem_seg_head.within_attention.out.0.weight",
    "memory_module.self_attention_ms.query_project.0.1.bias":
        "sem_seg_head.within_attention.query.0.1.bias",
    "context_within_image_module.parallel_branches.2.0.weight":
        "sem_seg_head.context.branches.2.0.weight",
    "context_within_image_module.global_branch.2.running_var":
        "sem_seg_head.context.image.1.running_var",
    "context_within_image_module.bottleneck.0.weight": "sem_seg_head.context.fuse.0.weight",
    "decoder_stage1.4.weight": "sem_seg_head.h1.4.weight",
    "decoder_stage2.1.running_var": "sem_seg_head.h2.1.running_var",
    "auxiliary_decoder.4.bias": "sem_seg_head.aux.res4.2.bias",
}  # fmt: skip


VIT_PAIRS = {
    "backbone_net.pos_embed": "backbone.net.pos_embed",
    "backbone_net.patch_embed.projection.weight": "backbone.net.patch_embed.proj.weight",
    "backbone_net.layers.5.ln2.bias": "backbone.net.blocks.5.norm2.bias",
    "backbone_net.layers.5.attn.attn.in_proj_weight": "backbone.net.blocks.5.attn.qkv.weight",
    "backbone_net.layers.5.attn.attn.out_proj.bias": "backbone.net.blocks.5.attn.proj.bias",
    "backbone_net.layers.23.ffn.layers.0.0.weight": "backbone.net.blocks.23.mlp.fc1.weight",
    "backbone_net.layers.23.ffn.layers.1.bias": "backbone.net.blocks.23.mlp.fc2.bias",
    "norm_layers.2.weight": "backbone.norms.2.weight",
    "auxiliary_decoder.1.0.weight": "sem_seg_head.aux.res3.0.0.weight",
    "auxiliary_decoder.1.5.weight": "sem_seg_head.aux.res3.2.1.weight",
    "auxiliary_decoder.2.9.weight": "sem_seg_head.aux.res4.5.weight",
}
OTHER_PAIRS = {
    ("ade20k", "ViTL"): VIT_PAIRS,
    ("cityscapes", "HRW48"): {
        "downsample_backbone.1.weight": "backbone.neck.step.1.weight",
        "backbone_net.stage4.2.fuse_layers.3.1.0.1.weight":
            "backbone.net.stage4.2.fuse_layers.3.1.0.1.weight",
    },
    ("ade20k", "S101"): {
        "backbone_net.layer3.22.conv2.fc1.bias": "backbone.net.layer3.22.conv2.fc1.bias",
    },
}  # fmt: skip


@pytest.mark.parametrize("data, backbone", MODELS, ids=lambda x: x)
def test_every_tensor_of_the_18_models_has_its_place(data, backbone):
    source = released_state(data, backbone, "meta")
    state, fates = convert(source, released_cfg(data, backbone))
    assert sorted(f.source for f in fates if f.source) == sorted(source)
    assert sorted(f.target for f in fates if f.target) == sorted(state)
    # One of ours for each of theirs, and the flags of the rows.
    assert len(state) == len(source) + 1
    ours = {fate.source: fate.target for fate in fates}
    pairs = OTHER_PAIRS.get((data, backbone), {})
    assert {theirs: ours[theirs] for theirs in pairs} == pairs


def test_values_go_where_they_belong(source):
    state = convert_released(source, released_cfg("lip", "R50"))
    for theirs, ours in PAIRS.items():
        assert torch.equal(state[ours], source[theirs]), ours
    rows, known = state["sem_seg_head.memory.rows"], state["sem_seg_head.memory.initialized"]
    assert torch.equal(rows, source["memory_module.memory"][:, 0])
    assert (~known).nonzero().flatten().tolist() == [2, 3, 7]


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s, "cur_epoch": 150},
    lambda s: {"state_dict": s},
    lambda s: {"model": {"state_dict": s}},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
], ids=["model", "state_dict", "both", "module", "without counters"])  # fmt: skip
def test_checkpoints_may_be_wrapped(source, wrap):
    cfg = released_cfg("lip", "R50")
    expected = convert_released(source, cfg)
    found = convert_released(wrap(source), cfg)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(found[name], value)


def test_several_rows_per_class():
    source = released_state("lip", "R50")
    block = "memory_module.self_attention."
    for name in [name for name in source if name.startswith(block)]:
        value = source.pop(name)
        for slot in range(2):
            new = name.replace("attention.", f"attentions.{slot}.", 1)
            source[new] = value + slot if value.dim() else value
    source["memory_module.memory"] = torch.rand(20, 2, 512)
    source["memory_module.memory"][5, 1] = 0
    source["memory_module.fuse_memory_conv.0.weight"] = torch.rand(512, 1024, 1, 1)
    for leaf in ("weight", "bias", "running_mean", "running_var"):
        source[f"memory_module.fuse_memory_conv.1.{leaf}"] = torch.rand(512)
    state = convert_released(source, released_cfg("lip", "R50", "MODEL.MCIBI.MEMORY.SLOTS", 2))
    rows, known = state["sem_seg_head.memory.rows"], state["sem_seg_head.memory.initialized"]
    assert torch.equal(rows.view(20, 2, 512), source["memory_module.memory"])
    assert (~known).nonzero().flatten().tolist() == [11]
    name = "query_project.1.0.weight"
    assert torch.equal(
        state["sem_seg_head.attention.of_slot.1.query.1.0.weight"],
        source[f"memory_module.self_attentions.1.{name}"],
    )
    assert torch.equal(
        state["sem_seg_head.attention.join.0.weight"],
        source["memory_module.fuse_memory_conv.0.weight"],
    )


def test_auxiliary_heads_that_the_config_lacks_are_left_out_with_the_reason(source):
    cfg = released_cfg("lip", "R50", "MODEL.SEM_SEG_HEAD.AUX_FEATURES", "[]")
    state, fates = convert(source, cfg)
    left = [fate for fate in fates if not fate.target]
    assert len(left) == 8 and all("auxiliary" in fate.what for fate in left)
    assert not any(".aux." in name for name in state)


def test_pretrained_backbones_convert_too():
    """As OpenMMLab has them: the released names without the prefix, and a classifier."""
    source = {
        name.removeprefix("backbone_net."): value
        for name, value in released_state("ade20k", "R50", "meta").items()
        if name.startswith("backbone_net.")
    }
    count = len(source)
    extra = {name: torch.ones(1) for name in ("fc.weight", "head.fc.bias", "incre_modules.0.0.x")}
    state, fates = convert({"state_dict": {**source, **extra}, "meta": {}},
                           released_cfg("ade20k", "R50"))  # fmt: skip
    assert len(state) == count and all(name.startswith("backbone.net.") for name in state)
    left = {fate.source: fate.what for fate in fates if not fate.target}
    assert left.keys() == extra.keys() and all("classifier" in what for what in left.values())


def shapes_of_ours(cfg):
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg).state_dict()


def test_positions_of_a_pretrained_vision_transformer_are_resampled():
    """timm's file is for images of 384 pixels, which is 24 x 24 patches and not 32 x 32."""
    cfg = released_cfg("ade20k", "ViTL")
    shapes = {
        name: value.shape
        for name, value in shapes_of_ours(cfg).items()
        if name.startswith("backbone.net.")
    }
    source = {
        name.removeprefix("backbone.net."): torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }
    grid = torch.linspace(0, 1, 24)[:, None].expand(24, 24).reshape(1, 576, 1).repeat(1, 1, 1024)
    source["pos_embed"] = torch.cat([torch.full((1, 1, 1024), 9.0), grid], dim=1)
    found = convert_released(source, cfg)["backbone.net.pos_embed"]
    assert found.shape == (1, 1025, 1024) and (found[0, 0] == 9).all()
    rows = found[0, 1:].view(32, 32, 1024)
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    expected = torch.tensor([0, 15 / 31, 1])
    torch.testing.assert_close(rows[[0, 15, -1], 0, 0], expected, atol=0.02, rtol=0)


def plus(state):
    state = {name: value for name, value in state.items() if not name.startswith("decoder_")}
    return {
        **state,
        "memory_module.memory": torch.zeros(20, 2),
        "decoder_pr.conv1.weight": torch.ones(1),
    }


@pytest.mark.parametrize("change, message", [
    (lambda s: [1, 2], "a list, expected the tensors of a model"),
    (lambda s: {}, "a dict, expected the tensors"),
    (lambda s: {**s, "epoch": 3}, "holds no state dict, but epoch"),
    (plus, "an MCIBI.. model .*expected one of MCIBI"),
    (lambda s: {**s, "memory_module.memory": torch.zeros(20, 2)}, r"an MCIBI.. model"),
    (lambda s: {k: v for k, v in s.items() if "memory" not in k}, "without a memory"),
    (lambda s: {**s, "memory_module.memory": torch.zeros(19, 1, 512)},
     r"\(19, 1, 512\), expected \(20, 1, 512\): MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
    (lambda s: {**s, "memory_module.memory": torch.zeros(20, 2, 512)}, "MODEL.MCIBI.MEMORY.SLOTS"),
    (lambda s: {**s, "extra.weight": torch.ones(1)}, "1 tensors? .*no place in it: extra.weight"),
    (lambda s: {**s, "auxiliary_decoder.7.weight": torch.ones(1)}, "auxiliary_decoder.7.weight"),
    (lambda s: {k: v for k, v in s.items() if k != "decoder_stage1.0.weight"},
     "missing: sem_seg_head.h1.0.weight"),
    (lambda s: {**s, "bottleneck.0.weight": torch.ones(512, 720, 3, 3)},
     r"project.0.weight \(512, 720, 3, 3\) float32 instead of \(512, 2048, 3, 3\)"),
    (lambda s: {**s, "module.bottleneck.0.weight": torch.ones(512, 2048, 3, 3)},
     "holds bottleneck.0.weight with and without module., expected one of the two"),
    (lambda s: {**s, "decoder_stage2.4.bias": torch.ones(20, dtype=torch.int8)},
     r"h2.4.bias \(20,\) int8 instead of \(20,\) float32"),
    (lambda s: {**s, "decoder_stage2.4.bias": torch.ones(20, dtype=torch.complex64)},
     r"h2.4.bias \(20,\) complex64 instead"),
    (lambda s: {**s, "decoder_stage2.4.bias": torch.ones(20).to_sparse()},
     r"h2.4.bias \(20,\) sparse float32 instead"),
    (lambda s: {**s, "backbone_net.conv1.0.weight": torch.ones(32, 3, 3, 3)},
     "1 tensors .*no place in it: backbone_net.conv1.0.weight"),
    (lambda s: {"layer.weight": torch.ones(3)}, "no place in it: layer.weight; 275 .*missing"),
    (lambda s: {"sem_seg_head.h1.0.weight": torch.ones(3)}, "a checkpoint of this project already"),
])  # fmt: skip
def test_what_is_no_released_model_of_the_config_is_refused(source, change, message):
    with pytest.raises(InputError, match=message):
        convert_released(change(source), released_cfg("lip", "R50"))


def test_a_config_without_mcibi_is_refused(source):
    with pytest.raises(InputError, match="107 tensors that have no place in it"):
        convert_released(source, released_cfg("lip", "R50", "MODEL.MCIBI.ENABLED", False))


def run_tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["convert_released", *map(str, arguments)])
    tool.main()


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    """A converted file, by the tool, and what the tool printed."""
    folder = tmp_path_factory.mktemp("converted")
    torch.save({"model": source}, folder / "released.pth")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        run_tool(
            patch, "--config-file", config_file("lip", "R50"), "--input", folder / "released.pth",
            "--output", folder / "ours.pth",
        )  # fmt: skip
    return SimpleNamespace(
        released=folder / "released.pth", ours=folder / "ours.pth", printed=printed.getvalue()
    )


def test_the_tool_writes_a_checkpoint_and_a_table(source, converted):
    state = torch.load(converted.ours, weights_only=True)["model"]
    assert len(state) == len(source) + 1
    counts = [int(n) for n in re.findall(r"  (\d+)  (?:mapped|renamed)", converted.printed)]
    assert sum(counts) == len(source)
    assert re.search(r"decoder_stage2 +sem_seg_head.h2 +8 +renamed", converted.printed)
    assert not list(converted.ours.parent.glob("*.tmp"))


class Code:
    def __reduce__(self):
        return os.mkdir, ("must-not-run",)


def test_bad_files_leave_nothing_behind(converted, tmp_path, monkeypatch):
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"model": Code()}))
    torch.save({"model": {"a": torch.ones(1), "b": Code()}}, tmp_path / "zipped.pth")
    torch.save({"model": {"layer.weight": torch.ones(1)}}, tmp_path / "other.pth")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for name, message in [
        ("text.pth", "cannot be read as a checkpoint that holds tensors alone"),
        ("code.pth", "cannot be read as a checkpoint that holds tensors alone"),
        ("zipped.pth", "cannot be read as a checkpoint that holds tensors alone .*posix.mkdir"),
        ("other.pth", "is not the model of the config"),
        ("none.pth", "no such file"),
    ]:
        with pytest.raises(InputError, match=rf"{name}: .*{message}"):
            run_tool(
                monkeypatch, "--config-file", config_file("lip", "R50"),
                "--input", tmp_path / name, "--output", tmp_path / "out.pth",
            )  # fmt: skip
    with pytest.raises(InputError, match=r"none/out\.pth: no such folder"):
        run_tool(
            monkeypatch, "--config-file", config_file("lip", "R50"),
            "--input", converted.released, "--output", tmp_path / "none/out.pth",
        )  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_nothing_behind(converted, tmp_path, monkeypatch):
    def full_disk(data, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(InputError, match=r"out\.pth: cannot be written .*No space"):
        run_tool(
            monkeypatch, "--config-file", config_file("lip", "R50"),
            "--input", converted.released, "--output", tmp_path / "out.pth",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_fine_tuning_on_other_classes_keeps_the_rest(source, converted):
    """Everything but what has one entry per class; that is as new."""
    cfg = released_cfg("lip", "R50", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    model = Trainer.build_model(cfg)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Checkpointer(model).load(str(converted.ours))
    state = torch.load(converted.ours, weights_only=True)["model"]
    bound = [name for name in state if state[name].shape != before[name].shape]
    assert sorted(bound) == sorted(
        ["sem_seg_head.memory.rows", "sem_seg_head.memory.initialized"]
        + [f"sem_seg_head.{part}.{leaf}" for part in ("h1.4", "h2.4", "aux.res4.2")
           for leaf in ("weight", "bias")]
    )  # fmt: skip
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in bound else state[name]), name
    assert not model.sem_seg_head.memory.initialized.any()


def test_the_converted_file_is_one_of_ours_for_evaluation(source, converted):
    model = Trainer.build_model(released_cfg("lip", "R50"))
    Checkpointer(model).load(str(converted.ours), strict=True)
    memory = model.sem_seg_head.memory
    assert torch.equal(memory.rows, source["memory_module.memory"][:, 0])
    assert memory.initialized.sum() == 17
