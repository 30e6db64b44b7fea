import pytest
import torch
import yaml
from conftest import ROOT, make_tiny_cfg
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import mcibi_d2
from mcibi_d2 import InputError, add_mcibi_config
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.modeling import MCIBISegmentor

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
LEAVES = [p for p in CONFIGS if not p.name.startswith("Base-")]


@pytest.mark.parametrize("path", LEAVES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_leaf_is_short_and_builds(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 12
    assert "!!python" not in text
    # Without values: some of the networks are large.
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta", "MODEL.TIMM.PRETRAINED", "False"])
    assert cfg.OUTPUT_DIR.endswith(f"{path.parent.name}/{path.stem}")
    with torch.device("meta"):
        model = build_model(cfg)
    assert isinstance(model, MCIBISegmentor)
    assert model.sem_seg_head.enabled == path.stem.startswith("mcibi_")


@pytest.mark.parametrize(
    "method, baseline",
    [("ade20k/mcibi_R50", "ade20k/fcn_R50"),
     ("camvid/mcibi_MobileNetV2", "camvid/fcn_MobileNetV2"),
     ("scenes/mcibi_tiny", "scenes/fcn_tiny")],
)  # fmt: skip
def test_baseline_and_method_differ_in_one_key(method, baseline):
    a, b = (load_config(str(ROOT / "configs" / f"{name}.yaml")) for name in (method, baseline))
    assert a.MODEL.MCIBI.ENABLED and not b.MODEL.MCIBI.ENABLED
    a.MODEL.MCIBI.ENABLED = b.MODEL.MCIBI.ENABLED
    a.OUTPUT_DIR = b.OUTPUT_DIR
    assert a == b


def test_ade20k_is_the_papers_recipe():
    cfg = load_config(str(ROOT / "configs/ade20k/mcibi_R50.yaml"))
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (16, 0.01, 0.0005)
    assert solver.MAX_ITER == 130 * 20210 // 16 == 164206
    assert tuple(cfg.INPUT.CROP.SIZE) == (512, 512)
    assert (solver.LR_SCHEDULER_NAME, solver.POLY_LR_POWER) == ("WarmupPolyLR", 0.9)
    mcibi = cfg.MODEL.MCIBI
    assert (mcibi.LOSS_WEIGHT_W, mcibi.LOSS_WEIGHT_M, mcibi.MEMORY.MOMENTUM) == (0.4, 1.0, 0.9)


def test_every_key_has_a_comment():
    lines = (ROOT / "mcibi_d2/config.py").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.strip().startswith("cfg.") and "= CN()" not in line:
            above = [text.strip() for text in lines[max(0, number - 3) : number]]
            assert any(text.startswith("#") for text in above), line


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
