"""Turn the ``.mat`` label files of COCO-Stuff 10k into PNGs.

Reads ``annotations/*.mat`` of v1.1 or v1.0 and writes ``labels/{train,test}/*.png`` in the encoding
of the 164k set: the id of the class minus 1, and 255 where there is no label. What is there already
is kept, so an interrupted run goes on where it was. Needs ``pip install 'mcibi_d2[coco_stuff]'``
(scipy for v1.1, h5py for v1.0).
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from detectron2.data import MetadataCatalog
from PIL import Image
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.data.datasets import data_root

IGNORE = 255


@cache
def _table(version: str) -> dict[int, int]:
    """Value of a PNG for each value of the field ``S``."""
    png_values = MetadataCatalog.get("coco_stuff_10k_train").label_ids
    if version == "1.1":  # 0, and the ids 1..182 of the 171 classes that have pixels
        return {0: IGNORE, **{value + 1: value for value in png_values}}
    # 1, and 2..172: the same classes in the same order, without gaps.
    return {1: IGNORE, **{place + 2: value for place, value in enumerate(png_values)}}


def read_mat(path: Path) -> tuple[np.ndarray, str]:
    """The field ``S`` of a label file, and the version that the file is of.

    Returns:
        Labels (height, width) and ``1.0`` or ``1.1``. The container tells them apart: v1.0 is
        MATLAB 7.3, which is HDF5, v1.1 an older MATLAB format.

    Raises:
        InputError: the file cannot be read, or the library for it is missing.
    """
    try:
        with open(path, "rb") as file:
            # MATLAB writes a line of text before HDF5's own mark.
            is_hdf5 = file.read(10).startswith((b"MATLAB 7.3", b"\x89HDF"))
        if is_hdf5:
            import h5py

            with h5py.File(path, "r") as file:
                # MATLAB stores columns first.
                return np.asarray(file["S"]).T, "1.0"
        import scipy.io

        return np.asarray(scipy.io.loadmat(path, variable_names=["S"])["S"]), "1.1"
    except ImportError as error:
        raise InputError(
            f"{path}: to read it {error.name} is needed: pip install 'mcibi_d2[coco_stuff]'"
        ) from error
    # The two libraries raise many kinds of errors for a damaged file.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read as a .mat file with a field S ({error})"
        ) from error


def convert(image: Path, mat: Path, png: Path) -> None:
    """Write the labels of one image, unless they are there.

    Raises:
        InputError: naming the file, and the size or the value that does not fit.
    """
    try:
        with Image.open(image) as opened:
            size = opened.size
    except OSError as error:
        raise InputError(f"{image}: cannot be read as an image ({error})") from error
    if _is_whole(png, size):
        return
    values, version = read_mat(mat)
    if values.ndim != 2 or values.shape[::-1] != size:
        raise InputError(
            f"{mat}: labels of shape {values.shape} (height, width), {image.name} has {size[::-1]}"
        )
    table = _table(version)
    labels = np.full(values.shape, IGNORE, np.uint8)
    for value in np.unique(values).tolist():
        if value not in table:
            raise InputError(
                f"{mat}: label {value:g} is not in the table of v{version}, which has the "
                f"{len(table) - 1} classes in {min(table)}..{max(table)}"
            )
        labels[values == value] = table[value]
    # A file that has its name is whole.
    unfinished = png.with_suffix(".unfinished")
    Image.fromarray(labels).save(unfinished, "PNG")
    os.replace(unfinished, png)


def _is_whole(png: Path, size: tuple[int, int]) -> bool:
    """Whether a label file is there, of (width, height), and not damaged."""
    try:
        with Image.open(png) as opened:
            found = opened.size
            opened.verify()
    # What Pillow raises for a damaged PNG.
    except (OSError, SyntaxError):
        return False
    return found == size


def _tasks(folder: Path) -> list[tuple[Path, Path, Path]]:
    """Image, ``.mat`` and PNG of every line of the two lists."""
    tasks = []
    for split in ("train", "test"):
        list_file = folder / "imageLists" / f"{split}.txt"
        if not list_file.is_file():
            raise InputError(
                f"{list_file}: no such list file, expected the unzipped cocostuff-10k-v1.1.zip or "
                f"v1.0.zip in {folder}"
            )
        stems = list_file.read_text().split()
        if not stems:
            raise InputError(f"{list_file}: lists no image, expected one name a line")
        target = folder / "labels" / split
        target.mkdir(parents=True, exist_ok=True)
        tasks += [
            (
                folder / "images" / f"{stem}.jpg",
                folder / "annotations" / f"{stem}.mat",
                target / f"{stem}.png",
            )
            for stem in stems
        ]
    return tasks


def _attempt(task: tuple[Path, Path, Path]) -> str | None:
    """Convert; the sentence that says what is wrong, if something is."""
    try:
        convert(*task)
    except InputError as error:
        return str(error)
    return None


def prepare(folder: Path, workers: int) -> None:
    """Convert a whole folder.

    Args:
        folder: with ``images``, ``annotations`` and ``imageLists``.
        workers: number of processes.

    Raises:
        InputError: a list is missing, or some files could not be converted. All others were.
    """
    tasks = _tasks(folder)
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(_attempt, tasks, chunksize=16)
        errors = [e for e in tqdm(results, "Labels", len(tasks), unit="image") if e]
    if errors:
        rest = f"\n... and {len(errors) - 10} more" if len(errors) > 10 else ""
        raise InputError(
            f"{len(errors)} of {len(tasks)} files were not converted:\n"
            + "\n".join(errors[:10])
            + rest
        )
    print(f"{len(tasks)} label files are in {folder / 'labels'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folder", type=Path, nargs="?",
        help="the unzipped data set (default: coco_stuff_10k in DETECTRON2_DATASETS)",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (all CPUs)")
    args = parser.parse_args()
    try:
        prepare(args.folder or data_root() / "coco_stuff_10k", max(1, args.workers))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
