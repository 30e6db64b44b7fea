import copy
import json
import logging
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import processes
import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer, argument_parser, setup
from mcibi_d2.engine.train_step import TrainStep
from mcibi_d2.tools import train as train_tool


def assert_equal_models(path, other):
    """Weights and memory, bit for bit."""
    states = [torch.load(p)["model"] for p in (path, other)]
    assert states[0].keys() == states[1].keys()
    different = [k for k in states[0] if not torch.equal(states[0][k], states[1][k])]
    assert different == []


def test_trains_logs_evaluates_and_keeps_the_best(tmp_path, three_scenes):
    Trainer(
        make_tiny_cfg(
            tmp_path, *three_scenes, "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2"
        )
    ).train()
    files = set(os.listdir(tmp_path))
    assert {"model_0000001.pth", "model_final.pth", "model_best.pth", "last_checkpoint",
            "metrics.json"} <= files  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not any(name.endswith(".tmp") for name in files)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    keys = set().union(*lines)
    assert {"loss_w", "loss_m", "loss_o", "loss_aux", "total_loss", "lr", "sem_seg/mIoU",
            "memory/momentum"} <= keys  # fmt: skip


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision(tmp_path, precision):
    cfg = make_tiny_cfg(tmp_path, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", precision)
    trainer = Trainer(cfg)
    types = set()
    trainer.model.sem_seg_head.project.register_forward_hook(
        lambda module, _, output: types.add(output.dtype) if module.training else None
    )
    trainer.train()
    assert types == {getattr(torch, precision)}
    memory = trainer.model.sem_seg_head.memory
    assert memory.rows.dtype == torch.float32 and memory.rows.isfinite().all()
    state = torch.load(tmp_path / "model_final.pth")["trainer"]["_trainer"]
    assert ("grad_scaler" in state) == (precision == "float16")


def test_optimizer_has_a_head_factor_and_the_papers_weight_decay(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "SOLVER.HEAD_LR_FACTOR", "10.0", "SOLVER.BASE_LR", "0.01")
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    head = {id(p) for p in model.sem_seg_head.parameters()}
    for group in optimizer.param_groups:
        assert group["weight_decay"] == 0.0005
        for p in group["params"]:
            assert group["lr"] == pytest.approx(0.1 if id(p) in head else 0.01)


def test_head_factor_is_for_the_backbones_new_layers_too(tmp_path):
    cfg = make_tiny_cfg(
        tmp_path, "SOLVER.HEAD_LR_FACTOR", "10.0", "SOLVER.BASE_LR", "0.01",
        "MODEL.TIMM.NAME", "test_vit", "MODEL.TIMM.OUTPUT_STRIDE", "16",
        "MODEL.TIMM.OUT_INDICES", "(2, 3, 4, 5)", "MODEL.TIMM.NECK", "mla",
    )  # fmt: skip
    model = Trainer.build_model(cfg)
    rates = {
        id(p): group["lr"]
        for group in Trainer.build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    pretrained = {id(p) for p in model.backbone.net.parameters()}
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(0.01 if id(p) in pretrained else 0.1), name


def test_learning_rate_is_poly(tmp_path):
    options = ["SOLVER.MAX_ITER", "50", "SOLVER.POLY_LR_CONSTANT_ENDING", "0.1"]
    cfg = make_tiny_cfg(tmp_path, *options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler = Trainer.build_lr_scheduler(cfg, optimizer)
    for t in range(50):
        expected = cfg.SOLVER.BASE_LR * max((1 - t / 50) ** 0.9, 0.1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        scheduler.step()


def test_warmup_is_optional_and_other_schedules_are_detectron2s(tmp_path):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    for name in ("WarmupPolyLR", "WarmupCosineLR"):
        cfg = make_tiny_cfg(
            tmp_path, "SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.WARMUP_ITERS", "2",
            "SOLVER.WARMUP_FACTOR", "0.5",
        )  # fmt: skip
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        Trainer.build_lr_scheduler(cfg, optimizer)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_stopped_and_resumed_equals_unbroken(tmp_path, three_scenes):
    options = [*three_scenes, "TEST.EVAL_PERIOD", "2", "SOLVER.MAX_ITER", "6",
               "SOLVER.CHECKPOINT_PERIOD", "3"]  # fmt: skip
    Trainer(make_tiny_cfg(tmp_path / "whole", *options)).train()

    class Stop(Exception):
        pass

    torch.manual_seed(0)  # as default_setup does, for the initial weights
    trainer = Trainer(make_tiny_cfg(tmp_path / "broken", *options))
    run_step = trainer.run_step

    def stop_at_four():
        if trainer.iter == 4:
            raise Stop
        run_step()

    trainer.run_step = stop_at_four
    with pytest.raises(Stop):
        trainer.train()
    torch.manual_seed(99)
    trainer = Trainer(make_tiny_cfg(tmp_path / "broken", *options))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 3
    trainer.train()
    assert_equal_models(tmp_path / "whole/model_final.pth", tmp_path / "broken/model_final.pth")
    states = [torch.load(tmp_path / d / "model_final.pth")["trainer"] for d in ("whole", "broken")]
    assert states[0]["iteration"] == states[1]["iteration"] == 5
    for a, b in zip(*(s["_trainer"]["optimizer"]["state"].values() for s in states), strict=True):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])


def test_random_seed_is_kept_for_resuming(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "SEED", "-1")
    trainer = Trainer(cfg)
    trainer.train()
    again = Trainer(cfg)
    assert again.seed != trainer.seed
    again.resume_or_load(resume=True)
    assert again.seed == trainer.seed


def evaluates_to(monkeypatch, *values):
    """Let the evaluations of all trainers give these numbers, one after the other."""
    values = iter(values)
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *_: {"sem_seg": {"mIoU": next(values)}})
    )


def test_best_is_kept_over_resuming(tmp_path, monkeypatch, three_scenes):
    options = [*three_scenes, "TEST.EVAL_PERIOD", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
    evaluates_to(monkeypatch, 10.0, 50.0, 11.0, 60.0, 20.0)
    Trainer(make_tiny_cfg(tmp_path, *options)).train()

    def best():
        record = json.loads((tmp_path / "model_best.json").read_text())
        iteration = torch.load(tmp_path / "model_best.pth")["trainer"]["iteration"]
        return record["value"], iteration

    assert best()[0] == 50.0
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    trainer = Trainer(make_tiny_cfg(tmp_path, *options, "SOLVER.MAX_ITER", "8"))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    assert best()[0] == 60.0
    # On other images it is another number.
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    other = ["DATASETS.TEST", "('scenes_val',)", "TEST.EVAL_PERIOD", "0", "SOLVER.MAX_ITER", "7"]
    trainer = Trainer(make_tiny_cfg(tmp_path, *options, *other))
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert best()[0] == 20.0


def test_error_in_the_last_iterations_keeps_nothing(tmp_path, monkeypatch, three_scenes):
    options = [*three_scenes, "SOLVER.CHECKPOINT_PERIOD", "2"]
    trainer = Trainer(make_tiny_cfg(tmp_path, *options))
    forward = trainer.model.forward

    def spoiled(batch):
        result = forward(batch)
        if trainer.model.training and trainer.iter == 2:
            return {name: loss * float("nan") for name, loss in result.items()}
        return result

    trainer.model.forward = spoiled
    with pytest.raises(InputError, match="at iteration 2"):
        trainer.train()
    assert sorted(p.name for p in tmp_path.glob("*.pth")) == ["model_0000001.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize("at", [1, 3])
def test_loss_that_is_not_finite_names_itself_and_the_files(tmp_path, at):
    cfg = make_tiny_cfg(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "8")
    trainer = Trainer(cfg)
    forward = trainer.model.forward
    batches = []

    def spoiled(batch):
        result = forward(batch)
        if trainer.model.training:
            batches.append([x["file_name"] for x in batch])
            if trainer.iter == at:
                result["loss_w"] = result["loss_w"] * float("nan")
        return result

    trainer.model.forward = spoiled
    with pytest.raises(InputError, match=rf"loss_w became nan at iteration {at}") as error:
        trainer.train()
    assert all(name in str(error.value) for name in batches[at])
    # The checkpoint of the iteration in which it happened was not written; earlier ones are whole.
    saved = sorted(p.name for p in tmp_path.glob("model_*.pth"))
    assert saved == ([] if at == 1 else ["model_0000001.pth"])
    for name in saved:
        assert all(v.isfinite().all() for v in torch.load(tmp_path / name)["model"].values())


def _bad_loss_on_one(rank, world_size, folder):
    trainer = Trainer(make_tiny_cfg(f"{folder}/output"))
    forward = trainer.model.module.forward

    def spoiled(batch):
        result = forward(batch)
        if trainer.model.training and rank == 1 and trainer.iter == 2:
            return {name: loss * float("nan") for name, loss in result.items()}
        return result

    trainer.model.module.forward = spoiled
    with pytest.raises(InputError) as error:
        trainer.train()
    with open(f"{folder}/{rank}.txt", "w") as file:
        file.write(str(error.value))


def test_every_process_says_the_same_of_a_bad_loss(tmp_path):
    processes.run(_bad_loss_on_one, 2, tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second and "at iteration 2;" in first


# --- real processes, from the command line


def command(folder, *options, program=(sys.executable,), flags=(), train=()):
    return [
        *program, *(train or [str(ROOT / "train_net.py")]),
        "--config-file", str(ROOT / "configs/scenes/mcibi_tiny.yaml"), *flags,
        "OUTPUT_DIR", str(folder), "SOLVER.IMS_PER_BATCH", "2", "INPUT.CROP.SIZE", "(65,97)",
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.MCIBI.ATTENTION_DIM", "8",
        "MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS", "[]",
        "DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", "()", *options,
    ]  # fmt: skip


def call(*args, **kwargs):
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*args, **kwargs), capture_output=True, text=True, timeout=240, env=environment
    )


@pytest.mark.slow  # test_stop.py stops runs in mid iteration, too
def test_killed_in_mid_iteration_and_resumed_equals_unbroken(tmp_path):
    options = ["SOLVER.MAX_ITER", "12", "SOLVER.CHECKPOINT_PERIOD", "4"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        command(broken, *options), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment,
    )  # fmt: skip
    deadline = time.time() + 120
    while not (broken / "last_checkpoint").exists() and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (broken / "last_checkpoint").exists() and not (broken / "model_final.pth").exists()
    resumed = call(broken, *options, flags=["--resume"])
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "Resuming at iteration" in resumed.stdout + resumed.stderr
    whole = call(tmp_path / "whole", *options)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert_equal_models(tmp_path / "whole/model_final.pth", broken / "model_final.pth")


def test_two_processes_by_detectron2s_launcher_and_by_torchrun(tmp_path):
    url = ["--num-gpus", "2", "--dist-url", "auto"]
    spawned = call(tmp_path / "spawned", "SOLVER.MAX_ITER", "3", flags=url)
    assert spawned.returncode == 0, spawned.stderr[-2000:]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--master-port", "0", "--standalone")  # fmt: skip
    module = ("-m", "mcibi_d2.tools.train")
    run = call(tmp_path / "torchrun", "SOLVER.MAX_ITER", "3", program=torchrun, train=module)
    assert run.returncode == 0, run.stderr[-2000:]
    assert_equal_models(tmp_path / "spawned/model_final.pth", tmp_path / "torchrun/model_final.pth")


def _train(rank, world_size, folder):
    trainer = Trainer(make_tiny_cfg(f"{folder}/output", "SOLVER.MAX_ITER", "5"))
    trainer.train()
    torch.save(trainer.model.module.state_dict(), f"{folder}/{rank}.pth")


def test_processes_end_with_equal_weights_and_memories(tmp_path):
    processes.run(_train, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert first["sem_seg_head.memory.initialized"].any()
    # The running statistics of plain batch norms, too.
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


@pytest.mark.parametrize(
    "options, flags, message",
    [
        (["MODEL.MCIBI.FUSON", "add"], [], r"FUSON.*did you mean MODEL\.MCIBI\.FUSION\?"),
        (["MODEL.MCIBI.FUSION", "mul"], [], r"MODEL\.MCIBI\.FUSION is 'mul', expected one of"),
        (["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "7"], [], "is 7, but scenes_train has 16 classes"),
        (["DATASETS.TRAIN", "('scene_train',)"], [], "'scene_train' is not a reg.*scenes_train"),
        (["MODEL.WEIGHTS", "/nowhere.pth"], [], r"MODEL\.WEIGHTS: /nowhere\.pth: no such file"),
        (["OUTPUT_DIR", "/dev/null/x"], [], "OUTPUT_DIR: /dev/null/x: cannot be written to"),
        (["SOLVER.IMS_PER_BATCH", "3"], ["--num-gpus", "2"], "is 3, expected a multiple of the 2"),
        ([], ["--eval-only"], "--eval-only needs MODEL.WEIGHTS"),
        ([], ["--num-gpus", "0"], "--num-gpus is 0"),
        ([], ["--num-machines", "0"], r"--machine-rank is 0, expected 0 up to --num-machines .0."),
        ([], ["--machine-rank", "7"], r"--machine-rank is 7, expected 0 up to --num-machines .1."),
        (["--opts", "SEED", "x"], [], "SEED is 'x', expected a whole number"),
        (["MODEL.DEVICE", "gpu"], [], "MODEL.DEVICE is 'gpu', expected cuda, cpu"),
        (["SOLVER.MAX_ITER", "0"], [], "SOLVER.MAX_ITER is 0, expected a whole number"),
        (["INPUT.TEST_RESIZE", "big"], [], "'big', expected one of shortest_edge, fixed"),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "254"], [], "is 254, but scenes_train ignores 255"),
        (["MODEL.SEM_SEG_HEAD.IGNORE_VALUE", "-1"], [], r"is -1, expected a whole .* 0\.\.65535"),
        (["DATASETS.TRAIN", "('ade20k_150_train',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "150"], [],
         "ADEChallengeData2016.*DETECTRON2_DATASETS"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence_before_training(
    tmp_path, options, flags, message, monkeypatch, capsys
):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "none"))
    program, *arguments = command(tmp_path / "output", *options, program=(), flags=flags)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    # In this process: starting one costs seconds. The interpreter prints what it exits with.
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(program, run_name="__main__")
    said = capsys.readouterr().err
    if isinstance(stopped.value.code, str):
        said += stopped.value.code
    else:
        assert stopped.value.code == 1
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said
    assert re.search(message, lines[0]), lines[0]


@pytest.mark.parametrize(
    "spoil, workers, message",
    [
        ("label", "0", r"train0\.png: label 200 is not in the table of camvid_11_train"),
        ("image", "1", r"train0\.png: cannot be read as an image"),
    ],
)
def test_bad_files_are_one_sentence_from_any_worker(tmp_path, monkeypatch, spoil, workers, message):
    folder = tmp_path / "CamVid"
    (folder / "train").mkdir(parents=True)
    (folder / "trainannot").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "train/train0.png")
    Image.new("L", (40, 30), 200).save(folder / "trainannot/train0.png")
    if spoil == "image":
        whole = (folder / "train/train0.png").read_bytes()
        (folder / "train/train0.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train.txt").write_text("/x/train/train0.png /x/trainannot/train0.png\n")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    run = call(
        tmp_path / "output", "DATASETS.TRAIN", "('camvid_11_train',)",
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "11", "DATALOADER.NUM_WORKERS", workers,
    )  # fmt: skip
    assert run.returncode == 1
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), run.stderr[-2000:]
    assert "Traceback" not in run.stdout + run.stderr
    assert re.search(message, (tmp_path / "output/log.txt").read_text())


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Check a command line of train_net.py, without what comes after."""

    def run(*flags, options=(), folder="run"):
        _, *arguments = command(tmp_path / folder, *options, program=(), flags=flags)
        return setup(argument_parser().parse_args(arguments))

    return run


def test_a_used_folder_is_refused(tmp_path, start):
    folder = tmp_path / "run"
    start()
    (folder / "log.txt").write_text("of a run that has written no checkpoint")
    (folder / "model_1.pth").write_text("of something else")
    start()
    for name in ("model_0000003.pth", "model_best.pth", "model_final.pth"):
        (folder / name).write_text("x")
        before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        words = rf"{folder}: holds .*{name}.*--resume.*another OUTPUT_DIR.*--force"
        for flags in ((), ("--resume",)):
            with pytest.raises(InputError, match=words):
                start(*flags)
        assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
        start("--eval-only", options=["MODEL.WEIGHTS", str(folder / name), "DATASETS.TEST",
                                      "('scenes_val',)"])  # fmt: skip
        start(folder="another")
        (folder / name).unlink()
    (folder / "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(InputError, match="holds the checkpoints of a run"):
        start()
    start("--resume")


def test_force_removes_the_run_before(tmp_path, start):
    folder = tmp_path / "run"
    folder.mkdir()
    own = ["log.txt", "notes.txt", "model_1.pth"]
    for name in (*own, "model_0000003.pth", "model_best.pth", "model_best.json", "last_checkpoint",
                 "model_final.pth", "metrics.json", "events.out.tfevents.1"):  # fmt: skip
        (folder / name).write_text("x")
    everything = sorted(p.name for p in folder.iterdir())
    for flags, options, message in (
        (["--resume"], [], "--force starts a training anew"),
        ([], ["MODEL.WEIGHTS", str(folder / "model_best.pth")], "is removed by --force"),
        ([], ["MODEL.WEIGHTS", f"{folder}/model_best.pth?matching_heuristics=True"], "is removed"),
        ([], ["MODEL.MCIBI.FUSION", "mul"], "FUSION"),
    ):
        with pytest.raises(InputError, match=message):
            start("--force", *flags, options=options)
        assert sorted(p.name for p in folder.iterdir()) == everything
    start("--force")
    assert sorted(p.name for p in folder.iterdir()) == sorted(own)


def test_a_run_keeps_its_config_until_it_goes_on_with_another(tmp_path, monkeypatch):
    """It says what the weights beside it are of."""
    folder, options = tmp_path / "run", ["DATASETS.TEST", "('scenes_val',)"]
    trainer = Trainer(make_tiny_cfg(folder))
    trainer.checkpointer.save("model_0000001", iteration=1)
    config = folder / "config.yaml"
    config.write_text("the run's")
    monkeypatch.setattr(train_tool, "default_setup", lambda *_: config.write_text("this one's"))
    monkeypatch.setattr(train_tool, "setup_logger", lambda *_, **more: None)
    monkeypatch.setattr(Trainer, "test", lambda *args: {})
    monkeypatch.setattr(Trainer, "train", lambda *args: None)

    def run(*flags, options=()):
        _, *arguments = command(folder, *options, program=(), flags=flags)
        args = argument_parser().parse_args(arguments)
        train_tool.train(args, setup(args))

    run("--eval-only", options=["MODEL.WEIGHTS", str(folder / "model_0000001.pth"), *options])
    assert config.read_text() == "the run's"
    with pytest.raises(InputError, match="not a checkpoint of this model"):
        run("--resume", options=["MODEL.MCIBI.ATTENTION_DIM", "24"])
    assert config.read_text() == "the run's"
    run("--resume", options=["SOLVER.BASE_LR", "0.125"])
    assert "BASE_LR: 0.125" in config.read_text()


# --- the same recipe on another number of processes

RECIPE = [
    "SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.08",
    "SOLVER.MAX_ITER", "6", "SOLVER.WARMUP_ITERS", "2", "SOLVER.STEPS", "(4,)",
    "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "2", "MODEL.MCIBI.LOSS_START_M", "3",
]  # fmt: skip


@pytest.mark.parametrize("processes_now, scale", [(1, 0.25), (2, 0.5), (4, 1), (8, 2)])
def test_recipe_is_scaled_to_the_number_of_processes(tmp_path, processes_now, scale):
    before = make_tiny_cfg(tmp_path, *RECIPE)
    before.freeze()
    cfg = Trainer.auto_scale_workers(before, processes_now)
    for value, expected in (
        (cfg.SOLVER.IMS_PER_BATCH, 8 * scale),
        (cfg.SOLVER.BASE_LR, 0.08 * scale),
        (cfg.SOLVER.MAX_ITER, 6 / scale),
        (cfg.SOLVER.WARMUP_ITERS, 2 / scale),
        (cfg.SOLVER.STEPS[0], 4 / scale),
        (cfg.TEST.EVAL_PERIOD, 2 / scale),
        (cfg.SOLVER.CHECKPOINT_PERIOD, round(3 / scale)),
        (cfg.MODEL.MCIBI.LOSS_START_M, round(3 / scale)),
    ):
        assert value == pytest.approx(expected)
    assert cfg.is_frozen() and before.SOLVER.IMS_PER_BATCH == 8


def test_no_period_is_scaled_to_never(tmp_path):
    cfg = make_tiny_cfg(tmp_path, *RECIPE, "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1")
    cfg = Trainer.auto_scale_workers(cfg, 32)
    assert (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD) == (1, 1)
    cfg = make_tiny_cfg(tmp_path, *RECIPE, "TEST.EVAL_PERIOD", "0")
    assert Trainer.auto_scale_workers(cfg, 32).TEST.EVAL_PERIOD == 0


def test_schedules_follow_the_recipe_on_fewer_processes(tmp_path, monkeypatch, three_scenes):
    """A quarter of the processes: all happens after as many images as the recipe says."""
    evaluated, seen = [], []
    monkeypatch.setattr(
        Trainer, "test", classmethod(lambda *_: evaluated.append(1) or {"sem_seg": {"mIoU": 1.0}})
    )
    trainer = Trainer(make_tiny_cfg(tmp_path, *RECIPE, *three_scenes))
    assert trainer.max_iter == 24
    head = trainer.model.sem_seg_head
    memory_hook = next(h for h in trainer._hooks if type(h).__name__ == "MemoryUpdateHook")
    run_step = trainer.run_step

    def watched():
        rate = trainer.optimizer.param_groups[0]["lr"]
        seen.append((rate, head.memory_loss.active, memory_hook._momentum()))
        run_step()

    trainer.run_step = watched
    trainer.train()
    rates, active, momenta = zip(*seen, strict=True)
    # Poly from 0.02, after a warm-up of 8; the memory loss from 12 on; Eq. 7 over 24.
    assert rates[8:] == pytest.approx([0.02 * (1 - t / 24) ** 0.9 for t in range(8, 24)])
    assert all(a < b for a, b in zip(rates[:8], rates[1:9], strict=True))
    assert list(active) == [t >= 12 for t in range(24)]
    expected = [(1 - t / 24) ** 0.9 * (0.9 - 0.009) + 0.009 for t in range(24)]
    assert momenta == pytest.approx(expected)
    assert len(evaluated) == 3
    saved = {p.name for p in tmp_path.glob("model_0*.pth")}
    assert saved == {"model_0000011.pth", "model_0000023.pth"}


def test_resumed_on_another_number_of_processes_is_the_same_recipe(tmp_path):
    """Three iterations of 8 images, as on 4 processes, then the rest by 2 on one process."""
    whole = [*RECIPE, "SOLVER.REFERENCE_WORLD_SIZE", "1", "TEST.EVAL_PERIOD", "0"]
    trainer = Trainer(make_tiny_cfg(tmp_path, *whole))
    run_step = trainer.run_step

    def stop_at_three():
        if trainer.iter == 3:
            raise KeyboardInterrupt
        run_step()

    trainer.run_step = stop_at_three
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = Trainer(make_tiny_cfg(tmp_path, *RECIPE, "TEST.EVAL_PERIOD", "0"))
    trainer.resume_or_load(resume=True)
    assert (trainer.start_iter, trainer.max_iter) == (12, 24)
    rates, positions = [], []
    run_step, forward = trainer.run_step, trainer.model.forward

    def watched():
        rates.append([group["lr"] for group in trainer.optimizer.param_groups][0])
        run_step()

    def forwarded(batch):
        positions.extend(x["position"] for x in batch)
        return forward(batch)

    trainer.run_step, trainer.model.forward = watched, forwarded
    trainer.train()
    assert rates == pytest.approx([0.02 * (1 - t / 24) ** 0.9 for t in range(12, 24)])
    assert positions == list(range(24, 48))


# --- bad samples


@pytest.fixture
def camvid_with_a_bad_label(tmp_path, monkeypatch):
    folder = tmp_path / "CamVid"
    (folder / "train").mkdir(parents=True)
    (folder / "trainannot").mkdir()
    for i in range(4):
        Image.new("RGB", (40, 30), (60 * i, 9, 9)).save(folder / f"train/train{i}.png")
        Image.new("L", (40, 30), 200 if i == 1 else i).save(folder / f"trainannot/train{i}.png")
    lines = [f"/x/train/train{i}.png /x/trainannot/train{i}.png" for i in range(4)]
    (folder / "train.txt").write_text("\n".join(lines))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return [
        "DATASETS.TRAIN", "('camvid_11_train',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "11",
        "DATALOADER.SKIP_BAD", "True", "MODEL.MCIBI.MEMORY.INIT", "first_batch_mean",
    ]  # fmt: skip


def _train_with_a_bad_label(rank, world_size, folder, options):
    log = logging.FileHandler(f"{folder}/{rank}.txt")
    logging.getLogger("mcibi_d2").addHandler(log)
    Trainer(make_tiny_cfg(f"{folder}/output", *options)).train()


def test_skipped_samples_are_reported_over_workers_and_processes(tmp_path, camvid_with_a_bad_label):
    options = [*camvid_with_a_bad_label, "SOLVER.MAX_ITER", "8", "DATALOADER.NUM_WORKERS", "1"]
    processes.run(_train_with_a_bad_label, 2, tmp_path, options)
    logs = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    # 8 batches of 2 are four passes over the four samples; each process has half of them.
    reason = r"train1\.png: label 200 is not in the table of camvid_11_train"
    assert re.search(
        rf"SKIP_BAD: 4 samples were skipped and replaced, 1 different ones:\n4 times: .*{reason}",
        logs[0],
    )
    assert re.search(rf"Skipped a sample of iteration \d: .*{reason}", "".join(logs))
    assert "SKIP_BAD" not in logs[1]


def test_skipped_samples_are_counted_on_after_resuming(tmp_path, camvid_with_a_bad_label):
    for iterations in ("2", "4"):
        cfg = make_tiny_cfg(
            tmp_path / "output", *camvid_with_a_bad_label, "SOLVER.MAX_ITER", iterations
        )
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()
        assert trainer._trainer.skipped.total() == int(iterations) // 2


def test_momentum_from_a_file_lies_in_memory_as_the_weights_do():
    convolution = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(convolution.parameters(), lr=0.1, momentum=0.9)
    convolution(torch.randn(1, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    step = TrainStep(convolution, [], optimizer)
    state = copy.deepcopy(step.state_dict())
    weight = convolution.weight
    saved = optimizer.state[weight]["momentum_buffer"].clone()
    state["optimizer"]["state"][0]["momentum_buffer"] = saved.contiguous()
    step.load_state_dict(state)
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert torch.equal(momentum, saved)
    assert momentum.stride() == weight.stride() != saved.contiguous().stride()
