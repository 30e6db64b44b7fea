"""The package as others have it: configs and models by name, and a wheel without a checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from detectron2.config import get_cfg
from PIL import Image

import mcibi_d2
from mcibi_d2 import InputError, add_mcibi_config, config_files, model_zoo
from mcibi_d2.engine import load_config

CONFIGS = ROOT / "configs"
NAMES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))


# --- by name


def test_configs_by_name():
    for name in NAMES:
        assert model_zoo.get_config_file(name) == str(CONFIGS / name)
        assert model_zoo.get_config_file(f"mcibi_d2://{name}") == str(CONFIGS / name)
    assert model_zoo.get_config("lip/mcibi_R50.yaml") == load_config(
        str(CONFIGS / "lip/mcibi_R50.yaml")
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ade20k/mcibi_R5.yaml", "close: .*ade20k/mcibi_R50.yaml"),
        ("configs/ade20k/mcibi_R50.yaml", "close: ade20k/mcibi_R50.yaml"),
        ("", "such as ade20k/mcibi_R50.yaml"),
        ("../pyproject.toml", "is no config file of mcibi_d2"),
        ("/etc/passwd", "is no config file of mcibi_d2"),
        ("ade20k", "is no config file of mcibi_d2"),
    ],
)
def test_unknown_names_are_said(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (model_zoo.get_config_file, model_zoo.get_config, model_zoo.get):
        with pytest.raises(InputError, match=rf"^{re.escape(name)}: .*{said}"):
            ask(name)
    if name and not os.path.isfile(name):
        with pytest.raises(InputError, match=rf"^--config-file {name}: no such file, and .*{said}"):
            load_config(name)


def test_models_by_name():
    model = model_zoo.get("scenes/mcibi_tiny.yaml", device="cpu")
    assert model.training and model.sem_seg_head.memory.rows.device.type == "cpu"
    assert not model_zoo.get("scenes/fcn_tiny.yaml").sem_seg_head.enabled
    for ask in (model_zoo.get_config, model_zoo.get):
        with pytest.raises(InputError, match=r"^scenes/fcn_tiny\.yaml: has no trained model"):
            ask("scenes/fcn_tiny.yaml", trained=True)


def test_a_file_in_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = load_config(str(CONFIGS / "scenes/mcibi_tiny.yaml"))
    assert load_config("scenes/mcibi_tiny.yaml") == expected
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/mcibi_tiny.yaml").write_text("SEED: 77\n")
    assert load_config("scenes/mcibi_tiny.yaml").SEED == 77
    assert load_config("mcibi_d2://scenes/mcibi_tiny.yaml") == expected


def test_a_base_by_name_is_found_from_anywhere(tmp_path, monkeypatch):
    expected = load_config(str(CONFIGS / "cityscapes/mcibi_R50.yaml"))
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/leaf.yaml").write_text("_BASE_: ../middle.yaml\n")
    (tmp_path / "a/middle.yaml").write_text("_BASE_: mcibi_d2://cityscapes/mcibi_R50.yaml\n")
    assert load_config(str(tmp_path / "a/b/leaf.yaml")) == expected
    shutil.move(tmp_path / "a", tmp_path / "c")
    monkeypatch.chdir(tmp_path / "c")
    assert load_config("middle.yaml") == expected
    # Detectron2 opens them too.
    cfg = get_cfg()
    add_mcibi_config(cfg)
    cfg.merge_from_file("mcibi_d2://cityscapes/mcibi_R50.yaml")
    assert cfg == expected
    (tmp_path / "c/middle.yaml").write_text("_BASE_: mcibi_d2://cityscapes/mcibi_R5.yaml\n")
    with pytest.raises(InputError, match=r"^middle\.yaml: _BASE_: .*R5\.yaml: is no .*close: "):
        load_config("middle.yaml")


def test_configs_are_named_so_that_they_can_move(tmp_path):
    assert config_files.portable_name(CONFIGS / "lip/fcn_R50.yaml") == "mcibi_d2://lip/fcn_R50.yaml"
    assert config_files.portable_name(tmp_path / "x.yaml") == str(tmp_path / "x.yaml")


def test_nothing_else_looks_for_the_configs():
    for path in (ROOT / "mcibi_d2").rglob("*.py"):
        text = path.read_text()
        assert path.stem == "config_files" or not re.search(r"parents\[|parent\.parent", text), path


# --- installed


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A wheel, and a function that runs Python where it is installed and there is no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    source, site, work = (folder / name for name in ("source", "site", "work"))
    source.mkdir()
    work.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("mcibi_d2", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *map(str, arguments)], cwd=work, env=environment, timeout=280,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout + done.stderr

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation",
        "--wheel-dir", folder, source)  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--no-index", "--no-deps", "--target", site, wheel)
    run.site, run.work = site, work
    return wheel, run


def test_the_wheel_is_whole(installed):
    wheel, _ = installed
    assert wheel.name.startswith(f"mcibi_d2-{mcibi_d2.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    files = {name for name in names if name.startswith("mcibi_d2/")}
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mcibi_d2").rglob("*")
        if path.is_file() and (path.suffix in (".py", ".json") or path.name == "py.typed")
    }
    assert "mcibi_d2/py.typed" in here
    assert files == here | {f"mcibi_d2/configs/{name}" for name in NAMES}
    assert all(".dist-info/" in name for name in names - files)


def test_own_data_to_training_to_prediction_without_a_checkout(installed):
    _, run = installed
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (run.work / "data" / folder).mkdir(parents=True)
    for i in range(6):
        labels = np.kron(rng.integers(0, 3, (4, 5)), np.ones((16, 16))).astype(np.uint8)
        Image.fromarray(labels).save(run.work / f"data/labels/{i}.png")
        image = 60 * labels[..., None] + rng.integers(0, 40, (*labels.shape, 3))
        Image.fromarray(image.astype(np.uint8)).save(run.work / f"data/images/{i}.png")
    said = run(
        "-m", "mcibi_d2.tools.init_dataset", "data/images", "data/labels", "--output", "mine.yaml",
        "--base", "scenes/mcibi_tiny.yaml", "--val-share", 0.4,
    )  # fmt: skip
    assert "python -m mcibi_d2.tools.train --config-file mine.yaml" in said
    text = (run.work / "mine.yaml").read_text()
    assert '_BASE_: "mcibi_d2://scenes/mcibi_tiny.yaml"' in text and str(run.site) not in text
    # The same file, elsewhere and with a checkout, is the same config.
    assert load_config(str(run.work / "mine.yaml")).MODEL == load_config(
        "scenes/mcibi_tiny.yaml", ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3",
                                   "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]"]
    ).MODEL  # fmt: skip

    train = ["-m", "mcibi_d2.tools.train", "--config-file", "mine.yaml"]
    options = ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0]
    trained = run(*train, *options, "OUTPUT_DIR", "out")
    weights = ["MODEL.WEIGHTS", "out/model_final.pth"]
    evaluated = run(*train, "--eval-only", *options, "OUTPUT_DIR", "eval", *weights)
    numbers = [re.search(r"copypaste: ([\d.]+,.*)", said)[1] for said in (trained, evaluated)]
    assert numbers[0] == numbers[1]

    code = (
        "import cv2, mcibi_d2, mcibi_d2.engine, mcibi_d2.predict\n"
        f"cfg = mcibi_d2.engine.load_config('mine.yaml', {weights})\n"
        "labels = mcibi_d2.predict.Predictor(cfg)(cv2.imread('data/images/0.png')).labels\n"
        "print(mcibi_d2.__file__, mcibi_d2.__version__, labels.shape, labels.max() < 3)"
    )
    said = run("-c", code).splitlines()[-1]
    assert said == f"{run.site}/mcibi_d2/__init__.py {mcibi_d2.__version__} (64, 80) True"


def test_documents_code_runs(installed):
    _, run = installed
    texts = [(ROOT / folder / "README.md").read_text() for folder in ("", "mcibi_d2")]
    found = [re.findall(r"```python\n(.*?)```", text, re.DOTALL) for text in texts]
    assert [len(blocks) for blocks in found] == [3, 1]
    blocks = sum(found, [])
    # One process for all: importing torch takes longer than they do.
    code = "".join(
        block.replace("output/library", str(run.work / f"document{number}"))
        for number, block in enumerate(blocks)
    )
    output = run("-c", f"import mcibi_d2\nprint('package:', mcibi_d2.__file__)\n{code}")
    assert f"package: {run.site}/" in output
    assert "Error" not in output and "none was committed" not in output
    for number, block in enumerate(blocks):
        assert (run.work / f"document{number}/model_final.pth").is_file() == ("train()" in block)
