"""From a data set record to what the model takes."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import IO

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from PIL import ExifTags, Image

from ..errors import InputError
from .augmentation import SemSegInput, build_test_augmentation, build_train_augmentation
from .classes import ignore_label
from .files import same_file
from .image_file import MAX_PIXELS, open_image
from .labels import is_array, label_values, read_label_file, read_labels
from .own import register_own_dataset

IMAGE_FORMATS = ("RGB", "BGR")
# Of EXIF's eight orientations, those that exchange height and width.
_SIDEWAYS = (5, 6, 7, 8)
# What brings each of them upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of TIFF: tags, bands by PhotometricInterpretation, and the ExtraSamples that are alpha.
_WIDTH, _LENGTH = 256, 257
_PHOTOMETRIC, _SAMPLES_PER_PIXEL, _EXTRA_SAMPLES = 262, 277, 338
_BITS_PER_SAMPLE, _PLANAR = 258, 284
_COLOR_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_ALPHA = ((1,), (2,))


def read_image(
    file_name: str,
    image_format: str,
    label_file: str | None = None,
    white_level: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Read an image as Detectron2 does, with what it leaves open.

    Any number of channels and colour space that Pillow knows (grayscale, CMYK, palette, alpha)
    becomes three channels; a TIFF's bands beyond these are refused. 16 bits become the upper 8 of
    them, or, with a white level W, the 8 bits nearest to 255 min(value, W) / W. An image is turned
    as its EXIF tag says, unless its labels have the size of the image as it is stored. (Where both
    have the same size, the labels are taken to fit the turned one.)

    Args:
        file_name: any image that Pillow reads.
        image_format: ``RGB`` or ``BGR``.
        label_file: of the image's labels. Only the size in its header is looked at, and only if
            the image is to be turned sideways.
        white_level: of 16 bits, the value that becomes 255 (``INPUT.WHITE_LEVEL``); 0: 65535.
        max_pixels: a larger image is refused (``INPUT.MAX_PIXELS``); 0: none is.

    Returns:
        (H, W, 3) uint8.

    Raises:
        InputError: naming the file.
    """
    with (
        errors_named(file_name),
        PathManager.open(file_name, "rb") as file,
        open_image(file, max_pixels) as image,
    ):
        return image_array(image, image_format, label_file, white_level, file)


@contextmanager
def errors_named(file_name: str) -> Iterator[None]:
    """Turn any error of a block that reads an image file into an ``InputError`` that names it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{file_name}: {error}") from error
    # Pillow's decoders raise whatever their libraries do.
    except Exception as error:
        raise InputError(f"{file_name}: cannot be read as an image ({error})") from error


def image_array(
    image: Image.Image,
    image_format: str,
    label_file: str | None = None,
    white_level: int = 0,
    file: IO[bytes] | None = None,
) -> np.ndarray:
    """What :func:`read_image` gives for an image that Pillow has opened.

    Args:
        image: whose pixels may not be read yet.
        image_format: see :func:`read_image`.
        label_file: see :func:`read_image`.
        white_level: see :func:`read_image`.
        file: of the image. Without it colors of 16 bits are the upper 8 of them, as Pillow has it.

    Raises:
        Exception: a ``ValueError`` that says what is wrong, or whatever Pillow's decoders raise.
    """
    image = upright_image(image, label_file, white_level, file)
    return np.ascontiguousarray(detection_utils.convert_PIL_to_numpy(image, image_format))


def upright_image(
    image: Image.Image,
    label_file: str | None = None,
    white_level: int = 0,
    file: IO[bytes] | None = None,
) -> Image.Image:
    """The image of :func:`image_array` before it gets its three channels: of 8 bits, and turned."""
    check_bands(image)
    deep = bool(white_level) and is_deep(image) and bool(file or image.mode.startswith("I"))
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    as_stored = orientation in _SIDEWAYS and size_in_header(label_file) == _stored_size(image)
    colors = deep and not image.mode.startswith("I")
    values = _deep_values(file, image) if deep else None
    turned = image.format == "TIFF"  # by OpenCV, which reads colors of 16 bits
    if not colors:
        image.load()
        # Pillow turns TIFFs by itself, too, from some release on, and takes the tag away.
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != orientation
    if deep:
        image = Image.fromarray(white_table(white_level)[values])
    if orientation in TURNS and turned == as_stored:
        back = {6: 8, 8: 6}.get(orientation, orientation)
        image = image.transpose(TURNS[back if turned else orientation])
    if image.mode.startswith("I"):
        image = _upper_8_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point values, expected 8 or 16 bits")
    return image


def check_bands(image: Image.Image) -> None:
    """Of a TIFF, what Pillow would take for colours or alpha though it is not."""
    tags = getattr(image, "tag_v2", {})
    samples = tags.get(_SAMPLES_PER_PIXEL, 1)
    extra = samples - _COLOR_BANDS.get(tags.get(_PHOTOMETRIC), samples)
    kinds = tuple(tags.get(_EXTRA_SAMPLES, ()))
    bits = int(np.max(tags.get(_BITS_PER_SAMPLE, 8)))
    if samples > 1 and tags.get(_PLANAR) == 2 and bits > 8:
        raise ValueError(
            f"it has bands of {bits} bits, one after the other, which Pillow and OpenCV mix up, "
            f"expected the bands of each pixel together; `gdal_translate -co INTERLEAVE=PIXEL` "
            f"stores them so"
        )
    if extra > 0 and not (extra == 1 and kinds in _ALPHA):
        raise ValueError(
            f"it has {samples} bands, and the TIFF does not say that the last {extra} are alpha "
            f"(its tag ExtraSamples is {kinds or 'missing'}), expected {samples - extra}; "
            f"`gdal_translate -b 1 -b 2 -b 3` takes the first three"
        )


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of what is in a file; of a TIFF, Pillow may have turned it already."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_WIDTH, image.width), tags.get(_LENGTH, image.height)


def is_deep(image: Image.Image) -> bool:
    """Whether a file has 16 bits in each channel, of which Pillow gives the upper 8 of colors.

    It is told from how the pixels are stored, which Pillow forgets when it has read them.
    """
    arguments = image.tile[0][3] if image.tile else ""
    if image.format == "PPM" and not isinstance(arguments, str):
        return arguments[-1] == 65535  # less are spread over the 8 bits
    form = arguments if isinstance(arguments, str) else arguments[0]
    return image.mode.startswith("I") or ";16" in str(form)


def _deep_values(file: IO[bytes], image: Image.Image) -> np.ndarray:
    """The values of an image of 16 bits: (H, W), of colors (H, W, 3) as RGB; alpha is left out."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"values {values.min()}..{values.max()}, expected 8 or 16 bits")
        return values
    file.seek(0)
    values = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise ValueError("16 bits in a form that OpenCV does not read")
    return values if values.ndim == 2 else values[..., 2::-1]


@cache
def white_table(white_level: int) -> np.ndarray:
    """The 8 bits that each value of 16 becomes, (65536,) uint8."""
    values = np.minimum(np.arange(1 << 16), white_level)
    return (values * 255 / white_level).round().astype(np.uint8)


def bright_values(file_name: str) -> tuple[int, int]:
    """Of an image of 16 bits, its highest value, and the one that 999 of 1000 do not exceed.

    Twice 0 of others, and of what cannot be read.
    """
    try:
        with PathManager.open(file_name, "rb") as file, open_image(file, 0) as image:
            if not is_deep(image):
                return 0, 0
            values = _deep_values(file, image).reshape(-1)
            few = len(values) // 1000 + 1
            return int(values.max()), int(np.partition(values, -few)[-few])
    except Exception:
        return 0, 0  # whoever reads the image will say so


def fitting_white_level(highest: int) -> int:
    """The white level for images whose highest value is this: that of 9, 10, 12 or 14 bits; else 0.

    Values of half the range and more fill 16 bits well enough.
    """
    return (1 << highest.bit_length()) - 1 if 0 < highest < 1 << 15 else 0


def say_dark(values: Iterable[tuple[int, int]]) -> list[str]:
    """A sentence if some images of 16 bits are nearly black, though their highest value is not.

    So it is where images of 12 bits are beside others of 16, or have a few faulty pixels.

    Args:
        values: of each image, :func:`bright_values`.
    """
    deep = [pair for pair in values if pair[0]]
    dark = [usual for _, usual in deep if usual < 1 << 13]
    if not dark or fitting_white_level(max(highest for highest, _ in deep)):
        return []
    return [
        f"{len(dark)} of {len(deep)} images of 16 bits have values up to {max(dark):,} alone in "
        f"nearly all of their pixels, of 65,535: too dark. INPUT.WHITE_LEVEL "
        f"{fitting_white_level(max(*dark, 1))} fits them, and makes white what is "
        f"above it."
    ]


def size_in_header(file_name: str | None) -> tuple[int, int] | None:
    """(width, height), None if there is no such file or it is no image."""
    try:
        if is_array(file_name):
            return read_label_file(file_name, label_values).shape[::-1]
        with PathManager.open(file_name, "rb") as file, open_image(file, 0) as image:
            return image.size
    except Exception:
        return None  # whoever reads the labels will say so


def _upper_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"values {values.min()}..{values.max()}, expected 8 or 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


class SemSegMapper:
    """Read an image and, in training, its labels; augment both.

    Args:
        is_train: whether labels are read. At test time they are the evaluator's business.
        augmentations: applied to image and labels alike.
        image_format: ``RGB`` or ``BGR``.
        dataset_name: whose metadata (label table, ``flip_pairs``) hold for records that do not
            name their data set (key ``dataset_name``).
        own_config: whose ``DATASETS.OWN`` worker processes register; None for none.
        white_level: see :func:`read_image`.
        max_pixels: see :func:`read_image`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation],
        image_format: str = "RGB",
        dataset_name: str | None = None,
        own_config: CfgNode | None = None,
        white_level: int = 0,
        max_pixels: int = MAX_PIXELS,
    ):
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.dataset_name = dataset_name
        self.own_config = own_config
        self.white_level = white_level
        self.max_pixels = max_pixels

    def __setstate__(self, state: dict) -> None:
        """Register the own data set in a worker process that was started, not forked."""
        self.__dict__.update(state)
        if self.own_config is not None:
            register_own_dataset(self.own_config)

    @classmethod
    def from_config(cls, cfg, is_train: bool) -> dict:
        """Arguments of ``__init__`` from a config."""
        return {
            "is_train": is_train,
            "augmentations": build_train_augmentation(cfg)
            if is_train
            else build_test_augmentation(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "dataset_name": cfg.DATASETS.TRAIN[0] if is_train else None,
            "own_config": cfg if cfg.DATASETS.OWN.NAME else None,
            "white_level": cfg.INPUT.WHITE_LEVEL,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
        }

    def __call__(self, record: dict) -> dict:
        """Map one record.

        Args:
            record: ``file_name``; in training ``sem_seg_file_name`` too.

        Returns:
            The record with ``image`` (3, H, W) uint8 tensor, ``height`` and ``width`` of the file,
            and in training ``sem_seg`` (H, W) long tensor.

        Raises:
            InputError: naming the file that cannot be read or does not fit.
        """
        record = copy.copy(record)
        label_file = record.pop("sem_seg_file_name", None)
        if label_file is not None and same_file(record["file_name"], label_file):
            raise InputError(
                f"{record['file_name']}: is its own label ({label_file} is the same file), "
                f"expected a label file beside each image"
            )
        image = read_image(
            record["file_name"], self.image_format, label_file, self.white_level, self.max_pixels
        )
        record["height"], record["width"] = image.shape[:2]
        if not self.is_train:
            inputs = SemSegInput(image)
        elif label_file is None:
            raise InputError(
                f"{record['file_name']}: its record has no sem_seg_file_name, which training needs"
            )
        else:
            inputs = self.with_labels(image, label_file, record.get("dataset_name"))
        self.augmentations(inputs)
        record.update(self.to_tensors(inputs))
        return record

    def with_labels(
        self, image: np.ndarray, label_file: str, dataset_name: str | None = None
    ) -> SemSegInput:
        """An image and its labels, to be augmented.

        Args:
            image: (H, W, 3) uint8.
            label_file: of the image's size.
            dataset_name: default: that of the mapper.
        """
        name = dataset_name or self.dataset_name
        metadata = MetadataCatalog.get(name)
        labels = read_labels(label_file, name, image.shape[:2])
        # Detectron2 resizes label maps of these two types only.
        largest = max(labels.max(), ignore_label(metadata))
        labels = labels.astype(np.uint8 if largest < 256 else np.float32)
        return SemSegInput(image, sem_seg=labels, flip_pairs=metadata.get("flip_pairs", ()))

    @staticmethod
    def to_tensors(inputs: SemSegInput) -> dict[str, torch.Tensor]:
        """``image`` and, where there are labels, ``sem_seg``, as the model takes them."""
        image = np.ascontiguousarray(inputs.image.transpose(2, 0, 1))
        tensors = {"image": torch.from_numpy(image)}
        if inputs.sem_seg is not None:
            tensors["sem_seg"] = torch.from_numpy(inputs.sem_seg.astype(np.int64, order="C"))
        return tensors
