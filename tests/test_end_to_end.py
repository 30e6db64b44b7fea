"""The configs of the demo and of CamVid, from the command line to a picture or a number."""

import json
import os
import subprocess
import sys

import numpy as np
from conftest import ROOT
from PIL import Image

from mcibi_d2.visualization import colorize


def run(*command, **environment):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, timeout=280,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def miou(output):
    lines = output.splitlines()
    header = next(i for i, line in enumerate(lines) if "copypaste: mIoU,fwIoU" in line)
    return float(lines[header + 1].split("copypaste: ")[1].split(",")[0])


def test_demo(tmp_path):
    output = run(
        "-m", "mcibi_d2.tools.quickstart", "--output", tmp_path, "--opts", "SOLVER.MAX_ITER", 6,
        "SOLVER.IMS_PER_BATCH", 2,
    )  # fmt: skip
    table = (tmp_path / "results.txt").read_text()
    for word in ("FCN", "FCN + MCIBI", "zero memory", "mIoU", "IoU water", "seconds"):
        assert word in table and word in output
    assert "18/18" in output  # the bar went to its end
    said = [line for line in output.splitlines() if line.startswith("Look at")]
    assert str(tmp_path / "scenes.png") in said[0] and "next type: " in said[0]
    sheet = np.asarray(Image.open(tmp_path / "scenes.png").convert("RGB"))
    assert sheet.shape[0] > 800 and sheet.shape[1] > 800 and sheet.std() > 20
    log = (tmp_path / "fcn_and_mcibi/metrics.json").read_text().splitlines()
    log = [json.loads(line) for line in log]
    assert any("loss_m" in line for line in log)
    assert (tmp_path / "zero_memory/model_final.pth").is_file()
    assert f"The report, for a browser: {tmp_path}/report.html\n" in output
    report = (tmp_path / "report.html").read_text()
    assert report.count("data:image/png") == 7  # curves: 2, memory: 2, examples: 3
    assert "<th scope=col>FCN + MCIBI</th>" in report and "PyTorch built with" in report


def test_train_then_evaluate_only_gives_the_same_number(tmp_path):
    command = ["train_net.py", "--config-file", "configs/scenes/mcibi_tiny.yaml"]
    options = ["OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2]
    trained = run(*command, *options)
    weights = ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    evaluated = run(*command, "--eval-only", "OUTPUT_DIR", tmp_path / "eval", *weights)
    assert miou(trained) == miou(evaluated) > 0


def test_camvid(tmp_path, real_data, mobilenet_weights):
    output = run(
        "train_net.py", "--config-file", "configs/camvid/mcibi_MobileNetV2.yaml",
        "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", mobilenet_weights, "SOLVER.MAX_ITER", 20,
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.WARMUP_ITERS", 0, "DATALOADER.NUM_WORKERS", 0,
        DETECTRON2_DATASETS=str(real_data),
    )  # fmt: skip
    assert 5 < miou(output) < 100
    assert (tmp_path / "model_best.pth").is_file()


def test_detectron2s_model_zoo_works():
    """pyproject.toml keeps setuptools below 82, the first without what the model zoo imports."""
    code = (
        "from detectron2 import model_zoo; "
        "print(model_zoo.get_config('Misc/semantic_R_50_FPN_1x.yaml').MODEL.META_ARCHITECTURE)"
    )
    assert run("-c", code).splitlines()[-1] == "SemanticSegmentor"


def test_colours_are_the_palettes_and_ignored_pixels_are_gray():
    picture = colorize(np.array([[0, 1, 255]]), [(1, 2, 3), (4, 5, 6)])
    assert picture.tolist() == [[[1, 2, 3], [4, 5, 6], [60, 60, 60]]]
