import os
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

warnings.filterwarnings("ignore", category=FutureWarning)

from mcibi_d2.engine import load_config  # noqa: E402
from mcibi_d2.modeling import MCIBIHead  # noqa: E402

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)


@pytest.fixture
def tiny_cfg(tmp_path):
    """configs/scenes/mcibi_tiny.yaml, cut to seconds."""
    return make_tiny_cfg(tmp_path / "output")


def make_tiny_cfg(output_dir, *options, config="scenes/mcibi_tiny.yaml"):
    return load_config(
        str(ROOT / "configs" / config),
        [
            "OUTPUT_DIR", str(output_dir),
            "SOLVER.IMS_PER_BATCH", "2",
            "SOLVER.MAX_ITER", "4",
            "INPUT.CROP.SIZE", "(65, 97)",
            "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16",
            "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]",
            "MODEL.MCIBI.ATTENTION_DIM", "8",
            "DATALOADER.NUM_WORKERS", "0",
            "DATASETS.TEST", "()",
            *options,
        ],
    )  # fmt: skip


HEAD_KEYS = {
    "num_classes": "SEM_SEG_HEAD.NUM_CLASSES", "channels": "SEM_SEG_HEAD.CONVS_DIM",
    "norm": "SEM_SEG_HEAD.NORM", "dropout": "SEM_SEG_HEAD.DROPOUT", "loss": "SEM_SEG_HEAD.LOSS",
    "aux_features": "SEM_SEG_HEAD.AUX_FEATURES", "aux_convs": "SEM_SEG_HEAD.AUX_CONVS",
    "aux_upsampling": "SEM_SEG_HEAD.AUX_UPSAMPLING", "activation": "SEM_SEG_HEAD.ACTIVATION",
    "class_weights": "SEM_SEG_HEAD.CLASS_WEIGHTS", "in_features": "SEM_SEG_HEAD.IN_FEATURES",
    "ohem_threshold": "SEM_SEG_HEAD.OHEM.THRESHOLD", "ohem_min_kept": "SEM_SEG_HEAD.OHEM.MIN_KEPT",
    "memory_update": "MCIBI.MEMORY.UPDATE", "memory_slots": "MCIBI.MEMORY.SLOTS",
}  # fmt: skip


def make_head(shapes, **options):
    """A head from a config; options are keys of MODEL.MCIBI in small letters, or HEAD_KEYS."""
    cfg = load_config()
    cfg.MODEL.DEVICE = "cpu"
    options = {"in_features": ["res5"], "aux_features": [], "norm": "BN", **options}
    for name, value in options.items():
        *nodes, key = HEAD_KEYS.get(name, f"MCIBI.{name.upper()}").split(".")
        node = cfg.MODEL
        for inner in nodes:
            node = node[inner]
        node[key] = value
    return MCIBIHead(cfg, shapes)


@pytest.fixture
def three_scenes():
    """A validation set of seconds."""
    records = DatasetCatalog.get("scenes_val")[:3]
    DatasetCatalog.register("test_scenes_three", lambda: records)
    metadata = MetadataCatalog.get("scenes_val").as_dict()
    metadata.pop("name")
    MetadataCatalog.get("test_scenes_three").set(**metadata)
    yield ["DATASETS.TEST", "('test_scenes_three',)"]
    DatasetCatalog.remove("test_scenes_three")
    MetadataCatalog.remove("test_scenes_three")


@pytest.fixture
def torn_scene(three_scenes, tmp_path):
    """The same with an image that cannot be read; the file and options to read it in a worker."""
    file = tmp_path / "torn.png"
    file.write_bytes(b"\x89PNG, and no more")
    DatasetCatalog.get("test_scenes_three")[1]["file_name"] = str(file)
    return file, [*three_scenes, "DATALOADER.NUM_WORKERS", "1"]


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data sets; tests of real files skip without it."""
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    if not (root / "CamVid" / "train.txt").is_file():
        pytest.skip(f"no CamVid in DETECTRON2_DATASETS ({root}): real files are not tested")
    return root


@pytest.fixture(scope="session")
def mobilenet_weights(real_data):
    path = real_data / "weights" / "mobilenetv2_100.torchvision_in1k.pth"
    if not path.is_file():
        pytest.skip(f"no {path}: the pretrained backbone is not tested")
    return path
