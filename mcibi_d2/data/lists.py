"""List and manifest files: which image goes with which label."""

import csv
import json
import os
import re
from pathlib import Path

import yaml

from ..errors import InputError
from .files import LABEL_SUFFIXES

MANIFESTS = (".json", ".jsonl", ".ndjson", ".yaml", ".yml")
# How columns and keys are called, Detectron2's own among them.
_IMAGE_KEYS = (
    "image", "img", "file_name", "filename", "image_path", "img_path", "image_file", "image_name",
    "image_filename", "images", "input",
)  # fmt: skip
_LABEL_KEYS = (
    "label", "mask", "sem_seg_file_name", "label_path", "mask_path", "label_file", "mask_file",
    "label_name", "mask_name", "labels", "masks", "annotation", "ann", "annotation_path", "seg_map",
    "segmentation", "seg", "gt", "target",
)  # fmt: skip
# The first of those that fit equally well, as names hold blanks more often than tabs.
_SEPARATORS = ("\t", ";", ",", " ")
_EXPECTED = (
    "expected an image and a label, separated by a tab, a comma, a semicolon or blanks (names "
    'that hold the separator "in quotes"), or first a line of headings such as image,mask'
)
_KEYS_EXPECTED = "expected {image, label} or Detectron2's {file_name, sem_seg_file_name}"


def read_list(path: Path) -> list[tuple[str, str]]:
    """Image and label of each entry of a list or manifest, as it names them.

    A list has an image and its label on each line, separated by a tab, a comma, a semicolon or
    blanks, with or without a line of headings (``image``, ``mask``, ...); blank lines and lines
    that begin with # do not count. A manifest (.json, .yaml, or JSON lines) has objects instead,
    with keys of the same names.

    Raises:
        InputError: the file, the line or entry, and what was expected.
    """
    try:
        # Some editors begin a file with a mark, which is no part of the first name.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read as a list of text ({error})") from error
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        return _manifest(path, text, yaml.safe_load)
    if suffix == ".json":
        try:
            return _manifest(path, text, json.loads)
        except InputError:
            if not re.match(r"\s*\{.*\}\s*\n\s*\{", text):
                raise
    lines = [
        (number, line.strip(" \r\n"))
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.lstrip().startswith("#")
    ]
    if lines and lines[0][1].startswith("{"):
        return [_of_line(path, number, line) for number, line in lines]
    return _columns(path, lines)


def _manifest(path: Path, text: str, load) -> list[tuple[str, str]]:
    try:
        entries = load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(entries, list):
        raise InputError(
            f"{path}: holds {type(entries).__name__}, expected a list of {{image, label}}"
        )
    return [_entry(path, f"entry {i}", entry) for i, entry in enumerate(entries, 1)]


def _of_line(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        return _entry(path, f"line {number}", json.loads(line))
    except ValueError as error:
        raise InputError(f"{path}: line {number} cannot be read as JSON ({error})") from error


def _entry(path: Path, place: str, entry) -> tuple[str, str]:
    if isinstance(entry, dict):
        keys = {_normal(key): value for key, value in entry.items()}
        found = []
        for names in (_IMAGE_KEYS, _LABEL_KEYS):
            texts = [keys[name] for name in names if isinstance(keys.get(name), str)]
            # A label may be the name of a class, beside a mask.
            found.append(next(filter(_ending, texts), texts[0] if texts else None))
        if all(found):
            return _portable(found[0]), _portable(found[1])
    raise InputError(f"{path}: {place} is {entry!r}, {_KEYS_EXPECTED}")


def _columns(path: Path, lines: list[tuple[int, str]]) -> list[tuple[str, str]]:
    """The entries of a list; its separator is the one that fits most of its lines."""
    fits = {s: sum(map(_fits, (_split(line, s) for _, line in lines))) for s in _SEPARATORS}
    order = sorted(_SEPARATORS, key=fits.__getitem__, reverse=True)
    heading = _heading(*(line for _, line in lines[:2])) if lines else None
    entries = []
    for number, line in lines[heading is not None :]:
        if heading is not None:
            separator, *places = heading
            parts = _split(line, separator)
            found = [parts[i] for i in places if i < len(parts)]
        else:
            # A line may have another separator than most.
            split = [_split(line, separator) for separator in order]
            pairs = [parts for parts in split if len(parts) == 2]
            found = next(filter(_fits, pairs), pairs[0] if pairs else [])
        if len(found) != 2 or not all(found):
            raise InputError(f"{path}: line {number} is {line!r}, {_EXPECTED}")
        entries.append((_portable(found[0]), _portable(found[1])))
    if entries and heading is None and fits[order[0]] and not any(map(_ending, entries[0])):
        raise InputError(f"{path}: line {lines[0][0]} is {lines[0][1]!r}, {_EXPECTED}")
    return entries


def _heading(line: str, first: str = "") -> tuple[str, int, int] | None:
    """Separator and places of the two columns, where a line names them.

    Of several columns that may be meant, it is one that holds a file's name in the ``first`` entry.
    """
    for separator in _SEPARATORS:
        names = [_normal(part) for part in _split(line, separator)]
        parts = _split(first, separator)
        places = []
        for keys in (_IMAGE_KEYS, _LABEL_KEYS):
            named = [names.index(key) for key in keys if key in names]
            files = [i for i in named if i < len(parts) and _ending(parts[i])]
            places += (files or named)[:1]
        if len(places) == 2:
            return separator, *places
    return None


def _split(line: str, separator: str) -> list[str]:
    parts = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    return [part.strip() for part in parts]


def _fits(parts: list[str]) -> bool:
    """Whether a line becomes two files of images."""
    return len(parts) == 2 and all(map(_ending, parts))


def _ending(name: str) -> bool:
    return name.lower().endswith(LABEL_SUFFIXES)


def _normal(name: str) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _portable(name: str) -> str:
    """A path that was written on Windows, for other systems."""
    if "\\" in name and os.sep == "/" and not os.path.exists(name):
        return name.replace("\\", "/")
    return name
