"""The features tool: one mean feature per image and class, and how well they separate."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, make_tiny_cfg
from detectron2.modeling import build_model
from hypothesis import given, settings
from hypothesis import strategies as st

from mcibi_d2 import InputError
from mcibi_d2.data import build_labelled_loader
from mcibi_d2.data.labels import read_labels
from mcibi_d2.evaluation import class_features, separation
from mcibi_d2.tools import features
from mcibi_d2.tools.command import run_tool
from mcibi_d2.visualization import Panel, embedding_figure

OPTIONS = ["DATASETS.TEST", "('scenes_val',)"]


@pytest.mark.parametrize("enabled", ["True", "False"])
def test_means_are_those_of_the_upsampled_features(tmp_path, enabled):
    cfg = make_tiny_cfg(tmp_path, *OPTIONS, "MODEL.MCIBI.ENABLED", enabled)
    model = build_model(cfg).eval()
    batches = list(build_labelled_loader(cfg, "scenes_val", 3))
    found, classes = class_features(model, batches)
    head, expected = model.sem_seg_head, []
    for (x,) in batches:
        maps = model.backbone(model.preprocess([x]).tensor)
        with torch.no_grad():
            pixels = head.project(maps[head.in_feature])
            if enabled == "True":
                pixels = head.fuse(
                    pixels, head.attention.read(pixels, head.h1(pixels), head.memory)
                )
        labels = x["sem_seg"]
        pixels = F.interpolate(pixels, labels.shape, mode="bilinear", align_corners=False)[0]
        for k in range(head.num_classes):
            if (labels == k).any():
                expected.append((k, pixels[:, labels == k].mean(dim=1)))
    assert classes.tolist() == [k for k, _ in expected]
    torch.testing.assert_close(found, torch.stack([v for _, v in expected]), rtol=1e-4, atol=1e-5)


def test_labels_come_with_the_images_of_testing(tmp_path):
    """Also where the released pipeline resizes: never a label between two others."""
    cfg = make_tiny_cfg(tmp_path, *OPTIONS, "TEST.RELEASED", "True", "INPUT.MIN_SIZE_TEST", "97")
    for (x,) in build_labelled_loader(cfg, "scenes_val", 3):
        truth = x["sem_seg"]
        assert truth.shape == x["image"].shape[1:] and min(truth.shape) == 97
        labels = read_labels(x["file_name"].replace("image", "labels"), "scenes_val")
        assert set(truth.unique().tolist()) <= set(np.unique(labels).tolist())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 25), st.integers(2, 5))
def test_separation_is_the_literal_one(seed, count, kinds):
    rng = np.random.default_rng(seed)
    points, classes = rng.normal(size=(count, 3)), rng.integers(0, kinds, count)
    members = {k: np.flatnonzero(classes == k) for k in set(classes.tolist())}
    members = {k: m for k, m in members.items() if len(m) > 1}
    if len(members) < 2:
        with pytest.raises(InputError, match="expected two classes in two images or more"):
            separation(points, classes)
        return
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    silhouettes, pure = [], []
    kept = np.concatenate(list(members.values()))
    for k, own in members.items():
        for i in own:
            inside = distances[i, own[own != i]].mean()
            outside = min(distances[i, m].mean() for j, m in members.items() if j != k)
            silhouettes.append((outside - inside) / max(inside, outside))
            others = kept[kept != i]
            pure.append(classes[others[distances[i, others].argmin()]] == k)
    found = separation(points, classes)
    np.testing.assert_allclose(found, (np.mean(silhouettes), np.mean(pure)), atol=1e-9)


def test_figure_shows_every_point_and_class_once():
    rng = np.random.default_rng(0)
    panels = [
        Panel(name, rng.normal(size=(9, 2)), np.arange(9) % 3 * 2, f"caption {name}")
        for name in ("baseline", "MCIBI")
    ]
    names, colors = [f"class {k}" for k in range(6)], [(40 * k, 0, 0) for k in range(6)]
    figure = embedding_figure(panels, names, colors)
    for axis, panel in zip(figure.axes, panels, strict=True):
        (dots,) = axis.collections
        np.testing.assert_array_equal(dots.get_offsets(), panel.points)
        expected = np.array(colors)[panel.classes] / 255
        np.testing.assert_allclose(dots.get_facecolors()[:, :3], expected)
        assert axis.get_title() == panel.title and axis.get_xlabel() == panel.caption
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["class 0", "class 2", "class 4"]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """A function that runs the tool on models with random weights."""
    config = str(ROOT / "configs/scenes/mcibi_tiny.yaml")
    for name, enabled in (("fcn", "False"), ("mcibi", "True")):
        model = build_model(make_tiny_cfg(tmp_path, "MODEL.MCIBI.ENABLED", enabled))
        torch.save({"model": model.state_dict()}, tmp_path / f"{name}.pth")

    def run(*arguments, options=()):
        command = [
            "features", "--output", str(tmp_path / "out" / "f.png"), "--config-file", config,
            "--weights", str(tmp_path / "mcibi.pth"), *arguments, "--opts",
            "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.MCIBI.ATTENTION_DIM", "8",
            "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]", "DATALOADER.NUM_WORKERS", "0",
            *options,
        ]  # fmt: skip
        monkeypatch.setattr(sys, "argv", command)
        run_tool(features.main)

    return run


def test_tool(tool, tmp_path, capsys):
    tool("--baseline-config-file", str(ROOT / "configs/scenes/fcn_tiny.yaml"),
         "--baseline-weights", str(tmp_path / "fcn.pth"), "--images", "4")  # fmt: skip
    said = capsys.readouterr().out
    lines = [line.split() for line in said.splitlines()]
    assert [line[0] for line in lines if line and line[0] in ("baseline", "MCIBI")] == [
        "baseline", "MCIBI",
    ]  # fmt: skip
    assert (tmp_path / "out" / "f.png").stat().st_size > 10_000
    # The same again, from the seed; alone it is one plot.
    tool("--images", "4")
    alone = capsys.readouterr().out
    assert next(x[1:] for x in map(str.split, alone.splitlines()) if x[:1] == ["features"]) == next(
        x[1:] for x in lines if x[:1] == ["MCIBI"]
    )


def test_an_image_that_a_worker_cannot_read_is_one_sentence(tool, torn_scene):
    file, options = torn_scene
    with pytest.raises(SystemExit) as exit_info:
        tool(options=options)
    assert str(exit_info.value).startswith(f"error: {file}: cannot be read as an image")
    assert len(str(exit_info.value).splitlines()) == 1


def test_tool_refuses(tool, tmp_path):
    with pytest.raises(SystemExit, match="expected two classes in two images or more"):
        tool("--images", "1")
    with pytest.raises(SystemExit, match="--baseline-weights needs --baseline-config-file"):
        tool("--baseline-weights", "x.pth")
    with pytest.raises(SystemExit, match="--images is 0"):
        tool("--images", "0")


def test_very_many_points_go_to_opentsne(monkeypatch):
    pytest.importorskip("openTSNE")
    monkeypatch.setattr(features, "MOST_POINTS", 50)
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal(size=(40, 5)), 30 + rng.normal(size=(40, 5))])
    laid_out = features.embed(points.astype(np.float32), 0)
    assert laid_out.shape == (80, 2)
    # Two heaps that are far apart stay so.
    assert separation(laid_out, np.arange(80) // 40)[1] > 0.95
