"""Workers that die, hang, or find no shared memory."""

import logging
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from conftest import ROOT, make_tiny_cfg
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from torch.utils.data import Dataset

from mcibi_d2 import InputError
from mcibi_d2.data import build_test_loader, build_train_loader, workers
from mcibi_d2.data.workers import WorkerLoader
from mcibi_d2.engine import launch

Usage = namedtuple("Usage", "total used free")


class Samples(Dataset):
    def __init__(self, act=None, length=12):
        self.act, self.length = act, length

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if self.act is not None and i == 3:
            self.act()
        return {
            "image": torch.full((2, 3), i, dtype=torch.uint8),
            "sem_seg": torch.tensor([[i, -1]]).T,
            "deeper": [torch.tensor(i / 2), torch.zeros(0, dtype=torch.bfloat16)],
        }


def as_it_is(batch):
    return batch


def loader(act=None, **options):
    return WorkerLoader(
        Samples(act), batch_size=1, collate_fn=as_it_is, **{"num_workers": 2, **options}
    )


def contents(batches):
    return [
        (x["image"].tolist(), x["sem_seg"].tolist(), x["deeper"][0].item(), x["deeper"][1].dtype)
        for (x,) in batches
    ]


def shared(batches):
    return {x["image"].is_shared() for (x,) in batches}


def fake_free(monkeypatch, free):
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: Usage(2**36, 0, free))


def test_little_shared_memory_sends_samples_through_pipes(monkeypatch, caplog):
    plain = contents(loader(num_workers=0))
    for free, uses in ((1000, {False}), (2000, {True})):
        fake_free(monkeypatch, free)
        caplog.clear()
        # 2 workers of 2 batches, and one in use.
        few = loader(sample_bytes=300)
        assert shared(few) == uses
        assert contents(few) == plain
        said = [r.getMessage() for r in caplog.records if "/dev/shm" in r.getMessage()]
        assert len(said) == (free == 1000)
        assert all("DATALOADER.NUM_WORKERS is 2" in s and "--shm-size" in s for s in said)


def full(self):
    raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device")


def test_shared_memory_that_fills_up_later_stops_nothing(monkeypatch):
    plain = contents(loader(num_workers=0))
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the workers are forked
    assert contents(loader(timeout=20)) == plain


def kill():
    os.kill(os.getpid(), signal.SIGBUS)


def kill_9():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_later():
    time.sleep(0.5)  # the samples before have left
    kill_9()


def leave():
    os._exit(3)


@pytest.mark.parametrize(
    "act, said", [(kill, "Bus error"), (kill_9, "Killed"), (leave, "exit code 3")]
)
def test_dead_worker_is_a_sentence(act, said):
    with pytest.raises(InputError) as error:
        contents(loader(act))
    text = str(error.value)
    assert text.startswith("DATALOADER.NUM_WORKERS is 2: DataLoader worker (pid ")
    assert said in text and "expected workers that live" in text and "\n" not in text


def test_death_is_said_only_where_a_batch_is_asked_for():
    """Not in the middle of a step, or of writing a checkpoint."""
    batches = iter(loader(kill_later, num_workers=1, prefetch_factor=4))
    next(batches)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        time.sleep(0.01)  # torch's signal handler would raise here
    with pytest.raises(InputError, match=r"^DATALOADER.NUM_WORKERS is 1: .* Killed"):
        list(batches)


def sleep():
    time.sleep(60)


def test_workers_that_give_nothing_end_in_a_sentence(monkeypatch):
    # How long torch waits for a worker to end.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^DATALOADER.TIMEOUT is 0.5: 1 workers gave no batch"):
        contents(loader(sleep, num_workers=1, timeout=0.5))
    assert time.monotonic() - start < 20


def refuse():
    raise InputError("x.png: bad")


def fail():
    raise RuntimeError("a bug")


def test_errors_of_the_mapper_stay_what_they_are():
    with pytest.raises(InputError, match=r"^x\.png: bad$"):
        contents(loader(refuse))
    with pytest.raises(RuntimeError, match="Caught RuntimeError in DataLoader worker"):
        contents(loader(fail))


def test_loaders_take_the_keys_and_estimate_what_they_need(tmp_path, monkeypatch, caplog):
    """Of crops, and of test images by their headers."""
    fake_free(monkeypatch, 2**20)
    cfg = make_tiny_cfg(
        tmp_path, "DATALOADER.NUM_WORKERS", "2", "DATALOADER.TIMEOUT", "7",
        "INPUT.CROP.SIZE", "(64, 128)",
    )  # fmt: skip
    train, test = build_train_loader(cfg), build_test_loader(cfg, "scenes_val")
    assert train.timeout == test.timeout == 7
    said = [r.getMessage() for r in caplog.records if "/dev/shm" in r.getMessage()]
    # 5 batches of 2 crops of 11 bytes a pixel are 0.86 MiB.
    assert said == []
    cfg.INPUT.CROP.SIZE, cfg.INPUT.MIN_SIZE_TEST = (128, 128), 512
    with caplog.at_level(logging.WARNING):
        build_train_loader(cfg)
        build_test_loader(cfg, "scenes_val")
    said = [r.getMessage() for r in caplog.records if "/dev/shm" in r.getMessage()]
    assert "takes 2 MiB" in said[0]
    assert len(said) == 2
    cfg.DATALOADER.NUM_WORKERS = 0
    assert build_train_loader(cfg).timeout == 0


def test_loaders_go_to_workers_that_are_started_not_forked(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "DATALOADER.NUM_WORKERS", "1")
    for made in (build_train_loader(cfg), build_test_loader(cfg, "scenes_val")):
        sent = pickle.dumps((made.dataset, made.collate_fn, made.worker_init_fn))
        dataset, collate, _ = pickle.loads(sent)
        (sample,) = collate([next(iter(dataset))])
        assert sample["image"].dtype == torch.uint8


def _setup(args):
    return make_tiny_cfg(args.opts[0], "MODEL.DEVICE", "cpu")


def _wait_for_the_other(args, cfg):
    if comm.get_rank() == 1:
        contents(loader(kill_9))
    comm.synchronize()


def launch_two(folder):
    arguments = ["--num-gpus", "2", "--dist-url", "auto", folder]
    launch(_wait_for_the_other, _setup, default_argument_parser().parse_args(arguments))


@pytest.mark.slow
def test_dead_worker_of_one_process_ends_all(tmp_path):
    code = "import sys, test_workers; test_workers.launch_two(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert "error: DATALOADER.NUM_WORKERS is 2: DataLoader worker (pid " in run.stderr
    assert "Traceback" not in run.stderr, run.stderr
