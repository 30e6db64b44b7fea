"""How long a call takes, and how much memory."""

import multiprocessing
import time
from collections.abc import Callable
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
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(*arguments)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        Path("/proc/self/clear_refs").write_text(
            "5", encoding="utf-8"
        )  # the peak is counted from here
        before = status("VmRSS")
        call(*arguments)
        return (status("VmHWM") - before) / MIB
    except (OSError, KeyError):
        return None  # not Linux


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


def shown(value: float | None, form: str) -> str:
    """A figure of a table, "?" where there is none."""
    return "?" if value is None else format(value, form)
