"""Look at your images and labels, and write a config that trains on them.

python -m mcibi_d2.tools.init_dataset IMAGES LABELS --output my_dataset.yaml
python -m mcibi_d2.tools.init_dataset manifest.json --output my_dataset.yaml
"""

import argparse
import filecmp
import json
import os
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.config_files import find_config_file, portable_name
from mcibi_d2.data import read_image
from mcibi_d2.data.classes import palette
from mcibi_d2.data.datasets import data_root
from mcibi_d2.data.labels import (
    label_brightness,
    label_colors,
    label_values,
    nearest_colors,
    nearest_values,
    read_label_file,
)
from mcibi_d2.data.mapper import bright_values, fitting_white_level, say_dark
from mcibi_d2.data.own import is_taken, split_pairs
from mcibi_d2.data.pairs import Pair, find_pairs, guess_suffixes
from mcibi_d2.engine import load_config
from mcibi_d2.tools.command import ToolParser, run_tool

BASE = "ade20k/mcibi_R50.yaml"
# More values than this are no classes.
MOST_CLASSES = 1024
# Released codes and the paper train ADE20K for 130 epochs; of a small set that is too little.
EPOCHS, LEAST_ITERATIONS = 130, 5000
# The border that the masks of Pascal VOC draw around objects.
VOC_BORDER = (224, 224, 192)
SHOWN = 10

Color = tuple[int, int, int]


class _Wrong(Exception):
    """Why a pair cannot be used."""


@dataclass
class _Label:
    """What one label file holds."""

    size: tuple[int, int]
    # Of each value, or of each color: its pixels, how many of them lie in no block of 2 x 2 of
    # their own, and how many have a value between those of the two beside, or above and below.
    pixels: dict
    thin: dict
    between: dict
    in_color: bool
    # Of a palette, the color of each value.
    palette: dict[int, Color] | None
    # Values that are not listed above, and the three numbers for all of them.
    rest: np.ndarray
    # Of the image.
    bright: tuple[int, int] = (0, 0)


@dataclass
class _Labels:
    """What all label files hold; of soft ones also the values that the others lie between."""

    form: str
    pixels: Counter
    files: Counter
    in_color: bool
    palette: dict[int, Color]
    soft: list | None = None
    # Of each image.
    bright: Sequence[tuple[int, int]] = ()
    # What is nowhere but between others, and may be a class of borders all the same.
    doubtful: Sequence = ()


def _read(pair: Pair, how: str = "exact") -> _Label | str:
    """The label of a pair, or what is wrong with the pair.

    Args:
        pair: image and label.
        how: ``exact``; ``nearest``, JPEGs too; ``threshold``, brightness.
    """
    try:
        label = _read_label(pair.label, how)
        # As training reads it, so that what is left out is what training would refuse.
        size = read_image(str(pair.image), "RGB", str(pair.label)).shape[:2]
        if label.size != size:
            raise _Wrong(
                f"{pair.label}: labels of {label.size[0]} x {label.size[1]} (height x width), its "
                f"image has {size[0]} x {size[1]}"
            )
        label.bright = bright_values(str(pair.image))
    except (_Wrong, InputError) as wrong:
        return " ".join(str(wrong).split())
    return label


def _read_label(path: Path, how: str) -> _Label:
    in_color, colors = False, None

    def values_of(image: Image.Image) -> np.ndarray:
        nonlocal in_color, colors
        if image.format == "JPEG" and how == "exact":
            raise _Wrong(
                f"{path}: a JPEG, whose compression changes labels, expected a PNG, or --nearest "
                f"and the values or colors that were meant"
            )
        if how == "threshold":
            return label_brightness(image)
        in_color = image.mode in ("RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr")
        colors = image.getpalette("RGB") if image.mode == "P" else None
        return label_colors(image) if in_color else label_values(image)

    values = read_label_file(str(path), values_of)
    pixels = _count(values)
    shown = values
    if colors is not None:
        # Between is said of colors; a palette has them in any order.
        table = np.zeros(256, np.int32)
        table[: len(colors) // 3] = np.array(colors).reshape(-1, 3) @ [1 << 16, 1 << 8, 1]
        shown = table[values]
    thin, between = _thin_pixels(values, shown, in_color or colors is not None)
    counts = [pixels, _count(values[thin]), _count(values[between])]
    rest = np.zeros(4, np.int64)
    if len(pixels) > MOST_CLASSES:
        kept = set(sorted(pixels, key=pixels.__getitem__)[-MOST_CLASSES // 4 :])
        rest[0] = len(pixels) - len(kept)
        for i, of in enumerate(counts):
            rest[i + 1] = sum(of.values()) - sum(of.get(value, 0) for value in kept)
            counts[i] = {value: of.get(value, 0) for value in kept}
    table = None
    if colors is not None:
        table = {value: tuple(colors[3 * value : 3 * value + 3]) for value in counts[0]}
    if in_color:
        counts = [{_rgb(color): count for color, count in of.items()} for of in counts]
    return _Label(values.shape, *counts, in_color, table, rest)


def _thin_pixels(
    values: np.ndarray, shown: np.ndarray, in_color: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the pixels in no block of 2 x 2 of one value, and of those between two others."""
    beside, below = values[:, 1:] == values[:, :-1], values[1:] == values[:-1]
    block = beside[1:] & beside[:-1] & below[:, 1:]
    thin = np.ones(values.shape, bool)
    for rows in (slice(1, None), slice(None, -1)):
        for columns in (slice(1, None), slice(None, -1)):
            thin[rows, columns] &= ~block
    between = np.zeros(values.shape, bool)
    if thin.any():
        for shift in (16, 8, 0) if in_color else (None,):
            part = shown if shift is None else shown >> shift & 255
            for view, where in ((part, between), (part.T, between.T)):
                before, middle, after = view[:, :-2], view[:, 1:-1], view[:, 2:]
                where[:, 1:-1] |= (before < middle) & (middle < after)
                where[:, 1:-1] |= (before > middle) & (middle > after)
        between &= thin
    return thin, between


def _count(values: np.ndarray) -> dict[int, int]:
    """Pixels of each value. Labels come in runs, of which there are fewer than pixels."""
    flat = values.ravel()
    if not flat.size:
        return {}
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    lengths = np.diff(starts, append=flat.size)
    found, place = np.unique(flat[starts], return_inverse=True)
    counts = np.bincount(place, lengths).astype(np.int64)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _rgb(color: int) -> Color:
    return color >> 16, color >> 8 & 255, color & 255


def scan(
    pairs: list[Pair], how: str = "exact", named: list[str] | None = None, threshold: int = 0
) -> tuple[_Labels, Counter, dict[str, str]]:
    """Read every file.

    Args:
        pairs: images and labels.
        how: ``exact``, ``nearest`` or ``threshold``.
        named: of ``nearest``: the values or colors that are meant; none: those found.
        threshold: of ``threshold``.

    Returns:
        What the labels hold, how many images have each (height, width), and what is wrong with
        which images, by name.

    Raises:
        InputError: no pair can be used, or the labels have more than ``MOST_CLASSES`` values, or
            are soft.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reading = pool.map(partial(_read, how=how), pairs)
        read = list(tqdm(reading, total=len(pairs), desc="Reading", unit="pair", leave=False))
    wrong = {p.name: x for p, x in zip(pairs, read, strict=True) if isinstance(x, str)}
    good = {p: x for p, x in zip(pairs, read, strict=True) if not isinstance(x, str)}

    # Palettes that say different things of one value: the colors are the labels, not the values.
    tables = [x.palette for x in good.values() if x.palette is not None]
    meanings = {(value, color) for table in tables for value, color in table.items()}
    colors = sum(x.in_color for x in good.values())
    in_color = 2 * colors > len(good) or len(meanings) > len({value for value, _ in meanings})
    if tables and how == "nearest":
        in_color = True  # what is near is said of colors
    pixels, thin, between, files, sizes = Counter(), Counter(), Counter(), Counter(), Counter()
    rest, crowded = np.zeros(4, np.int64), {}
    for pair, label in good.items():
        counts = [label.pixels, label.thin, label.between]
        if in_color and not label.in_color and label.palette is not None:
            counts = [_by_palette(of, label.palette) for of in counts]
        elif label.in_color != in_color:
            kind, others = ("colors", "values") if label.in_color else ("values", "colors")
            wrong[pair.name] = f"{pair.label}: holds {kind}, most labels hold {others}"
            continue
        if label.rest[0]:
            crowded[pair] = label
            rest += label.rest
            if how == "exact":
                continue
        for of_all, of in zip((pixels, thin, between), counts, strict=True):
            of_all.update(of)
        files.update(counts[0].keys())
        sizes[label.size] += 1
    kind = "colors" if in_color else "values"
    if how == "exact":
        both = [Counter(pixels), Counter(thin), Counter(between)]
        for label in crowded.values():
            for of_all, of in zip(both, (label.pixels, label.thin, label.between), strict=True):
                of_all.update(of)
        meant = soft_values(*both, rest)
        if meant is not None:
            share = 100 * sum(both[0][v] for v in meant) / (sum(both[0].values()) + rest[1])
            raise InputError(
                f"the labels hold {len(both[0]) + rest[0]} {kind}, of which "
                f"{', '.join(map(_text, meant))} have {share:.3g} % of the pixels and the others "
                f"lie between them at their borders: soft masks (smoothed, resized, or once "
                f"JPEGs); run this again with --nearest, for the nearest of these, with --nearest "
                f"and the {kind} that are meant, or with --threshold VALUE, for two classes"
            )
        areas = sum(n for value, n in pixels.items() if 2 * thin[value] <= n)
        if len(pixels) > 64 and 4 * areas < sum(pixels.values()) and _are_bytes(pixels):
            raise InputError(
                f"the labels hold {len(pixels)} {kind}, nearly all of them in no area of their "
                f"own: photographs, expected one value or color per class"
            )
        for pair, label in crowded.items():
            wrong[pair.name] = (
                f"{pair.label}: {len(label.pixels) + label.rest[0]} {kind}, too many for classes: "
                f"a photograph, a smoothed mask or ids of objects, expected one value or color per "
                f"class"
            )
    if not pixels:
        raise InputError(
            f"none of {len(pairs)} pairs can be used, expected some; {next(iter(wrong.values()))}"
        )
    if len(pixels) > MOST_CLASSES and how == "exact":
        raise InputError(
            f"the labels hold {len(pixels)} {kind}, too many for "
            f"classes: smoothed masks or ids of objects, expected one value or color per class"
        )
    form = "values" if not tables or how == "threshold" else "indices of a palette"
    if in_color:
        form = "colors" if not tables else "colors, in palettes that differ between the files"
        form = "colors" if how == "nearest" else form
    labels = _Labels(form, pixels, files, in_color, dict(meanings))
    labels.bright = [label.bright for label in good.values()]
    if how == "nearest":
        meant = soft_values(pixels, thin, between, rest, surely=False)
        _take_nearest(labels, _parse(named, labels, "--nearest") if named else meant)
    elif how == "exact":
        meant = soft_values(pixels, thin, between, rest, surely=False)
        labels.doubtful = sorted(set(pixels) - set(meant or pixels))
    elif how == "threshold":
        _take_sides(labels, threshold)
    return labels, sizes, wrong


def _are_bytes(values: Iterable) -> bool:
    return all(isinstance(value, tuple) or 0 <= value <= 255 for value in values)


def _by_palette(counts: dict, palette: dict[int, Color]) -> Counter:
    of_colors = Counter()
    for value, count in counts.items():
        of_colors[palette[value]] += count
    return of_colors


def soft_values(
    pixels: Counter, thin: Counter, between: Counter, rest: np.ndarray, surely: bool = True
) -> list | None:
    """Of soft labels, the values that the others lie between; None of others.

    Classes are areas: nearly all pixels of a value lie in blocks of it, and where two meet there is
    nothing between. At soft borders no value has an area, and from pixel to pixel the values rise
    or fall. A class of lines is thin, but has the same on both sides.

    Args:
        pixels: of each value (or color).
        thin: those that lie in no block of 2 x 2 pixels of their value.
        between: those whose value is between those of the pixels on both sides.
        rest: number of further values, and these three of all of them.
        surely: whether one value that lies between, which may be a class of borders, or a few
            pixels, are too little.
    """
    lines = [value for value in pixels if 2 * thin[value] > pixels[value]]
    solid = [value for value in pixels if 2 * thin[value] <= pixels[value]]
    in_color = any(isinstance(value, tuple) for value in solid)
    if lines and (len(solid) == 1 or in_color and len(_apart(solid, pixels)) == 1):
        # What is meant may be thin itself, as vessels are; it is farthest from the others.
        farthest = max(lines, key=lambda value: (_distance(value, solid[0]), pixels[value]))
        lines.remove(farthest)
        solid.append(farthest)
    total = sum(pixels.values()) + rest[1]
    at_borders = sum(pixels[value] for value in lines) + rest[1]
    rising = sum(between[value] for value in lines) + rest[3]
    meant = _apart(solid, pixels)
    if (
        len(meant) < 2
        or len(lines) + rest[0] < (2 if surely else 1)
        or not (10 if surely else 1) <= at_borders < 0.75 * total
        or (rising < 0.2 * at_borders and not _are_noise(lines, meant))
    ):
        return None
    return sorted(meant)


def _apart(solid: list, pixels: Counter) -> list:
    """Of values with areas, those that are not beside a more frequent one, as JPEGs have them."""
    meant: list = []
    for value in sorted(solid, key=lambda value: -pixels[value]):
        far, near = (64, 16) if isinstance(value, tuple) else (8, 4)
        if not any(
            _distance(value, m) <= (far if pixels[value] < 0.1 * pixels[m] else near) for m in meant
        ):
            meant.append(value)
    return meant


def _are_noise(lines: list, meant: list) -> bool:
    """Whether all lines are close to areas that are far from each other, and to several of them."""
    nearest = [min(meant, key=lambda value: _distance(line, value)) for line in lines]
    return (
        len(set(nearest)) > 1
        and all(_distance(*pair) <= 16 for pair in zip(lines, nearest, strict=True))
        and all(_distance(*pair) >= 48 for pair in combinations(meant, 2))
    )


def _distance(one, other) -> int:
    if isinstance(one, tuple):
        return max(abs(a - b) for a, b in zip(one, other, strict=True))
    return abs(one - other)


def _take_nearest(labels: _Labels, meant: Iterable | None) -> None:
    """Count each value as the nearest of those that are meant; None: all are."""
    if meant is None:
        return
    known = sorted(meant)
    found = sorted(labels.pixels)
    if labels.in_color:
        packed = [np.array(x) @ [1 << 16, 1 << 8, 1] for x in (known, found)]
        places = nearest_colors(packed[1], packed[0])
    else:
        places = nearest_values(np.array(found), np.array(known))
    _take(labels, {value: known[i] for value, i in zip(found, places, strict=True)})


def _take_sides(labels: _Labels, threshold: int) -> None:
    """Count each value as the most frequent one on its side of a threshold."""
    sides: list = [[], []]
    for value in labels.pixels:
        sides[value >= threshold].append(value)
    if not all(sides):
        raise InputError(
            f"--threshold is {threshold}, but the labels hold {min(labels.pixels)} to "
            f"{max(labels.pixels)}, expected values below it and others"
        )
    most = [max(side, key=labels.pixels.__getitem__) for side in sides]
    _take(labels, {value: most[value >= threshold] for value in labels.pixels})


def _take(labels: _Labels, taken: dict) -> None:
    pixels: Counter = Counter()
    for value, count in labels.pixels.items():
        pixels[taken[value]] += count
    labels.soft = sorted(pixels)
    labels.pixels = pixels
    labels.files = Counter({value: labels.files[value] for value in pixels})


def guess_ignored(labels: _Labels) -> tuple[set, list[str]]:
    """The values or colors that are probably no class, and sentences that say why or why not."""
    if labels.in_color and all(len(set(color)) == 1 for color in labels.pixels):
        # Values that were saved in three equal channels.
        ignored, said = _guess_values(sorted(color[0] for color in labels.pixels), "{0},{0},{0}")
        return {(value,) * 3 for value in ignored}, said
    if not labels.in_color:
        return _guess_values(sorted(labels.pixels), "{}")
    if len(labels.pixels) == 2 and (0, 0, 0) in labels.pixels:
        return set(), [
            f"0,0,0 and {_text(max(labels.pixels))} alone are a mask: two classes, 'background' "
            f"and 'object', and nothing is ignored."
        ]
    said = []
    if (0, 0, 0) in labels.pixels:
        said.append(
            "Black is read as a class; if it means 'not labelled', run this again with "
            "--ignore 0,0,0."
        )
    if VOC_BORDER in labels.pixels:
        return {VOC_BORDER}, [
            *said,
            "224,224,192 is ignored: Pascal VOC's masks draw borders with it. If it is a "
            "class, run this again with --ignore and the colors to ignore, if any.",
        ]
    return set(), said


def _guess_values(found: list[int], form: str) -> tuple[set, list[str]]:
    """The same of values, which increase; ``form`` is how a sentence and --ignore have one."""
    if len(found) == 2 and -1 not in found:
        first, last = map(form.format, found)
        meaning = (
            "are a mask: two classes, 'background' and 'object',"
            if found[0] == 0
            else "are two classes,"
        )
        return set(), [
            f"{first} and {last} alone {meaning} and nothing is ignored."
            + (
                f" ({last} often means 'ignore', but then one class would be left.)"
                if found[1] in (255, 65535)
                else ""
            )
        ]
    said, ignored = [], set()
    if found[0] == -1:
        ignored.add(-1)
        said.append("-1 is ignored: no class has it.")
        found = found[1:]
    if found[0] == 0:
        said.append(
            f"{form.format(0)} is read as a class; if it means 'not labelled', run this again with "
            f"--ignore {form.format(0)}"
            + (" and the others to ignore." if found[-1] in (255, 65535) else ".")
        )
    *others, last = found
    # Three or more levels of gray, such as 0, 127, 255, are classes.
    numbered = len(others) > 1 and (others[-1] < 100 or len(others) > 16)
    if last in (255, 65535) and numbered and last > others[-1] + 1:
        said.append(
            f"{form.format(last)} is ignored: it is the usual value for it, and the others end at "
            f"{form.format(others[-1])}. If it is a class, run this again with --ignore and the "
            f"values to ignore, if any."
        )
        ignored.add(last)
    return ignored, said


def _parse(texts: list[str], labels: _Labels, option: str = "--ignore") -> set:
    """Of ``--ignore`` and ``--nearest``: values, or colors as 224,224,192."""
    parsed = set()
    for text in texts:
        parts = text.split(",")
        if len(parts) != (3 if labels.in_color else 1) or not all(
            p.lstrip("-").isdecimal() for p in parts
        ):
            expected = "a color such as 224,224,192" if labels.in_color else "a value such as 255"
            raise InputError(f"{option} {text}: expected {expected}, as the labels hold")
        value = tuple(map(int, parts)) if labels.in_color else int(text)
        if value not in labels.pixels and option == "--ignore":
            raise InputError(f"{option} {text}: no label holds it, expected one that they hold")
        parsed.add(value)
    return parsed


def name_classes(classes: list, labels: _Labels) -> tuple[list[str], list[list[int]]]:
    """Names and colors to begin with."""
    if labels.in_color and not (len(classes) == len(labels.pixels) == 2 and not any(classes[0])):
        names = ["color_{}_{}_{}".format(*color) for color in classes]
        # Values that were saved in three equal channels are too dark to tell apart.
        gray = all(len(set(color)) == 1 for color in classes)
        return names, palette(len(classes)) if gray else [list(color) for color in classes]
    names = [f"class_{value}" for value in classes]
    if len(labels.pixels) == 2 and classes[0] in (0, (0, 0, 0)):
        names = ["background", "object"]
    if labels.in_color:
        return names, palette(2) if len(set(classes[1])) == 1 else [list(c) for c in classes]
    colors = {labels.palette.get(value) for value in classes} - {None}
    if len(colors) == len(classes):
        return names, [list(labels.palette[value]) for value in classes]
    return names, palette(len(classes))


def _text(value) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def write_report(
    labels: _Labels,
    sizes: Counter,
    wrong: dict[str, str],
    alone: list[Path],
    links: list[str],
    names: dict,
) -> None:
    """Say what was found."""
    heights, widths = zip(*sizes.elements(), strict=True)
    span = [
        f"{min(side)}" if min(side) == max(side) else f"{min(side)}..{max(side)}"
        for side in (heights, widths)
    ]
    print(f"{len(heights)} images of {span[0]} x {span[1]} (height x width) with labels.")
    print(f"The labels hold {labels.form}:\n")
    total = sum(labels.pixels.values())
    rows = [
        [
            _text(value),
            f"{100 * count / total:.3g} %",
            labels.files[value],
            names.get(value, "ignored"),
        ]
        for value, count in sorted(labels.pixels.items())
    ]
    headers = ["color" if labels.in_color else "value", "pixels", "files", "read as"]
    print(tabulate(rows, headers, stralign="right", disable_numparse=True), end="\n\n")
    for title, lines in (
        ("Without a partner, left out", list(map(str, alone))),
        ("Not followed", links),
        ("Cannot be used, left out (DATASETS.OWN.EXCLUDED)", list(wrong.values())),
    ):
        if lines:
            print(f"{title}: {len(lines)}")
            for line in lines[:SHOWN]:
                print(f"  {line}")
            if len(lines) > SHOWN:
                print(f"  and {len(lines) - SHOWN} more")


def _portable(path: Path) -> str:
    """Below DETECTRON2_DATASETS if it is set and the path is there, else absolute."""
    if "DETECTRON2_DATASETS" in os.environ:
        root = Path(os.path.abspath(data_root()))
        if path.is_relative_to(root) and path != root:
            return path.relative_to(root).as_posix()
    return str(path)


def write_config(
    own: CfgNode,
    base: str,
    base_cfg: CfgNode,
    images: int,
    sizes: Counter,
    notes: list[str],
    wrong: dict[str, str],
    white_level: int,
) -> str:
    """The text of the config.

    Args:
        own: ``DATASETS.OWN``.
        base: file of the base config, as the text names it.
        base_cfg: what it holds.
        images: number of training images.
        sizes: how many images have each (height, width).
        notes: of each class, a comment.
        wrong: why each of ``EXCLUDED`` is there.
        white_level: of the images; 0: they have 8 bits, or fill 16.
    """
    solver, head = base_cfg.SOLVER, base_cfg.MODEL.SEM_SEG_HEAD
    count = len(own.CLASS_NAMES)
    wanted = EPOCHS * images // solver.IMS_PER_BATCH
    iterations = min(solver.MAX_ITER, max(wanted, LEAST_ITERATIONS))
    middle = [statistics.median_low(side) for side in zip(*sizes.elements(), strict=True)]
    crop = [min(pair) for pair in zip(base_cfg.INPUT.CROP.SIZE, middle, strict=True)]
    lines = [
        f"# The data set {own.NAME}: edit the names and colors of its classes.",
        f"_BASE_: {_quoted(base)}",
        "DATASETS:",
        f"  TRAIN: {_quoted([f'{own.NAME}_train'])}",
        f"  TEST: {_quoted([f'{own.NAME}_val'] if own.VAL or own.VAL_SHARE else [])}",
        "  OWN:",
        f"    NAME: {own.NAME}",
        "    # [images, labels], or a list or manifest; absolute or below DETECTRON2_DATASETS.",
        f"    TRAIN: {_quoted(own.TRAIN)}",
        f"    VAL: {_quoted(own.VAL)}",
        "    # Without VAL: the share of TRAIN that is held out for evaluation.",
        f"    VAL_SHARE: {own.VAL_SHARE}",
        *_suffix_lines(own),
        *_block("EXCLUDED", own.EXCLUDED, [wrong[name] for name in own.EXCLUDED]),
        *_block("CLASS_NAMES", own.CLASS_NAMES, notes),
        "    # Red, green and blue to draw with.",
        *_block("CLASS_COLORS", own.CLASS_COLORS, own.CLASS_NAMES),
    ]
    if own.LABEL_COLORS:
        lines += [
            "    # Colors of the label files: of each class, and those that are ignored.",
            *_block("LABEL_COLORS", own.LABEL_COLORS, own.CLASS_NAMES),
            f"    IGNORED_COLORS: {_quoted(own.IGNORED_COLORS)}",
        ]
    else:
        lines += [
            "    # Values of the label files: of each class, and those that are ignored.",
            f"    LABEL_IDS: {_quoted(own.LABEL_IDS)}",
            f"    LABEL_IGNORED: {_quoted(own.LABEL_IGNORED)}",
        ]
    if own.LABEL_NEAREST:
        lines += [
            "    # Every other value or color is taken as the nearest of these.",
            "    LABEL_NEAREST: true",
        ]
    if own.LABEL_THRESHOLD:
        lines += [
            "    # Values (of colors, brightness) from here on are the second class.",
            f"    LABEL_THRESHOLD: {own.LABEL_THRESHOLD}",
        ]
    lines += ["MODEL:", "  SEM_SEG_HEAD:", f"    NUM_CLASSES: {count}"]
    if head.CLASS_WEIGHTS:
        lines.append("    CLASS_WEIGHTS: []")
    if count > head.IGNORE_VALUE:
        lines.append("    IGNORE_VALUE: 65535")
    lines += [
        "INPUT:",
        *(
            [
                "  # The value of images of 16 bits that becomes white.",
                f"  WHITE_LEVEL: {white_level}",
            ]
            * bool(white_level)
        ),
        "  CROP:",
        f"    SIZE: {_quoted(crop)}",
        "  # Evaluate at the images' own size.",
        "  MIN_SIZE_TEST: 0",
        *(["  TEST_RESIZE: shortest_edge"] * (base_cfg.INPUT.TEST_RESIZE != "shortest_edge")),
        "SOLVER:",
        f"  # {EPOCHS} epochs are {EPOCHS} * {images} / {solver.IMS_PER_BATCH} = {wanted} "
        f"iterations; here at least {LEAST_ITERATIONS},\n"
        f"  # and no more than the {solver.MAX_ITER} of the base.",
        f"  MAX_ITER: {iterations}",
        f"  CHECKPOINT_PERIOD: {max(1, iterations // 10)}",
        "TEST:",
        f"  EVAL_PERIOD: {max(1, iterations // 10)}",
        f"OUTPUT_DIR: {_quoted(f'output/{own.NAME}')}",
    ]
    return "\n".join(lines) + "\n"


def _suffix_lines(own: CfgNode) -> list[str]:
    if not own.IMAGE_SUFFIX and not own.LABEL_SUFFIX:
        return []
    return [
        "    # What names end in, beside what an image and its label share.",
        f"    IMAGE_SUFFIX: {_quoted(own.IMAGE_SUFFIX)}",
        f"    LABEL_SUFFIX: {_quoted(own.LABEL_SUFFIX)}",
    ]


def _quoted(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _block(key: str, values: Iterable, notes: list[str]) -> list[str]:
    """A key of ``DATASETS.OWN`` with an entry and its comment on each line."""
    if not values:
        return [f"    {key}: []"]
    entries = [_quoted(value) for value in values]
    width = max(map(len, entries))
    return [f"    {key}:"] + [
        f"    - {entry:{width}}  # {note}" for entry, note in zip(entries, notes, strict=True)
    ]


def _source(images: Path, labels: Path | None) -> list[str]:
    """``DATASETS.OWN.TRAIN`` or ``VAL``, of paths of the command line."""
    paths = [images] if labels is None else [images, labels]
    return [_portable(Path(os.path.abspath(path.expanduser()))) for path in paths]


def _set_suffixes(own: CfgNode, image_suffix: str | None, label_suffix: str | None) -> list[str]:
    """Set what names end in, as given or as found; what was found is returned as a sentence."""
    if image_suffix is not None or label_suffix is not None:
        own.IMAGE_SUFFIX, own.LABEL_SUFFIX = image_suffix or "", label_suffix or ""
        return []
    # A list needs none, a folder beside it may.
    guesses = [guess_suffixes(source) for source in (own.TRAIN, own.VAL) if source]
    own.IMAGE_SUFFIX, own.LABEL_SUFFIX = next(filter(any, guesses), ("", ""))
    return [
        f"Names of {kind} end in {suffix}, beside what a pair shares (--{option}-suffix says "
        f"another)."
        for kind, option, suffix in (
            ("images", "image", own.IMAGE_SUFFIX),
            ("labels", "label", own.LABEL_SUFFIX),
        )
        if suffix
    ]


def init_dataset(args: argparse.Namespace) -> None:
    """Look at the files, report, and write the config.

    Raises:
        InputError: why no config can be written.
    """
    if args.output.exists() and not args.force:
        raise InputError(f"{args.output}: exists already, expected a new file, or --force")
    if not args.output.parent.is_dir():
        raise InputError(f"{args.output.parent}: no such folder, for --output")
    base = find_config_file(args.base)
    base_cfg = load_config(base)
    own = base_cfg.DATASETS.OWN
    if own.NAME:
        raise InputError(f"--base {args.base}: has a data set of its own, expected a model alone")
    own.NAME = re.sub(r"\W", "_", args.output.stem)
    if is_taken(own.NAME):
        raise InputError(
            f"{args.output}: the data set would be called {own.NAME}, which there is already, "
            f"expected another file name"
        )
    own.TRAIN = _source(args.images, args.labels)
    if args.val_images is not None:
        own.VAL = _source(args.val_images, args.val_labels)
    elif args.val_labels is not None:
        raise InputError("--val-labels needs --val-images, which is not given")
    if not 0 <= args.val_share < 1:
        raise InputError(f"--val-share is {args.val_share}, expected 0 <= share < 1")
    own.VAL_SHARE = 0.0 if own.VAL else args.val_share

    said = _set_suffixes(own, args.image_suffix, args.label_suffix)
    found = [
        find_pairs(source, own.IMAGE_SUFFIX, own.LABEL_SUFFIX)
        for source in (own.TRAIN, own.VAL)
        if source
    ]
    pairs = [pair for some in found for pair in some.pairs]
    others = [path for some in found for path in some.others]
    if others:
        said.append(f"{len(others)} files have no such name and are not read, as {others[0]}.")
    how = "exact" if args.nearest is None else "nearest"
    if args.threshold is not None:
        if args.nearest is not None:
            raise InputError("--threshold and --nearest are both given, expected one of them")
        if args.threshold < 1:
            raise InputError(f"--threshold is {args.threshold}, expected 1 or more")
        how = "threshold"
    labels, sizes, wrong = scan(pairs, how, args.nearest, args.threshold or 0)
    own.EXCLUDED = sorted(wrong)
    train = split_pairs(own, "train").pairs
    val = split_pairs(own, "val").pairs if own.VAL or own.VAL_SHARE else []

    ignored, why = guess_ignored(labels)
    if args.ignore is not None:
        ignored, why = _parse(args.ignore, labels), []
    said += why
    said += [
        f"{_text(value)} is found at borders alone, between other values; if it is no class, but "
        f"comes from smoothing or resizing, run this again with --nearest."
        for value in labels.doubtful
    ]
    if labels.soft:
        values = ", ".join(map(_text, labels.soft))
        said.append(
            f"Each pixel is taken as the nearest of {values}."
            if how == "nearest"
            else f"Pixels from {args.threshold} on are one class, the others the other."
        )
    seen = {pair.image.resolve() for pair in train}
    twice = [pair.image for pair in val if pair.image.resolve() in seen]
    if twice:
        said.append(f"{len(twice)} images are both for training and for evaluation: {min(twice)}")
    classes = sorted(set(labels.pixels) - ignored)
    strange = [
        value for value in labels.pixels if not labels.in_color and not -1 <= value < 1 << 16
    ]
    if strange:
        raise InputError(
            f"the labels hold {min(strange)}, expected 0..65535, or -1 for 'ignored'; of NumPy "
            f"files others can be changed to these"
        )
    if len(classes) < 2:
        raise InputError(
            f"the labels hold one class, {', '.join(map(_text, classes)) or 'none'}, expected two "
            f"or more beside what is ignored"
        )
    used = (pair for pair in pairs if pair.name not in wrong)
    if all(filecmp.cmp(pair.image, pair.label, shallow=False) for pair in used):
        raise InputError(
            f"{own.TRAIN[0]}: each image is a copy of its label, expected images and labels"
        )
    own.CLASS_NAMES, own.CLASS_COLORS = name_classes(classes, labels)
    if labels.in_color:
        own.LABEL_COLORS = [list(color) for color in classes]
        own.IGNORED_COLORS = [list(color) for color in sorted(ignored)]
    else:
        own.LABEL_IDS, own.LABEL_IGNORED = classes, sorted(ignored)
    own.LABEL_NEAREST, own.LABEL_THRESHOLD = how == "nearest", args.threshold or 0
    highest = max(value for value, _ in labels.bright)
    white_level = base_cfg.INPUT.WHITE_LEVEL or fitting_white_level(highest)
    if white_level and highest:
        said.append(
            f"Images of 16 bits have values up to {highest:,} of 65,535, so that "
            f"{white_level:,} becomes white (INPUT.WHITE_LEVEL)."
        )
    elif not white_level:
        said += say_dark(labels.bright)
    alone = [path for some in found for path in some.alone]
    links = [sentence for some in found for sentence in some.links]
    names = dict(zip(classes, own.CLASS_NAMES, strict=True))
    write_report(labels, sizes, wrong, alone, links, names)
    for sentence in said:
        print(sentence)

    total = sum(labels.pixels.values())
    kind = "color" if labels.in_color else "value"
    notes = [
        f"{kind} {_text(x)}, {100 * labels.pixels[x] / total:.3g} % of pixels" for x in classes
    ]
    text = write_config(
        own, portable_name(base), base_cfg, len(train), sizes, notes, wrong, white_level
    )
    _write(args.output, text)
    fits = base_cfg.MODEL.DEVICE == "cpu" or torch.cuda.is_available()
    print(
        f"\nWrote {args.output}: {len(classes)} classes, {len(train)} images to train on, "
        f"{len(val)} to evaluate on. Edit names, colors and schedule in it; next type:\n"
        f"python -m mcibi_d2.tools.train --config-file {args.output}"
        + ("" if fits else " MODEL.DEVICE cpu")
    )
    if not fits:
        print("On a CPU, --base camvid/mcibi_MobileNetV2.yaml is a smaller network.")


def _write(output: Path, text: str) -> None:
    """Write the config if it can be loaded."""
    with tempfile.NamedTemporaryFile(
        "w", dir=output.parent, prefix=f".{output.stem}_", suffix=".yaml", encoding="utf-8"
    ) as file:
        file.write(text)
        file.flush()
        load_config(file.name)
    output.write_text(text, encoding="utf-8")


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("init_dataset", __doc__)
    parser.add_argument(
        "images", type=Path,
        help="folder of images, or of images and labels (x.jpg and x_mask.png); or a list (an "
             "image and its label on each line) or a manifest (.json, .yaml or JSON lines, a list "
             "of {image, label}), with paths relative to the file",
    )  # fmt: skip
    parser.add_argument(
        "labels", type=Path, nargs="?",
        help="folder of label files with the images' names, or these and a suffix",
    )  # fmt: skip
    parser.add_argument(
        "--label-suffix", metavar="TEXT",
        help="what names of labels end in beside what they share with their images, such as _mask "
             "(found by itself, and said)",
    )  # fmt: skip
    parser.add_argument("--image-suffix", metavar="TEXT", help="the same of images: _leftImg8bit")
    parser.add_argument("--output", type=Path, required=True, help="config to write, e.g. my.yaml")
    parser.add_argument("--val-images", type=Path, help="as IMAGES, for evaluation")
    parser.add_argument("--val-labels", type=Path, help="as LABELS, for evaluation")
    parser.add_argument(
        "--val-share", type=float, default=0.1,
        help="without --val-images: share held out for evaluation; 0 for none (0.1)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", nargs="*", metavar="VALUE",
        help="values (255) or colors (224,224,192) without ground truth, instead of a guess; "
             "nothing after it: none",
    )  # fmt: skip
    parser.add_argument(
        "--nearest", nargs="*", metavar="VALUE",
        help="of soft masks (smoothed, resized, JPEGs): take each pixel as the nearest of these "
             "values or colors; nothing after it: of those that have areas",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=int, metavar="VALUE",
        help="or: two classes, of the values (of colors, their brightness) below it, and others",
    )  # fmt: skip
    parser.add_argument(
        "--base", default=BASE, metavar="FILE", help=f"config of the model and recipe ({BASE})"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the config")
    return parser


def main() -> None:
    """Run the tool."""
    init_dataset(make_parser().parse_args())


if __name__ == "__main__":
    run_tool(main)
