"""Start one process or several: by Detectron2's launcher or under torchrun."""

import argparse
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from ..data import register_own_dataset
from ..errors import InputError, sentence
from .stop import SIGNALS, Stopped


def launch(
    main: Callable[[argparse.Namespace, CfgNode], object],
    setup: Callable[[argparse.Namespace], CfgNode],
    args: argparse.Namespace,
) -> None:
    """Run ``main(args, setup(args))`` in as many processes as asked for.

    Under ``torchrun`` this process is one of them. Else Detectron2's launcher starts
    ``--num-gpus`` processes on each of ``--num-machines`` machines: with NCCL on GPUs, with gloo
    where ``MODEL.DEVICE`` is the CPU.

    An :class:`InputError` ends the program with its sentence and status 1, without a traceback.

    Args:
        main: what each process does.
        setup: makes the config; called once, before any process is started.
        args: of Detectron2's ``default_argument_parser``.
    """
    try:
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if under_torchrun:
            local_size = int(os.environ["LOCAL_WORLD_SIZE"])
            args.num_gpus = local_size
            args.num_machines = int(os.environ["WORLD_SIZE"]) // local_size
            args.machine_rank = int(os.environ["RANK"]) // local_size
        cfg = setup(args)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        if under_torchrun:
            _join(int(os.environ["LOCAL_RANK"]), args.num_gpus, on_cpu)
            try:
                _guarded(main, args, cfg)
            except Stopped:
                dist.destroy_process_group()
                raise
            dist.destroy_process_group()
            return
        if on_cpu:
            # Detectron2 takes NCCL wherever it sees a GPU.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
            if args.num_gpus > 1 and "OMP_NUM_THREADS" not in os.environ:
                # Else every process takes every core.
                os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.num_gpus))
        with _passing_signals_on() if args.num_gpus * args.num_machines > 1 else nullcontext():
            detectron2_launch(
                _guarded,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, cfg),
            )
    except InputError as error:
        sys.exit(f"error: {sentence(error)}")
    except ProcessExitedException as error:
        # A process that ended by itself has said why; one that was killed could not.
        sys.exit(error.exit_code if error.signal_name is None else f"error: {error}")


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Tell the processes that were started when this one is told to end; the second time, end all.

    They end with the status of :class:`~.stop.Stopped`, and then so does this one.
    """
    told: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process in multiprocessing.active_children():
            # Windows has no SIGKILL.
            process.kill() if len(told) > 1 else os.kill(process.pid, number)
        if len(told) > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    except ProcessExitedException as error:
        if not told:
            raise
        # Also when they were told before they watched for it.
        raise Stopped(told[0]) from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _guarded(main: Callable, args: argparse.Namespace, cfg: CfgNode) -> None:
    logging.getLogger("detectron2.engine.train_loop").addFilter(_without_traceback)
    try:
        # A process that was started, not forked, has the registrations of the import alone.
        register_own_dataset(cfg)
        main(args, cfg)
    except InputError as error:
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        # Not an exception: that would print a traceback. Not a clean exit: other processes wait.
        os._exit(1) if comm.get_world_size() > 1 else sys.exit(1)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Let Detectron2 log an :class:`InputError` as its sentence."""
    if record.exc_info and isinstance(record.exc_info[1], InputError):
        record.msg = f"{record.getMessage()} {sentence(record.exc_info[1])}"
        record.exc_info = None
    return True


def _join(local_rank: int, local_size: int, on_cpu: bool) -> None:
    """Make this torchrun process a member of Detectron2's process groups."""
    if not on_cpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("gloo" if on_cpu else "nccl")
    comm.create_local_process_group(local_size)
    comm.synchronize()
