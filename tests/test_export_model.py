"""Exported files beside the model that they are made of, and what is refused."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny_cfg
from detectron2.modeling import build_model
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.modeling.context import CONTEXTS
from mcibi_d2.tools import export

CONFIG = ["MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]",
          "MODEL.MCIBI.ATTENTION_DIM", "8"]  # fmt: skip
VIT = ["MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.OUTPUT_STRIDE", "16",
       "MODEL.TIMM.OUT_INDICES", "(3, 5)"]  # fmt: skip


@pytest.fixture
def small_check(monkeypatch):
    """The check, on images that take no time; of the ViT's patches, one size has whole ones."""
    monkeypatch.setattr(export, "CHECKED_SIZES", ((128, 128), (75, 90)))


def make_model(folder, *options):
    """A model in which everything has a say, with a third of the memory's rows not there."""
    cfg = make_tiny_cfg(folder, *CONFIG, *options)
    model = build_model(cfg).eval()
    for parameter in model.parameters():
        if not parameter.any():  # what begins at zero
            nn.init.normal_(parameter, std=0.1)
    memory = getattr(model.sem_seg_head, "memory", None)
    if memory is not None:
        there = torch.arange(len(memory.rows)) % 3 != 0
        memory.initialize(torch.randn_like(memory.rows), there)
    return cfg, model


def run_tool(monkeypatch, weights, output, form, *arguments, options=()):
    monkeypatch.setattr(sys, "argv", [
        "export", "--config-file", str(ROOT / "configs/scenes/mcibi_tiny.yaml"), "--format", form,
        "--output", str(output), *arguments,
        "--opts", *CONFIG, "MODEL.WEIGHTS", str(weights), *options,
    ])  # fmt: skip
    export.main()


def scores(model, images):
    with torch.no_grad():
        return torch.stack([x["sem_seg"] for x in model([{"image": i} for i in images])])


@pytest.mark.parametrize(
    ("form", "preprocessing"), [("torchscript", "BGR"), ("onnx", "RGB"), ("pt2", "none")]
)
def test_the_file_is_the_model(tmp_path, monkeypatch, capsys, small_check, form, preprocessing):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    cfg, model = make_model(tmp_path, *VIT)
    assert model.backbone.size_divisibility == 16 and cfg.INPUT.FORMAT == "RGB"
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    path = tmp_path / f"model.{form}"
    run_tool(monkeypatch, tmp_path / "weights.pth", path, form, "--preprocessing", preprocessing,
             options=VIT)  # fmt: skip
    said = capsys.readouterr().out
    assert "3 x 3 x 75 x 90: largest difference" in said and "MiB" in said
    assert ("opset 18" in said) == (form == "onnx")

    images = torch.rand(2, 3, 70, 101) * 255
    expected = scores(model, images)
    given = images
    if preprocessing == "BGR":
        given = images.flip(1)
    elif preprocessing == "none":
        given = (images - model.pixel_mean) / model.pixel_std
    found = export.load(str(path), form, torch.device("cpu"))(given)
    span = expected.max() - expected.min()
    assert found.shape == expected.shape and (found - expected).abs().max() < 1e-4 * span
    assert sorted(os.listdir(tmp_path)) == [path.name, "weights.pth"]


@pytest.mark.parametrize("context", ["none", *(c for c in CONTEXTS if c not in export.FIXED_SIZE)])
def test_every_context_as_torchscript(tmp_path, small_check, context):
    cfg, model = make_model(tmp_path, "MODEL.MCIBI.CONTEXT", context)
    assert export.export(cfg, model, "torchscript", "RGB", tmp_path / "x") < 1e-6


MORE = [
    pytest.param("onnx", "ppm", (), marks=pytest.mark.slow),
    pytest.param("pt2", "isa", (), marks=pytest.mark.slow),
    pytest.param("onnx", "dm", (), marks=pytest.mark.slow),
    pytest.param("onnx", "ann", (), marks=pytest.mark.slow),
    pytest.param("pt2", "dm", (), marks=pytest.mark.slow),
    pytest.param("onnx", "none", ("MODEL.MCIBI.AGGREGATION", "rows"), marks=pytest.mark.slow),
    pytest.param("pt2", "none", ("MODEL.MCIBI.AGGREGATION", "rows"), marks=pytest.mark.slow),
    pytest.param("onnx", "none", ("MODEL.MCIBI.MEMORY.SLOTS", "2"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("form", "context", "options"), MORE)
def test_more(tmp_path, small_check, form, context, options):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    cfg, model = make_model(tmp_path, "MODEL.MCIBI.CONTEXT", context, *options)
    assert export.export(cfg, model, form, "RGB", tmp_path / "x") < 1e-4
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("size", [(13, 29), (5, 3), (6, 12)])
@pytest.mark.parametrize("regions", [1, 2, 3, 6, 8])
def test_averages_of_regions(size, regions):
    maps = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(maps, regions)
    torch.testing.assert_close(export.average_regions(maps, (regions, regions)), expected)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_filters_of_an_unknown_number(size):
    maps = torch.randn(1, 6, 9, 14, dtype=torch.float64)
    filters = torch.randn(6, 1, size, size, dtype=torch.float64)
    options = (None, [1, 1], [size // 2, size // 2], [1, 1])
    # A number that is not known is no int.
    found = export.filter_channels(maps, filters, *options, groups=torch.tensor(6))
    torch.testing.assert_close(found, F.conv2d(maps, filters, padding=size // 2, groups=6))
    assert export.filter_channels(maps, filters, *options, groups=6) is NotImplemented


def test_a_wrong_file_is_not_kept(tmp_path, monkeypatch, small_check):
    # Its loop over rows is recorded with the number of rows of one size.
    monkeypatch.setattr(export, "FIXED_SIZE", {})
    cfg, model = make_model(tmp_path, "MODEL.MCIBI.CONTEXT", "psa")
    path = tmp_path / "model.pt"
    path.write_text("from before")
    with pytest.raises(InputError, match="CONTEXT psa cannot be exported as torchscript") as error:
        export.export(cfg, model, "torchscript", "RGB", path)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [path.name] and path.read_text() == "from before"


def test_not_a_number_is_a_difference(tmp_path, small_check):
    cfg, model = make_model(tmp_path)
    nn.init.constant_(model.sem_seg_head.h2[-1].bias, torch.nan)
    with pytest.raises(InputError, match="differ from the model's by nan"):
        export.export(cfg, model, "torchscript", "RGB", tmp_path / "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["MODEL.MCIBI.CONTEXT", "psa"], "CONTEXT is psa, which cannot be exported for images"),
        (["TEST.INFERENCE", "slide"], "TEST.INFERENCE is 'slide', expected whole"),
        (["MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty, expected a checkpoint"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "SemanticSegmentor, expected MCIBI"),
        (["MODEL.TIMM.NAME", "vit_relpos_small_patch16_224", "MODEL.TIMM.OUTPUT_STRIDE", "16",
          "MODEL.TIMM.OUT_INDICES", "(8, 11)"], "vit_relpos_small_patch16_224.*any size"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, monkeypatch, options, words):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(InputError, match=words):
        run_tool(monkeypatch, tmp_path / "weights.pth", tmp_path / "model", "torchscript",
                 options=options)  # fmt: skip
    assert os.listdir(tmp_path) == ["weights.pth"]


def test_output_is_a_file_in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"")
    for output, words in ((tmp_path, "expected the name of a file"),
                          (tmp_path / "none" / "model", "none is not a folder")):  # fmt: skip
        with pytest.raises(InputError, match=words):
            run_tool(monkeypatch, tmp_path / "weights.pth", output, "torchscript")


def test_onnx_says_what_it_needs(tmp_path, monkeypatch):
    cfg = make_tiny_cfg(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"needs the package (onnx\w*).*pip install .*export"):
        export.check_exportable(cfg, "onnx")
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    with pytest.raises(InputError, match="needs torch 2.6 or newer, this is 2.5.1"):
        export.check_exportable(cfg, "pt2")
    export.check_exportable(cfg, "torchscript")


@pytest.mark.parametrize(
    ("form", "precision"),
    [
        ("onnx", "float16"),
        ("torchscript", "bfloat16"),
        pytest.param("pt2", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_in_half_precision(tmp_path, monkeypatch, capsys, small_check, form, precision):
    if form == "onnx":
        pytest.importorskip("onnxscript")
    _, model = make_model(tmp_path)
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    path = tmp_path / f"model.{form}"
    weights = tmp_path / "weights.pth"
    run_tool(monkeypatch, weights, tmp_path / "whole", form)
    run_tool(monkeypatch, weights, path, form, "--precision", precision)
    assert precision in capsys.readouterr().out
    assert os.path.getsize(path) < 0.8 * os.path.getsize(tmp_path / "whole")
    images = torch.rand(2, 3, 70, 101) * 255
    expected = scores(model, images)
    found = export.load(str(path), form, torch.device("cpu"))(images)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05 * (expected.max() - expected.min())
