"""The house stays as it is drawn: what may import what."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "mcibi_d2"
# Which rooms a room may import, beside packages from outside.
TORCH_ONLY = {"attention", "bilinear", "blocks", "fusion", "labels", "losses"}
ALLOWED = {
    "config": set(),
    "errors": set(),
    "files": {"errors"},
    "input_size": {"errors"},
    "config_files": {"errors"},
    "convert": {"errors"},
    "model_zoo": {"config_files", "engine", "errors"},
    "modeling": {"modeling", "input_size", "errors"},
    "data": {"data", "input_size", "errors"},
    "evaluation": {"evaluation", "modeling", "data", "errors", "files"},
    "visualization": {"visualization"},
    "engine": {
        "config_files",
        "engine",
        "evaluation",
        "visualization",
        "data",
        "modeling",
        "config",
        "input_size",
        "errors",
        "files",
    },
    "predict": {"config", "engine", "data", "modeling", "visualization", "errors"},
    "__init__": {"config_files", "config", "data", "errors", "modeling"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path):
    """Absolute names of the modules that a file imports."""
    package = path.relative_to(ROOT).with_suffix("").parts
    package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    own = {name.split(".")[1] for name in imported_modules(path)
           if name.startswith("mcibi_d2.") and name.count(".")}  # fmt: skip
    own = {name for name in own if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}
    if room != "tools":
        assert own <= ALLOWED[room]
        assert "tools" not in own


TORCH_ONLY_FILES = [
    *(PACKAGE / "modeling" / f"{name}.py" for name in sorted(TORCH_ONLY)),
    *sorted((PACKAGE / "modeling" / "context").glob("*.py")),
    *(p for p in sorted((PACKAGE / "modeling" / "memory").glob("*.py")) if p.stem != "files"),
]


@pytest.mark.parametrize("path", TORCH_ONLY_FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_idea_needs_torch_only(path):
    allowed = tuple(f"mcibi_d2.modeling.{name}" for name in (*TORCH_ONLY, "context", "memory"))
    for module in imported_modules(path):
        top = module.split(".")[0]
        assert (
            module.startswith(allowed)
            or module == "mcibi_d2.modeling"
            or top == "torch"
            or top in sys.stdlib_module_names
        ), module


def test_train_net_is_short_and_has_no_classes():
    source = (ROOT / "train_net.py").read_text()
    assert len(source.splitlines()) < 80
    assert not any(isinstance(n, ast.ClassDef) for n in ast.walk(ast.parse(source)))


def test_optional_libraries_are_not_imported():
    code = (
        "import sys, mcibi_d2.engine, mcibi_d2.predict; print([m for m in ('sklearn', 'scipy', "
        "'h5py', 'onnx', 'onnxruntime', 'openTSNE', 'pandas', 'pyvips') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_without_detectron2_one_error_says_how_to_get_it(tmp_path):
    # A path in which only this package, and nothing installed, can be found.
    os.symlink(PACKAGE, tmp_path / "mcibi_d2")
    code = (
        f"import sys; sys.path = [{str(tmp_path)!r}] + "
        "[p for p in sys.path if 'site-packages' not in p]; import mcibi_d2"
    )
    run = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True,
                         cwd=tmp_path)  # fmt: skip
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: mcibi_d2 needs Detectron2")
    assert "make install" in last and "pip install --no-build-isolation git+" in last


def test_pictures_are_not_read_or_written_by_name_in_opencv():
    """It changes names outside ASCII on Windows."""
    for path in [*FILES, *(ROOT / "datasets").glob("*.py")]:
        assert not re.search(r"cv2\.im(read|write)\b", path.read_text("utf-8")), path
