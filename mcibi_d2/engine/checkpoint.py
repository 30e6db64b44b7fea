"""Checkpoints: written whole or not at all, and loaded with a word about what fits."""

import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO
from urllib.parse import parse_qs

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from iopath.common.file_io import PathManager
from torch import nn

from ..errors import InputError
from ..files import read_data
from ..modeling.memory import classes_of_head
from .class_names import CLASSES, names_in, require_same

# Where timm's own keys are found in our models.
_TIMM_PREFIX = "backbone.net."
# How long a server may take to answer.
_DOWNLOAD_SECONDS = 15
_UNKNOWN = object()
_NUMBERED = re.compile(r"model_[0-9]{7,}")
# What a run writes that is its model; model_best.json has the value of model_best.pth.
_OF_A_RUN = re.compile(r"last_checkpoint|model_([0-9]{7,}|final|best)\.pth|model_best\.json")


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, made safe.

    - Files are written under a temporary name and renamed when complete, so that an interrupted
      save leaves the last checkpoint as it was.
    - Backbone state dicts with timm's names are accepted as they are.
    - A file that is not of this model is an error, instead of a network that is silently
      untrained.
    - The names of the classes are kept in the file. One with as many classes of other names, or in
      another order, is an error.
    - Of the checkpoints with a number (``model_0004999.pth``) that the run has written, before it
      was resumed, too, the newest are kept. An older one goes when a newer one is written whole
      and ``--resume`` would start from it. Other files are never touched.

    Args:
        model: to save and load.
        save_dir: folder of the checkpoints.
        kept: how many with a number; 0 for all.
        save_to_disk: default: on the main process only.
        class_names: of the model; () for no comparison.
        allow_other_classes: load a file whose classes have other names all the same.
        checkpointables: other objects with ``state_dict``, saved beside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        kept: int = 0,
        save_to_disk=None,
        class_names: Sequence[str] = (),
        allow_other_classes: bool = False,
        **checkpointables,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.kept = kept
        # Names without suffix, oldest first, of what this run has written with a number.
        self._numbered: list[str] = []
        self.class_names = list(class_names)
        self.allow_other_classes = allow_other_classes
        # What `load` was called with, for the steps in between.
        self._path, self._strict, self._resuming = "", False, False

    def save(self, name: str, *, tag: bool = True, **kwargs) -> None:
        """Write ``<save_dir>/<name>.pth``.

        Args:
            name: without suffix.
            tag: whether ``--resume`` starts from it.
            kwargs: further things to store.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, plain(part.state_dict())) for key, part in self.checkpointables.items())
        if self.class_names:
            data[CLASSES] = self.class_names
        data.update(plain(kwargs))
        if tag and _NUMBERED.fullmatch(name):
            self._numbered = [*(other for other in self._numbered if other != name), name]
        data["numbered"] = self._numbered
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        with replacing(path) as file:
            torch.save(data, file)
        if tag:
            self.tag_last_checkpoint(f"{name}.pth")
        if tag and self.kept > 0:
            while len(self._numbered) > self.kept:
                with suppress(FileNotFoundError):
                    os.remove(os.path.join(self.save_dir, f"{self._numbered.pop(0)}.pth"))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file that ``--resume`` starts from."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename.encode())

    def load(self, path: str, checkpointables: list[str] | None = None, *, strict: bool = False):
        """Load a checkpoint of ours, a timm state dict, or a Detectron2 pickle.

        Args:
            path: of the file; "" for nothing.
            checkpointables: which other objects to restore; default: all that are there.
            strict: whether every tensor of the model must be in the file, with its shape; used
                for evaluation and for resuming. Otherwise tensors of the head may be left out,
                as for another number of classes, which the log says.

        Returns:
            What the file holds beside the model.
        """
        self._path, self._strict = path, strict
        if path:
            check_weights_exist(path)
        file, _ = split_query(path)
        if "://" in path:
            file = _download(path, self.path_manager)
        # Not Detectron2's own, which takes a "?" in the name of a folder for the start of a query.
        return super(DetectionCheckpointer, self).load(file, checkpointables)

    def resume_or_load(self, path: str, *, resume: bool = True, strict: bool = False):
        """Restore the last checkpoint with everything, or load ``path`` into the model alone."""
        if resume and self.has_checkpoint():
            path = self.get_checkpoint_file()
            if not os.path.isfile(path):
                raise InputError(
                    f"{self.save_dir}/last_checkpoint: names {os.path.basename(path)!r}, which is "
                    f"not there, expected the name of a checkpoint"
                )
            self._resuming = True
            try:
                loaded = self.load(path, strict=True)
            finally:
                self._resuming = False
            # A file may say what it likes, but not have others deleted.
            numbered = loaded.get("numbered")
            self._numbered = [
                name
                for name in (numbered if isinstance(numbered, list) else ())
                if isinstance(name, str) and _NUMBERED.fullmatch(name)
            ]
            return loaded
        return self.load(path, checkpointables=[], strict=strict)

    def _load_file(self, filename: str) -> dict:
        loaded = read_data(filename, "a checkpoint")
        if not isinstance(loaded, dict):
            loaded = {}
        query = parse_qs(split_query(self._path)[1], keep_blank_values=True)
        if query.pop("matching_heuristics", None) == ["True"]:  # Detectron2's own query
            loaded = {**_with_model(loaded), "matching_heuristics": True}
        if query:
            raise InputError(f"{self._path}: ?{', '.join(query)} is not known")
        blobs = loaded.get("blobs", loaded)
        if (blobs is not loaded and isinstance(blobs, dict)) or (
            filename.endswith(".pkl") and _all_arrays(loaded)
        ):
            # As Detectron2 takes them: Caffe2's, of Detectron 1 and of ImageNet.
            blobs = {
                name: value for name, value in blobs.items() if not f"{name}".endswith("_momentum")
            }
            loaded = {"model": blobs, "__author__": "Caffe2", "matching_heuristics": True}
        elif "model_state" in loaded:  # of pycls
            loaded = {
                "model": loaded["model_state"], "__author__": "pycls", "matching_heuristics": True
            }  # fmt: skip
        loaded = _with_model(loaded)
        state = loaded["model"]
        if isinstance(state, dict) and "state_dict" in state:  # as timm's own training writes them
            state = state["state_dict"]
        if (
            not isinstance(state, dict)
            or not state
            or not all(
                isinstance(k, str) and isinstance(v, torch.Tensor | np.ndarray)
                for k, v in state.items()
            )
        ):
            raise InputError(
                f"{filename}: holds no state dict, expected a checkpoint of this project, "
                f"of timm, or of Detectron2"
            )
        state = {
            key.removeprefix("module."): value
            if torch.is_tensor(value)
            else self._tensor(key, value)
            for key, value in state.items()
        }
        own = tuple(f"{name}." for name, _ in self.model.named_children())
        timm_names = {
            key[len(_TIMM_PREFIX) :]
            for key in self.model.state_dict()
            if key.startswith(_TIMM_PREFIX)
        }
        if timm_names & state.keys() and not any(key.startswith(own) for key in state):
            state = {_TIMM_PREFIX + key: value for key, value in state.items()}
        loaded["model"] = state
        return loaded

    def _tensor(self, name: str, array: torch.Tensor | np.ndarray) -> torch.Tensor:
        if torch.is_tensor(array):
            return array
        try:
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        except TypeError as error:
            raise InputError(
                f"{self._path}: {name} is of type {array.dtype}, expected numbers"
            ) from error

    def _leave_other_memories(self, state: dict) -> None:
        """Take the memory out of a state with another number of classes.

        Its rows may have the shape of ours all the same: two slots for each of half the classes.
        """
        own = self.model.state_dict()
        for key in [key for key in state if f".{key}".endswith(".memory.rows")]:
            prefix = key.removesuffix("memory.rows")
            there, here = (classes_of_head(x, prefix) for x in (state, own))
            if None not in (there, here) and there != here:
                del state[key]
                state.pop(f"{prefix}memory.initialized", None)
                self.logger.warning(
                    f"Left out the memory, which is for {there} classes, not for {here}"
                )

    def _load_model(self, checkpoint: dict):
        for part in self.checkpointables if self._resuming else ():
            if part not in checkpoint:
                raise InputError(
                    f"{self._path}: holds a model alone, which no training can go on from, "
                    f"expected a checkpoint of a run (MODEL.WEIGHTS starts another from a model)"
                )
        if not self.allow_other_classes:
            require_same(self.class_names, "this model", names_in(checkpoint), self._path)
        self._leave_other_memories(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        wrong = {key for key, *_ in incompatible.incorrect_shapes}
        missing = _without_counters(set(incompatible.missing_keys) | wrong)
        expected = _without_counters(self.model.state_dict())
        if self._strict and missing:
            raise InputError(
                f"{self._path}: not a checkpoint of this model: {len(missing)} of "
                f"{len(expected)} tensors are not in it or have another shape, such as "
                f"{_some(missing)}"
            )
        # Auxiliary heads are for training alone; anything else would be another network.
        surplus = [
            key
            for key in incompatible.unexpected_keys
            if key.startswith("sem_seg_head.") and not key.startswith("sem_seg_head.aux.")
        ]
        if self._strict and surplus:
            raise InputError(
                f"{self._path}: not a checkpoint of this model: its head has {len(surplus)} "
                f"tensors more, such as {_some(surplus)}"
            )
        lost = [key for key in missing if key.startswith("backbone.")]
        count = sum(key.startswith("backbone.") for key in expected)
        if 2 * len(lost) > count:
            raise InputError(
                f"{self._path}: not weights for this model: {len(lost)} of {count} tensors of the "
                f"backbone are not in it or have another shape, such as {_some(lost)}"
            )
        if wrong:
            self.logger.warning(
                f"Left out, because their shape is another (another number of classes?): "
                f"{_some(wrong, 20)}"
            )
        return incompatible


def _with_model(loaded: dict) -> dict:
    """A bare state dict under the key that all others have it under."""
    return loaded if "model" in loaded else {"model": loaded}


def _all_arrays(loaded: dict) -> bool:
    return bool(loaded) and all(isinstance(value, np.ndarray) for value in loaded.values())


def plain(value: object, name: str = "") -> object:
    """The same, of what :func:`~mcibi_d2.files.read_data` reads with every release of torch.

    Args:
        value: containers with numbers, texts and tensors. What is something else is left out, and
            the log says so.
        name: of the value, for the log.
    """
    if isinstance(value, dict):
        named = {key: plain(entry, f"{name}.{key}".strip(".")) for key, entry in value.items()}
        return {key: entry for key, entry in named.items() if entry is not _UNKNOWN}
    if isinstance(value, list | tuple):
        entries = [plain(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
        kind = list if isinstance(value, list) else tuple
        return _UNKNOWN if any(entry is _UNKNOWN for entry in entries) else kind(entries)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if value is None or isinstance(value, torch.Tensor):
        return value
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    logging.getLogger(__name__).warning(
        f"Left out of the checkpoint: {name}, a {type(value).__name__}, which is not data."
    )
    return _UNKNOWN


def files_of_a_run(folder: str) -> list[str]:
    """The names of the checkpoints in a folder, and of what belongs to them; by name."""
    if not os.path.isdir(folder):
        return []
    return sorted(name for name in os.listdir(folder) if _OF_A_RUN.fullmatch(name))


@contextmanager
def replacing(path: str) -> Iterator[IO[bytes]]:
    """Write a file under a temporary name; it takes its own when it is complete.

    An error leaves neither.
    """
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException:
        with suppress(OSError):
            os.remove(f"{path}.tmp")
        raise


def split_query(path: str) -> tuple[str, str]:
    """A path or URL and the query behind it: ``model.pth?matching_heuristics=True``.

    A file of that name has no query.
    """
    file, _, query = path.partition("?")
    return (path, "") if os.path.isfile(path) else (file, query)


def _download(path: str, path_manager: PathManager) -> str:
    """Get a file that is elsewhere into the cache, or say in seconds that it cannot be had."""
    before = socket.getdefaulttimeout()
    # Else a network that answers nothing is waited for as long as the system's TCP does.
    socket.setdefaulttimeout(_DOWNLOAD_SECONDS)
    try:
        local = path_manager.get_local_path(split_query(path)[0])
        if not os.path.isfile(local):  # nothing here knows such addresses
            raise FileNotFoundError("no such file")
        return local
    except Exception as error:  # whatever the handlers of addresses raise
        raise InputError(
            f"MODEL.WEIGHTS: {path}: cannot be downloaded ({str(error) or type(error).__name__}), "
            f"expected a file that can, or one that is here"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def check_weights_exist(path: str) -> None:
    """Raise an :class:`InputError` if ``MODEL.WEIGHTS`` is empty or a local file not there."""
    if not path:
        raise InputError("MODEL.WEIGHTS is empty, expected a checkpoint")
    if "://" not in path and not os.path.isfile(split_query(path)[0]):
        raise InputError(f"MODEL.WEIGHTS: {path}: no such file, expected a checkpoint")


def _without_counters(keys: Iterable[str]) -> list[str]:
    """Without the batch norms' counters, which Detectron2's and older files lack."""
    return sorted(key for key in keys if not key.endswith("num_batches_tracked"))


def _some(keys: Iterable[str], most: int = 3) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
