import re

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_tiny_cfg
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

import mcibi_d2
from mcibi_d2 import InputError, add_mcibi_config
from mcibi_d2.data.augmentation import (
    SemSegInput,
    build_test_augmentation,
    build_train_augmentation,
)
from mcibi_d2.engine import Checkpointer, Trainer, load_config
from mcibi_d2.engine.config_table import TABLE
from mcibi_d2.modeling import MCIBISegmentor
from mcibi_d2.tools.config_keys import keys_document

FOLDER = ROOT / "configs"
CONFIGS = sorted(FOLDER.rglob("*.yaml"))
LEAVES = [p for p in CONFIGS if not p.name.startswith("Base-")]
BASELINES = [p for p in LEAVES if not p.name.startswith("mcibi_")]
# What section 4.1 says (of COCO-Stuff 10k: what is released): training images, epochs, batch,
# learning rate, weight decay, crop.
RECIPES = {
    "ade20k/mcibi_R50": (20210, 130, 16, 0.01, 0.0005, (512, 512)),
    "cityscapes/mcibi_R50": (2975, 220, 8, 0.01, 0.0005, (512, 1024)),
    "cityscapes/mcibi_deeplabv3_R50_trainval": (3475, 220, 8, 0.01, 0.0005, (512, 1024)),
    "lip/mcibi_R50": (30462, 150, 32, 0.01, 0.0005, (473, 473)),
    "coco_stuff/mcibi_R50": (118287, 30, 16, 0.01, 0.0005, (512, 512)),
    "coco_stuff_10k/mcibi_deeplabv3_R50": (9000, 110, 16, 0.001, 0.0001, (512, 512)),
}
# Sections of Detectron2 of which every key is in the table.
SECTIONS = ("INPUT", "DATASETS", "DATALOADER", "SOLVER", "TEST", "MODEL.BACKBONE", "MODEL.RESNETS",
            "MODEL.SEM_SEG_HEAD", "MODEL.MCIBI", "MODEL.TIMM")  # fmt: skip
TABLE_5 = ("ade20k", "cityscapes", "lip", "coco_stuff")
DATASETS = {name.partition("/")[0] for name in RECIPES}
CONTEXTS = {"fcn": "none", "pspnet": "ppm", "ocrnet": "ocr", "deeplabv3": "aspp"}
CLASSES = {
    "ade20k_150": 150, "cityscapes_19": 19, "lip_20": 20, "cihp_20": 20, "coco_stuff_164k": 171,
    "coco_stuff_10k": 171, "camvid_11": 11, "scenes": 16,
}  # fmt: skip
# A small network of the same family; of vision transformers also their numbers of blocks.
SMALL = {
    "resnet50c": "test_resnet", "resnet101c": "test_resnet", "test_resnet": "test_resnet",
    "resnest50d": "resnest14d", "resnest101e": "resnest14d", "hrnet_w48": "hrnet_w18_small",
    "convnext_tiny": "test_convnext", "mobilenetv2_100": "mobilenetv2_035",
    "vit_large_patch16_384": "test_vit", "vit_small_patch14_dinov2": "test_vit",
}  # fmt: skip
BLOCKS = {"vit_large_patch16_384": 24, "vit_small_patch14_dinov2": 12, "test_vit": 6}


def name_of(path):
    """``ade20k/mcibi_R50`` of ``configs/ade20k/mcibi_R50.yaml``."""
    return path.relative_to(FOLDER).with_suffix("").as_posix()


def method_of(baseline):
    """The file that a baseline belongs to: mcibi_R50.yaml of fcn_R50.yaml."""
    return baseline.with_name("mcibi_" + baseline.name.removeprefix("fcn_"))


def flatten(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_leaf_is_short_and_builds(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 12
    assert "!!python" not in text
    # Without values: some of the networks are large.
    cfg = load_config(str(path), ["MODEL.TIMM.PRETRAINED", "False"])
    cfg.MODEL.DEVICE = "meta"
    output = cfg.OUTPUT_DIR
    assert output == f"output/{name_of(path)}"
    if "released" in path.parts:
        return  # tests/test_convert.py builds them
    with torch.device("meta"):
        model = build_model(cfg)
    assert isinstance(model, MCIBISegmentor)
    assert model.sem_seg_head.enabled == path.stem.startswith("mcibi_")


@pytest.mark.parametrize("path", BASELINES, ids=name_of)
def test_baseline_and_method_differ_in_one_key(path):
    a, b = (dict(flatten(load_config(str(p)))) for p in (method_of(path), path))
    assert {key for key in a if a[key] != b[key]} == {"MODEL.MCIBI.ENABLED", "OUTPUT_DIR"}
    assert a["MODEL.MCIBI.ENABLED"] and not b["MODEL.MCIBI.ENABLED"]


@pytest.mark.parametrize("folder", TABLE_5)
def test_frameworks_of_table_5_differ_in_one_key(folder):
    cfgs = {
        framework: dict(flatten(load_config(str(FOLDER / folder / f"{framework}_R50.yaml"))))
        for framework in CONTEXTS
    }
    for framework, cfg in cfgs.items():
        assert cfg.pop("MODEL.MCIBI.CONTEXT") == CONTEXTS[framework]
        assert cfg.pop("OUTPUT_DIR") == f"output/{folder}/{framework}_R50"
    assert all(cfg == cfgs["fcn"] for cfg in cfgs.values())


@pytest.mark.parametrize(
    "folder, backbones, suffix",
    [("ade20k", ("R50", "R101", "S101", "HRW48", "ViTL"), ""),
     ("lip", ("R50", "R101", "S101", "HRW48"), ""),
     ("cityscapes", ("R50", "R101", "S101", "HRW48"), "_trainval"),
     ("coco_stuff_10k", ("R50", "R101", "S101", "ViTL"), "")],
)  # fmt: skip
def test_backbones_of_tables_6_to_9(folder, backbones, suffix):
    networks = {
        "R50": "resnet50c", "R101": "resnet101c", "S101": "resnest101e", "HRW48": "hrnet_w48",
        "ViTL": "vit_large_patch16_384",
    }  # fmt: skip
    for backbone in backbones:
        path = FOLDER / folder / f"mcibi_deeplabv3_{backbone}{suffix}.yaml"
        model = load_config(str(path)).MODEL
        found = (model.TIMM.NAME, model.MCIBI.CONTEXT)
        assert found == (networks[backbone], "aspp")


# Factors and base of the scale (None: the image's own size, with its ratio), degrees and share of
# rotation, and the test size of images of 100 x 300.
SCALED_BY_A_FACTOR = ((0.5, 2.0), None, None, (512, 1536))
AUGMENTATION = {
    "cityscapes": ((0.5, 2.0), None, None, (1024, 3072)),
    "lip": ((0.75, 1.25), (520, 520), (30, 0.6), (473, 473)),
}


def described(cfg):
    """As in ``AUGMENTATION``, of what is built."""
    built = {type(x).__name__: x for x in build_train_augmentation(cfg)}
    scale, rotation = built["RandomScaleCrop"].scale, built.get("RandomRotation")
    assert scale.keep_ratio == (scale.base is None)
    inputs = SemSegInput(np.zeros((100, 300, 3), np.uint8))
    for augmentation in build_test_augmentation(cfg):
        augmentation(inputs)
    return (
        (scale.low, scale.high),
        scale.base,
        rotation and (rotation.degrees, rotation.prob),
        inputs.image.shape[:2],
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name):
    images, epochs, batch, rate, decay, crop = RECIPES[name]
    cfg = load_config(str(FOLDER / f"{name}.yaml"))
    solver, mcibi = cfg.SOLVER, cfg.MODEL.MCIBI
    found = (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY)
    assert found == (epochs * images // batch, batch, rate, decay)
    assert solver.WEIGHT_DECAY_NORM == solver.WEIGHT_DECAY
    assert tuple(cfg.INPUT.CROP.SIZE) == crop
    assert described(cfg) == AUGMENTATION.get(name.partition("/")[0], SCALED_BY_A_FACTOR)
    assert (cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA, cfg.INPUT.COLOR_AUG_SSD) == (0.75, True)
    assert (cfg.INPUT.CROP.TYPE, cfg.INPUT.RANDOM_FLIP) == ("absolute", "horizontal")
    assert (solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER) == ("WarmupPolyLR", 0.9)
    assert (mcibi.LOSS_WEIGHT_W, mcibi.LOSS_WEIGHT_M, mcibi.MEMORY.MOMENTUM) == (0.4, 1.0, 0.9)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_schedule_is_written_out(path):
    """Epochs * images / batch = iterations, in a comment, with the numbers that are used."""
    text = path.read_text()
    said = re.search(r"# .*?(\d+) \* (\d+) / (\d+) = ([\d,]+) iterations", text)
    if "MAX_ITER" in text and path.parent.name in DATASETS and path.parent.parent == FOLDER:
        assert said
    if said:
        epochs, images, batch, iterations = (int(x.replace(",", "")) for x in said.groups())
        assert yaml.safe_load(text)["SOLVER"]["MAX_ITER"] == iterations
        assert iterations == epochs * images // batch


@pytest.mark.parametrize("gpus", [1, 2, 4, 16])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_on_other_numbers_of_gpus(name, gpus):
    cfg = load_config(str(FOLDER / f"{name}.yaml"))
    batch, rate = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR
    scaled = Trainer.auto_scale_workers(cfg, gpus).SOLVER
    found = (scaled.IMS_PER_BATCH, scaled.BASE_LR)
    assert found == (batch * gpus / 8, pytest.approx(rate * gpus / 8))
    images = (batch * cfg.SOLVER.MAX_ITER, scaled.IMS_PER_BATCH * scaled.MAX_ITER)
    assert abs(images[0] - images[1]) <= scaled.IMS_PER_BATCH


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_nothing_is_repeated(path):
    """No file says what the files that it is based on say already."""
    own = yaml.safe_load(path.read_text())
    bases = own.pop("_BASE_", [])
    said = {}
    for base in [bases] if isinstance(bases, str) else bases:
        said |= flatten(CfgNode.load_yaml_with_base(str(path.parent / base)))
    assert [key for key, value in flatten(own) if said.get(key) == value] == []


@pytest.mark.parametrize("path", [p for p in LEAVES if p.parent.parent == FOLDER], ids=name_of)
def test_number_of_classes_is_that_of_the_data_sets(path):
    cfg = load_config(str(path))
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert CLASSES[name.rpartition("_")[0]] == cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES


def test_every_leaf_is_in_the_list():
    listed = re.findall(r"\]\(([\w/-]+\.yaml)\)", (FOLDER / "README.md").read_text())
    assert all((FOLDER / name).is_file() for name in listed)
    own = {f"{name_of(p)}.yaml" for p in LEAVES if "released" not in p.parts}
    assert own <= set(listed)


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Registers data sets of noise, one for each number of classes, and gives their names."""
    folder = tmp_path_factory.mktemp("generated")
    names = {}

    def make(num_classes):
        if num_classes not in names:
            name = names[num_classes] = f"noise_{num_classes}"
            draw = np.random.default_rng(num_classes)
            records = []
            for number in range(4):
                image, label = (folder / f"{name}_{number}_{x}.png" for x in ("image", "label"))
                Image.fromarray(draw.integers(256, size=(80, 112, 3), dtype=np.uint8)).save(image)
                blocks = draw.choice([*range(num_classes), 255], (10, 14)).astype(np.uint8)
                Image.fromarray(blocks.repeat(8, axis=0).repeat(8, axis=1)).save(label)
                records.append({"file_name": str(image), "sem_seg_file_name": str(label)})
            DatasetCatalog.register(name, lambda: records)
            MetadataCatalog.get(name).set(
                stuff_classes=[str(k) for k in range(num_classes)], ignore_label=255
            )
        return names[num_classes]

    yield make
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def shrink(cfg):
    """Put a small relative of the backbone into a config of :func:`make_tiny_cfg`."""
    model, net = cfg.MODEL, cfg.MODEL.TIMM
    large, net.NAME = net.NAME, SMALL[net.NAME]
    if large in BLOCKS:
        share = BLOCKS[net.NAME] / BLOCKS[large]
        net.OUT_INDICES = [int(index * share) for index in net.OUT_INDICES]
        net.OUTPUT_STRIDE = 16
    net.MLA_CHANNELS = 16
    model.RESNETS.STEM_OUT_CHANNELS = model.RESNETS.RES2_OUT_CHANNELS = 16
    model.RESNETS.WIDTH_PER_GROUP = 4
    if cfg.INPUT.SCALE_BASE != (0, 0):
        cfg.INPUT.SCALE_BASE = (80, 80)


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_leaf_trains(path, tmp_path, generated, monkeypatch):
    options = (
        "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", "False",
        "SOLVER.MAX_ITER", "2", "SOLVER.REFERENCE_WORLD_SIZE", "0",
        "MODEL.MCIBI.MEMORY.INIT_MAX_IMAGES", "2",
    )  # fmt: skip
    cfg = make_tiny_cfg(tmp_path, *options, config=path.relative_to(FOLDER))
    num_classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    cfg.DATASETS.TRAIN = (generated(num_classes),)
    shrink(cfg)
    monkeypatch.setattr(Checkpointer, "save", lambda *args, **kwargs: None)
    trainer = Trainer(cfg)
    head = trainer.model.sem_seg_head
    layer = (head.h2 if head.enabled else head.classify)[-1]
    before = layer.weight.detach().clone()
    trainer.train()

    # The losses of both iterations were finite, or it would have stopped.
    losses = {key for key in trainer.storage.latest() if key.startswith("loss_")}
    assert len(layer.weight) == num_classes and not layer.weight.equal(before)
    assert "loss_o" in losses and ("loss_w" in losses) == head.enabled
    if head.enabled:
        rows, initialized = head.memory.rows, head.memory.initialized
        assert rows.isfinite().all() and rows[initialized].any() and not rows[~initialized].any()


def test_every_key_has_a_comment():
    lines = (ROOT / "mcibi_d2/config.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("cfg.") and "= CN()" not in line:
            above = [text.strip() for text in lines[max(0, number - 3) : number]]
            assert any(text.startswith("#") for text in above), line


def test_every_key_has_a_rule():
    plain, ours = get_cfg(), get_cfg()
    add_mcibi_config(ours)
    ours = dict(flatten(ours))
    added = ours.keys() - dict(flatten(plain))
    read = {key for key in ours if key.startswith(tuple(f"{name}." for name in SECTIONS))}
    assert (added | read) - TABLE.keys() == set()
    assert TABLE.keys() - ours.keys() == set()


def test_the_list_of_keys_is_up_to_date():
    """If not: python -m mcibi_d2.tools.config_keys > configs/KEYS.md."""
    assert (FOLDER / "KEYS.md").read_text() == keys_document()


def test_unknown_key_of_a_file_names_file_and_neighbour(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({"MODEL": {"MCIBI": {"MEMORY": {"UPDAT": "mean"}}}}))
    with pytest.raises(InputError, match=r"wrong\.yaml: .*UPDAT.*did you mean .*UPDATE\?"):
        load_config(str(path))


@pytest.mark.parametrize("text, message", [("a: [", "wrong.yaml"), (None, "no such file")])
def test_broken_and_missing_files_are_said(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    if text:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(str(path))


def test_missing_base_file_is_named(tmp_path):
    (tmp_path / "leaf.yaml").write_text("_BASE_: none.yaml\n")
    with pytest.raises(InputError, match=r"leaf\.yaml: .*none\.yaml: No such file"):
        load_config(str(tmp_path / "leaf.yaml"))


def test_works_from_another_detectron2_project(tmp_path):
    """The README's example: the keys, the segmentor and the trainer, by import."""
    cfg = get_cfg()
    add_mcibi_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/scenes/mcibi_tiny.yaml"))
    model = build_model(cfg)
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    result = model.eval()([{"image": image}])[0]["sem_seg"]
    assert result.shape == (16, 64, 64)


def test_head_works_in_detectron2s_own_segmentor(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    trainer = Trainer(cfg)
    trainer.model.train()
    batch = next(iter(trainer.data_loader))
    losses = trainer.model(batch)
    assert {"loss_o", "loss_m"} <= set(losses)
    batch[0].update(height=70, width=50)
    assert trainer.model.eval()(batch[:1])[0]["sem_seg"].shape == (16, 70, 50)


def test_public_names():
    from mcibi_d2.engine import MemoryUpdateHook, Trainer
    from mcibi_d2.modeling import FeatureMemory, MCIBIHead, MCIBISegmentor

    assert mcibi_d2.add_mcibi_config is add_mcibi_config
    assert all((MemoryUpdateHook, Trainer, FeatureMemory, MCIBIHead, MCIBISegmentor))
