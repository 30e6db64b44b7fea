"""The size that test images are brought to: one rule for mapper, predictor and model."""

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from .errors import InputError

TEST_RESIZES = ("shortest_edge", "fixed")
WITHOUT_CITYSCAPES = (
    "cityscapes was shortest_edge with INPUT.MIN_SIZE_TEST 1024 and INPUT.MAX_SIZE_TEST 1000000"
)


def build_test_resize(cfg) -> T.Augmentation | None:
    """The test size by ``INPUT.TEST_RESIZE``; None: an image's own.

    ``shortest_edge``: the shorter side is ``INPUT.MIN_SIZE_TEST`` (0: the image's own size), the
    longer one at most ``INPUT.MAX_SIZE_TEST``. ``fixed``: ``INPUT.FIXED_SIZE_TEST``, whatever the
    image's ratio. OpenCV resizes with ``TEST.RELEASED``, else Pillow.
    """
    if cfg.INPUT.TEST_RESIZE not in TEST_RESIZES:
        raise InputError(
            f"INPUT.TEST_RESIZE is {cfg.INPUT.TEST_RESIZE!r}, expected one of "
            f"{', '.join(TEST_RESIZES)} ({WITHOUT_CITYSCAPES})"
        )
    if cfg.INPUT.TEST_RESIZE == "fixed":
        resize = T.Resize(tuple(cfg.INPUT.FIXED_SIZE_TEST))
    elif cfg.INPUT.MIN_SIZE_TEST == 0:
        return None
    else:
        shortest, longest = [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
        resize = T.ResizeShortestEdge(shortest, longest, "choice")
    return OpenCVResize(resize) if cfg.TEST.RELEASED else resize


class OpenCVResize(T.Augmentation):
    """Another augmentation's resizing, done by OpenCV: bilinear, with aliasing.

    Args:
        resize: whose transforms are Detectron2's ``ResizeTransform``.
    """

    def __init__(self, resize: T.Augmentation):
        super().__init__()
        self.resize = resize

    def get_transform(self, image: np.ndarray) -> Transform:
        """The resizing of ``image`` (H, W, C)."""
        return OpenCVResizeTransform(self.resize.get_transform(image))


class OpenCVResizeTransform(Transform):
    """See :class:`OpenCVResize`.

    Args:
        resize: to which size.
    """

    def __init__(self, resize: T.ResizeTransform):
        super().__init__()
        self.resize = resize
        self.new_h, self.new_w = resize.new_h, resize.new_w

    def apply_image(self, image: np.ndarray) -> np.ndarray:
        """Bilinear."""
        return cv2.resize(image, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Nearest neighbour."""
        return self.resize.apply_segmentation(segmentation)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Move (x, y) points."""
        return self.resize.apply_coords(coords)
