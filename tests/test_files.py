"""No file runs code, whichever way it comes in."""

import ast
import io
import os
import pickle
import struct
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from PIL import EpsImagePlugin, Image
from safetensors.torch import save_file

from mcibi_d2 import InputError
from mcibi_d2.data import read_image
from mcibi_d2.data.labels import label_values, read_label_file
from mcibi_d2.engine import Checkpointer, Trainer, load_config
from mcibi_d2.engine.memory_init import read_rows
from mcibi_d2.engine.setup import check_config
from mcibi_d2.evaluation import read_results
from mcibi_d2.evaluation.memory_contents import MemoryContents
from mcibi_d2.files import read_data
from mcibi_d2.modeling import FeatureMemory
from mcibi_d2.tools import convert_released

LEGACY = {"_use_new_zipfile_serialization": False}


class Mark:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def objects(array_of):
    array = np.empty(1, dtype=object)
    array[0] = array_of
    return array


def forms(mark):
    """Name -> the bytes of a file that would leave a mark."""

    def saved(value, **how):
        file = io.BytesIO()
        torch.save(value, file, **how)
        return file.getvalue()

    def npy(array):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return file.getvalue()

    state = {"a": torch.ones(1), "b": mark}
    folder = mark.path.encode()
    return {
        "zip": saved({"model": state}),
        "zip without tensors": saved({"model": mark}),
        "legacy": saved({"model": state}, **LEGACY),
        "pickle": pickle.dumps({"model": {"a": np.ones(1), "b": mark}}),
        "pickle 0": pickle.dumps({"model": mark}, protocol=0),
        "objects": pickle.dumps({"a": objects(mark)}),
        "blobs": pickle.dumps({"blobs": {"conv1_w": mark}}, protocol=2),
        "npy": npy(objects(mark)),
        "result": pickle.dumps({"IoU-road": mark}),
        # By hand: instances of Python 2, reduce in protocol 0, a class out of a dotted name, a
        # tensor's storage that is a pickle of its own, and an encoding that is a module.
        "inst": b"(S'" + folder + b"'\nios\nmkdir\n.",
        "os.mkdir": b"cos\nmkdir\n(S'" + folder + b"'\ntR.",
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x08os.mkdir\x93\x8c"
        + struct.pack("B", len(folder)) + folder + b"\x85R.",
        "storage": pickle.dumps(Storage(pickle.dumps(mark))),
        "storage by torch": pickle.dumps(Storage(saved(mark, **LEGACY))),
        "storage by script": pickle.dumps(Storage(script())),
        # numpy makes arrays of objects out of bytes, which are their addresses then.
        "addresses": b"cnumpy\nndarray\n((K\x01tS'O'\nC\x08" + bytes(8) + b"tR.",
        "getattr": b"c__builtin__\neval\n(S'__import__(\"os\").mkdir(\"" + folder + b"\")'\ntR.",
        "tar": tar(pickle.dumps(mark)),
    }  # fmt: skip


class Storage:
    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


def script():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def tar(data):
    """As torch 0.1 wrote them, for which later ones have a reader."""
    import tarfile

    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def readers(folder):
    """Ways in: how a file is called, and what reads it."""
    model = Trainer.build_model(make_tiny_cfg(folder / "run"))
    memory = FeatureMemory(4, 3)

    def resume(path):
        (folder / "run").mkdir(exist_ok=True)
        (folder / "run/last_checkpoint").write_text(os.path.relpath(path, folder / "run"))
        Checkpointer(model, str(folder / "run")).resume_or_load("", resume=True)

    def weights(path):
        Checkpointer(model).load(path)

    return [
        *((f"x{suffix}", weights) for suffix in (".pth", ".pkl", ".pyth", ".safetensors", "")),
        ("x.pth", resume),
        ("rows.npy", lambda path: read_rows(path, memory)),
        ("rows.pth", lambda path: read_rows(path, memory)),
        ("memory.pth", MemoryContents.read),
        ("sem_seg_evaluation.pth", read_results),
        ("released.pth", convert_released.read),
    ]


def test_nothing_in_a_file_is_run(tmp_path):
    mark = Mark(tmp_path / "mark")
    ways = readers(tmp_path)
    for form, data in forms(mark).items():
        for name, read in ways:
            (tmp_path / name).write_bytes(data)
            with pytest.raises(InputError) as error:
                read(str(tmp_path / name))
            assert not Path(mark.path).exists(), (form, name)
            assert name in str(error.value) and "\n" not in str(error.value), (form, name)
    # It was not for want of trying.
    pickle.loads(forms(mark)["pickle 0"])
    assert Path(mark.path).is_dir()


@pytest.mark.parametrize(
    "form, thing",
    [
        *((form, "(posix|nt)\\.mkdir") for form in ("zip", "zip without tensors", "legacy",
                                                    "pickle", "pickle 0", "objects", "blobs")),
        ("os.mkdir", "os\\.mkdir"),
        ("npy", "Object arrays"),
        ("storage by torch", "(posix|nt)\\.mkdir"),
        ("storage by script", "a storage that is a zip"),
        ("addresses", "a call of numpy\\.ndarray"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(tmp_path, form, thing):
    path = tmp_path / "x.pth"
    path.write_bytes(forms(Mark(tmp_path / "mark"))[form])
    with pytest.raises(InputError, match=rf"^{path}: cannot be read as .*{thing}"):
        read_data(str(path))


def test_torchscript_is_code_and_is_refused(tmp_path):
    (tmp_path / "x.pth").write_bytes(script())
    with pytest.raises(InputError, match=r"x\.pth: .*TorchScript"):
        read_data(str(tmp_path / "x.pth"))


@pytest.mark.parametrize("shape", [(2**33, 2**33), (-1, -8), (3,), (2**61,)])
def test_arrays_are_as_large_as_their_bytes(tmp_path, shape):
    (tmp_path / "x.pkl").write_bytes(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
        + b"".join(b"L%dL\n" % size for size in shape)
        + b"tcnumpy\ndtype\n(S'u1'\ntRI00\nS'12345678'\ntb."
    )
    with pytest.raises(InputError, match=r"8 bytes for an array of shape"):
        read_data(str(tmp_path / "x.pkl"))


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_numbers_are_read(tmp_path, protocol):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    data = {
        "model": OrderedDict(
            a=array, b=np.asfortranarray(array), c=np.arange(3, dtype=">i4"), d=np.float64(3.5),
            e=torch.arange(4.0).view(2, 2), f=np.zeros((0, 3)), g=torch.nn.Parameter(torch.ones(2)),
            h=np.array([True, False]), i=np.array(7),
        ),
        "__author__": "x", "matching_heuristics": True, "n": [1, (2.5, None)],
        "b": b"", "c": b"\xff",
    }  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(data, protocol=protocol))
    found = read_data(str(tmp_path / "x.pkl"))
    assert {k: v for k, v in found.items() if k != "model"} == {
        k: v for k, v in data.items() if k != "model"
    }
    assert found["model"].keys() == data["model"].keys()
    for key, value in data["model"].items():
        expected = value.detach() if torch.is_tensor(value) else value
        assert np.array_equal(found["model"][key], expected), key
        assert str(found["model"][key].dtype) == str(expected.dtype).replace(">i4", "int32")


def test_a_pickle_of_python_2_is_read(tmp_path):
    """Protocol 2 by Python 2 and numpy 1: bytes are strings there."""
    array = np.array([1.5, -2.0], dtype=np.float32)
    data = (
        b"\x80\x02}q\x00U\x07conv1_wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray"
        b"\nq\x03K\x00\x85U\x01b\x87Rq\x04(K\x01K\x02\x85cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87R"
        b"q\x06(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
        + array.tobytes() + b"tbs."
    )  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(data)
    found = read_data(str(tmp_path / "x.pkl"))
    assert np.array_equal(found["conv1_w"], array)


def test_numpys_numbers_in_a_saved_file_are_read(tmp_path):
    torch.save({"IoU-road": np.float64(12.5), "n": np.int64(3)}, tmp_path / "x.pth")
    assert read_data(str(tmp_path / "x.pth")) == {"IoU-road": 12.5, "n": 3}


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x"])
def test_a_files_form_is_not_its_name(tmp_path, tiny_cfg, name):
    model = Trainer.build_model(tiny_cfg)
    state = {k: v.contiguous() for k, v in model.backbone.net.state_dict().items()}
    numbers = {k: v.numpy() for k, v in state.items()}
    for write in (
        lambda path: save_file(state, path),
        lambda path: torch.save(state, path),
        lambda path: torch.save(state, path, **LEGACY),
        lambda path: path.write_bytes(pickle.dumps({"model": numbers, "__author__": "me"})),
    ):
        write(tmp_path / name)
        for buffer in model.backbone.parameters():
            buffer.data.zero_()
        Checkpointer(model).load(str(tmp_path / name))
        assert all(torch.equal(v, state[k]) for k, v in model.backbone.net.state_dict().items())


def test_detectron2s_resnets_are_read(tmp_path):
    """Its model zoo's files and Caffe2's are numpy arrays under names of their own."""
    cfg = load_config(
        str(ROOT / "configs/ade20k/mcibi_R50_d2.yaml"), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    )
    model = Trainer.build_model(cfg)
    name = "backbone.res2.0.conv1.weight"
    expected = torch.randn_like(model.state_dict()[name])
    own = {
        k.removeprefix("backbone."): v.numpy()
        for k, v in model.state_dict().items()
        if k.startswith("backbone.") and not k.endswith("num_batches_tracked")
    }
    own["res2.0.conv1.weight"] = expected.numpy()
    for data in (
        {"model": own, "__author__": "x", "matching_heuristics": True},
        {"blobs": {**own, "res2_0_branch2a_w_momentum": np.ones(1)}},
    ):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(data, protocol=2))
        model.get_parameter(name).data.zero_()
        Checkpointer(model).load(str(tmp_path / "x.pkl"))
        assert torch.equal(model.state_dict()[name], expected)


def test_configs_run_no_code(tmp_path):
    mark = tmp_path / "mark"
    code = f"OUTPUT_DIR: !!python/object/apply:os.system ['mkdir {mark}']\n"
    (tmp_path / "base.yaml").write_text(code)
    (tmp_path / "config.yaml").write_text("_BASE_: base.yaml\n")
    (tmp_path / "new.yaml").write_text("OUTPUT_DIR: !!python/object/new:os.mkdir []\n")
    for name, place in (("base", "base"), ("config", "base"), ("new", "new")):
        with pytest.raises(InputError, match=rf"{place}\.yaml, line 1: .*os\.(system|mkdir)"):
            load_config(str(tmp_path / f"{name}.yaml"))
    with pytest.raises(InputError):
        load_config(
            "", ["OUTPUT_DIR", f"!!python/object/apply:os.system ['mkdir {mark}']", "X", "1"]
        )
    assert not mark.exists()


def test_no_postscript_is_run(tmp_path, monkeypatch):
    """Pillow has Ghostscript draw what begins as EPS, whatever it is called."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\nmkdir -p '{tmp_path / 'mark'}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png", format="EPS")
    for read in (
        lambda path: read_image(path, "BGR"),
        lambda path: read_label_file(path, label_values),
    ):
        with pytest.raises(InputError, match=r"x\.png: .*EPS, a program"):
            read(str(tmp_path / "x.png"))
        assert not (tmp_path / "mark").exists()
    with suppress(OSError), Image.open(tmp_path / "x.png") as image:
        image.load()
    assert (tmp_path / "mark").exists()


def test_no_proposals_are_unpickled(tmp_path, three_scenes):
    mark = Mark(tmp_path / "mark")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"boxes": mark}))
    cfg = make_tiny_cfg(
        tmp_path, *three_scenes, "MODEL.LOAD_PROPOSALS", "True",
        "DATASETS.PROPOSAL_FILES_TEST", f"('{tmp_path / 'x.pkl'}',)",
    )  # fmt: skip
    with pytest.raises(InputError, match=r"MODEL\.LOAD_PROPOSALS"):
        check_config(cfg)
    Trainer.build_test_loader(cfg, "test_scenes_three")
    assert not (tmp_path / "mark").exists()


# --- and it stays so

# Calls that may run what a file says: the last parts of their names, and what makes them safe.
RISKY = {
    ("load",): {"pickle", "torch", "dill", "joblib", "marshal", "cloudpickle", "jit", "export"},
    ("loads",): {"pickle", "dill", "marshal", "cloudpickle"},
    ("load_state_dict_from_url", "unsafe_load", "full_load", "load_all", "open_code"): None,
    ("Unpickler", "read_pickle", "eval", "exec"): {"pickle", "pandas", "", "builtins"},
}
# Files that write these and read back what they wrote.
OWN = {
    "tools/export.py": {"torch.jit.load", "torch.export.load"},
    "tools/benchmark/export.py": {"export.load"},
    "files.py": None,
}


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call | ast.ClassDef):
            for function in [node.func] if isinstance(node, ast.Call) else node.bases:
                yield ast.unparse(function), getattr(node, "keywords", []), node


@pytest.mark.parametrize(
    "path", sorted(p for folder in ("mcibi_d2", "datasets") for p in (ROOT / folder).rglob("*.py")),
    ids=lambda p: str(p.relative_to(ROOT)),
)  # fmt: skip
def test_files_are_read_in_one_place(path):
    place = str(path.relative_to(ROOT)).removeprefix("mcibi_d2/")
    if OWN.get(place, ()) is None:
        return
    for name, keywords, node in calls(path):
        said = {k.arg: ast.unparse(k.value) for k in keywords}
        owner, _, last = name.rpartition(".")
        owner = owner.rpartition(".")[2]
        where = f"{place}:{node.lineno}: {name}"
        for names, owners in RISKY.items():
            if last in names and (owners is None or owner in owners):
                assert name in OWN.get(place, ()), f"{where}: use mcibi_d2.files.read_data"
        if name in ("np.load", "numpy.load"):
            assert said.get("allow_pickle") == "False", where
        if last == "merge_from_file":
            assert said.get("allow_unsafe") == "False", where
        if last == "load" and owner == "yaml":
            assert said.get("Loader", "").endswith(("SafeLoader", "BaseLoader")), where
        assert said.get("allow_pickle", "False") == said.get("allow_unsafe", "False") == "False"
        assert said.get("weights_only", "True") == "True", where
