"""Augmentation in Detectron2's format, with labels that stay labels.

The order of training is that of the released code: scale, crop, flip, rotation, colour, padding.
"""

import random
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from fvcore.transforms.transform import HFlipTransform, NoOpTransform, PadTransform, Transform
from PIL import Image

from ..input_size import build_test_resize

# What build_train_augmentation knows of INPUT.RANDOM_FLIP, and of INPUT.CROP.TYPE.
FLIPS = ("none", "horizontal", "vertical")
CROP_TYPES = ("absolute",)


class SemSegInput(T.AugInput):
    """What is augmented: Detectron2's ``AugInput``, and what its data set says about flipping.

    Args:
        image: (H, W, 3) uint8.
        sem_seg: (H, W) class ids as uint8 or float32, the types that Detectron2 resizes.
        flip_pairs: pairs of class ids that a mirror exchanges, such as left and right arm.
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        sem_seg: np.ndarray | None = None,
        flip_pairs: Sequence[Sequence[int]] = (),
    ):
        super().__init__(image, sem_seg=sem_seg)
        self.flip_pairs = flip_pairs


class ScaleCropTransform(Transform):
    """Resize to one size, then cut a window out, without computing what is cut away.

    The same as Detectron2's ``ResizeTransform`` and ``CropTransform`` but for the rounding of
    pixels to 8 bits: Pillow resizes the part of the image that the window shows.

    Args:
        size: (H, W) of the image.
        new_size: (H, W) that it is resized to.
        start: (y, x) of the window's upper left corner in the resized image.
        window: (H, W) of the window.
    """

    def __init__(
        self,
        size: tuple[int, int],
        new_size: tuple[int, int],
        start: tuple[int, int],
        window: tuple[int, int],
    ):
        super().__init__()
        self.size = size
        self.new_size = new_size
        self.start = start
        self.window = window

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Bilinear, without aliasing, as Pillow and Detectron2 do it."""
        return self._apply(image, Image.Resampling.BILINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """The nearest label."""
        return self._apply(segmentation, Image.Resampling.NEAREST)

    def _apply(self, array: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        (y, x), (height, width) = self.start, self.window
        if self.new_size == self.size:
            return array[y : y + height, x : x + width]
        down, right = (old / new for old, new in zip(self.size, self.new_size, strict=True))
        box = (
            x * right,
            y * down,
            min((x + width) * right, self.size[1]),
            min((y + height) * down, self.size[0]),
        )
        return np.asarray(Image.fromarray(array).resize((width, height), resample, box=box))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Move (x, y) points."""
        factors = [new / old for old, new in zip(self.size, self.new_size, strict=True)]
        return coords * factors[::-1] - self.start[::-1]


class RandomScale(T.Augmentation):
    """Resize by a random factor.

    Args:
        low: smallest factor.
        high: largest factor; the factor is uniform between the two.
        base: (height, width) that the factor scales, turned for an image that is higher than wide;
            None: the image's own size.
        keep_ratio: with ``base``, whether the image keeps its ratio and fits into the scaled base,
            or takes its size.
    """

    def __init__(
        self,
        low: float,
        high: float,
        base: tuple[int, int] | None = None,
        keep_ratio: bool = True,
    ):
        super().__init__()
        self.low = low
        self.high = high
        self.base = base
        self.keep_ratio = keep_ratio

    def draw_size(self, height: int, width: int) -> tuple[int, int]:
        """Draw the new (height, width) of an image."""
        factor = np.random.uniform(self.low, self.high)
        if self.base is None:
            new_size = height * factor, width * factor
        else:
            short, long = (side * factor for side in sorted(self.base))
            new_size = (short, long) if height <= width else (long, short)
            if self.keep_ratio:
                fit = min(new_size[0] / height, new_size[1] / width)
                new_size = height * fit, width * fit
        return max(1, round(new_size[0])), max(1, round(new_size[1]))

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the factor for ``image`` (H, W, C)."""
        height, width = image.shape[:2]
        return T.ResizeTransform(height, width, *self.draw_size(height, width))


class RandomScaleCrop(T.Augmentation):
    """:class:`RandomScale`, then a random window of at most a size.

    The two in one, since an enlarged image is mostly cut away. The rule of the window is that of
    Detectron2's ``RandomCrop_CategoryAreaConstraint``.

    Args:
        scale: None: keep the image's size.
        size: (height, width); an image that is smaller is left whole.
        max_area: take the first of ten windows in which there are two classes and none has more
            than this share of the labelled pixels, else the tenth. 1.0: the first.
        ignore_label: of pixels that do not count.
    """

    def __init__(
        self,
        scale: RandomScale | None,
        size: tuple[int, int],
        max_area: float = 1.0,
        ignore_label: int = 255,
    ):
        super().__init__()
        self.scale = scale
        self.size = size
        self.max_area = max_area
        self.ignore_label = ignore_label

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray) -> Transform:
        """Draw factor and window for ``image`` (H, W, C) with labels (H, W)."""
        size = tuple(image.shape[:2])
        new_size = self.scale.draw_size(*size) if self.scale else size
        window = tuple(min(pair) for pair in zip(self.size, new_size, strict=True))
        for _ in range(10 if self.max_area < 1 else 1):
            start = tuple(
                np.random.randint(whole - part + 1)
                for whole, part in zip(new_size, window, strict=True)
            )
            transform = ScaleCropTransform(size, new_size, start, window)
            if self.max_area >= 1 or self._is_mixed(transform.apply_segmentation(sem_seg)):
                break
        return transform

    def _is_mixed(self, labels: np.ndarray) -> bool:
        counts = np.bincount(labels.astype(np.intp, copy=False).ravel())
        counts[self.ignore_label : self.ignore_label + 1] = 0
        return np.count_nonzero(counts) > 1 and counts.max() < counts.sum() * self.max_area


class FlipPairsTransform(HFlipTransform):
    """Mirror, and exchange the labels of left and right.

    Args:
        width: of the image.
        pairs: of class ids.
    """

    def __init__(self, width: int, pairs: Sequence[Sequence[int]]):
        super().__init__(width)
        self.pairs = pairs

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """The mirrored labels, exchanged."""
        mirrored = super().apply_segmentation(segmentation)
        exchanged = mirrored.copy()
        for left, right in self.pairs:
            exchanged[mirrored == left] = right
            exchanged[mirrored == right] = left
        return exchanged


class RandomFlip(T.RandomFlip):
    """Detectron2's, which exchanges the ``flip_pairs`` of a :class:`SemSegInput` when mirroring."""

    def __call__(self, aug_input: T.AugInput) -> Transform:
        """Flip in place; returns what was done."""
        transform = self.get_transform(aug_input.image)
        pairs = getattr(aug_input, "flip_pairs", ())
        if pairs and isinstance(transform, HFlipTransform):
            transform = FlipPairsTransform(transform.width, pairs)
        aug_input.transform(transform)
        return transform


class PaddedRotationTransform(T.RotationTransform):
    """Rotate in a frame of the same size; what comes into the frame has a colour and no label.

    Args:
        height: of the image.
        width: of the image.
        angle: in degrees, counter-clockwise.
        color: per channel.
        ignore_label: of the pixels that come into the frame.
    """

    def __init__(
        self, height: int, width: int, angle: float, color: Sequence[int], ignore_label: int
    ):
        super().__init__(height, width, angle, expand=False)
        self.color = color
        self.ignore_label = ignore_label

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Bilinear."""
        return self._apply(image, cv2.INTER_LINEAR, self.color)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """The nearest label."""
        return self._apply(segmentation, cv2.INTER_NEAREST, self.ignore_label)

    def _apply(self, array: np.ndarray, interpolation: int, border) -> np.ndarray:
        size = (self.bound_w, self.bound_h)
        return cv2.warpAffine(
            array, self.rm_image, size, flags=interpolation, borderValue=border
        )  # fmt: skip


class RandomRotation(T.Augmentation):
    """Rotate by a random angle, sometimes.

    Args:
        degrees: the angle is uniform between minus and plus this.
        prob: of rotating.
        color: per channel, of the pixels that come into the frame.
        ignore_label: their label.
    """

    def __init__(self, degrees: float, prob: float, color: Sequence[int], ignore_label: int):
        super().__init__()
        self.degrees = degrees
        self.prob = prob
        self.color = color
        self.ignore_label = ignore_label

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the angle for ``image`` (H, W, C)."""
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        angle = np.random.uniform(-self.degrees, self.degrees)
        return PaddedRotationTransform(*image.shape[:2], angle, self.color, self.ignore_label)


class ColorJitterTransform(ColorAugSSDTransform):
    """Detectron2's, bit for bit, in less than half its time: by tables of the 256 values.

    Args:
        img_format: ``RGB`` or ``BGR``, of the image that it gets.
    """

    def __init__(self, img_format: str):
        super().__init__("BGR")
        self.swap = img_format == "RGB"

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Draw what is done, from ``random``, and do it."""
        if not self.swap:
            return super().apply_image(image)
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        return cv2.cvtColor(super().apply_image(image), cv2.COLOR_BGR2RGB)

    def convert(self, image: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        """``image`` * ``alpha`` + ``beta``, in 0..255."""
        return cv2.LUT(image, super().convert(np.arange(256), alpha, beta))

    def hue(self, image: np.ndarray) -> np.ndarray:
        """Perhaps turn the hue, of 180 steps."""
        if not random.randrange(2):
            return image
        turned = (np.arange(256) + random.randint(-self.hue_delta, self.hue_delta)) % 180
        image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
        image[:, :, 0] = cv2.LUT(image[:, :, 0], turned.astype(np.uint8))
        return cv2.cvtColor(image, cv2.COLOR_HSV2BGR)


class ColorJitter(T.Augmentation):
    """Random brightness, contrast, saturation and hue, as in SSD.

    Args:
        img_format: ``RGB`` or ``BGR``, of the image that it gets.
    """

    def __init__(self, img_format: str):
        super().__init__()
        self.img_format = img_format

    def get_transform(self, image: np.ndarray) -> Transform:
        """The transform draws when it is applied; ``image`` is not looked at."""
        return ColorJitterTransform(self.img_format)


class ColorPadTransform(PadTransform):
    """fvcore's padding, with a colour.

    Args:
        bottom: rows to add.
        right: columns to add.
        color: per channel.
        ignore_label: of what is added.
    """

    def __init__(self, bottom: int, right: int, color: Sequence[int], ignore_label: int):
        super().__init__(0, 0, right, bottom, seg_pad_value=ignore_label)
        self.color = color

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Add rows and columns of the colour."""
        return cv2.copyMakeBorder(
            image, 0, self.y1, 0, self.x1, cv2.BORDER_CONSTANT, value=self.color
        )


class PadToSize(T.Augmentation):
    """Pad what is smaller than a size, on the right and at the bottom.

    Args:
        size: (height, width).
        color: per channel, of what is added.
        ignore_label: its label.
    """

    def __init__(self, size: tuple[int, int], color: Sequence[int], ignore_label: int):
        super().__init__()
        self.size = size
        self.color = color
        self.ignore_label = ignore_label

    def get_transform(self, image: np.ndarray) -> Transform:
        """What ``image`` (H, W, C) lacks."""
        bottom, right = (
            max(0, wanted - have) for wanted, have in zip(self.size, image.shape[:2], strict=True)
        )
        if bottom == right == 0:
            return NoOpTransform()
        return ColorPadTransform(bottom, right, self.color, self.ignore_label)


def build_train_augmentation(cfg) -> list[T.Augmentation]:
    """Scale, crop, flip, rotation, colour, padding, as the ``INPUT`` keys say.

    The result has the size ``INPUT.CROP.SIZE``. What is added by rotation and padding has the mean
    colour and no label.
    """
    ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    color = tuple(round(mean) for mean in cfg.MODEL.PIXEL_MEAN)
    size = tuple(cfg.INPUT.CROP.SIZE)
    augmentations: list[T.Augmentation] = []
    scale = None
    base = tuple(cfg.INPUT.SCALE_BASE)
    if tuple(cfg.INPUT.SCALE_RANGE) != (1.0, 1.0) or base != (0, 0):
        scale = RandomScale(
            *cfg.INPUT.SCALE_RANGE, base if base != (0, 0) else None, cfg.INPUT.SCALE_KEEP_RATIO
        )
    if cfg.INPUT.CROP.ENABLED:
        max_area = cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA
        augmentations.append(RandomScaleCrop(scale, size, max_area, ignore_label))
    elif scale:
        augmentations.append(scale)
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(
            RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    if cfg.INPUT.ROTATION_DEGREES > 0:
        augmentations.append(
            RandomRotation(cfg.INPUT.ROTATION_DEGREES, cfg.INPUT.ROTATION_PROB, color, ignore_label)
        )
    if cfg.INPUT.COLOR_AUG_SSD:
        augmentations.append(ColorJitter(cfg.INPUT.FORMAT))
    if cfg.INPUT.CROP.ENABLED:
        augmentations.append(PadToSize(size, color, ignore_label))
    return augmentations


def build_test_augmentation(cfg) -> list[T.Augmentation]:
    """The resizing of :func:`~mcibi_d2.input_size.build_test_resize`, if there is one."""
    resize = build_test_resize(cfg)
    return [] if resize is None else [resize]
