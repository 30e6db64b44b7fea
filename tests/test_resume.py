"""Resuming with other settings: what can takes effect, and what cannot is named."""

import copy
import logging
import re

import pytest
import torch
from conftest import make_tiny_cfg

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer
from mcibi_d2.engine.trainer import KeepBest


@pytest.fixture
def log():
    messages, logger = [], logging.getLogger("mcibi_d2.engine.resume")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def run(tmp_path):
    """A run of two iterations, to be resumed."""
    options = ["SOLVER.MAX_ITER", "8", "SOLVER.CHECKPOINT_PERIOD", "2", "SEED", "5"]

    def resume(*more):
        trainer = Trainer(make_tiny_cfg(tmp_path, *options, *more))
        trainer.resume_or_load(resume=True)
        return trainer

    trainer = resume()
    trainer.max_iter = 2
    trainer.train()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    return resume


def test_the_same_settings_are_not_spoken_of(run, log):
    run()
    assert log == []


def test_what_takes_effect(run, log):
    trainer = run(
        "SOLVER.BASE_LR", "0.004", "SOLVER.MOMENTUM", "0.5", "SOLVER.WEIGHT_DECAY", "0.25",
        "SOLVER.MAX_ITER", "4", "SOLVER.POLY_LR_POWER", "2.0", "MODEL.MCIBI.LOSS_WEIGHT_W", "0.125",
        "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", str([2.0] * 16),
    )  # fmt: skip
    assert len(log) == 1 and log[0].startswith("INFO Other settings than the run had")
    assert re.search(r"SOLVER.BASE_LR 0.004 \(was 0.0[\d]+\)", log[0])
    for key in ("MOMENTUM 0.5 (was 0.9)", "WEIGHT_DECAY 0.25", "MAX_ITER 4 (was 8)", "POWER 2.0",
                "LOSS_WEIGHT_W 0.125 (was 0.4)", "CLASS_WEIGHTS [2.0, 2.0"):  # fmt: skip
        assert key in log[0]
    seen, run_step = [], trainer.run_step

    def watched():
        seen.append(trainer.optimizer.param_groups[0]["lr"])
        run_step()

    trainer.run_step = watched
    trainer.train()
    assert seen == pytest.approx([0.004 * (1 - t / 4) ** 2 for t in (2, 3)])
    groups = trainer.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.5}
    assert max(group["weight_decay"] for group in groups) == 0.25


def test_what_cannot_is_named_each_time(run, log, tmp_path):
    others = ["SEED", "6", "MODEL.MCIBI.MEMORY.INIT", "first_batch_mean"]
    for _ in range(2):
        trainer = run(*others, "SOLVER.MAX_ITER", "4")
        said = next(message for message in log if message.startswith("WARNING"))
        assert "SEED is 6, the run has 5" in said
        assert "MODEL.MCIBI.MEMORY.INIT is 'first_batch_mean', the run has 'random_pixel'" in said
        assert trainer.seed == 5
        log.clear()
        trainer.train()
        (tmp_path / "last_checkpoint").write_text("model_0000003.pth")


@pytest.mark.parametrize("update", ["zero", "random", "learned"])
def test_rows_of_another_kind_are_refused(run, update):
    with pytest.raises(InputError, match=rf"UPDATE is '{update}', the run has 'cosine'"):
        run("MODEL.MCIBI.MEMORY.UPDATE", update)


def _spoil(checkpoint, path, value):
    *path, last = path.split("/")
    for name in path:
        checkpoint = checkpoint[name]
    checkpoint[last] = value


def test_a_spoilt_state_of_the_training_is_one_sentence(run, tmp_path):
    path = tmp_path / "model_0000001.pth"
    saved, trainer = torch.load(path, weights_only=True), run("DATASETS.TEST", "('scenes_val',)")
    state = saved["trainer"]["_trainer"]["optimizer"]["state"]
    for place, value in (
        ("config", "hello"), ("config", "a: ["), ("config", "!!python/name:os.system"),
        ("iteration", "x"), ("iteration", -5), ("seed", "x"), ("statistics", [1]),
        ("_trainer/optimizer", {}), ("_trainer", None),
        ("_trainer/optimizer/state", {k: {"momentum_buffer": torch.ones(3)} for k in state}),
    ):  # fmt: skip
        other = copy.deepcopy(saved)
        _spoil(other["trainer"], place, value)
        torch.save(other, path)
        with pytest.raises(InputError, match=r"state of the training cannot be taken up \([^\n]*$"):
            trainer.resume_or_load()
    torch.save({"model": saved["model"]}, path)
    with pytest.raises(InputError, match=r"model_0000001\.pth: holds a model alone"):
        trainer.resume_or_load()
    torch.save({**saved, "numbered": 5}, path)
    (tmp_path / "model_best.json").write_text("{")
    trainer.resume_or_load()
    keep = next(hook for hook in trainer._hooks if isinstance(hook, KeepBest))
    with pytest.raises(InputError, match=r"model_best\.json: cannot be read"):
        keep.before_train()


def test_other_groups_of_parameters_keep_their_momentum(run):
    same, other = run(), run("SOLVER.HEAD_LR_FACTOR", "10.0", "SOLVER.WEIGHT_DECAY_NORM", "0.0")
    assert len(same.optimizer.param_groups) == 1 and len(other.optimizer.param_groups) > 2
    buffers = [
        {n: t.optimizer.state[p]["momentum_buffer"] for n, p in t.model.named_parameters()}
        for t in (same, other)
    ]
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    rates = {group["lr"] / group["initial_lr"] for group in other.optimizer.param_groups}
    assert max(rates) == pytest.approx(min(rates)) and max(rates) < 1
    other.run_step = lambda: None
    other.train()
