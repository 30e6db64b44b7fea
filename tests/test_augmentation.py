import random

import cv2
import numpy as np
import pytest
from conftest import make_tiny_cfg
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform

from mcibi_d2 import InputError
from mcibi_d2.data.augmentation import (
    ColorJitterTransform,
    PaddedRotationTransform,
    PadToSize,
    RandomFlip,
    RandomRotation,
    RandomScale,
    RandomScaleCrop,
    ScaleCropTransform,
    SemSegInput,
    build_test_augmentation,
    build_train_augmentation,
)
from mcibi_d2.engine.setup import check_config

PAIRS = [[14, 15], [16, 17], [18, 19]]


def picture(height, width, seed=0):
    """A smooth random image, in which rounding is all that may differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (7, 7), 2)


def blocks(height, width, classes=20, seed=0):
    """Labels in 10 x 10 blocks."""
    labels = np.random.default_rng(seed).integers(
        0, classes, (-(-height // 10), -(-width // 10)), np.uint8
    )
    return labels.repeat(10, 0).repeat(10, 1)[:height, :width]


def names(cfg):
    return [type(x).__name__ for x in build_train_augmentation(cfg)]


# --- scale and crop


def test_random_scale_is_a_factor_of_the_image():
    for seed in range(20):
        np.random.seed(seed)
        transform = RandomScale(0.5, 2.0).get_transform(np.zeros((100, 40, 3)))
        assert 50 <= transform.new_h <= 200
        assert abs(transform.new_h / 100 - transform.new_w / 40) < 0.02


@pytest.mark.parametrize("height, width", [(100, 40), (40, 100), (60, 60)])
def test_random_scale_of_a_base(height, width):
    for seed in range(10):
        np.random.seed(seed)
        factor = np.random.uniform(0.5, 2.0)
        # As released: the longer side to the longer one of the base, the shorter to the shorter.
        fit = min(512 * factor / min(height, width), 2048 * factor / max(height, width))
        np.random.seed(seed)
        kept = RandomScale(0.5, 2.0, (512, 2048)).draw_size(height, width)
        assert kept == (round(height * fit), round(width * fit))
        np.random.seed(seed)
        taken = RandomScale(0.5, 2.0, (512, 2048), keep_ratio=False).draw_size(height, width)
        expected = (round(512 * factor), round(2048 * factor))
        assert taken == (expected if height <= width else expected[::-1])
        np.random.seed(seed)
        lip = RandomScale(0.75, 1.25, (520, 520), keep_ratio=False).draw_size(height, width)
        assert lip[0] == lip[1] and 390 <= lip[0] <= 650


@pytest.mark.parametrize("seed", range(12))
def test_scale_and_crop_in_one_are_detectron2s_two(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(60, 300, 2)
    image, labels = picture(height, width, seed), blocks(height, width, seed=seed)
    size = (90, 150)
    np.random.seed(seed)
    inputs = SemSegInput(image, sem_seg=labels)
    RandomScaleCrop(RandomScale(0.5, 2.0), size, 0.3, 255)(inputs)
    np.random.seed(seed)
    expected = T.AugInput(image, sem_seg=labels)
    T.AugmentationList(
        [RandomScale(0.5, 2.0), T.RandomCrop_CategoryAreaConstraint("absolute", size, 0.3, 255)]
    )(expected)
    assert inputs.image.shape == expected.image.shape
    assert np.abs(inputs.image.astype(int) - expected.image).max() <= 2
    assert np.abs(inputs.image.astype(int) - expected.image).mean() < 0.5
    # A nearest neighbour may be a tie.
    assert (inputs.sem_seg == expected.sem_seg).mean() > 0.98
    assert set(np.unique(inputs.sem_seg)) <= set(np.unique(labels))


def test_crops_are_anywhere():
    """Unlike those of Detectron2's FixedSizeCrop, which lie on the diagonal."""
    crop = RandomScaleCrop(None, (10, 10))
    image, labels = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    np.random.seed(0)
    starts = np.array([crop.get_transform(image, labels).start for _ in range(300)])
    assert starts.min() < 5 and starts.max() > 85
    assert abs(np.corrcoef(starts.T)[0, 1]) < 0.2


def test_category_limit_is_kept():
    labels = np.zeros((100, 400), np.uint8)
    labels[:, 300:] = 1
    image = np.zeros((100, 400, 3), np.uint8)
    shares = {}
    for limit in (0.75, 1.0):
        np.random.seed(0)
        crop = RandomScaleCrop(None, (100, 100), limit)
        found = [
            np.bincount(crop.get_transform(image, labels).apply_segmentation(labels).ravel())
            for _ in range(60)
        ]
        shares[limit] = np.mean([counts.max() / counts.sum() < 0.75 for counts in found])
    assert shares[1.0] < 0.4 < 0.6 < shares[0.75]


def test_ignored_pixels_do_not_count_in_the_limit():
    labels = np.full((20, 20), 255, np.uint8)
    labels[0, 0], labels[0, 1] = 3, 4
    crop = RandomScaleCrop(None, (20, 20), 0.75, 255)
    assert crop._is_mixed(labels)
    labels[0, 1] = 3
    assert not crop._is_mixed(labels)
    assert not crop._is_mixed(np.full((20, 20), 255, np.uint8))
    assert not crop._is_mixed(np.full((20, 20), 300, np.float32))


def test_points_follow_the_image():
    transform = ScaleCropTransform((50, 100), (100, 200), (10, 20), (40, 60))
    assert transform.apply_coords(np.array([[30.0, 20.0]])).tolist() == [[40.0, 30.0]]


# --- flip


def flipped(labels, pairs, image=None):
    image = np.zeros((*labels.shape, 3), np.uint8) if image is None else image
    inputs = SemSegInput(image, sem_seg=labels, flip_pairs=pairs)
    RandomFlip(prob=1.0)(inputs)
    return inputs


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_flip_exchanges_left_and_right(dtype):
    labels = np.array([[0, 14, 15, 18], [16, 17, 19, 255]], dtype)
    inputs = flipped(labels, PAIRS, np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    assert inputs.sem_seg.tolist() == [[19, 14, 15, 0], [255, 18, 16, 17]]
    assert inputs.image[0, 0].tolist() == [9, 10, 11]
    assert flipped(inputs.sem_seg, PAIRS).sem_seg.tolist() == labels.tolist()
    assert flipped(labels, []).sem_seg.tolist() == labels[:, ::-1].tolist()


def test_vertical_flip_exchanges_nothing():
    labels = np.array([[14, 15], [16, 17]], np.uint8)
    inputs = SemSegInput(np.zeros((2, 2, 3), np.uint8), sem_seg=labels, flip_pairs=PAIRS)
    RandomFlip(prob=1.0, horizontal=False, vertical=True)(inputs)
    assert inputs.sem_seg.tolist() == [[16, 17], [14, 15]]


def test_half_of_all_are_flipped():
    labels = np.array([[14, 0]], np.uint8)
    np.random.seed(0)
    found = []
    for _ in range(400):
        inputs = SemSegInput(np.zeros((1, 2, 3), np.uint8), sem_seg=labels, flip_pairs=PAIRS)
        RandomFlip()(inputs)
        found.append(tuple(inputs.sem_seg[0]))
    assert set(found) == {(14, 0), (0, 15)}
    assert 0.4 < np.mean([f == (0, 15) for f in found]) < 0.6


# --- rotation


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rotation_by_a_right_angle_is_exact(dtype):
    labels = blocks(40, 40).astype(dtype)
    image = picture(40, 40)
    transform = PaddedRotationTransform(40, 40, 90, (1, 2, 3), 255)
    assert np.array_equal(transform.apply_segmentation(labels), np.rot90(labels))
    assert np.array_equal(transform.apply_image(image), np.rot90(image))


def test_rotation_never_mixes_labels_and_pads_with_colour_and_ignore():
    labels, image = blocks(60, 90), np.full((60, 90, 3), 200, np.uint8)
    transform = PaddedRotationTransform(60, 90, 30, (124, 116, 104), 255)
    turned, colors = transform.apply_segmentation(labels), transform.apply_image(image)
    assert turned.shape == (60, 90) and set(np.unique(turned)) <= {*np.unique(labels), 255}
    # Pixel by pixel: where it comes from, and what is there.
    outside = 0
    cos, sin = np.cos(np.deg2rad(30)), np.sin(np.deg2rad(30))
    for y in range(0, 60, 7):
        for x in range(0, 90, 7):
            dx, dy = x - 44.5, y - 29.5
            from_x, from_y = 44.5 + cos * dx - sin * dy, 29.5 + sin * dx + cos * dy
            if not (-0.5 < from_x < 89.5 and -0.5 < from_y < 59.5):
                outside += 1
                if not (-2 < from_x < 91 and -2 < from_y < 61):
                    assert turned[y, x] == 255 and colors[y, x].tolist() == [124, 116, 104]
            elif abs(from_x % 1 - 0.5) > 0.05 and abs(from_y % 1 - 0.5) > 0.05:
                assert turned[y, x] == labels[round(from_y), round(from_x)]
    assert outside > 5


def test_rotation_is_drawn_as_often_and_as_far_as_told():
    np.random.seed(0)
    rotation = RandomRotation(30, 0.6, (0, 0, 0), 255)
    drawn = [rotation.get_transform(np.zeros((4, 4, 3))) for _ in range(500)]
    angles = np.array([t.angle for t in drawn if isinstance(t, T.RotationTransform)])
    assert 0.5 < len(angles) / 500 < 0.7
    assert -30 <= angles.min() < -25 and 25 < angles.max() <= 30


# --- colour, padding


@pytest.mark.parametrize("img_format", ["RGB", "BGR"])
def test_colour_is_detectron2s_bit_for_bit(img_format):
    image = picture(40, 50)
    ours, theirs = ColorJitterTransform(img_format), ColorAugSSDTransform(img_format)
    results = []
    for seed in range(40):
        random.seed(seed)
        expected = theirs.apply_image(image)
        random.seed(seed)
        result = ours.apply_image(image)
        assert np.array_equal(result, expected)
        results.append(result)
    assert len({r.tobytes() for r in results}) > 30


def test_padding_has_the_colour_and_no_label():
    inputs = SemSegInput(picture(5, 9), sem_seg=blocks(5, 9))
    before = inputs.image
    PadToSize((8, 7), (124, 116, 104), 255)(inputs)
    assert inputs.image.shape == (8, 9, 3) and np.array_equal(inputs.image[:5], before)
    assert (inputs.image[5:] == (124, 116, 104)).all() and (inputs.sem_seg[5:] == 255).all()


# --- the whole


def test_order_is_that_of_the_released_code(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "INPUT.ROTATION_DEGREES", "30")
    assert names(cfg) == [
        "RandomScaleCrop", "RandomFlip", "RandomRotation", "ColorJitter", "PadToSize"
    ]  # fmt: skip
    assert "RandomRotation" not in names(make_tiny_cfg(tmp_path))
    cfg = make_tiny_cfg(tmp_path, "INPUT.CROP.ENABLED", "False", "INPUT.RANDOM_FLIP", "none",
                        "INPUT.COLOR_AUG_SSD", "False")  # fmt: skip
    assert names(cfg) == ["RandomScale"]
    cfg.INPUT.SCALE_RANGE = (1.0, 1.0)
    assert names(cfg) == []
    cfg.INPUT.SCALE_BASE = (50, 50)
    assert names(cfg) == ["RandomScale"]


def test_image_and_labels_are_moved_alike(tmp_path):
    cfg = make_tiny_cfg(
        tmp_path, "INPUT.COLOR_AUG_SSD", "False", "INPUT.ROTATION_DEGREES", "20"
    )  # fmt: skip
    labels = np.random.default_rng(0).integers(0, 16, (8, 9)).repeat(10, 0).repeat(10, 1)
    image = np.repeat(labels[..., None], 3, axis=2).astype(np.uint8)
    for seed in range(8):
        np.random.seed(seed)
        inputs = SemSegInput(image, sem_seg=labels.astype(np.uint8))
        T.AugmentationList(build_train_augmentation(cfg))(inputs)
        valid = inputs.sem_seg != 255
        assert inputs.image.shape == (65, 97, 3) and valid.any()
        # Interpolation mixes the image at borders only.
        same = inputs.image[..., 0][valid] == inputs.sem_seg[valid]
        assert same.mean() > 0.5
        added = cv2.erode((~valid).astype(np.uint8), np.ones((5, 5))) > 0
        assert (inputs.image[added] == (124, 116, 104)).all()


@pytest.mark.parametrize(
    "options, size, expected",
    [
        (["MIN_SIZE_TEST", "0"], (30, 70), (30, 70)),
        (["MIN_SIZE_TEST", "60", "MAX_SIZE_TEST", "100"], (30, 40), (60, 80)),
        (["MIN_SIZE_TEST", "60", "MAX_SIZE_TEST", "100"], (30, 75), (40, 100)),
        (["TEST_RESIZE", "fixed"], (30, 70), (473, 473)),
        (["TEST_RESIZE", "fixed", "FIXED_SIZE_TEST", "(40, 50)"], (30, 70), (40, 50)),
        (["MIN_SIZE_TEST", "1024", "MAX_SIZE_TEST", "1000000"], (30, 70), (1024, 2389)),
    ],
)
def test_sizes_at_test_time(tmp_path, options, size, expected):
    options = [x if i % 2 else f"INPUT.{x}" for i, x in enumerate(options)]
    inputs = SemSegInput(picture(*size))
    T.AugmentationList(build_test_augmentation(make_tiny_cfg(tmp_path, *options)))(inputs)
    assert inputs.image.shape == (*expected, 3)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("TEST_RESIZE", "big", "expected one of shortest_edge, fixed"),
        ("TEST_RESIZE", "cityscapes", "shortest_edge with INPUT.MIN_SIZE_TEST 1024 and INPUT.MAX"),
        ("CROP.SIZE", "(3,)", r"expected \(height, width\)"),
        ("CROP.SIZE", "(0.5, 0.5)", r"expected \(height, width\) in pixels"),
        ("FIXED_SIZE_TEST", "(0, 473)", r"expected \(height, width\) in pixels"),
        ("SCALE_BASE", "(0, 520)", r"expected \(height, width\) in pixels"),
        ("SCALE_RANGE", "(2.0, 0.5)", r"expected \(smallest, largest\) factor"),
        ("SCALE_RANGE", "(0.0, 0.5)", r"expected \(smallest, largest\) factor"),
        ("SCALE_KEEP_RATIO", "False", r"but INPUT\.SCALE_BASE is \(0, 0\)"),
        ("ROTATION_DEGREES", "-3", r"expected a number of 0\.\.180"),
        ("ROTATION_PROB", "1.5", r"expected a number of 0\.\.1"),
        ("CROP.SINGLE_CATEGORY_MAX_AREA", "75.0", "expected a number above 0 and at most 1"),
        ("MIN_SIZE_TEST", "-1", r"expected a whole number of 0\.\."),
    ],
)
def test_impossible_values_are_said(tmp_path, key, value, message):
    cfg = make_tiny_cfg(tmp_path)
    cfg.merge_from_list([f"INPUT.{key}", value])
    with pytest.raises(InputError, match=rf"^INPUT\.{key} is .*{message}"):
        check_config(cfg)
