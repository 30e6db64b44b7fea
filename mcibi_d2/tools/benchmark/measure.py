"""How long a call takes, and how much memory."""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

MIB = 2**20


def wait(device: str) -> None:
    """Let a GPU finish what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def median_seconds(calls: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """Medians of several calls that take turns, without the first turn."""
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            wait(device)
            before = time.perf_counter()
            call()
            wait(device)
            times[name].append(time.perf_counter() - before)
    return {name: median(values[1:]) for name, values in times.items()}


def status(key: str) -> int:
    """A number of bytes from this process's entry in /proc."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def extra_peak(call: Callable, make: Callable, small, case, device: str) -> float | None:
    """Extra peak memory of one call in MiB, in a fresh process; None where it cannot be told.

    Args:
        call: with what ``make`` gives as arguments.
        make: called with a case and the device.
        small: a case to warm up with.
        case: to measure.
        device: to run on.
    """
    return _in_a_fresh_process(_measure_peak, call, make, small, case, device)


@torch.no_grad()
def _measure_peak(call: Callable, make: Callable, small, case, device: str) -> float | None:
    call(*make(small, device))  # libraries load on first use
    arguments = make(case, device)
    before = _start_peak(device)
    call(*arguments)
    return None if before is None else (_peak(device) - before) / MIB


def growth(call: Callable, make: Callable, case, device: str, first: int, last: int):
    """How much more memory a fresh process holds after ``last`` calls than after ``first``.

    Args:
        call: with what ``make`` gives as arguments, again and again.
        make: called with the case and the device.
        case: to measure.
        device: to run on.
        first: a number of calls.
        last: a larger one.

    Returns:
        MiB of the host's memory; None where it cannot be told.
    """
    return _in_a_fresh_process(_measure_growth, call, make, case, device, first, last)


@torch.no_grad()
def _measure_growth(call: Callable, make: Callable, case, device: str, first: int, last: int):
    arguments = make(case, device)
    held = []
    try:
        for done in range(1, last + 1):
            call(*arguments)
            if done in (first, last):
                held.append(status("VmRSS"))
    except (OSError, KeyError):
        return None  # not Linux
    return (held[1] - held[0]) / MIB


def _in_a_fresh_process(function: Callable, *args):
    """What the function returns, run in a new process with as many threads."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(
        target=_answer, args=(function, args, torch.get_num_threads(), results)
    )
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process that measures memory ended with {process.exitcode}")
    return results.get()


def _answer(function: Callable, args: tuple, threads: int, results) -> None:
    torch.set_num_threads(threads)
    results.put(function(*args))


@dataclass(frozen=True)
class Measured:
    """What was found of one of several sides.

    Attributes:
        seconds: of each call that was timed.
        peak_mib: the largest extra memory; None where it cannot be told.
        result: of the last call.
    """

    seconds: list[float]
    peak_mib: float | None
    result: object

    @property
    def median(self) -> float:
        """Of the seconds."""
        return median(self.seconds)


def take_turns(
    sides: dict[str, Callable],
    args: tuple,
    device: str,
    repeats: int,
    whole: bool = False,
    first: bool = True,
) -> dict[str, Measured]:
    """Measure several sides in turn, each in a process of its own.

    Args:
        sides: by name, what makes a call from ``args`` and the device. The call takes nothing, and
            what it returns can be sent to another process.
        args: sizes and the like.
        device: to run on.
        repeats: calls that are timed.
        whole: count what is made before the calls (a model) as well, not the calls alone.
        first: make one more call before these, which is not timed.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    try:
        for name, make in sides.items():
            pipes[name], other = context.Pipe()
            arguments = (other, make, args, device, torch.get_num_threads(), whole)
            processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            processes[-1].start()
            other.close()  # so that it is noticed here when the process ends
        for name in pipes:
            pipes[name].recv()  # it is ready, and takes no time from the others
        answers = {name: [] for name in sides}
        for _ in range(repeats + first):
            for name, pipe in pipes.items():
                pipe.send(None)
                answers[name].append(pipe.recv())
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"the process that measures {name!r} ended before its time") from error
    finally:
        for process in processes:
            process.terminate()
            process.join()
    found = {}
    for name, calls in answers.items():
        seconds, peaks, results = zip(*calls, strict=True)
        peak = None if None in peaks else max(peaks)
        found[name] = Measured(list(seconds[first:]), peak, results[-1])
    return found


def _serve(pipe, make: Callable, args: tuple, device: str, threads: int, whole: bool) -> None:
    """Make the call, then make it each time something comes through the pipe."""
    torch.set_num_threads(threads)
    before = _start_peak(device) if whole else None
    call = make(*args, device)
    if not whole:
        before = _start_peak(device)
    wait(device)
    pipe.send(None)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        start = time.perf_counter()
        result = call()
        wait(device)
        seconds = time.perf_counter() - start
        peak = None if before is None else (_peak(device) - before) / MIB
        pipe.send((seconds, peak, result))


def _start_peak(device: str) -> int | None:
    """Begin to look for the peak; returns what is held now, None where it cannot be told."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        # The peak is counted from here.
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        return status("VmRSS")
    except (OSError, KeyError):
        return None  # not Linux


def _peak(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    return status("VmHWM")


def shown(value: float | None, form: str) -> str:
    """A figure of a table, "?" where there is none."""
    return "?" if value is None else format(value, form)
