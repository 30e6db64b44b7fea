"""Training-time augmentation, in Detectron2's format."""

import numpy as np
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from fvcore.transforms.transform import Transform


class RandomScale(T.Augmentation):
    """Resize by a random factor of the image's own size, keeping its ratio.

    Args:
        low: smallest factor.
        high: largest factor; the factor is uniform between the two.
    """

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low = low
        self.high = high

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the factor for ``image`` (H, W, C)."""
        height, width = image.shape[:2]
        factor = np.random.uniform(self.low, self.high)
        return T.ResizeTransform(
            height, width, max(1, round(height * factor)), max(1, round(width * factor))
        )


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
        return ColorAugSSDTransform(self.img_format)


def build_train_augmentation(cfg) -> list[T.Augmentation]:
    """Scale, crop, flip, colour (paper, section 4.1), as the ``INPUT`` keys say.

    The result has the size ``INPUT.CROP.SIZE``, padded where the scaled image is smaller.
    """
    ignore_label = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE
    augmentations: list[T.Augmentation] = []
    if tuple(cfg.INPUT.SCALE_RANGE) != (1.0, 1.0):
        augmentations.append(RandomScale(*cfg.INPUT.SCALE_RANGE))
    if cfg.INPUT.CROP.ENABLED:
        size = tuple(cfg.INPUT.CROP.SIZE)
        if cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA < 1.0:
            augmentations.append(
                T.RandomCrop_CategoryAreaConstraint(
                    "absolute", size, cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA, ignore_label
                )
            )
        # Pads what is too small, crops what is too large.
        augmentations.append(
            T.FixedSizeCrop(size, pad=True, pad_value=128.0, seg_pad_value=ignore_label)
        )
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(
            T.RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    if cfg.INPUT.COLOR_AUG_SSD:
        augmentations.append(ColorJitter(cfg.INPUT.FORMAT))
    return augmentations


def build_test_augmentation(cfg) -> list[T.Augmentation]:
    """The test size: shortest edge ``INPUT.MIN_SIZE_TEST`` (0: the image's own size)."""
    size = cfg.INPUT.MIN_SIZE_TEST
    if size == 0:
        return []
    return [T.ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST, "choice")]
