import cv2
import numpy as np
import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper, read_image
from mcibi_d2.data.image_file import MAX_PIXELS
from mcibi_d2.data.labels import read_labels

ORIENTATION = 0x0112


@pytest.fixture
def people():
    """A data set with left and right."""
    name = "test_people"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        stuff_classes=[str(i) for i in range(20)],
        ignore_label=255,
        flip_pairs=[[14, 15], [16, 17], [18, 19]],
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def picture(height=30, width=20):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (5, 5), 2)


def save_turned(path, array, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(array).save(path, exif=exif)


# --- kinds of images


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_images_are_read_as_detectron2_does(tmp_path, image_format):
    Image.fromarray(picture()).save(tmp_path / "x.jpg")
    Image.fromarray(picture()).quantize(64).save(tmp_path / "x.png")
    for file in (tmp_path / "x.jpg", tmp_path / "x.png"):
        expected = detection_utils.read_image(str(file), image_format)
        assert np.array_equal(read_image(str(file), image_format), expected)


def test_grayscale(tmp_path):
    Image.fromarray(picture()[..., 0]).save(tmp_path / "x.jpg", quality=100)
    array = read_image(str(tmp_path / "x.jpg"), "RGB")
    assert array.shape == (30, 20, 3) and (array == array[..., :1]).all()
    assert np.abs(array[..., 0].astype(int) - picture()[..., 0]).max() <= 3


def test_cmyk(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    array = read_image(str(tmp_path / "x.jpg"), "RGB")
    assert array.shape == (30, 20, 3)
    assert np.abs(array.astype(int) - picture()).mean() < 4


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_become_8(tmp_path, channels):
    small = picture() if channels == 3 else picture()[..., 0]
    cv2.imwrite(str(tmp_path / "x.png"), (small.astype(np.uint16) << 8) + 255)  # the upper is kept
    array = read_image(str(tmp_path / "x.png"), "BGR")
    assert array.dtype == np.uint8
    assert np.array_equal(array, small if channels == 3 else np.repeat(small[..., None], 3, 2))


def test_floating_point_images_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=r"x\.tif: cannot be read as an image \(floating-point"):
        read_image(str(tmp_path / "x.tif"), "RGB")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_truncated_images_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"x.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (100, 80, 3), np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=rf"x\.{suffix}: cannot be read as an image"):
        read_image(str(path), "RGB")


# --- EXIF


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_as_in_detectron2(tmp_path, orientation):
    save_turned(tmp_path / "x.png", picture(), orientation)
    expected = detection_utils.read_image(str(tmp_path / "x.png"), "RGB")
    assert expected.shape == ((30, 20, 3) if orientation < 5 else (20, 30, 3))
    assert np.array_equal(read_image(str(tmp_path / "x.png"), "RGB"), expected)


@pytest.mark.parametrize("kind", ["colors", "gray of 16 bits", "colors of 16 bits"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_tiffs_are_turned_once(tmp_path, orientation, kind):
    """Pillow turns them when it reads the pixels."""
    path, stored = tmp_path / "x.tif", picture()
    if kind == "colors of 16 bits":
        pyvips = pytest.importorskip("pyvips")
        deep = pyvips.Image.new_from_array(stored.astype(np.uint16) * 16, interpretation="rgb16")
        deep = deep.copy()
        deep.set_type(pyvips.GValue.gint_type, "orientation", orientation)
        deep.tiffsave(str(path))
    else:
        gray = kind == "gray of 16 bits"
        image = Image.fromarray(stored[..., 0].astype(np.uint16) * 16 if gray else stored)
        stored = np.repeat(stored[..., :1], 3, 2) if gray else stored
        image.save(path, tiffinfo={ORIENTATION: orientation})
    save_turned(tmp_path / "x.png", stored, orientation)
    expected = read_image(str(tmp_path / "x.png"), "RGB")
    for white_level in [4080] if "16" in kind else [0, 4080]:
        assert np.array_equal(read_image(str(path), "RGB", white_level=white_level), expected)
        # As stored, where the labels are.
        Image.fromarray(stored[..., 0]).save(tmp_path / "labels.png")
        found = read_image(str(path), "RGB", str(tmp_path / "labels.png"), white_level)
        assert np.array_equal(found, expected if orientation < 5 else stored)
    if "16" in kind:
        assert np.array_equal(read_image(str(path), "RGB"), expected // 16)


@pytest.mark.parametrize("fits", ["turned", "stored"])
def test_labels_decide_and_training_agrees_with_evaluation(tmp_path, people, fits):
    image = picture()
    save_turned(tmp_path / "x.png", image, 6)
    labels = np.random.default_rng(1).integers(0, 20, (30, 20), np.uint8)
    if fits == "turned":
        labels = np.rot90(labels, -1)
    Image.fromarray(labels).save(tmp_path / "y.png")
    cfg = make_tiny_cfg(
        tmp_path, "INPUT.SCALE_RANGE", "(1.0, 1.0)", "INPUT.RANDOM_FLIP", "none",
        "INPUT.COLOR_AUG_SSD", "False", "INPUT.CROP.ENABLED", "False",
    )  # fmt: skip
    record = {"file_name": str(tmp_path / "x.png"), "sem_seg_file_name": str(tmp_path / "y.png"),
              "dataset_name": people}  # fmt: skip
    train, test = SemSegMapper(cfg, True)(record), SemSegMapper(cfg, False)(record)
    expected = np.rot90(image, -1) if fits == "turned" else image
    assert np.array_equal(train["image"].permute(1, 2, 0), expected)
    assert np.array_equal(train["sem_seg"], labels)
    assert torch.equal(train["image"], test["image"])
    # The evaluator compares a prediction of height x width with the labels.
    size = test["height"], test["width"]
    assert read_labels(record["sem_seg_file_name"], people, size).shape == size == labels.shape


def test_without_labels_exif_decides(tmp_path, tiny_cfg):
    save_turned(tmp_path / "x.png", picture(), 6)
    for labels in ({}, {"sem_seg_file_name": str(tmp_path / "none.png")}):
        sample = SemSegMapper(tiny_cfg, False)({"file_name": str(tmp_path / "x.png"), **labels})
        assert (sample["height"], sample["width"]) == (20, 30)
        assert sample["image"].shape == (3, 20, 30)


# --- what a data set says


def test_flip_is_that_of_the_records_data_set(tmp_path, people):
    """Two data sets in one training: one has left and right, the other has not."""
    labels = np.full((65, 97), 14, np.uint8)
    Image.fromarray(labels).save(tmp_path / "y.png")
    Image.fromarray(np.zeros((65, 97, 3), np.uint8)).save(tmp_path / "x.png")
    cfg = make_tiny_cfg(tmp_path, "INPUT.SCALE_RANGE", "(1.0, 1.0)",
                        "DATASETS.TRAIN", f"('scenes_train', '{people}')")  # fmt: skip
    mapper = SemSegMapper(cfg, True)
    found = {}
    for name in (people, "scenes_train"):
        record = {"file_name": str(tmp_path / "x.png"), "dataset_name": name,
                  "sem_seg_file_name": str(tmp_path / "y.png")}  # fmt: skip
        found[name] = set()
        for seed in range(10):
            np.random.seed(seed)
            found[name] |= set(mapper(record)["sem_seg"].unique().tolist())
    assert found == {people: {14, 15}, "scenes_train": {14}}


def test_large_ignore_label_with_small_labels(tmp_path, tiny_cfg):
    name = "test_large_ignore"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(stuff_classes=["a", "b"], ignore_label=65535)
    tiny_cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 65535
    tiny_cfg.INPUT.ROTATION_DEGREES = 30
    tiny_cfg.INPUT.SCALE_RANGE = (0.5, 0.6)
    try:
        Image.fromarray(np.ones((80, 120), np.uint8)).save(tmp_path / "y.png")
        Image.fromarray(picture(80, 120)).save(tmp_path / "x.png")
        record = {"file_name": str(tmp_path / "x.png"), "dataset_name": name,
                  "sem_seg_file_name": str(tmp_path / "y.png")}  # fmt: skip
        for seed in range(5):
            np.random.seed(seed)
            sample = SemSegMapper(tiny_cfg, True)(record)
            assert set(sample["sem_seg"].unique().tolist()) == {1, 65535}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("size", [(20, 300), (300, 20), (64, 96), (200, 200), (1, 1)])
def test_batches_have_one_size(tmp_path, people, size):
    Image.fromarray(picture(*size)).save(tmp_path / "x.png")
    Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "y.png")
    cfg = make_tiny_cfg(tmp_path, "INPUT.ROTATION_DEGREES", "30")
    record = {"file_name": str(tmp_path / "x.png"), "sem_seg_file_name": str(tmp_path / "y.png"),
              "dataset_name": people}  # fmt: skip
    for seed in range(4):
        np.random.seed(seed)
        sample = SemSegMapper(cfg, True)(record)
        assert sample["image"].shape == (3, 65, 97) and sample["sem_seg"].shape == (65, 97)


# --- real files


def test_real_cihp_flips_are_its_own(real_data, people):
    folder = real_data / "samples/CIHP/Training"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    from mcibi_d2.data.augmentation import RandomFlip, SemSegInput

    pairs = MetadataCatalog.get(people).flip_pairs
    for path in sorted((folder / "Category_ids").glob("*.png")):
        labels = read_labels(str(path), people).astype(np.uint8)
        inputs = SemSegInput(
            np.zeros((*labels.shape, 3), np.uint8), sem_seg=labels, flip_pairs=pairs
        )
        RandomFlip(prob=1.0)(inputs)
        expected = np.asarray(Image.open(folder / "Category_rev_ids" / path.name))
        assert np.array_equal(inputs.sem_seg, expected)


def test_real_lip_grayscale_file(real_data):
    path = real_data / "samples/LIP/TrainVal_images/val_images/86_185913.jpg"
    if not path.is_file():
        pytest.skip(f"no {path}")
    assert Image.open(path).mode == "L"
    array = read_image(str(path), "RGB")
    assert array.shape == (377, 130, 3) and (array == array[..., :1]).all()


def write_larger_than(path, pixels):
    """A file of a few bytes whose image is large."""
    Image.new("1", (pixels // 10 + 1, 10)).save(path)


@pytest.mark.parametrize("pillows", [None, 10, 89478485])
def test_images_above_max_pixels_are_refused(tmp_path, monkeypatch, pillows):
    """By our limit alone, from the header, and Pillow's own stays as it was."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    write_larger_than(tmp_path / "x.png", 1000)
    with pytest.raises(InputError) as error:
        read_image(str(tmp_path / "x.png"), "RGB", max_pixels=1000)
    assert str(error.value) == (
        f"{tmp_path / 'x.png'}: 101 x 10 (width x height) are 1010 pixels, expected at most "
        f"INPUT.MAX_PIXELS 1000 (0: no limit)"
    )
    for most in (0, 1010, MAX_PIXELS):
        assert read_image(str(tmp_path / "x.png"), "RGB", max_pixels=most).shape == (10, 101, 3)
    assert pillows == Image.MAX_IMAGE_PIXELS


def test_default_is_pillows_limit_for_images_and_labels(tmp_path, recwarn):
    write_larger_than(tmp_path / "large.png", MAX_PIXELS)
    with pytest.raises(InputError, match=r"large\.png: .* at most INPUT\.MAX_PIXELS 178956970"):
        read_image(str(tmp_path / "large.png"), "RGB")
    with pytest.raises(InputError, match=r"large\.png: .* at most INPUT\.MAX_PIXELS 178956970"):
        read_labels(str(tmp_path / "large.png"), "scenes_val")
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]


def test_max_pixels_is_of_the_config(tmp_path):
    tiny_cfg = make_tiny_cfg(tmp_path)
    write_larger_than(tmp_path / "x.png", 1000)
    record = {"file_name": str(tmp_path / "x.png")}
    tiny_cfg.INPUT.MAX_PIXELS = 1000
    with pytest.raises(InputError, match="INPUT.MAX_PIXELS 1000"):
        SemSegMapper(tiny_cfg, False)(record)
    tiny_cfg.INPUT.MAX_PIXELS = 0
    assert SemSegMapper(tiny_cfg, False)(record)["width"] == 101
