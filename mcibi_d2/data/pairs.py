"""Which image goes with which label: by folders and names, lists and manifests."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .datasets import data_root
from .files import IMAGE_SUFFIXES, LABEL_SUFFIXES, find_files, same_file
from .lists import read_list

# What the names of labels, and of images, say of themselves.
_LABEL_WORDS = {
    "mask", "masks", "label", "labels", "labelids", "labeltrainids", "trainids", "seg", "segmap",
    "segmentation", "gt", "gtfine", "groundtruth", "truth", "annot", "annotation", "annotations",
    "ann", "anno", "target", "matte", "alpha", "parsing", "semantic", "class", "classes", "ids",
}  # fmt: skip
_IMAGE_WORDS = {
    "img", "image", "images", "rgb", "sat", "photo", "input", "orig", "original", "raw", "src",
    "frame", "pic",
}  # fmt: skip


class Pair(NamedTuple):
    """An image, its label file, and the name that ``EXCLUDED`` and the held-out share know."""

    name: str
    image: Path
    label: Path


class FoundPairs(NamedTuple):
    """What a data set's source holds.

    Attributes:
        pairs: in order.
        alone: images and labels without a partner.
        links: a sentence for each link that is not followed.
        others: files whose names have neither suffix.
    """

    pairs: list[Pair]
    alone: list[Path]
    links: list[str]
    others: list[Path]


def find_pairs(source: Sequence[str], image_suffix: str = "", label_suffix: str = "") -> FoundPairs:
    """The pairs of a data set.

    Args:
        source: ``DATASETS.OWN.TRAIN`` or ``VAL``: a folder of images and one of labels, searched
            with their subfolders, one folder of both, or one list or manifest file.
        image_suffix: what names of images end in that is not in those of their labels, such as
            ``_leftImg8bit``. Of folders alone.
        label_suffix: the same of labels, such as ``_mask``; with its ending (``.png``), where the
            ending alone tells labels from images.

    Raises:
        InputError: what is missing, or not as expected, and where; also where an image is its own
            label.
    """
    paths = _paths(source)
    found = _listed(paths[0]) if not _are_folders(paths) else None
    if found is None:
        found = _in_folders(paths, source, image_suffix, label_suffix)
    same = [pair for pair in found.pairs if same_file(pair.image, pair.label)]
    if same:
        raise InputError(
            f"{same[0].image}: is its own label, as {len(same)} of {len(found.pairs)} images are "
            f"(one file, or a link to it), expected a label file beside each image"
        )
    return found


def guess_suffixes(source: Sequence[str]) -> tuple[str, str]:
    """What names of images and of labels end in, beside what a pair shares; twice "" for nothing.

    Raises:
        InputError: one folder whose names do not tell images from labels, or several suffixes that
            labels may have.
    """
    paths = _paths(source)
    if not _are_folders(paths):
        return "", ""
    one, files, _ = _look(paths, source)
    images, labels = ([_without_ending(key) for key in files[i]] for i in (0, 1))
    if not one and 2 * len(set(images) & set(labels)) >= min(len(images), len(labels)):
        return "", ""
    counts = _count_suffixes(images, labels, one)
    if one:
        counts = _oriented(counts)
        ending = _label_ending(list(files[0]))
        if ending is not None:
            counts["", ending[0]] += ending[1]
    if not counts:
        if one:
            raise InputError(_one_folder(paths[0], files[0]))
        return "", ""
    best = max(counts, key=lambda pair: (counts[pair], -len(pair[0]), -len(pair[1])))
    wanted = min(len(images), len(labels))
    if one:
        no_labels = [key for key in files[0] if not best[1] or _key(key, best[1]) is None]
        wanted = sum(_key(key, best[0]) is not None for key in no_labels)
    if 2 * counts[best] < wanted:
        if one:
            raise InputError(_one_folder(paths[0], files[0]))
        return "", ""
    rivals = sorted(
        pair[1] for pair, n in counts.items() if pair[0] == best[0] and 2 * n > counts[best]
    )
    if len(rivals) > 1:
        raise InputError(
            f"{paths[-1]}: images have several labels, whose names end in {', '.join(rivals)}; "
            f"--label-suffix says which are meant"
        )
    # Of x.jpg.png, .jpg alone would be the ending of the images.
    longer = [key for key in files[1] if _without_ending(key).endswith(best[1])]
    if one and best[1].lower() in LABEL_SUFFIXES and longer:
        return best[0], best[1] + os.path.splitext(longer[0])[1]
    return best


def _paths(source: Sequence[str]) -> list[Path]:
    paths = [data_root() / Path(part).expanduser() for part in source]
    # One folder that is given twice, be it by a link, is one folder.
    return paths[:1] if len(paths) == 2 and same_file(*paths) else paths


def _are_folders(paths: list[Path]) -> bool:
    return len(paths) == 2 or paths[0].is_dir()


def _look(
    paths: list[Path], source: Sequence[str]
) -> tuple[bool, list[dict[str, Path]], list[str]]:
    """Whether there is one folder alone, the files of each by their paths below it, and links."""
    files, links = [], []
    suffixes = (IMAGE_SUFFIXES, LABEL_SUFFIXES) if len(paths) == 2 else (LABEL_SUFFIXES,)
    for folder, other, wanted in zip(paths, paths[::-1], suffixes, strict=True):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder{_where(folder, source)}")
        found = find_files(folder, wanted)
        inside = other != folder and other.is_relative_to(folder)
        files.append(
            {
                path.relative_to(folder).as_posix(): path
                for path in found.files
                # A folder of labels may be in that of the images.
                if not (inside and path.is_relative_to(other))
            }
        )
        links += found.left_out
        if not files[-1]:
            raise InputError(
                f"{folder}: holds no image ({', '.join(wanted)})" + "".join(f"; {x}" for x in links)
            )
    one = len(paths) == 1
    return one, files * (2 if one else 1), links


def _in_folders(
    paths: list[Path], source: Sequence[str], image_suffix: str, label_suffix: str
) -> FoundPairs:
    one, files, links = _look(paths, source)
    if one and image_suffix == label_suffix:
        raise InputError(_one_folder(paths[0], files[0]))
    others: list[Path] = []
    by_key: list[dict[str, Path]] = []
    for i, (found, suffix) in enumerate(zip(files, (image_suffix, label_suffix), strict=True)):
        keys: dict[str, Path] = {}
        for name, path in found.items():
            if one and i == 0 and label_suffix and _key(name, label_suffix) is not None:
                continue
            if one and i == 0 and path.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            if one and i == 1 and not label_suffix and _key(name, image_suffix) is not None:
                continue
            key = _key(name, suffix)
            if key is None:
                others.append(path)
            elif key in keys:
                raise InputError(
                    f"{path}: has the name of {keys[key].name}, expected one file of a name; "
                    f"a list of pairs can tell them apart"
                )
            else:
                keys[key] = path
        by_key.append(keys)
    images, labels = by_key
    if one:
        used = {*images.values(), *labels.values()}
        others = [path for path in dict.fromkeys(others) if path not in used]
    pairs = [
        Pair(path.relative_to(paths[0]).as_posix(), path, labels[key])
        for key, path in images.items()
        if key in labels
    ]
    if not pairs:
        raise InputError(_no_pair(paths, files, image_suffix, label_suffix, source))
    alone = [path for key, path in images.items() if key not in labels]
    alone += [path for key, path in labels.items() if key not in images]
    return FoundPairs(pairs, alone, links, others)


def _no_pair(
    paths: list[Path], files: list[dict], image_suffix: str, label_suffix: str, source: Sequence
) -> str:
    if image_suffix or label_suffix:
        wanted = " and ".join(
            f"{kind} end in {suffix!r}"
            for kind, suffix in (("images", image_suffix), ("labels", label_suffix))
            if suffix
        )
        return (
            f"{paths[-1]}: no label has the name of an image where {wanted} (DATASETS.OWN."
            f"IMAGE_SUFFIX, LABEL_SUFFIX); files are named as {', '.join(_some(files))}"
        )
    said = (
        f"{paths[1]}: no label has the name of an image, with its folders: labels are named as "
        f"{min(files[1])}, images as {min(files[0])}"
    )
    guess = guess_suffixes(source)
    if any(guess):
        said += f"; DATASETS.OWN.IMAGE_SUFFIX {guess[0]!r} and LABEL_SUFFIX {guess[1]!r} pair them"
    return said + "; a list of pairs can say which belong together"


def _some(files: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for found in files for name in sorted(found)[:3]))


def _one_folder(folder: Path, names: dict) -> str:
    return (
        f"{folder}: a folder of images, expected LABELS beside it, or names that tell images from "
        f"labels (x.jpg and x_mask.png; --label-suffix, DATASETS.OWN.LABEL_SUFFIX); it holds "
        f"{', '.join(sorted(names)[:4])}" + ", ..." * (len(names) > 4)
    )


def _key(name: str, suffix: str) -> str | None:
    """What an image and its label share: a path without ending and suffix; None if it has none."""
    stem = _without_ending(name)
    if stem.endswith(suffix):
        return stem[: len(stem) - len(suffix)]
    if "." in suffix and name.lower().endswith(suffix.lower()):
        return name[: len(name) - len(suffix)]
    return None


def _without_ending(name: str) -> str:
    return os.path.splitext(name)[0]


def _count_suffixes(images: list[str], labels: list[str], one: bool) -> Counter[tuple[str, str]]:
    """How many labels go with an image, for each suffix of images and of labels."""
    tails: Counter[str] = Counter()
    for key in images:
        start = key.rfind("/") + 1
        cuts = [i for i in range(start, len(key)) if i == start or not key[i].isalnum()]
        tails.update({key[i:] for i in cuts})
    share = len(images) / (5 if one else 2)
    common = [tail for tail, n in tails.most_common(8) if n >= share and n > 1 and _has_word(tail)]
    counts: Counter[tuple[str, str]] = Counter()
    for suffix in ["", *common]:
        stems = {key[: len(key) - len(suffix)] for key in images if key.endswith(suffix)}
        for label in labels:
            for end in range(label.rfind("/") + 1, len(label) + 1):
                rest = label[end:]
                # Numbers are numbers of images.
                known = label[:end] in stems and (not rest or _has_word(rest))
                if known and not (one and rest == suffix):
                    counts[suffix, rest] += 1
    return counts


def _oriented(counts: Counter) -> Counter[tuple[str, str]]:
    """Of one folder: the same with the suffix of labels second, where that can be told."""
    told: Counter[tuple[str, str]] = Counter()
    for (one, other), n in counts.items():
        words = [set(_words(suffix)) for suffix in (one, other)]
        label = [bool(w & _LABEL_WORDS) for w in words]
        image = [bool(w & _IMAGE_WORDS) for w in words]
        if label[0] != label[1]:
            pair = (one, other) if label[1] else (other, one)
        elif image[0] != image[1]:
            pair = (one, other) if image[0] else (other, one)
        elif not one or not other:
            pair = (one, other) if not one else (other, one)
        else:
            continue
        told[pair] = max(told[pair], n)
    return told


def _label_ending(names: list[str]) -> tuple[str, int] | None:
    """Of one folder: the ending of labels, where endings tell them from images of the same names.

    Arrays are labels; else JPEGs are images and what is not JPEG are labels.
    """
    jpegs = {name for name in names if name.lower().endswith((".jpg", ".jpeg", ".jpe", ".jfif"))}
    arrays = {name for name in names if name.lower().endswith(".npy")}
    labels = arrays or set(names) - jpegs
    images = {_without_ending(name) for name in (set(names) - arrays if arrays else jpegs)}
    endings = Counter(
        os.path.splitext(name)[1] for name in sorted(labels) if _without_ending(name) in images
    )
    return endings.most_common(1)[0] if endings else None


def _has_word(suffix: str) -> bool:
    return any(c.isalpha() for c in suffix)


def _words(suffix: str) -> list[str]:
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", suffix)
    return [part.lower() for part in parts] + [suffix.strip("_-. ").lower()]


def _listed(path: Path) -> FoundPairs:
    """The pairs of a list or manifest file; their paths are relative to it."""
    if not path.is_file():
        kind = "list or manifest; two folders are [images, labels]"
        raise InputError(f"{path}: no such {kind}{_where(path, [path])}")
    entries = read_list(path)
    if not entries:
        raise InputError(f"{path}: lists no image")
    label_of: dict[str, str] = {}
    for image, label in entries:
        if label_of.setdefault(image, label) != label:
            raise InputError(
                f"{path}: {image} has two labels, {label_of[image]} and {label}, expected one"
            )
    pairs = [
        Pair(image, path.parent / Path(image).expanduser(), path.parent / Path(label).expanduser())
        for image, label in entries
    ]
    return FoundPairs(pairs, [], [], [])


def _where(path: Path, source: Sequence) -> str:
    """For an error about a path that was looked for below the data sets' folder."""
    if path.is_absolute() and str(path) in map(str, source):
        return ""
    return (
        f"; paths of DATASETS.OWN are absolute or below DETECTRON2_DATASETS, which is "
        f"{os.getenv('DETECTRON2_DATASETS', 'not set (so: datasets)')}"
    )
