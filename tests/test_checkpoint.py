import os
import pickle
from collections import Counter

import numpy as np
import pytest
import timm
import torch
from conftest import make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from fvcore.common.checkpoint import Checkpointer as FvcoreCheckpointer
from safetensors.torch import save_file

from mcibi_d2 import InputError
from mcibi_d2.engine import Checkpointer, Trainer, class_names
from mcibi_d2.engine.config_check import check_config
from mcibi_d2.engine.memory_init import read_rows
from mcibi_d2.predict import Predictor, load_model


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


def test_a_query_is_not_a_part_of_a_files_name(tmp_path, tiny_cfg):
    model = Trainer.build_model(tiny_cfg)
    checkpointer = Checkpointer(model, str(tmp_path / "a?b=c"))
    (tmp_path / "a?b=c").mkdir()
    checkpointer.save("model_0000001")
    checkpointer.resume_or_load("", resume=True)
    checkpointer.load(f"{tmp_path}/a?b=c/model_0000001.pth", strict=True)
    names = {k.removeprefix("backbone."): v for k, v in model.state_dict().items() if "net" in k}
    other = {k: v + 1 for k, v in names.items()}
    torch.save(other, tmp_path / "x.pth")
    checkpointer.load(f"{tmp_path}/x.pth?matching_heuristics=True")
    assert all(torch.equal(model.backbone.state_dict()[k], v) for k, v in other.items())
    with pytest.raises(InputError, match=r"x\.pth\?foo=1: \?foo is not known"):
        checkpointer.load(f"{tmp_path}/x.pth?foo=1")


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


@pytest.fixture
def turned():
    """A data set with the classes of the scenes in another order: sky and ground exchanged."""
    metadata = MetadataCatalog.get("scenes_train").as_dict()
    metadata.pop("name")
    names = list(metadata["stuff_classes"])
    metadata["stuff_classes"] = [names[1], names[0], *names[2:]]
    DatasetCatalog.register("test_turned", lambda: DatasetCatalog.get("scenes_train")[:2])
    MetadataCatalog.get("test_turned").set(**metadata)
    yield "test_turned"
    DatasetCatalog.remove("test_turned")
    MetadataCatalog.remove("test_turned")


OTHER_ORDER = r"class 0 is '.*', expected '.*'; they are the same names in another order"
ALLOWED = ["DATASETS.ALLOW_OTHER_CLASSES", "True"]


def test_class_names_are_compared_as_a_reader_would():
    same = ["Road", "traffic  light ", "sky"]
    class_names.require_same(["road", "Traffic Light", "sky"], "a", same, "b")
    class_names.require_same([], "a", same, "b")
    class_names.require_same(["road"], "a", same, "b")  # another number is another error
    message = "^b has other classes than a: class 1 is 'sky', expected 'traffic  light '; they are"
    with pytest.raises(InputError, match=message + " the same names.*ALLOW_OTHER_CLASSES"):
        class_names.require_same(same, "a", ["road", "sky", "Traffic light"], "b")
    with pytest.raises(InputError, match="class 2 is 'sea', expected 'sky'; DATASETS.ALLOW"):
        class_names.require_same(same, "a", ["road", "traffic light", "sea"], "b")


@pytest.mark.parametrize("train", [True, False])
def test_data_sets_of_one_config_have_the_same_classes(tmp_path, turned, train):
    options = ["DATASETS.TEST", f"('{turned}',)"]
    cfg = make_tiny_cfg(tmp_path, *options)
    with pytest.raises(InputError, match=f"data set {turned} has other .* scenes_.*{OTHER_ORDER}"):
        check_config(cfg, train=train)
    with pytest.raises(InputError, match=OTHER_ORDER):
        Trainer(cfg)
    check_config(make_tiny_cfg(tmp_path, *options, *ALLOWED), train=train)
    both = make_tiny_cfg(tmp_path, "DATASETS.TRAIN", f"('scenes_train', '{turned}')")
    with pytest.raises(InputError, match=OTHER_ORDER):
        Trainer(both)


@pytest.mark.parametrize("way", ["evaluation", "further training", "resuming"])
def test_a_checkpoint_of_other_classes_is_refused(tmp_path, turned, way):
    Trainer(make_tiny_cfg(tmp_path)).checkpointer.save("a")
    saved = torch.load(tmp_path / "a.pth", weights_only=True)
    assert saved["classes"] == MetadataCatalog.get("scenes_train").stuff_classes
    options = ["DATASETS.TRAIN", f"('{turned}',)", "MODEL.WEIGHTS", str(tmp_path / "a.pth")]

    def load(*more):
        cfg = make_tiny_cfg(tmp_path, *options, *more)
        if way == "evaluation":
            return load_model(cfg)
        return Trainer(cfg).resume_or_load(resume=way == "resuming")

    with pytest.raises(InputError, match=f"a.pth has other classes .*{OTHER_ORDER}"):
        load()
    load(*ALLOWED)
    if way == "evaluation":  # the test set's names count where there is no other
        cfg = make_tiny_cfg(tmp_path, *options[2:], "DATASETS.TRAIN", "()")
        cfg.DATASETS.TEST = (turned,)
        with pytest.raises(InputError, match=OTHER_ORDER):
            Predictor(cfg)
    del saved["classes"]  # as an older version has written it
    torch.save(saved, tmp_path / "a.pth")
    load()


def test_rows_of_a_file_are_for_the_same_classes(tmp_path, turned):
    trainer = Trainer(make_tiny_cfg(tmp_path))
    memory = trainer.model.sem_seg_head.memory
    memory.initialize(torch.rand(16, 16), torch.ones(16, dtype=torch.bool))
    trainer.checkpointer.save("a")
    options = ["MODEL.MCIBI.MEMORY.INIT", "file", "SOLVER.MAX_ITER", "1"]
    options += ["MODEL.MCIBI.MEMORY.INIT_FILE", str(tmp_path / "a.pth")]
    options += ["DATASETS.TRAIN", f"('{turned}',)"]
    with pytest.raises(InputError, match=f"INIT_FILE: .*a.pth has other .*{OTHER_ORDER}"):
        Trainer(make_tiny_cfg(tmp_path / "b", *options)).train()
    Trainer(make_tiny_cfg(tmp_path / "b", *options, *ALLOWED)).train()


def test_a_memory_of_half_the_classes_with_two_slots_is_left_out(tmp_path):
    options = ["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "8", "MODEL.MCIBI.MEMORY.SLOTS", "2"]
    model = Trainer.build_model(make_tiny_cfg(tmp_path, *options))
    memory = model.sem_seg_head.memory
    memory.initialize(torch.rand(16, 16), torch.ones(16, dtype=torch.bool))
    Checkpointer(model, str(tmp_path)).save("a")
    other = Trainer.build_model(make_tiny_cfg(tmp_path))
    Checkpointer(other).load(str(tmp_path / "a.pth"))
    assert other.sem_seg_head.memory.rows.shape == memory.rows.shape
    assert not other.sem_seg_head.memory.initialized.any()
    with pytest.raises(InputError, match="INIT_FILE: .*is for 8 classes, expected one for 16"):
        read_rows(str(tmp_path / "a.pth"), other.sem_seg_head.memory)


@pytest.mark.parametrize(
    "address",
    ["http://127.0.0.1:9/x.pth", "catalog://x", "s3://a/b.pth", "scenes://val/00000/image.png"],
)
def test_weights_that_cannot_be_downloaded_are_one_sentence(address):
    with pytest.raises(InputError, match=rf"WEIGHTS: {address}: cannot be downloaded \(.+\), exp"):
        Checkpointer(torch.nn.Linear(1, 1)).load(address)


def test_the_newest_checkpoints_are_kept(tmp_path):
    """Over resuming, too; files that the run did not write stay, whatever they are called."""
    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.CHECKPOINTS_KEPT", "2"]
    names = ["model_0000777.pth", "model_0000000.pth.bak", "model_1.pth", "model_best.pth", "x.pth"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    Trainer(make_tiny_cfg(tmp_path, *options)).train()
    written = {"model_0000002.pth", "model_0000003.pth", "model_final.pth"}
    assert {p.name for p in tmp_path.glob("*.pth*")} == {*names, *written}
    trainer = Trainer(make_tiny_cfg(tmp_path, *options, "SOLVER.MAX_ITER", "6"))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    written = {"model_0000004.pth", "model_0000005.pth", "model_final.pth"}
    assert {p.name for p in tmp_path.glob("*.pth*")} == {*names, *written}
    assert all((tmp_path / name).read_bytes() == b"mine" for name in names)


@pytest.mark.parametrize("kept", ["0", "-1"])
def test_all_checkpoints_may_be_kept(tmp_path, kept):
    options = ["SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.CHECKPOINTS_KEPT", kept]
    Trainer(make_tiny_cfg(tmp_path, *options)).train()
    assert len(list(tmp_path.glob("model_0*.pth"))) == 4


def test_the_old_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpointer = Checkpointer(torch.nn.Linear(2, 2), str(tmp_path), kept=1)
    checkpointer.save("model_0000001")
    save = torch.save

    def full_disk(data, file):
        assert (tmp_path / "model_0000001.pth").exists()
        save(data, file)
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpointer.save("model_0000002")
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert [p.name for p in tmp_path.glob("*.pth")] == ["model_0000001.pth"]


def test_no_file_has_others_deleted(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "victim.pth").write_bytes(b"mine")
    checkpointer = Checkpointer(torch.nn.Linear(2, 2), str(tmp_path / "run"), kept=1)
    checkpointer.save("model_0000001")
    loaded = torch.load(tmp_path / "run/model_0000001.pth")
    loaded["numbered"] = ["../victim", "model_0000001", str(tmp_path / "victim"), 7]
    torch.save(loaded, tmp_path / "run/model_0000001.pth")
    checkpointer.resume_or_load("", resume=True)
    checkpointer.save("model_0000002")
    assert (tmp_path / "victim.pth").exists()
    assert [p.name for p in (tmp_path / "run").glob("*.pth")] == ["model_0000002.pth"]


def test_a_last_checkpoint_that_is_gone_is_named(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(InputError, match=r"last_checkpoint: names 'model_0000009.pth', which is"):
        Checkpointer(torch.nn.Linear(2, 2), str(tmp_path)).resume_or_load("", resume=True)


def test_checkpoints_hold_what_every_torch_reads(tmp_path):
    class Part:
        def state_dict(self):
            return {
                "counts": Counter(a=1), "numbers": (np.float64(0.5), [np.int64(3), True]),
                "array": np.ones(2), "device": torch.device("cpu"), "text": np.str_("x"),
            }  # fmt: skip

    Checkpointer(torch.nn.Linear(2, 2), str(tmp_path), part=Part()).save("a", more=np.bool_(True))
    loaded = torch.load(tmp_path / "a.pth", weights_only=True)
    assert torch.equal(loaded["part"].pop("array"), torch.ones(2, dtype=torch.float64))
    assert loaded["part"] == {"counts": {"a": 1}, "numbers": (0.5, [3, True]), "text": "x"}
    assert loaded["more"] is True and type(loaded["part"]["counts"]) is dict
