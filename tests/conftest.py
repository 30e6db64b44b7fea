import os
import warnings
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

warnings.filterwarnings("ignore", category=FutureWarning)

from mcibi_d2.engine import load_config  # noqa: E402

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
