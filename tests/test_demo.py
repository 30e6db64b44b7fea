"""The predictor and the demo: labels, scores, pictures, and what they make of bad files."""

import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from mcibi_d2 import InputError
from mcibi_d2.data import scenes
from mcibi_d2.predict import Predictor
from mcibi_d2.tools import demo
from mcibi_d2.visualization import with_legend

OPTIONS = ["DATASETS.TEST", "('scenes_val',)", "INPUT.MIN_SIZE_TEST", "0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = build_model(make_tiny_cfg(folder))
    # Else every pixel has the same class.
    torch.nn.init.normal_(model.sem_seg_head.h2[-1].weight, std=3)
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return str(folder / "weights.pth")


@pytest.fixture
def cfg(tmp_path, weights):
    return make_tiny_cfg(tmp_path / "output", *OPTIONS, "MODEL.WEIGHTS", weights)


def picture(number=0):
    """A scene as OpenCV would read it."""
    return np.ascontiguousarray(scenes.render("val", number)[0][..., ::-1])


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["INPUT.FORMAT", "BGR"],
        ["INPUT.MIN_SIZE_TEST", "97"],
        ["TEST.INFERENCE", "slide", "TEST.SLIDE.WINDOW", "(64,80)", "TEST.SLIDE.STRIDE", "(40,50)"],
    ],
    ids=["plain", "BGR", "resized", "slide"],
)  # fmt: skip
def test_predictor_says_what_detectron2s_says(cfg, changes):
    cfg.merge_from_list(changes)
    image = picture()
    found = Predictor(cfg)(image)
    # Detectron2's own predictor resizes by the shortest edge only, which 0 switches off there too.
    plain = cfg.clone()
    if not plain.INPUT.MIN_SIZE_TEST:
        plain.INPUT.MIN_SIZE_TEST, plain.INPUT.MAX_SIZE_TEST = min(image.shape[:2]), 10000
    logits = DefaultPredictor(plain)(image)["sem_seg"]
    probabilities = logits.softmax(dim=0)
    assert found.labels.shape == found.scores.shape == image.shape[:2]
    assert len(np.unique(found.labels)) > 1
    assert (found.labels == logits.argmax(dim=0).numpy()).mean() > 0.999
    np.testing.assert_allclose(found.scores, probabilities.amax(dim=0).numpy(), atol=1e-5)
    colors = np.array(MetadataCatalog.get("scenes_val").stuff_colors)[:, ::-1][found.labels]
    assert np.abs(found.overlay - (0.4 * image + 0.6 * colors)).max() <= 1


def test_predictor_refuses(cfg):
    predictor = Predictor(cfg)
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)):
        with pytest.raises(InputError, match=r"expected \(H, W, 3\) uint8"):
            predictor(image)
    for key, value, sentence in (
        ("MODEL.WEIGHTS", "", "MODEL.WEIGHTS is empty, expected a checkpoint"),
        ("MODEL.WEIGHTS", "gone.pth", "gone.pth: no such file"),
        ("DATASETS.TEST", ("camvid_11_val",), "NUM_CLASSES is 16, but camvid_11_val has 11"),
    ):
        changed = cfg.clone()
        changed.merge_from_list([key, value])
        with pytest.raises(InputError, match=sentence):
            Predictor(changed)


def test_legend_lists_the_classes_that_occur():
    image = np.full((40, 60, 3), 7, np.uint8)
    labels = np.zeros((40, 60), np.uint8)
    labels[:10], labels[10] = 2, 255
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    for fixed_size in (False, True):
        drawn = with_legend(image, labels, ["sky", "never", "tree"], colors, fixed_size)
        assert (drawn[:40, :60] == image).all()
        panel = drawn[:, 60:]
        rows = [np.flatnonzero((panel == color).all(axis=2).any(axis=1)) for color in colors]
        assert len(rows[0]) and len(rows[2]) and not len(rows[1])
        assert rows[0].max() < rows[2].min()  # the largest first
    # Of a video every frame has one size, whatever is in it; a picture is as tall as its legend.
    names, palette = [f"class {k}" for k in range(30)], [(k, k, k) for k in range(30)]
    many = np.arange(40 * 60).reshape(40, 60) % 30
    sizes = [with_legend(image, x, names, palette, True).shape for x in (many, many * 0)]
    assert sizes[0] == sizes[1] and sizes[0][0] == 40
    assert with_legend(image, many, names, palette).shape[0] > 30 * 11


def run(monkeypatch, weights, output, *inputs, options=(), opts=()):
    command = [
        "demo", "--config-file", str(ROOT / "configs/scenes/mcibi_tiny.yaml"), "--input", *inputs,
        "--output", output, *options, "--opts", *OPTIONS, "MODEL.WEIGHTS", weights,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]",
        "MODEL.MCIBI.ATTENTION_DIM", "8", *opts,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    demo.main()


def write_video(path, frames):
    codec = cv2.VideoWriter_fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), codec, 10, picture().shape[1::-1])
    for number in range(frames):
        writer.write(picture(number))
    writer.release()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (frame := capture.read())[0]:
        frames.append(frame[1])
    return frames


def test_images_and_videos(monkeypatch, capsys, tmp_path, cfg, weights):
    inputs, output = tmp_path / "in", tmp_path / "out"
    (inputs / "deeper").mkdir(parents=True)
    cv2.imwrite(str(inputs / "a.png"), picture(0))
    cv2.imwrite(str(inputs / "deeper" / "a.png"), picture(1))
    (inputs / "notes.txt").write_text("no picture")
    (inputs / "torn.jpg").write_bytes(b"\xff\xd8 no JPEG")
    write_video(inputs / "film.avi", 5)
    run(monkeypatch, weights, output, inputs, options=["--labels", "--confidence"])
    said = capsys.readouterr().out
    assert f"skipped {inputs / 'torn.jpg'}: cannot be read as an image" in said
    assert "1 of 4 inputs skipped." in said
    assert "7 pictures, " in said and " per second (read " in said
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    videos = {"film.mp4", "film_confidence.mp4", *(f"film_labels/{i:06d}.png" for i in range(5))}
    pictures = {
        f"{a}{b}" for a in ("a", "deeper/a") for b in (".jpg", "_labels.png", "_confidence.png")
    }
    assert files == videos | pictures

    predictor = Predictor(cfg)
    for number, name in enumerate(("a", "deeper/a")):
        expected = predictor(picture(number))
        labels = cv2.imread(str(output / f"{name}_labels.png"), cv2.IMREAD_UNCHANGED)
        assert (labels == expected.labels).all()
        confidence = cv2.imread(str(output / f"{name}_confidence.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_allclose(confidence / 255, expected.scores, atol=0.002)
        drawn = cv2.imread(str(output / f"{name}.jpg")).astype(int)
        height, width = expected.labels.shape
        assert np.abs(drawn[:height, :width] - expected.overlay).mean() < 6
    frames = read_video(output / "film.mp4")
    assert len(frames) == 5 and len({frame.shape for frame in frames}) == 1


class AsciiCapture:
    """What OpenCV does on Windows."""

    real = cv2.VideoCapture

    def __new__(cls, source):
        return cls.real(source if str(source).isascii() else "mangled")


class AsciiWriter(AsciiCapture):
    real = cv2.VideoWriter

    def __new__(cls, path, *arguments):
        return cls.real(path if path.isascii() else "/nowhere/mangled.mp4", *arguments)


def test_names_outside_ascii_where_opencv_cannot_take_them(monkeypatch, tmp_path, weights):
    inputs, output = tmp_path / "Straße", tmp_path / "aus 道路"
    inputs.mkdir()
    cv2.imwrite(str(inputs / "grün.png"), picture())
    write_video(tmp_path / "film.avi", 2)
    (tmp_path / "film.avi").rename(inputs / "фильм.avi")
    monkeypatch.setattr(cv2, "imwrite", None)
    monkeypatch.setattr(cv2, "imread", None)
    monkeypatch.setattr(cv2, "VideoCapture", AsciiCapture)
    monkeypatch.setattr(cv2, "VideoWriter", AsciiWriter)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run(monkeypatch, weights, output, inputs, options=["--labels", "--confidence"])
    written = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    labels = {f"фильм_labels/{i:06d}.png" for i in range(2)} | {"grün_labels.png"}
    assert written == labels | {
        "grün.jpg", "grün_confidence.png", "фильм.mp4", "фильм_confidence.mp4"
    }  # fmt: skip
    assert list((tmp_path / "temporary").iterdir()) == []
    data = np.fromfile(output / "grün_labels.png", np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_UNCHANGED).shape == picture().shape[:2]
    (output / "фильм.mp4").rename(tmp_path / "film.mp4")
    monkeypatch.undo()
    assert len(read_video(tmp_path / "film.mp4")) == 2


def test_pictures_and_frames_are_run_together(monkeypatch, tmp_path, weights):
    sizes = [picture(), picture()[:64], picture(1)]
    for number, image in enumerate(sizes):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    write_video(tmp_path / "film.avi", 5)
    given, labels = [], demo.Predictor.labels
    monkeypatch.setattr(
        demo.Predictor, "labels", lambda self, x: (given.append(len(x)), labels(self, x))[1]
    )
    run(monkeypatch, weights, tmp_path / "out", tmp_path, options=["--batch", "2"])
    assert given == [2, 1, 2, 2, 1]
    assert len(read_video(tmp_path / "out" / "film.mp4")) == 5
    for number, image in enumerate(sizes):
        drawn = cv2.imread(str(tmp_path / "out" / f"{number}.jpg"))
        assert drawn.shape[0] >= image.shape[0] and drawn.shape[1] > image.shape[1]
    with pytest.raises(InputError, match="--batch is 0, expected 1 or more"):
        run(monkeypatch, weights, tmp_path / "more", tmp_path / "0.png", options=["--batch", "0"])


def test_video_that_breaks_off(monkeypatch, capsys, tmp_path, weights):
    write_video(tmp_path / "whole.avi", 8)
    data = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "torn.avi").write_bytes(data[: len(data) * 2 // 3])
    run(monkeypatch, weights, tmp_path / "out", tmp_path / "torn.avi")
    said = capsys.readouterr().out
    done = len(read_video(tmp_path / "out" / "torn.mp4"))
    assert 0 < done < 8
    assert f"torn.avi: ends after {done} of 8 frames, which are kept" in said
    run(monkeypatch, weights, tmp_path / "two", tmp_path / "whole.avi", options=["--frames", "2"])
    assert len(read_video(tmp_path / "two" / "whole.mp4")) == 2
    assert "ends after" not in capsys.readouterr().out


def test_output_folder_is_not_overwritten(monkeypatch, tmp_path, weights):
    cv2.imwrite(str(tmp_path / "a.png"), picture())
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match=r"out: holds files already; --force"):
        run(monkeypatch, weights, output, tmp_path / "a.png")
    assert [path.name for path in output.iterdir()] == ["mine.txt"]
    run(monkeypatch, weights, output, tmp_path / "a.png", options=["--force"])
    assert sorted(path.name for path in output.iterdir()) == ["a.jpg", "mine.txt"]


def test_bad_inputs(monkeypatch, tmp_path, weights):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    for given, sentence in (
        ("gone.png", "gone.png: no such file or folder"),
        ("empty", "has no images and no videos"),
    ):
        with pytest.raises(InputError, match=sentence):
            run(monkeypatch, weights, tmp_path / "out", tmp_path / given)
    with pytest.raises(InputError, match="expected webcam or webcam:NUMBER"):
        run(monkeypatch, weights, tmp_path / "out", "webcam:x")
    with pytest.raises(InputError, match="--opacity is 2.0, expected 0 to 1"):
        run(monkeypatch, weights, tmp_path / "out", tmp_path, options=["--opacity", "2"])
    with pytest.raises(SystemExit, match="nothing could be read"):
        run(monkeypatch, weights, tmp_path / "out", tmp_path / "bad.mp4")


def test_names_of_outputs(tmp_path):
    for name in ("a/x.jpg", "b/x.jpg", "b/x.png", "b/x_2.png", "b/X.gif", "b/x.jfif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files = [str(tmp_path), str(tmp_path / "a/x.jpg"), str(tmp_path / "a")]
    inputs, links = demo.find_inputs(files)
    named = [
        (str(given.source.relative_to(tmp_path)), name)
        for given, name in zip(inputs, demo.name_outputs(inputs), strict=True)
    ]
    assert not links and named == [
        ("a/x.jpg", "a/x"), ("b/X.gif", "b/X"), ("b/x.jfif", "b/x_3"), ("b/x.jpg", "b/x_4"),
        ("b/x.png", "b/x_5"), ("b/x_2.png", "b/x_2"), ("a/x.jpg", "x"), ("a/x.jpg", "x_2"),
    ]  # fmt: skip


def test_many_files_of_one_name_are_named_at_once():
    # Each name is compared with few others: their number grows as that of the files.
    compared = 0

    class Name(str):
        def __eq__(self, other):
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

        def casefold(self):
            return Name(str.casefold(self))

    def count(files):
        nonlocal compared
        compared = 0
        inputs = [demo.Input("image", Path("x"), Name("photo")) for _ in range(files)]
        names = demo.name_outputs(inputs)
        assert len(set(map(str, names))) == files
        return compared

    few, many = count(300), count(3000)
    assert 0 < many < 20 * few
