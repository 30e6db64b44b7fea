import os
import pickle

import pytest
import timm
import torch
from conftest import make_tiny_cfg
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from safetensors.torch import save_file

from mcibi_d2 import InputError
from mcibi_d2.engine import Checkpointer, Trainer


def test_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    checkpointer = Checkpointer(torch.nn.Linear(2, 2), str(tmp_path))
    checkpointer.save("a")
    before = (tmp_path / "a.pth").read_bytes()

    def full_disk(data, file):
        file.write(b"half a check")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="No space"):
            checkpointer.save(name)
    assert (tmp_path / "a.pth").read_bytes() == before
    assert not (tmp_path / "b.pth").exists()
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "a.pth")


def test_is_readable_by_fvcore(tmp_path, tiny_cfg):
    model = Trainer.build_model(tiny_cfg)
    Checkpointer(model, str(tmp_path)).save("a")
    other = Trainer.build_model(tiny_cfg)
    FvcoreCheckpointer(other).load(str(tmp_path / "a.pth"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_timm_state_dict_goes_to_the_backbone(tmp_path, tiny_cfg):
    source = timm.create_model("test_resnet")
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    model = Trainer.build_model(tiny_cfg)
    Checkpointer(model).load(str(tmp_path / "timm.pth"))
    state = model.state_dict()
    shared = [k for k in source.state_dict() if f"backbone.net.{k}" in state]
    assert len(shared) == sum(k.startswith("backbone.") for k in state)
    for key in shared:
        assert torch.equal(state[f"backbone.net.{key}"], source.state_dict()[key])


@pytest.mark.parametrize("wrap", ["module", "state_dict"])
def test_other_ways_to_write_a_timm_state_dict(tmp_path, tiny_cfg, wrap):
    state = timm.create_model("test_resnet").state_dict()
    wrapped = {f"module.{k}": v for k, v in state.items()}
    torch.save(wrapped if wrap == "module" else {"state_dict": state}, tmp_path / "timm.pth")
    model = Trainer.build_model(tiny_cfg)
    Checkpointer(model).load(str(tmp_path / "timm.pth"))
    assert torch.equal(
        model.state_dict()["backbone.net.layer1.0.conv1.weight"], state["layer1.0.conv1.weight"]
    )


def test_another_width_leaves_the_memory_uninitialised(tmp_path):
    trainer = Trainer(make_tiny_cfg(tmp_path))
    trainer.train()
    other = Trainer.build_model(make_tiny_cfg(tmp_path, "MODEL.SEM_SEG_HEAD.CONVS_DIM", "24"))
    Checkpointer(other).load(str(tmp_path / "model_final.pth"))
    assert not other.sem_seg_head.memory.initialized.any()


def test_a_trunk_alone_is_enough_for_a_larger_backbone(tmp_path, tiny_cfg):
    model = Trainer.build_model(tiny_cfg)
    state = {k: v for k, v in model.state_dict().items() if k.startswith("backbone.")}
    torch.save({"model": dict(list(state.items())[:-10])}, tmp_path / "trunk.pth")
    Checkpointer(model).load(str(tmp_path / "trunk.pth"))
    with pytest.raises(InputError, match="not a checkpoint of this model"):
        Checkpointer(model).load(str(tmp_path / "trunk.pth"), strict=True)


def test_a_failed_load_does_not_stand_in_the_way_of_the_next(tmp_path, tiny_cfg):
    checkpointer = Checkpointer(Trainer.build_model(tiny_cfg), str(tmp_path))
    checkpointer.save("a")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError):
        checkpointer.load(str(tmp_path / "text.pth"))
    checkpointer.load(str(tmp_path / "a.pth"), strict=True)


def test_another_number_of_classes_keeps_the_rest(tmp_path):
    model = Trainer.build_model(make_tiny_cfg(tmp_path))
    Checkpointer(model, str(tmp_path)).save("a")
    other = Trainer.build_model(make_tiny_cfg(tmp_path, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"))
    Checkpointer(other).load(str(tmp_path / "a.pth"))
    project = "sem_seg_head.project.0.weight"
    assert torch.equal(other.state_dict()[project], model.state_dict()[project])
    assert other.sem_seg_head.memory.rows.shape == (7, 16)
    with pytest.raises(InputError, match=r"not a checkpoint of this model: .*sem_seg_head"):
        Checkpointer(other).load(str(tmp_path / "a.pth"), strict=True)


def test_a_head_with_more_than_the_model_is_refused_in_evaluation(tmp_path):
    Checkpointer(Trainer.build_model(make_tiny_cfg(tmp_path)), str(tmp_path)).save("a")
    cfg = make_tiny_cfg(tmp_path, "MODEL.MCIBI.AGGREGATION", "none")
    with pytest.raises(InputError, match=r"its head has \d+ tensors more, .*sem_seg_head"):
        Checkpointer(Trainer.build_model(cfg)).load(str(tmp_path / "a.pth"), strict=True)
    cfg = make_tiny_cfg(tmp_path, "MODEL.SEM_SEG_HEAD.AUX_FEATURES", "[]")
    Checkpointer(Trainer.build_model(cfg)).load(str(tmp_path / "a.pth"), strict=True)


def test_safetensors_of_timm_load(tmp_path, tiny_cfg):
    model = Trainer.build_model(tiny_cfg)
    state = {
        k: v + 1 if v.is_floating_point() else v for k, v in model.backbone.net.state_dict().items()
    }
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
    Checkpointer(model).load(str(tmp_path / "model.safetensors"))
    assert all(torch.equal(v, state[k]) for k, v in model.backbone.net.state_dict().items())


def test_files_that_are_no_checkpoint_of_this_model_are_refused(tmp_path, tiny_cfg):
    model = Trainer.build_model(tiny_cfg)
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "code.pth").write_bytes(pickle.dumps(os.system))
    for name, message in [
        ("other.pth", r"not weights for this model: .*backbone\.net"),
        ("list.pth", "no state dict|cannot be read as a checkpoint"),
        ("text.pth", "cannot be read as a checkpoint"),
        ("code.pth", "cannot be read as a checkpoint"),
        ("none.pth", "no such file"),
    ]:
        with pytest.raises(InputError, match=rf"{name}.*{message}"):
            Checkpointer(model).load(str(tmp_path / name))
