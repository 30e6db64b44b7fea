"""A run that is told to end loses nothing."""

import json
import logging
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import processes
import pytest
import torch
from conftest import make_tiny_cfg
from test_trainer import assert_equal_models, call, command

from mcibi_d2.data.loader import TrainingStream
from mcibi_d2.engine import Trainer
from mcibi_d2.engine.stop import Stopped
from mcibi_d2.evaluation import SemSegEvaluator


@pytest.fixture
def log():
    """The messages of this package, whose logger may have been told to keep them to itself."""
    messages, logger = [], logging.getLogger("mcibi_d2")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def signal_at(trainer, iteration, number=signal.SIGTERM):
    """Let a signal come in the middle of an iteration, to all processes of this job."""
    run_step, done = trainer.run_step, []

    def signalled():
        if trainer.iter == iteration and not done:
            done.append(1)
            job = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            subprocess.run(["kill", f"-{number.value}", *map(str, job)], check=True)
        run_step()

    trainer.run_step = signalled
    return trainer


def resumed(cfg):
    torch.manual_seed(99)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 2), (signal.SIGUSR1, 0)])
def test_stopped_by_a_signal_and_resumed_equals_unbroken(tmp_path, log, number, workers):
    """With workers, they get the signal, too, as when it goes to all processes of a job."""
    options = ["SOLVER.MAX_ITER", "6", "DATALOADER.NUM_WORKERS", str(workers)]
    Trainer(make_tiny_cfg(tmp_path / "whole", *options)).train()
    cfg = make_tiny_cfg(tmp_path / "broken", *options)
    handler = signal.getsignal(number)
    torch.manual_seed(0)
    trainer = signal_at(Trainer(cfg), 2, number)
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number
    said = rf"Stopped by {number.name} at iteration 2 of 6: .*model_0000002\.pth .* --resume"
    assert re.search(said, " ".join(log))
    assert signal.getsignal(number) == handler
    assert (tmp_path / "broken/last_checkpoint").read_text() == "model_0000002.pth"
    lines = (tmp_path / "broken/metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 2 and "loss_m" in json.loads(lines[-1])
    trainer = resumed(cfg)
    assert trainer.start_iter == 3
    trainer.train()
    assert_equal_models(tmp_path / "whole/model_final.pth", tmp_path / "broken/model_final.pth")


def test_stopped_in_an_evaluation_which_the_resumed_run_makes_up_for(
    tmp_path, three_scenes, monkeypatch
):
    options = [
        *three_scenes, "TEST.EVAL_PERIOD", "2", "INPUT.MIN_SIZE_TEST", "48",
        "TEST.VIS_IMAGES", "0", "MODEL.MCIBI.MEMORY.INIT", "first_batch_mean",
    ]  # fmt: skip
    cfg = make_tiny_cfg(tmp_path / "broken", *options)
    process, counted = SemSegEvaluator.process, []

    def signalled(self, inputs, outputs):
        counted.append(1)
        if len(counted) in (2, 7):
            os.kill(os.getpid(), signal.SIGTERM)
        process(self, inputs, outputs)

    monkeypatch.setattr(SemSegEvaluator, "process", signalled)
    with pytest.raises(Stopped):
        Trainer(cfg).train()
    assert len(counted) == 2
    assert (tmp_path / "broken/last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "broken/model_best.pth").exists()
    with pytest.raises(Stopped):  # and in the evaluation at the end
        resumed(cfg).train()
    assert len(counted) == 2 + 3 + 2
    record = json.loads((tmp_path / "broken/model_best.json").read_text())
    assert record["iteration"] == 1
    assert (tmp_path / "broken/last_checkpoint").read_text() == "model_final.pth"
    resumed(cfg).train()
    torch.manual_seed(0)
    Trainer(make_tiny_cfg(tmp_path / "whole", *options)).train()
    for name in ("final", "best"):
        assert_equal_models(
            tmp_path / f"whole/model_{name}.pth", tmp_path / f"broken/model_{name}.pth"
        )
    whole, broken = (
        json.loads((tmp_path / d / "model_best.json").read_text()) for d in ("whole", "broken")
    )
    assert whole == broken


def test_stopped_before_the_first_iteration_leaves_nothing(tmp_path, monkeypatch, log):
    trainer = Trainer(make_tiny_cfg(tmp_path))
    get = TrainingStream.__getitem__

    def signalled(self, position):
        if position == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return get(self, position)

    monkeypatch.setattr(TrainingStream, "__getitem__", signalled)
    with pytest.raises(Stopped):
        trainer.train()
    assert "Stopped by SIGTERM at iteration 0 of 4: this run has done no iteration" in " ".join(log)
    assert not list(tmp_path.glob("*.pth")) and not (tmp_path / "last_checkpoint").exists()


def test_a_second_signal_ends_at_once(tmp_path):
    code = (
        "import os, signal, sys, time\n"
        "from mcibi_d2.engine.stop import watching_for_signals\n"
        "with watching_for_signals():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == -signal.SIGTERM
    process.stdout.close()


def _stop_two(rank, world_size, folder):
    options = ["SOLVER.MAX_ITER", "5"]
    torch.manual_seed(0)
    Trainer(make_tiny_cfg(f"{folder}/whole", *options)).train()
    cfg = make_tiny_cfg(f"{folder}/broken", *options)
    torch.manual_seed(0)
    trainer = Trainer(cfg)
    if rank == 1:
        signal_at(trainer, 2)
    with pytest.raises(Stopped):
        trainer.train()
    resumed(cfg).train()
    with open(f"{folder}/{rank}.txt", "w") as file:
        file.write(str(trainer.iter))


def test_all_processes_stop_when_one_is_told_to(tmp_path):
    processes.run(_stop_two, 2, tmp_path)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second == "3"
    assert_equal_models(tmp_path / "whole/model_final.pth", tmp_path / "broken/model_final.pth")


# --- from the command line

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", "0", "--standalone")  # fmt: skip
SPAWN = ("--num-gpus", "2", "--dist-url", "auto")


def stopped_from_outside(arguments, seconds):
    """Start a run, send it a signal so long after its first iteration; its status and output."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, began = [], threading.Event()

    def listen():
        for line in process.stdout:
            said.append(line)
            if re.search("Memory initialised|Starting training from iteration [1-9]", line):
                began.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert began.wait(120), "".join(said)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    status = process.wait(120)
    listener.join()
    process.stdout.close()
    return status, "".join(said)


@pytest.mark.slow
def test_stopped_at_ten_random_moments_equals_unbroken(tmp_path):
    options = ["SOLVER.MAX_ITER", "400", "SOLVER.CHECKPOINT_PERIOD", "1000"]
    moments = random.Random(0)
    began = []
    for number in range(10):
        flags = ["--resume"] if number else []
        seconds = moments.uniform(0.0, 2.5)
        status, said = stopped_from_outside(
            command(tmp_path / "broken", *options, flags=flags), seconds
        )
        assert status == 128 + signal.SIGTERM and "Traceback" not in said, said[-3000:]
        stopped = re.search(r"Stopped by SIGTERM at iteration (\d+) of 400", said)
        began.append((round(seconds, 2), int(stopped[1])))
    print("seconds after the beginning, iteration:", began)
    run = call(tmp_path / "broken", *options, flags=["--resume"])
    assert run.returncode == 0, run.stderr[-2000:]
    assert call(tmp_path / "whole", *options).returncode == 0
    assert_equal_models(tmp_path / "whole/model_final.pth", tmp_path / "broken/model_final.pth")


@pytest.mark.slow
@pytest.mark.parametrize("program, flags", [((sys.executable,), SPAWN), (TORCHRUN, ())])
def test_stopped_on_two_processes_from_outside_equals_unbroken(tmp_path, program, flags):
    options = ["SOLVER.MAX_ITER", "60", "DATALOADER.NUM_WORKERS", "1"]
    status, said = stopped_from_outside(
        command(tmp_path / "broken", *options, program=program, flags=flags), 3
    )
    if not flags:
        assert status != 0  # torchrun's own
    else:
        assert status == 128 + signal.SIGTERM and "Traceback" not in said, said[-3000:]
    assert re.search(r"Stopped by SIGTERM at iteration \d+ of 60: .*--resume", said), said[-3000:]
    assert (tmp_path / "broken/last_checkpoint").exists()
    for folder, more in (("broken", ["--resume"]), ("whole", [])):
        run = call(tmp_path / folder, *options, program=program, flags=[*flags, *more])
        assert run.returncode == 0, run.stderr[-2000:]
    assert_equal_models(tmp_path / "whole/model_final.pth", tmp_path / "broken/model_final.pth")
