import copy
import json
import math
import re
from types import SimpleNamespace

import processes
import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.utils.events import EventStorage
from hypothesis import given
from hypothesis import strategies as st

from mcibi_d2 import InputError
from mcibi_d2.data import build_train_loader
from mcibi_d2.engine import MemoryInitHook, MemoryUpdateHook, Trainer
from mcibi_d2.engine.memory_hooks import poly_momentum
from mcibi_d2.modeling import FeatureMemory


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.floats(0.1, 2.0))
def test_momentum_is_equation_7(t, m0, p):
    expected = (1 - t / 1000) ** p * (m0 - m0 / 100) + m0 / 100
    assert math.isclose(poly_momentum(t, 1000, m0, p), expected, rel_tol=1e-12)


def test_update_hook_comes_before_the_learning_rate_and_the_checkpoint(tiny_cfg):
    order = [type(h) for h in Trainer(tiny_cfg)._hooks]
    update = order.index(MemoryUpdateHook)
    assert order.index(MemoryInitHook) < update < order.index(hooks.LRScheduler)
    assert update < order.index(hooks.PeriodicCheckpointer)


def test_baseline_has_no_memory_hooks(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "MODEL.MCIBI.ENABLED", "False")
    assert not {MemoryInitHook, MemoryUpdateHook} & {type(h) for h in Trainer(cfg)._hooks}


def test_memory_moves_once_per_step_by_what_the_step_observed(tmp_path, monkeypatch):
    trainer = Trainer(make_tiny_cfg(tmp_path / "output"))
    memory = trainer.model.sem_seg_head.memory
    commits = []

    def commit(momentum):
        before = copy.deepcopy(memory)
        type(memory).commit(memory, momentum)
        commits.append((momentum, before._sums[:, -2].sum().item()))
        assert not memory._sums.any()

    monkeypatch.setattr(memory, "commit", commit)
    trainer.train()
    assert [m for m, _ in commits] == [poly_momentum(t, 4, 0.9, 0.9) for t in range(4)]
    assert all(pixels > 1000 for _, pixels in commits)
    assert memory.initialized.sum() > 8 and memory.rows.isfinite().all()


@pytest.mark.parametrize("schedule", ["poly", "constant", "lr"])
def test_momentum_schedules(tmp_path, monkeypatch, schedule):
    cfg = make_tiny_cfg(
        tmp_path,
        "MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE", schedule,
        "MODEL.MCIBI.MEMORY.MOMENTUM", "0.8",
        "SOLVER.HEAD_LR_FACTOR", "10.0",
        "SOLVER.WARMUP_ITERS", "2",
        "SOLVER.WARMUP_FACTOR", "0.5",
    )  # fmt: skip
    trainer = Trainer(cfg)
    memory = trainer.model.sem_seg_head.memory
    seen, expected = [], []
    step, commit = trainer.run_step, memory.commit

    def run_step():
        t, lr = trainer.iter, trainer.optimizer.param_groups[-1]["lr"]  # of this very step
        rule = {
            "poly": poly_momentum(t, 4, 0.8, 0.9),
            "constant": 0.8,
            "lr": 0.8 * lr / (cfg.SOLVER.BASE_LR * 10),
        }
        expected.append(rule[schedule])
        step()

    trainer.run_step = run_step
    monkeypatch.setattr(memory, "commit", lambda m: (seen.append(m), commit(m)))
    trainer.train()
    assert seen == pytest.approx(expected)
    if schedule == "lr":
        assert seen[0] == pytest.approx(0.4)


def test_unknown_schedule_is_refused():
    with pytest.raises(InputError, match="'cubic'.*poly, constant, lr"):
        MemoryUpdateHook(schedule="cubic")


def test_memory_loss_starts_at_its_iteration(tmp_path):
    trainer = Trainer(make_tiny_cfg(tmp_path, "MODEL.MCIBI.LOSS_START_M", "2"))
    losses = []
    head = trainer.model.sem_seg_head
    head.register_forward_hook(
        lambda *args: losses.append(args[-1][1]["loss_m"].item()) if args[0].training else None
    )
    trainer.train()
    assert [loss > 0 for loss in losses] == [False, False, True, True]


def test_health_is_logged_when_a_period_is_over(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "2")
    trainer = Trainer(cfg)
    looked = []
    memory = trainer.model.sem_seg_head.memory
    health = memory.health
    memory.health = lambda: (looked.append(trainer.iter), health())[1]
    trainer.train()
    assert looked == [1, 3]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    last = {key: value for line in lines for key, value in line.items()}
    expected = health()
    expected["h2_accuracy"] = trainer.model.sem_seg_head.rows_accuracy()
    expected["momentum"] = torch.tensor(poly_momentum(3, 4, 0.9, 0.9))
    for name, value in expected.items():
        assert last[f"memory/{name}"] == pytest.approx(value.item(), abs=1e-5)
    assert last["memory/initialized"] > 0.5 and last["memory/row_norm"] > 0
    assert 0 <= last["memory/h2_accuracy"] <= 1 and -1 <= last["memory/cosine"] <= 1


def test_controls_log_what_they_have(tmp_path):
    for update, expected in (
        ("zero", set()),
        ("random", {"initialized", "row_norm", "cosine", "h2_accuracy"}),
    ):
        folder = tmp_path / update
        Trainer(make_tiny_cfg(folder, "MODEL.MCIBI.MEMORY.UPDATE", update)).train()
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        names = {key.removeprefix("memory/") for line in lines for key in line if "memory/" in key}
        assert names == expected


def _make_trainer(memory):
    model = torch.nn.Module()
    model.memory = memory
    return SimpleNamespace(model=model, iter=0, max_iter=100, optimizer=None)


def test_a_feature_that_is_not_finite_names_class_and_iteration_at_the_next_period():
    memory = FeatureMemory(4, 3)
    hook = MemoryUpdateHook(periods=(5,), class_names=["sky", "road", "tree", "car"])
    hook.trainer = _make_trainer(memory)
    hook.before_train()
    rows = []
    with EventStorage():
        for iteration in range(5):
            hook.trainer.iter = iteration
            hook.before_step()
            features = torch.rand(1, 3, 4, 4)
            labels = torch.tensor([0, 2, 255, 3]).view(1, 4, 1).expand(1, 4, 4)
            if iteration == 2:
                features[0, 1, 3, 3] = float("inf")  # a car
            if iteration == 3:
                features[0, 0, 0, 0] = float("nan")
            memory.observe(features, labels)
            if iteration == 4:
                with pytest.raises(InputError) as error:
                    hook.after_step()
            else:
                hook.after_step()
            rows.append(memory.rows.clone())
    expected = "the features of class 3 (car) were not finite, or too large to be squared, at"
    assert str(error.value).startswith(f"{expected} iteration 2, expected finite ones")
    assert torch.equal(rows[2][3], rows[1][3]) and not torch.equal(rows[2][0], rows[1][0])
    assert memory.rows.isfinite().all()


def test_a_loss_that_is_not_finite_names_the_class_whose_features_were_not(tmp_path):
    trainer = Trainer(make_tiny_cfg(tmp_path))
    head = trainer.model.sem_seg_head

    def spoil(module, args, output):
        if trainer.iter == 1 and head.training:
            output = output.clone()
            output[0, 0, 0, 0] = float("nan")
        return output

    head.project.register_forward_hook(spoil)
    pattern = r"became nan at iteration 1; the files of .*; the features of class \d+ \(\w+\)"
    with pytest.raises(InputError, match=pattern) as error:
        trainer.train()
    assert "were not finite, or too large to be squared, at iteration 1; expected" in str(
        error.value
    )
    # The pixels of that corner have one class or two, not all.
    assert len(re.findall(r"\d+ \(\w+\)", str(error.value))) <= 3
    assert head.memory.rows.isfinite().all()


def _not_finite_on_one(rank, world_size, folder):
    memory = FeatureMemory(3, 3)
    hook = MemoryUpdateHook(periods=(1,))
    hook.trainer = _make_trainer(memory)
    hook.before_train()
    features = torch.rand(1, 3, 4, 4)
    if rank == 1:
        features[:] = float("nan")
    memory.observe(features, torch.full((1, 4, 4), rank))
    with (
        EventStorage(),
        pytest.raises(InputError, match="class 1 were not finite, or .* at iteration 0"),
    ):
        hook.after_step()
    assert memory.initialized.tolist() == [True, False, False]


def test_every_process_stops_when_one_has_a_feature_that_is_not_finite(tmp_path):
    processes.run(_not_finite_on_one, 2, tmp_path)


@pytest.mark.parametrize(
    "stop, options",
    [
        (1, []),
        (2, ["MODEL.MCIBI.MEMORY.MOMENTUM_SCHEDULE", "lr", "MODEL.MCIBI.MEMORY.SLOTS", "2"]),
        (3, ["MODEL.MCIBI.MEMORY.UPDATE", "learned", "MODEL.MCIBI.LOSS_START_M", "3"]),
        (4, ["MODEL.MCIBI.RCL_BN", "batch", "MODEL.MCIBI.MEMORY.INIT", "first_batch_mean"]),
    ],
)
def test_resumed_after_any_iteration_the_memory_is_the_same(tmp_path, stop, options):
    options = [*options, "SOLVER.MAX_ITER", "5", "SOLVER.CHECKPOINT_PERIOD", "1"]
    options += ["SOLVER.CHECKPOINTS_KEPT", "0"]
    torch.manual_seed(0)
    Trainer(make_tiny_cfg(tmp_path, *options)).train()
    whole = torch.load(tmp_path / "model_final.pth")["model"]
    (tmp_path / "last_checkpoint").write_text(f"model_{stop - 1:07d}.pth")
    trainer = Trainer(make_tiny_cfg(tmp_path, *options))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == stop
    trainer.train()
    resumed = trainer.model.state_dict()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_bases_of_emanet_are_committed_without_a_memory(tmp_path):
    options = ["MODEL.MCIBI.CONTEXT", "ema", "MODEL.MCIBI.ENABLED", "False"]
    trainer = Trainer(make_tiny_cfg(tmp_path, *options, "SOLVER.MAX_ITER", "2"))
    context = trainer.model.sem_seg_head.context
    before = context.bases.clone()
    trainer.train()
    assert not torch.equal(context.bases, before) and not context._sums.any()


def test_trains_in_detectron2s_own_segmentor(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.model.sem_seg_head.memory.initialized.all()


def other_trainer(tmp_path, kind, hooks_):
    """A trainer of Detectron2's own, with hooks, that has trained two iterations; its model."""
    cfg = make_tiny_cfg(tmp_path, "SOLVER.MAX_ITER", "2", "SEED", "1")
    torch.manual_seed(0)
    if kind == "DefaultTrainer":

        class Other(DefaultTrainer):
            build_train_loader = staticmethod(build_train_loader)

            def build_hooks(self):
                return [*hooks_, *super().build_hooks()]

        trainer = Other(cfg)
        # Of the paper's schedule.
        assert (
            trainer.scheduler.get_last_lr()[0] > 0
            and cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR"
        )
        trainer.train()
        return trainer.model
    model = Trainer.build_model(cfg)
    wrapped = torch.compile(model, backend="eager", disable=True) if kind == "wrapped" else model
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    trainer = SimpleTrainer(wrapped, build_train_loader(cfg), optimizer)
    trainer.register_hooks(hooks_)
    trainer.train(0, 2)
    return model


@pytest.mark.parametrize("kind", ["DefaultTrainer", "SimpleTrainer", "wrapped"])
def test_the_hooks_work_in_detectron2s_trainers(tmp_path, kind):
    model = other_trainer(tmp_path, kind, [MemoryInitHook(seed=1), MemoryUpdateHook()])
    trainer = Trainer(make_tiny_cfg(tmp_path, "SEED", "1"))
    hook = MemoryInitHook(seed=1)
    hook.trainer = trainer
    hook.before_train()
    memory, drawn = model.sem_seg_head.memory, trainer.model.sem_seg_head.memory
    assert memory.initialized.sum() >= drawn.initialized.sum() > 8
    assert memory._waiting == 0 and memory.rows.isfinite().all()


def test_a_trainer_without_the_parts_that_the_hooks_need_is_told_so(tmp_path):
    model = Trainer.build_model(make_tiny_cfg(tmp_path))
    for hook, parts, missing in (
        (MemoryInitHook(), {}, "model"),
        (MemoryInitHook(), {"model": model}, "data_loader"),
        (MemoryUpdateHook(), {}, "model"),
        (MemoryUpdateHook(schedule="lr"), {"model": model}, "optimizer"),
    ):
        hook.trainer = SimpleNamespace(start_iter=0, **parts)
        with pytest.raises(InputError, match=f"{type(hook).__name__} found no {missing} in"):
            hook.before_train()


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_batches_that_are_never_committed_are_said_once(caplog, monkeypatch):
    batch = torch.rand(1, 3, 2, 2), torch.zeros(1, 4, 4).long()
    memory = FeatureMemory(2, 3)
    for _ in range(3):  # gradients of 16 batches at a time
        for _ in range(16):
            memory.observe(*batch)
        memory.commit(0.5)
    assert messages(caplog) == []
    for _ in range(100):
        memory.observe(*batch)
    (message,) = messages(caplog)
    assert "none was committed" in message and "mcibi_d2.engine.MemoryUpdateHook" in message
    caplog.clear()
    for update in ("zero", "random"):
        memory = FeatureMemory(2, 3, update=update)
        for _ in range(100):
            memory.observe(*batch)
    assert messages(caplog) == []


def test_an_evaluation_without_a_single_row_says_so(tmp_path, caplog, monkeypatch):
    options = ["MODEL.MCIBI.AGGREGATION", "none"]
    images = [{"image": torch.zeros(3, 33, 33)}]
    for extra, expected in (
        ([], 1),
        (options, 1),
        (["MODEL.MCIBI.MEMORY.UPDATE", "zero"], 0),
        (["MODEL.MCIBI.MEMORY.UPDATE", "random"], 0),
        (["MODEL.MCIBI.ENABLED", "False"], 0),
    ):
        model = Trainer.build_model(make_tiny_cfg(tmp_path, *extra)).eval()
        caplog.clear()
        for _ in range(3):
            model(images)
            model.load_state_dict(model.state_dict())
        found = [text for text in messages(caplog) if "was never initialised" in text]
        assert len(found) == expected, extra
    # With a row there is nothing to say, and the device is asked once.
    model = Trainer.build_model(make_tiny_cfg(tmp_path)).eval()
    memory = model.sem_seg_head.memory
    memory.initialize(torch.rand(16, 16), torch.arange(16) == 3)
    caplog.clear()
    model(images)
    asked = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: asked.append(1) or True)
    memory.warn_if_empty()
    assert messages(caplog) == asked == []


def test_the_first_draw_says_nothing_of_an_empty_memory(tmp_path, caplog, monkeypatch):
    cfg = make_tiny_cfg(tmp_path, "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    Trainer(cfg).train()
    assert not [text for text in messages(caplog) if "never initialised" in text]


def test_precise_bn_leaves_the_memory_alone(tmp_path):
    trainer = Trainer(make_tiny_cfg(tmp_path, "MODEL.MCIBI.RCL_BN", "batch"))
    batch = next(iter(trainer.data_loader))
    head = trainer.model.sem_seg_head
    head.memory.initialize(torch.rand(16, 16), torch.ones(16, dtype=torch.bool))
    head.h2[1].momentum = 1.0
    seen = []
    head.h2[1].register_forward_hook(lambda _, args, out: seen.append(args[0]))
    with torch.no_grad():
        trainer.model(batch)
    assert not head.memory._sums.any()
    # The statistics are the pixels', not the rows'.
    torch.testing.assert_close(head.h2[1].running_mean, seen[0].mean(dim=(0, 2, 3)))
    trainer.model(batch)
    assert trainer.model.sem_seg_head.memory._sums.any()
