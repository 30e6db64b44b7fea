"""Predictions as the evaluation servers want them: ids, names, sizes, and a checked zip."""

import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from ..data.image_file import open_image
from ..errors import InputError

CITYSCAPES_NAME = re.compile(r"([a-zA-Z-]+_\d{6}_\d{6})(?!\d)")
# Of EXIF's orientations, those that exchange height and width.
_SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class ServerFormat:
    """What a server expects.

    Args:
        name: file name, without its ending, for an image's file name.
        classes: how many there are; None: as many as the data set has.
        size: (height, width) of every prediction; None: that of its image.
    """

    name: Callable[[str], str]
    classes: int | None = None
    size: tuple[int, int] | None = None


def _stem(file_name: str) -> str:
    return Path(file_name).stem


def _cityscapes_name(file_name: str) -> str:
    found = CITYSCAPES_NAME.match(Path(file_name).name)
    if not found:
        raise InputError(
            f"{file_name}: expected a name of Cityscapes, <city>_<6 digits>_<6 digits>_..."
        )
    return found[1]


# png is no server's: the class ids at the images' size.
FORMATS = {
    "cityscapes": ServerFormat(_cityscapes_name, 19, (1024, 2048)),
    "ade20k": ServerFormat(_stem, 150),
    "lip": ServerFormat(_stem, 20),
    "png": ServerFormat(_stem),
}


class ServerFiles:
    """A folder of one PNG for each image of a data set, and the zip of it.

    Args:
        form: a name of ``FORMATS``.
        images: file names of the images.
        ids: the value of each class in the PNGs (metadata's ``server_ids``).
        folder: for the PNGs; made if it is not there.

    Raises:
        InputError: an image has no name in this format, two have the same, or there are not as
            many ids as the format has classes.
    """

    def __init__(self, form: str, images: list[str], ids: list[int], folder: str | Path):
        self.form = FORMATS[form]
        if self.form.classes not in (None, len(ids)):
            raise InputError(
                f"--format {form} has {self.form.classes} classes, but the data set has {len(ids)}"
            )
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.type = np.uint8 if max(ids) < 256 else np.uint16
        self.ids = np.array(ids, dtype=self.type)
        self._allowed = np.zeros(2**16, dtype=bool)
        self._allowed[ids] = True
        self._targets: dict[str, Path] = {}
        for image in images:
            target = self.folder / f"{self.form.name(image)}.png"
            self._targets[image] = target
        if len(set(self._targets.values())) < len(images):
            seen: dict[Path, str] = {}
            for image, target in self._targets.items():
                if target in seen:
                    raise InputError(
                        f"{image}: its prediction would be {target.name}, as that of {seen[target]}"
                    )
                seen[target] = image
            raise InputError(f"{len(images)} images, of which only {len(self._targets)} differ")

    def missing(self) -> list[str]:
        """Images that have no prediction yet, or one whose file was cut off or damaged."""
        return [image for image, target in self._targets.items() if not _is_whole(target)]

    def write(self, image: str, labels: np.ndarray) -> None:
        """Write the prediction of an image; a file is there only when it is complete.

        Args:
            image: file name of the image.
            labels: (height, width) class ids.

        Raises:
            InputError: a pixel has no class (its logits are NaN).
        """
        outside = int((labels >= len(self.ids)).sum())
        if outside:
            raise InputError(
                f"{image}: {outside} pixels have no class (NaN logits), expected 0.."
                f"{len(self.ids) - 1}"
            )
        target = self._targets[image]
        part = target.with_suffix(".part")
        Image.fromarray(self.ids[labels]).save(part, format="PNG")
        os.replace(part, target)

    def check(self, image: str) -> None:
        """Look at the prediction of an image: its size and values.

        Raises:
            InputError: naming the file, what was found and what was expected.
        """
        target = self._targets[image]
        try:
            with target.open("rb") as file, open_image(file, 0) as png:
                values = np.asarray(png)
        except (OSError, SyntaxError) as error:
            raise InputError(f"{target}: cannot be read as a prediction ({error})") from error
        sizes = [self.form.size] if self.form.size else _image_sizes(image)
        if values.shape not in sizes or values.dtype not in (np.uint8, np.uint16):
            height, width = sizes[0]
            raise InputError(
                f"{target}: a prediction of shape {values.shape} and type {values.dtype}, expected "
                f"{height} x {width} (height x width) and one channel of 8 or 16 bits"
            )
        wrong = values[~self._allowed[values]]
        if len(wrong):
            raise InputError(
                f"{target}: value {wrong[0]}, expected the {len(self.ids)} ids from "
                f"{self.ids.min()} to {self.ids.max()} of the data set"
            )

    def zip(self, path: str | Path) -> None:
        """Write all predictions to a zip, after their number and names were checked.

        Args:
            path: of the zip, which is there only when it is complete.

        Raises:
            InputError: a prediction is missing, or there is a file that belongs to no image.
        """
        missing = self.missing()
        if missing:
            raise InputError(
                f"{self.folder}: {len(self._targets) - len(missing)} predictions, expected "
                f"{len(self._targets)}; there is none for {missing[0]}"
            )
        extra = sorted(set(self.folder.iterdir()) - set(self._targets.values()))
        if extra:
            raise InputError(f"{extra[0]}: is the prediction of no image, expected no such file")
        part = Path(path).with_suffix(".part")
        # PNGs are compressed already.
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            for target in sorted(self._targets.values()):
                archive.write(target, target.name)
        os.replace(part, path)


def _is_whole(path: Path) -> bool:
    """Whether a PNG is there to its end, with the right checksums."""
    try:
        with path.open("rb") as file, open_image(file, 0) as png:
            png.verify()
    except (OSError, SyntaxError):
        return False
    return True


def _image_sizes(file_name: str) -> list[tuple[int, int]]:
    """(height, width) that predictions for an image may have, from its header."""
    with PathManager.open(file_name, "rb") as file, open_image(file, 0) as image:
        width, height = image.size
        sideways = image.getexif().get(ExifTags.Base.Orientation, 1) in _SIDEWAYS
    return [(width, height), (height, width)] if sideways else [(height, width)]
