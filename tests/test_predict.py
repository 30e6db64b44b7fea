"""The predictor: from configs and from runs, of one image and of many, and what it refuses."""

import json
import logging
import shutil
import struct

import cv2
import numpy as np
import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.data import read_image, scenes
from mcibi_d2.data.classes import Classes, palette
from mcibi_d2.engine import Trainer
from mcibi_d2.engine.config_check import check_config
from mcibi_d2.evaluation import SemSegEvaluator
from mcibi_d2.predict import Predictor


def picture(number=0):
    """A scene as OpenCV would read it."""
    return np.ascontiguousarray(scenes.render("val", number)[0][..., ::-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """OUTPUT_DIR of a short training on a data set that is not registered any more."""
    folder = tmp_path_factory.mktemp("there") / "run"
    records = DatasetCatalog.get("scenes_train")[:4]
    DatasetCatalog.register("test_away", lambda: records)
    scenes_metadata = MetadataCatalog.get("scenes_train")
    MetadataCatalog.get("test_away").set(
        stuff_classes=[f"my {name}" for name in scenes_metadata.stuff_classes]
    )
    folder.mkdir()
    cfg = make_tiny_cfg(
        folder, "DATASETS.TRAIN", "('test_away',)", "SOLVER.MAX_ITER", "1", "TEST.VIS_IMAGES", "0",
        "INPUT.MIN_SIZE_TEST", "0", "MODEL.TIMM.NAME", "test_resnet",
    )  # fmt: skip
    try:
        trainer = Trainer(cfg)
        trainer.train()
    finally:
        DatasetCatalog.remove("test_away")
        MetadataCatalog.remove("test_away")
    cfg.MODEL.TIMM.PRETRAINED = True  # nothing is downloaded for a model that has its weights
    cfg.DATASETS.TEST = ("test_away_too",)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """The folder somewhere else."""
    return shutil.copytree(trained, tmp_path / "run")


def test_a_run_needs_its_folder_alone(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    predictor = Predictor.from_run(run)
    names = [f"my {name}" for name in MetadataCatalog.get("scenes_val").stuff_classes]
    assert predictor.classes.names == predictor.metadata.stuff_classes == names
    assert predictor.classes.colors == palette(len(names))
    found = predictor(picture())
    assert found.labels.shape == found.overlay.shape[:2] == picture().shape[:2]
    drawn = Visualizer(picture(), predictor.metadata).draw_sem_seg(torch.from_numpy(found.labels))
    assert drawn.get_image().shape == picture().shape
    assert "test_away" not in DatasetCatalog
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # nothing is written


def test_which_weights_a_run_gives(run):
    def layer(predictor):
        return predictor.model.sem_seg_head.h2[-1].bias[0].item()

    last = torch.load(run / "model_final.pth", weights_only=True)
    for name, value in (("model_best.pth", 2.0), ("mine.pth", 3.0), ("model_0000000.pth", 4.0)):
        last["model"]["sem_seg_head.h2.4.bias"][:] = value
        torch.save(last, run / name)
    assert layer(Predictor.from_run(run)) == 2
    assert layer(Predictor.from_run(run, "mine.pth")) == 3
    (run / "model_best.pth").unlink()
    assert layer(Predictor.from_run(str(run))) not in (2, 3, 4)
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").unlink()
    assert layer(Predictor.from_run(run)) == 4
    (run / "model_0000000.pth").unlink()
    with pytest.raises(InputError, match=r"run: holds no weights, expected model_best\.pth, model"):
        Predictor.from_run(run)
    with pytest.raises(InputError, match=r"run/other\.pth: no such file"):
        Predictor.from_run(run, "other.pth")


def test_what_a_run_lacks_is_one_sentence(run):
    with pytest.raises(InputError, match=r"nowhere: no such folder, expected OUTPUT_DIR of a run"):
        Predictor.from_run(run / "nowhere")
    (run / "classes.json").write_text('{"stuff_classes": ["a", "b"]}')
    with pytest.raises(InputError, match=r"classes\.json: has 2 stuff_classes, expected the 16"):
        Predictor.from_run(run)
    for broken in ("{", "[]", '{"stuff_classes": 3}', '{"stuff_classes": [1]}'):
        (run / "classes.json").write_text(broken)
        with pytest.raises(InputError, match=r"classes\.json: cannot be read as the classes of a"):
            Predictor.from_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"run/config\.yaml: no such file, expected the config"):
        Predictor.from_run(run)


def test_an_older_run_without_its_classes(run, caplog):
    (run / "classes.json").unlink()
    saved = torch.load(run / "model_final.pth", weights_only=True)
    saved.pop("classes", None)
    torch.save(saved, run / "model_final.pth")
    config = run / "config.yaml"
    text = config.read_text().replace("\nTEST:\n", "\nTEST:\n  MEMORY_BUDGET_MB: 1024\n")
    config.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert Predictor.from_run(run).classes.names[:2] == ["class_0", "class_1"]
    assert "classes.json" in caplog.text and "class_15" in caplog.text
    config.write_text(text.replace("- test_away_too", "- scenes_val"))
    expected = MetadataCatalog.get("scenes_val")
    assert Predictor.from_run(run).classes.names == list(expected.stuff_classes)
    assert Predictor.from_run(run).classes.colors == [list(x) for x in expected.stuff_colors]
    # Of own data the config itself knows.
    names = [f"own {k}" for k in range(16)]
    own = f"  OWN:\n    NAME: away\n    TRAIN: [/gone]\n    CLASS_NAMES: {json.dumps(names)}\n"
    start, _, rest = text.partition("  OWN:\n")
    rest = rest[rest.index("\n  P") + 1 :]
    config.write_text(f"{start}{own}{rest}".replace("- test_away\n", "- away_train\n"))
    assert Predictor.from_run(run).classes.names == names
    assert "away_train" not in DatasetCatalog


@pytest.fixture(scope="module")
def predictor(trained):
    return Predictor.from_run(trained, batch_size=3)


def test_a_list_is_the_same_as_one_by_one(predictor, monkeypatch):
    wide = [picture(k) for k in range(5)]
    small = [np.ascontiguousarray(image[:64, :96]) for image in wide[:2]]
    images = [wide[0], small[0], *wide[1:], small[1]]
    sizes = []
    run = predictor.model.backbone.forward
    monkeypatch.setattr(
        predictor.model.backbone, "forward", lambda x: (sizes.append(len(x)), run(x))[1]
    )
    found = predictor(images)
    assert sorted(sizes) == [2, 2, 3]
    for image, several in zip(images, found, strict=True):
        one = predictor(image)
        assert (one.labels == several.labels).mean() > 0.999
        np.testing.assert_allclose(one.scores, several.scores, atol=1e-4)
        assert several.overlay.shape == image.shape
    assert predictor([]) == predictor.predict([]) == []
    assert len(predictor.predict(tuple(images))) == len(images)


def test_large_images_are_run_one_by_one(predictor, monkeypatch):
    pixels = predictor(picture()).labels.size
    assert 2 * pixels < predictor._most_pixels == 2**18, "on a CPU, where larger batches are slower"
    monkeypatch.setattr(predictor, "_most_pixels", 2 * pixels - 1)
    batches, run = [], predictor.model.score_maps
    monkeypatch.setattr(
        predictor.model, "score_maps", lambda x: (batches.append(len(x)), run(x))[1]
    )
    predictor([picture(0), picture(1)])
    assert batches == [1, 1]


def test_images_come_as_pillow_or_path_too(predictor, tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), image)
    pillow = Image.fromarray(np.ascontiguousarray(image[..., ::-1]))
    for given in (path, str(path), pillow, Image.open(path), pillow.convert("RGBA")):
        assert (predictor(given).overlay == predictor(image).overlay).all()
    gray = predictor(pillow.convert("L"))
    assert gray.labels.shape == image.shape[:2]


WRONG = {
    "None": (None, "image is None, expected"),
    "gray": (np.zeros((4, 5), np.uint8), r"shape \(4, 5\) and type uint8.*COLOR_GRAY2BGR"),
    "gray3": (np.zeros((4, 5, 1), np.uint8), r"shape \(4, 5, 1\).*COLOR_GRAY2BGR"),
    "alpha": (np.zeros((4, 5, 4), np.uint8), r"shape \(4, 5, 4\).*image\[\.\.\., :3\]"),
    "float": (np.zeros((4, 5, 3), np.float32), r"type float32, expected \(H, W, 3\) uint8"),
    "16 bits": (np.zeros((4, 5, 3), np.uint16), r"type uint16, expected \(H, W, 3\) uint8"),
    "empty": (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\).*with pixels"),
    "batch": (np.zeros((2, 4, 5, 3), np.uint8), r"\(2, 4, 5, 3\).*several images are a list"),
    "objects": (np.array([None]), r"shape \(1,\) and type object, expected"),
    "torch": (torch.zeros(3, 4, 5), r"torch.Tensor of shape \(3, 4, 5\) and type torch.float32"),
    "number": (7, "a builtins.int, expected"),
    "bytes": (b"x", "a builtins.bytes, expected"),
    "dict": ({}, "a builtins.dict, expected"),
    "gone": ("gone.jpg", "gone.jpg: cannot be read as an image"),
    "float TIFF": (Image.new("F", (5, 4)), "image cannot be read .*floating-point"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image_is_one_sentence(predictor, name):
    image, sentence = WRONG[name]
    with pytest.raises(InputError, match=sentence):
        predictor(image)
    with pytest.raises(InputError, match=sentence.replace("image is", "image 1 of the list is")
                       .replace("image cannot", "image 1 of the list cannot")):  # fmt: skip
        predictor.predict([picture(), image])


def test_what_is_no_config_is_one_sentence():
    for cfg, sentence in (
        (None, "cfg is None, expected a config"),
        ("run", r"cfg is a builtins\.str, expected a config.*Predictor\.from_run"),
        ({}, r"cfg is a builtins\.dict"),
        (get_cfg(), r"expected mcibi_d2\.add_mcibi_config"),
    ):
        with pytest.raises(InputError, match=sentence):
            Predictor(cfg)
    with pytest.raises(InputError, match="batch_size is 0, expected"):
        Predictor(get_cfg(), batch_size=0)


def tiff(path, bands, extra, dtype=np.uint8, planar=1):
    """A TIFF as remote sensing writes it, by hand: Pillow cannot."""
    height, width = 6, 7
    values = np.arange(height * width * bands).reshape(height, width, bands) % 251
    data = values.astype(dtype).tobytes()
    tags = [(256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 1),
            (262, 3, 1, 2 if bands > 2 else 1), (273, 4, 1, 8), (277, 3, 1, bands),
            (278, 4, 1, height), (279, 4, 1, len(data))]  # fmt: skip
    if extra is not None:
        tags.append((338, 3, bands - 3, extra))
    bits = 8 + len(data)
    tags.append((258, 3, bands, bits if bands > 2 else 8 | 8 << 16))
    tags.append((284, 3, 1, planar))
    tags.sort()
    body = data + struct.pack(f"<{bands}H", *[8 * values.astype(dtype).itemsize] * bands)
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    head = struct.pack("<2sHI", b"II", 42, 8 + len(body))
    path.write_bytes(head + body + struct.pack("<H", len(tags)) + entries + b"\0" * 4)
    return str(path), values


@pytest.mark.parametrize(("bands", "extra"), [(4, 0), (4, None), (5, 0)])
def test_a_fourth_band_is_not_alpha(tmp_path, bands, extra):
    path, _ = tiff(tmp_path / "bands.tif", bands, extra)
    with pytest.raises(InputError, match=rf"bands\.tif: .*it has {bands} bands.*ExtraSamples"):
        read_image(path, "RGB")


def test_bands_of_16_bits_one_after_the_other_are_refused(tmp_path):
    path, values = tiff(tmp_path / "bands.tif", 3, None, np.uint16)
    assert (read_image(path, "RGB", white_level=255) == values).all()
    tiff(tmp_path / "bands.tif", 3, None, np.uint16, planar=2)
    for level in (0, 255):
        with pytest.raises(InputError, match=r"bands\.tif: .*bands of 16 bits, one after the ot"):
            read_image(path, "RGB", white_level=level)


@pytest.mark.parametrize("extra", [1, 2])
def test_alpha_that_the_file_names_is_left_out(tmp_path, extra):
    path, values = tiff(tmp_path / "alpha.tif", 4, extra)
    assert read_image(path, "RGB").shape == (6, 7, 3)
    if extra == 2:
        assert (read_image(path, "RGB") == values[..., :3]).all()
    path, values = tiff(tmp_path / "three.tif", 3, None)
    assert (read_image(path, "RGB") == values).all()


@pytest.fixture
def plain_set(tmp_path):
    """A data set registered as Detectron2's tutorial says, with class ids in its files."""
    name, count = "test_tutorial", 3
    records = []
    for number in range(2):
        image, labels = scenes.render("val", number)
        files = [str(tmp_path / f"{number}.{kind}.png") for kind in ("image", "labels")]
        Image.fromarray(image).save(files[0])
        Image.fromarray(np.where(labels % 7 == 6, 255, labels % count).astype(np.uint8)).save(
            files[1]
        )
        records.append(dict(zip(("file_name", "sem_seg_file_name"), files, strict=True)))
    DatasetCatalog.register(name, lambda: records)
    yield MetadataCatalog.get(name)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    "more", [{}, {"stuff_colors": [(1, 2, 3)], "stuff_dataset_id_to_contiguous_id": {7: 0, 8: 1}}]
)
def test_a_set_with_names_alone_trains_and_predicts(plain_set, tmp_path, more):
    plain_set.set(stuff_classes=["road", "sky", "car"], **more)
    cfg = make_tiny_cfg(
        tmp_path / "run", "DATASETS.TRAIN", "('test_tutorial',)", "DATASETS.TEST",
        "('test_tutorial',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3", "SOLVER.MAX_ITER", "1",
        "INPUT.MIN_SIZE_TEST", "0", "TEST.VIS_IMAGES", "1", "MODEL.TIMM.NAME", "test_resnet",
    )  # fmt: skip
    check_config(cfg)
    trainer = Trainer(cfg)
    trainer.train()
    assert (tmp_path / "run" / "overlays.png").is_file()
    assert trainer._last_eval_results["sem_seg"]["mIoU"] >= 0
    cfg.MODEL.WEIGHTS = str(tmp_path / "run" / "model_final.pth")
    predictor = Predictor(cfg)
    assert predictor(picture()).overlay.shape == picture().shape
    assert (
        predictor.classes.colors
        == [list(x) for x in more.get("stuff_colors", ())]
        + palette(3)[len(more.get("stuff_colors", ())) :]
    )
    assert DefaultPredictor(cfg)(picture())["sem_seg"].shape[0] == 3


def test_what_cannot_be_defaulted_is_said_before_training(plain_set, tmp_path):
    options = ("DATASETS.TRAIN", "('test_tutorial',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES")
    with pytest.raises(InputError, match="test_tutorial has no stuff_classes in its metadata, ex"):
        check_config(make_tiny_cfg(tmp_path, *options, "3"))
    with pytest.raises(InputError, match="test_tutorial has no stuff_classes in its metadata, ex"):
        SemSegEvaluator("test_tutorial")
    plain_set.set(stuff_classes=["road", "sky", "car"])
    cfg = make_tiny_cfg(tmp_path, *options, "3", "MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254")
    with pytest.raises(InputError, match=r"is 254, but test_tutorial ignores 255 \(it has no igno"):
        check_config(cfg)


def test_the_default_label_is_no_class():
    metadata = MetadataCatalog.get("test_many")
    metadata.set(stuff_classes=[str(k) for k in range(300)])
    with pytest.raises(InputError, match="has 300 classes and no ignore_label in its metadata"):
        Classes.of("test_many")
    metadata.set(ignore_label=65535)
    assert Classes.of("test_many").ignore_label == 65535
    MetadataCatalog.remove("test_many")


def test_detectron2s_own_ade20k_has_what_is_needed():
    classes = Classes.of("ade20k_sem_seg_val")
    assert len(classes.names) == len(classes.colors) == 150 and classes.ignore_label == 255
