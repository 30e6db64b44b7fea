"""The config files of this project: where they are, and how one is read with what it is based on.

They are in ``configs`` beside the package in a checkout, in the package itself where it is
installed. ``mcibi_d2://ade20k/mcibi_R50.yaml`` names one wherever that is, for Detectron2 as well.
"""

import difflib
import os
from pathlib import Path
from typing import IO

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler

from .errors import InputError

PREFIX = "mcibi_d2://"
_PACKAGE = Path(__file__).resolve().parent
FOLDER = next((f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir()), None)


def get_config_file(config_path: str) -> str:
    """The path of one of this project's config files.

    Args:
        config_path: below ``configs``, such as ``ade20k/mcibi_R50.yaml``, with or without
            ``mcibi_d2://`` before it.

    Raises:
        InputError: there is none of this name; it says which are similar.
    """
    name = os.path.normpath(config_path.removeprefix(PREFIX))
    found = _names()
    if name not in found:
        close = difflib.get_close_matches(name.removeprefix("configs/"), found, n=3)
        raise InputError(
            f"{config_path}: is no config file of mcibi_d2"
            + (f"; close: {', '.join(close)}" if close else ", such as ade20k/mcibi_R50.yaml")
        )
    return str(FOLDER / name)


def _names() -> list[str]:
    if FOLDER is None:
        return []
    return sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))


def find_config_file(config_file: str) -> str:
    """The path of a config file: one that is there, else one of this project's.

    Raises:
        InputError: it is neither.
    """
    if os.path.isfile(config_file):
        return config_file
    try:
        return get_config_file(config_file)
    except InputError as error:
        raise InputError(f"--config-file {config_file}: no such file, and {error}") from error


def portable_name(config_file: str) -> str:
    """How another config names a file: as this project's, wherever it is, else by its path."""
    path = Path(config_file).resolve()
    if FOLDER is not None and path.is_relative_to(FOLDER):
        return PREFIX + path.relative_to(FOLDER).as_posix()
    return os.path.abspath(config_file)


class _ConfigFile(CfgNode):
    """Opens the files that a config is based on."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        # What does not begin with / is put behind the folder of the file that names it.
        _, prefix, name = filename.rpartition(PREFIX)
        return PathManager.open(prefix + name, "r")


def read_config(path: str) -> object:
    """What a YAML file holds, over what it is based on; no code in it is run.

    Raises:
        Exception: of YAML or of opening the files.
    """
    return _ConfigFile.load_yaml_with_base(path, allow_unsafe=False)


class _Handler(PathHandler):
    """Opens ``mcibi_d2://<config>``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs) -> str:
        return get_config_file(path)

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs) -> IO:
        return open(get_config_file(path), mode, buffering)

    def _isfile(self, path: str, **kwargs) -> bool:
        return os.path.normpath(path.removeprefix(PREFIX)) in _names()

    _exists = _isfile


PathManager.register_handler(_Handler(), allow_override=True)
