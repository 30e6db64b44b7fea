"""Worker processes that read: with little shared memory too, and their failures are sentences."""

import logging
import multiprocessing
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler

import numpy as np
import torch
from detectron2.utils import comm
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import InputError, sentence

# Where Linux keeps what processes share; a container has 64 MiB of it by default.
SHARED_MEMORY = "/dev/shm"


class WorkerLoader(DataLoader):
    """torch's ``DataLoader`` that neither hangs nor ends in a traceback when its workers fail.

    Workers hand tensors over in shared memory. Where there is too little of it for what they
    prepare, which torch would wait for without end, the tensors come through the workers' pipes.

    Args:
        dataset: of torch.
        timeout: seconds to wait for a batch; 0: for ever. Without workers it is not used.
        sample_bytes: of one sample's tensors, about; None: not known, and the workers find out.
        workers_key: what the user sets their number by.
        **options: of ``DataLoader``.

    Raises:
        InputError: while iterating: a worker has died or been killed, or there was no batch in
            time. It is raised where a batch is asked for, never between two.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        timeout: float = 0,
        sample_bytes: int | None = None,
        workers_key: str = "DATALOADER.NUM_WORKERS",
        **options,
    ):
        super().__init__(dataset, **options)
        self._key = f"{workers_key} is {self.num_workers}"
        if self.num_workers == 0:
            return
        self.timeout = timeout
        free = shared_memory_free()
        shared = True
        if sample_bytes is not None and free is not None:
            # Of every worker the batches it prepares, and the one that is being used.
            batches = self.num_workers * self.prefetch_factor + 1
            needed = batches * (self.batch_size or 1) * sample_bytes * comm.get_local_size()
            shared = needed <= free
            if not shared:
                logging.getLogger(__name__).warning(
                    f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but what the workers "
                    f"prepare ({self._key}) takes {needed / 2**20:.0f} MiB: it comes through pipes "
                    f"instead, which is slower; a container gets more by --shm-size"
                )
        self.worker_init_fn = _WorkerStart(shared, self.worker_init_fn)

    def __iter__(self) -> Iterator:
        """Batches; see the class for what is raised."""
        return super().__iter__() if self.num_workers == 0 else self._watched()

    def _watched(self) -> Iterator:
        batches, pids, before = None, set(), set(multiprocessing.active_children())
        while True:
            try:
                if batches is None:
                    batches = super().__iter__()
                    pids = {p.pid for p in set(multiprocessing.active_children()) - before}
                    _deaths.watch(pids)
                batch = _deaths.next(batches, pids)
            except StopIteration:
                return
            except InputError as error:
                raise InputError(sentence(error)) from None
            except (RuntimeError, OSError, EOFError) as error:
                if str(error).startswith("Caught "):  # by a worker: an error in the mapper
                    raise
                # How a process ended is in the first of these.
                failure = str(error.__cause__ or error) or type(error).__name__
                break
            yield batch
        # Ends the workers that are left; outside of the block, which holds on to them.
        del batches
        raise InputError(self._explain(failure))

    def _explain(self, failure: str) -> str:
        failure = failure.split(". ")[0].rstrip(". ")
        if "timed out" in failure:
            return (
                f"DATALOADER.TIMEOUT is {self.timeout:g}: {self.num_workers} workers gave no batch "
                f"in so many seconds, expected one (is the disk of the data slow or gone? A larger "
                f"TIMEOUT waits longer, 0 for ever)"
            )
        free = shared_memory_free()
        shared = "" if free is None else f"; {SHARED_MEMORY} has {free / 2**20:.0f} MiB free"
        return (
            f"{self._key}: {failure}{shared}; expected workers that live (fewer of them need less "
            f"memory; 0 reads in the process itself)"
        )


def shared_memory_free() -> int | None:
    """Free bytes for what processes share; None where there is no such limit."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


class _WorkerStart:
    """What a worker does first: choose how its tensors leave it.

    Args:
        shared: whether there is enough shared memory.
        then: another ``worker_init_fn``.
    """

    def __init__(self, shared: bool, then: Callable[[int], None] | None):
        self.shared = shared
        self.then = then

    def __call__(self, worker: int) -> None:
        ForkingPickler.register(torch.Tensor, self._reduce)
        if self.then is not None:
            self.then(worker)

    def _reduce(self, tensor: torch.Tensor) -> tuple:
        if not tensor.is_cpu or tensor.layout != torch.strided:
            return reduce_tensor(tensor)
        if self.shared:
            try:
                # Where memory is short this raises; later, torch would drop the batch.
                return reduce_tensor(tensor.share_memory_())
            except RuntimeError as error:
                self.shared = False
                logging.getLogger(__name__).warning(
                    f"{SHARED_MEMORY} is full: samples come through pipes instead, which is "
                    f"slower; a container gets more by --shm-size ({error})"
                )
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (values, tensor.dtype, tensor.shape)


def _tensor(values: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(values).view(dtype).reshape(shape)


class _Deaths:
    """Keeps what torch says of a dead worker until a batch of its loader is asked for.

    torch raises it from a signal handler: wherever the process is, in the middle of a step or of
    writing a file.
    """

    def __init__(self):
        self._handler: Callable | None = None
        self._watched: set[int] = set()
        self._waiting = False
        self._said: dict[int, str] = {}

    def watch(self, pids: set[int]) -> None:
        """Keep what is said of these processes."""
        self._watched |= pids
        in_main = threading.current_thread() is threading.main_thread()
        if self._handler is None and in_main and hasattr(signal, "SIGCHLD"):
            handler = signal.getsignal(signal.SIGCHLD)
            if callable(handler):  # torch's, which it has set by now
                self._handler = handler
                signal.signal(signal.SIGCHLD, self._handle)

    def next(self, batches: Iterator, pids: set[int]) -> object:
        """The next batch of workers with these ids, if all live."""
        self._waiting = True
        try:
            for pid in pids & self._said.keys():
                raise RuntimeError(self._said.pop(pid))
            return next(batches)
        finally:
            self._waiting = False

    def _handle(self, number: int, frame: object) -> None:
        try:
            self._handler(number, frame)
        except RuntimeError as error:
            pids = self._watched & {int(pid) for pid in re.findall(r"\d+", str(error))}
            if self._waiting or not pids:
                raise
            self._said.update(dict.fromkeys(pids, str(error)))


_deaths = _Deaths()
