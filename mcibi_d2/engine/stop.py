"""What a run does when it is told to end: SIGTERM and SIGUSR1, as clusters send them."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.utils import comm

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# One stop reaches a process of several twice: from the cluster, and from the launcher, which passes
# it on. Seconds within which that is one signal.
SAME_SIGNAL = 2.0
# On several processes, look so seldom in an evaluation: looking makes one wait for the other.
LOOK_EVERY = 10

_running: "_Watch | None" = None


class Stopped(SystemExit):
    """The run was told to end, and has done what was to be done before.

    As a ``SystemExit`` it ends the program, without a traceback, with status 128 + the signal's
    number, as shells count.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class _Watch:
    """Notes the first signal; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number = 0
        self.several = comm.get_world_size() > 1
        # torchrun passes signals on to a single process, too.
        self._twice = self.several or "TORCHELASTIC_RUN_ID" in os.environ
        self._since = 0.0
        # Of its own, so that it never waits for a GPU, nor in line with gradients.
        self._group = dist.new_group(backend="gloo") if self.several else None
        self._work: dist.Work | None = None
        self._told = torch.zeros(1, dtype=torch.int64)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            if not self._twice:
                # By the system, so that it ends even what waits for something outside of Python.
                for other in SIGNALS:
                    signal.signal(other, signal.SIG_DFL)
        elif now - self._since > SAME_SIGNAL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def asked(self) -> int:
        """See :func:`stop_asked`."""
        if not self.several:
            return self.number
        found = 0
        if self._work is not None:
            self._work.wait()
            found = int(self._told)
        self._told = torch.tensor([self.number])
        self._work = dist.all_reduce(
            self._told, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return found

    def close(self) -> None:
        """Leave nothing under way; called by every process, or by none."""
        if self._work is not None:
            self._work.wait()
            dist.destroy_process_group(self._group)


@contextmanager
def watching_for_signals() -> Iterator[None]:
    """Note the signals instead of ending by them; the handlers before are put back.

    Every process enters and leaves it, in the main thread; elsewhere there can be no handler, and
    nothing is watched.
    """
    global _running
    if _running is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _running = watch = _Watch()
    before = {number: signal.signal(number, watch.handle) for number in SIGNALS}
    try:
        yield
    except Stopped:
        watch.close()
        raise
    else:
        watch.close()
    finally:
        _running = None
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def stop_asked() -> int:
    """The number of the signal that told this run to end, 0 if none did.

    Every process calls it equally often and gets the same, whichever had the signal. Nobody waits:
    on several processes, what was known at the last call is exchanged until this one, on the CPU.
    """
    return _running.asked() if _running is not None else 0


def end_if_asked() -> None:
    """Raise :class:`Stopped`, if the run was told to end; see :func:`stop_asked`."""
    number = stop_asked()
    if number:
        raise Stopped(number)


class StoppableLoader:
    """A test loader that ends with :class:`Stopped` when the run is told to end.

    Args:
        loader: of one image per batch, spread over the processes by ``InferenceSampler``.
    """

    def __init__(self, loader: torch.utils.data.DataLoader):
        self._loader = loader
        self.dataset = loader.dataset

    def __len__(self) -> int:
        """Batches of this process."""
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        """The loader's batches."""
        world_size = comm.get_world_size()
        # Not all processes have more.
        common = len(self.dataset) // world_size
        for number, batch in enumerate(self._loader):
            if world_size == 1 or (number < common and number % LOOK_EVERY == 0):
                end_if_asked()
            yield batch


def _in_fork() -> None:
    """Leave it to the run when its data-loader workers end.

    A signal to all processes of a job would take the batch away from the iteration that is to be
    ended. One by the run itself is how stuck workers are ended.
    """
    global _running
    if _running is None:
        return
    _running = None
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_end_by_parent, args=(os.getppid(),), daemon=True).start()


def _end_by_parent(parent: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        pass
    os._exit(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_fork)
