"""Files on the disk: which of them are images and labels, and all of them below a folder."""

import os
from pathlib import Path
from typing import NamedTuple

# What Pillow reads; the one list for data sets, training, demo and checks.
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jp2",
    ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
LABEL_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")


class Found(NamedTuple):
    """The files below a folder, in order, and a sentence for each link that is not followed."""

    files: list[Path]
    left_out: list[str]


def find_files(folder: str | Path, suffixes: tuple[str, ...] = ()) -> Found:
    """All files below a folder, those in linked folders too.

    Hidden files and folders are passed over: systems put them there, not people. A link to a
    folder that it is itself in would have no end; it is left out, as is one that leads nowhere.

    Args:
        folder: of which links count as what they lead to. It may be missing: nothing is found.
        suffixes: endings in small letters, of files that are meant; none: all files.
    """
    files: list[Path] = []
    left_out: list[str] = []
    # Folders to look into, with those that they are in: (device, inode) of each. A link to one
    # that is above the first folder would enter it again.
    folder = Path(folder)
    above = {_identity(parent) for parent in folder.resolve().parents}
    waiting = [(folder, frozenset(above))]
    while waiting:
        inside, around = waiting.pop()
        try:
            around = around | {_identity(inside)}
            with os.scandir(inside) as entries:
                found = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            continue
        except OSError as error:
            left_out.append(f"{inside}: cannot be looked into ({error.strerror})")
            continue
        for entry in found:
            path = inside / entry.name
            wanted = not suffixes or entry.name.lower().endswith(suffixes)
            try:
                if entry.is_dir():
                    if entry.is_symlink() and _identity(path) in around:
                        left_out.append(
                            f"{path}: a link to a folder that it is in itself, not followed"
                        )
                    else:
                        waiting.append((path, around))
                elif entry.is_file():
                    files += [path] * wanted
                elif entry.is_symlink() and (wanted or not path.suffix):
                    left_out.append(f"{path}: a link to {os.readlink(path)}, which is not there")
            except OSError as error:  # a link to itself
                left_out.append(f"{path}: cannot be followed ({error.strerror})")
    return Found(sorted(files), sorted(left_out))


def same_file(one: str | Path, other: str | Path) -> bool:
    """Whether two paths lead to one file, be it by links. Of what is not there: False."""
    if str(one) == str(other):
        return True
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
