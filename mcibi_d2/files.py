"""Files of tensors and numbers, read so that nothing in them is ever executed.

A pickle, which most such files are, may name any function of Python and have it called. Everything
in this package that reads one reads it here.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import safetensors.torch
import torch

from .errors import InputError

# Booleans, numbers and bytes: no objects, no fields, which could hold some.
_NUMBERS = re.compile(r"[<>=|]?(\?|[bBhHiIlLqQefdgFD]|[biufcSV][0-9]{1,3})")


def read_data(path: str, what: str = "a file that holds tensors and numbers alone") -> object:
    """What a file of tensors or numbers holds; code in it is not run but refused by its name.

    What a file is, it says itself, whatever it is called: ``torch.save``'s (zipped or old),
    safetensors (a dict of tensors), ``.npy`` (an array), or a pickle of plain containers with
    numbers, numpy arrays and tensors, as Detectron2's model zoo and Caffe2 have them, of Python 2
    too.

    Args:
        path: of a local file.
        what: it should be, for the error.

    Returns:
        Tensors are on the CPU.

    Raises:
        InputError: it cannot be read, is none of these, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(16)
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if start.startswith(b"\x93NUMPY"):
            return np.load(path, allow_pickle=False)
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**27:
            return safetensors.torch.load_file(path)
        return _read_pickle(path)
    except _Refused as error:
        raise InputError(
            f"{path}: cannot be read as {what} (it holds {error}; code in files is never run, and "
            f"only tensors, numbers and plain containers of them are read)"
        ) from error
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read as {what} ({type(error).__name__}: {_reason(error)})"
        ) from error


class _Refused(Exception):
    """Something that is not data, as ``module.name``."""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return lines[0].strip()[:120] if lines else "no reason given"


def _read_zip(path: str) -> object:
    # As torch.load looks at it. Before torch 2.6 that would hand TorchScript, which is code, to the
    # reader for it, with weights_only, too (CVE-2025-32434).
    archive = torch._C.PyTorchFileReader(path)
    if "constants.pkl" in archive.get_all_records():
        raise _Refused("TorchScript")
    if not any(name.startswith("data/") for name in archive.get_all_records()):
        # No tensors. Older releases of torch know no numbers of numpy's.
        return _Unpickler(io.BytesIO(archive.get_record("data.pkl"))).load()
    # Not the name, by which some releases of torch choose another reader.
    with open(path, "rb") as file:
        return _load_weights(file)


def _load_weights(file: BinaryIO) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # What it was that is no tensor, PyTorch says in the middle of a long text.
        name = re.search(r"(?:GLOBAL|[Uu]nsupported class) ([\w.]+)", str(error))
        if name:
            raise _Refused(name[1]) from error
        raise


def _read_pickle(path: str) -> object:
    with open(path, "rb") as file:
        found = _Unpickler(file).load()
        if type(found) is int and found == torch.serialization.MAGIC_NUMBER:
            # The first of several pickles. As bytes, for then torch does not try to take it for a
            # tar file, from which before torch 2.6 it would unpack files.
            file.seek(0)
            return _load_weights(io.BytesIO(file.read()))
    return found


class _Unpickler(pickle.Unpickler):
    """Knows plain containers, numbers, arrays and tensors; anything else is an error.

    Args:
        file: to read from.
    """

    def __init__(self, file: BinaryIO):
        super().__init__(file, encoding="latin1")  # as numpy wants what Python 2 wrote
        self._known = _known()

    def find_class(self, module: str, name: str) -> object:
        """The function or class that a file asks for."""
        # numpy 2 has moved what numpy 1 wrote.
        asked = (module.replace("numpy._core", "numpy.core"), name)
        if asked not in self._known:
            raise _Refused(f"{module}.{name}")
        return self._known[asked]


def _known() -> dict[tuple[str, str], Callable]:
    """What a pickle may ask for: stand-ins that do nothing but make numbers, arrays and tensors.

    Made anew for each file, so that nothing which one does to them is there for the next.
    """

    class DType:
        """``numpy.dtype`` of numbers, which numpy's own reader is not trusted with."""

        def __init__(self, code: str, *_):
            self.code = code
            self.order = "="

        def __setstate__(self, state: tuple) -> None:
            self.order = state[1] if state[1] in ("<", ">") else "="

    class Array(np.ndarray):
        """An array under construction."""

        def __setstate__(self, state: tuple) -> None:
            shape, dtype, fortran, data = state[-4:]
            dtype = _type(dtype)
            # Python's integers, which no shape makes overflow.
            if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
                raise ValueError(f"{len(data)} bytes for an array of shape {shape}")
            super().__setstate__((1, shape, dtype, bool(fortran), data))

    def _type(dtype: object) -> np.dtype:
        code = dtype.code if isinstance(dtype, DType) else dtype
        # After what is in the array, so that code there is called by its name.
        if not (isinstance(code, str) and _NUMBERS.fullmatch(code)):
            raise _Refused(f"an array of type {code!r}, no numbers")
        return np.dtype(code).newbyteorder(dtype.order)

    def ndarray(*_) -> None:
        # It is an argument of `reconstruct`. The class itself makes arrays of objects, too, and
        # out of bytes, which it then takes for the addresses of objects.
        raise _Refused("a call of numpy.ndarray")

    def reconstruct(*_) -> np.ndarray:
        return Array((0,), np.int8)

    def scalar(dtype: object, data: bytes | str) -> np.generic:
        data = data.encode("latin1") if isinstance(data, str) else bytes(data)
        return np.frombuffer(data, _type(dtype), count=1)[0]

    def from_buffer(buffer: bytes, dtype: object, shape: tuple, order: str) -> np.ndarray:
        array = np.frombuffer(buffer, _type(dtype)).reshape(shape, order=order)
        return array.astype(array.dtype.newbyteorder("="))

    def encode(text: str, encoding: str = "latin1") -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise _Refused(f"_codecs.encode with {encoding!r}")
        return text.encode("latin1")

    def empty_bytes() -> bytes:
        return b""

    def rebuild_tensor(storage, offset, size, stride, *_) -> torch.Tensor:
        # Without the hooks, which may come behind.
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def rebuild_parameter(data: torch.Tensor, *_) -> torch.Tensor:
        return data

    def load_from_bytes(data: bytes) -> object:
        if data.startswith(b"PK"):
            # PyTorch writes storages in its old form, and might take a zip for TorchScript.
            raise _Refused("a storage that is a zip")
        return _load_weights(io.BytesIO(data))

    return {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): ndarray,
        ("numpy", "dtype"): DType,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.multiarray", "scalar"): scalar,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        # Bytes in the protocols that have none.
        ("_codecs", "encode"): encode,
        ("__builtin__", "bytes"): empty_bytes,
        ("builtins", "bytes"): empty_bytes,
        # Tensors that were pickled, not saved.
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): load_from_bytes,
    }
