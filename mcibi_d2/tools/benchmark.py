"""Time the parts that the project promises to be fast, side by side with the plain way.

``python -m mcibi_d2.tools.benchmark memory`` measures ``FeatureMemory.observe`` and ``commit``
against the update as the equations say it: up-sample the features, loop over the classes.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.modeling import FeatureMemory

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "ade20k" / "mcibi_R50.yaml"
MOMENTUM = 0.9
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Features of N x C x h x w, labels of N x H x W with some of K classes."""

    batch: int
    channels: int
    grid: tuple[int, int]
    size: tuple[int, int]
    classes: int
    present: int

    def __str__(self) -> str:
        """The sizes, as the tables show them."""
        (h, w), (height, width) = self.grid, self.size
        return f"{self.batch} x {self.channels} x {h} x {w} -> {height} x {width}"

    def make(self, device: str) -> tuple[FeatureMemory, Tensor, Tensor]:
        """A filled memory, features as after a ReLU, and labels in patches with ignored ones."""
        generator = torch.Generator().manual_seed(0)
        memory = FeatureMemory(self.classes, self.channels)
        rows = torch.randn(self.classes, self.channels, generator=generator).relu()
        memory.initialize(rows, torch.ones(self.classes, dtype=torch.bool))
        features = torch.randn(self.batch, self.channels, *self.grid, generator=generator).relu()
        names = torch.randperm(self.classes, generator=generator)[: self.present]
        rows, columns = (-(-side // 32) for side in self.size)
        patches = torch.randint(0, self.present, (self.batch, rows * columns), generator=generator)
        patches[:, : self.present] = torch.arange(self.present)  # every class, in every image
        labels = names[patches].view(self.batch, rows, columns)
        labels[:, -1, -1] = 255
        labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)
        labels = labels[:, : self.size[0], : self.size[1]].contiguous()
        return memory.to(device), features.to(device), labels.to(device)


CASES = (
    Case(2, 512, (64, 64), (512, 512), 150, 24),
    Case(1, 512, (64, 128), (512, 1024), 19, 17),
    Case(2, 512, (60, 60), (473, 473), 20, 12),
)
# The same image, with ever more classes.
NUMBERS_OF_CLASSES = tuple(
    Case(2, 512, (64, 64), (512, 512), classes, 10) for classes in (10, 100, 1000)
)


def literal_update(memory: FeatureMemory, features: Tensor, labels: Tensor) -> Tensor:
    """Eq. 6-10 as they stand: up-sample, permute, and go through the classes one by one."""
    rows = memory.rows.clone()
    pixels = F.interpolate(features, labels.shape[-2:], mode="bilinear", align_corners=False)
    pixels = pixels.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    labels = labels.flatten()
    for k in labels.unique().tolist():
        if not 0 <= k < len(rows):
            continue
        of_class = pixels[labels == k]
        weights = 1 - F.cosine_similarity(of_class, rows[k].expand_as(of_class))
        target = (of_class * (weights / weights.sum())[:, None]).sum(dim=0)
        rows[k] = (1 - MOMENTUM) * rows[k] + MOMENTUM * target
    return rows


def our_update(memory: FeatureMemory, features: Tensor, labels: Tensor) -> Tensor:
    """The same by ``observe`` and ``commit``, which change the memory."""
    memory.observe(features, labels)
    memory.commit(MOMENTUM)
    return memory.rows


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


@torch.no_grad()
def _seconds(update: Callable, case: Case, device: str, repeats: int) -> list[float]:
    memory, features, labels = case.make(device)
    start = memory.rows.clone()
    times = []
    for _ in range(repeats + 1):
        memory.rows.copy_(start)
        _wait(device)
        before = time.perf_counter()
        update(memory, features, labels)
        _wait(device)
        times.append(time.perf_counter() - before)
    return times[1:]  # without the first, which warms up


def _status(key: str) -> int:
    """A number of bytes from this process's entry in /proc."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@torch.no_grad()
def _measure_peak(update: Callable, case: Case, device: str, threads: int, results) -> None:
    torch.set_num_threads(threads)
    update(*Case(1, 8, (4, 4), (32, 32), 3, 1).make(device))  # libraries load on first use
    arguments = case.make(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        update(*arguments)
        results.put(torch.cuda.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = _status("VmRSS")
        update(*arguments)
        results.put(_status("VmHWM") - before)
    except (OSError, KeyError):
        results.put(None)  # not Linux


def _peak(update: Callable, case: Case, device: str) -> float | None:
    """Extra peak memory of one update in MiB, in a fresh process; None where it cannot be told."""
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (update, case, device, torch.get_num_threads(), results)
    process = context.Process(target=_measure_peak, args=arguments)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the process that measures memory ended with {process.exitcode}")
    extra = results.get()
    return None if extra is None else extra / MIB


@torch.no_grad()
def compare_updates(case: Case, device: str, repeats: int, literal_repeats: int) -> dict:
    """Our update and the literal one on the same data."""
    ours = _seconds(our_update, case, device, repeats)
    literal = _seconds(literal_update, case, device, literal_repeats)
    memory, features, labels = case.make(device)
    expected = literal_update(memory, features, labels)
    difference = (our_update(memory, features, labels) - expected).abs().max().item()
    return {
        "case": str(case),
        "classes": case.classes,
        "present": case.present,
        "ours_seconds": median(ours),
        "literal_seconds": median(literal),
        "ratio": median(literal) / median(ours),
        "ours_peak_mib": _peak(our_update, case, device),
        "literal_peak_mib": _peak(literal_update, case, device),
        "largest_difference": difference,
        "ours_all_seconds": ours,
        "literal_all_seconds": literal,
    }


def time_training_step(
    config_file: str, device: str, precision: str, size: int, batch: int, repeats: int
) -> dict:
    """A whole training step on random images, and the memory's share of it."""
    options = ["MODEL.DEVICE", device, "MODEL.TIMM.PRETRAINED", "False"]
    cfg = load_config(config_file, options)
    if not cfg.MODEL.MCIBI.ENABLED:
        raise InputError(f"{config_file}: MODEL.MCIBI.ENABLED is False, expected a memory to time")
    model = Trainer.build_model(cfg).train()
    memory, classes = model.sem_seg_head.memory, model.sem_seg_head.num_classes
    optimizer = Trainer.build_optimizer(cfg, model)
    filled, _, labels = Case(batch, 1, (1, 1), (size, size), classes, min(classes, 24)).make("cpu")
    rows = filled.rows.expand(-1, memory.channels)
    memory.initialize(rows, filled.initialized)
    inputs = [
        {"image": torch.randint(0, 256, (3, size, size)), "sem_seg": label} for label in labels
    ]
    spent = []

    def timed(function: Callable) -> Callable:
        def call(*args):
            _wait(device)
            before = time.perf_counter()
            function(*args)
            _wait(device)
            spent.append(time.perf_counter() - before)

        return call

    memory.observe = timed(memory.observe)
    commit = timed(memory.commit)
    dtype = getattr(torch, precision)
    steps, updates = [], []
    for _ in range(repeats + 1):
        spent.clear()
        before = time.perf_counter()
        with torch.autocast(device.split(":")[0], dtype, enabled=precision != "float32"):
            losses = model(inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        commit(MOMENTUM)
        steps.append(time.perf_counter() - before)
        updates.append(sum(spent))
    return {
        "case": f"{Path(config_file).stem}, {batch} x {size} x {size}, {precision}",
        "step_seconds": median(steps[1:]),
        "update_seconds": median(updates[1:]),
        "share": median(updates[1:]) / median(steps[1:]),
    }


def _number(value: float | None, form: str) -> str:
    return "?" if value is None else format(value, form)


def benchmark_memory(args: argparse.Namespace) -> dict:
    """Measure, print tables, and return everything as plain data."""
    results = {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "updates": [],
        "numbers_of_classes": [],
        "steps": [],
    }
    for case in CASES:
        print(f"measuring {case}", file=sys.stderr)
        found = compare_updates(case, args.device, args.repeats, max(3, args.repeats // 5))
        results["updates"].append(found)
    for case in NUMBERS_OF_CLASSES:
        seconds = median(_seconds(our_update, case, args.device, args.repeats))
        results["numbers_of_classes"].append({"classes": case.classes, "ours_seconds": seconds})
    for precision in () if args.no_step else ("float32", "bfloat16"):
        print(f"measuring a training step, {precision}", file=sys.stderr)
        results["steps"].append(
            time_training_step(args.config_file, args.device, precision, 512, 2, args.steps)
        )

    print(
        tabulate(
            [
                [
                    x["case"],
                    x["classes"],
                    x["present"],
                    _number(x["ours_seconds"] * 1e3, ".1f"),
                    _number(x["literal_seconds"] * 1e3, ".0f"),
                    _number(x["ratio"], ".0f"),
                    _number(x["ours_peak_mib"], ".0f"),
                    _number(x["literal_peak_mib"], ".0f"),
                    _number(x["largest_difference"], ".1e"),
                ]
                for x in results["updates"]
            ],
            headers=["features -> labels", "K", "present", "ours ms", "literal ms", "faster by",
                     "ours MiB", "literal MiB", "difference"],
            disable_numparse=True,
        )
    )  # fmt: skip
    first = results["numbers_of_classes"][0]["ours_seconds"]
    print(f"\n{NUMBERS_OF_CLASSES[0]}, 10 classes present, by the number of classes:")
    for x in results["numbers_of_classes"]:
        seconds = x["ours_seconds"]
        print(f"  K = {x['classes']}: {seconds * 1e3:.1f} ms, {seconds / first:.2f} times K = 10")
    if results["steps"]:
        print("\nThe update in a training step:")
    for x in results["steps"]:
        print(
            f"  {x['case']}: {x['update_seconds'] * 1e3:.0f} ms of {x['step_seconds']:.2f} s, "
            f"{100 * x['share']:.2f} %"
        )
    print()
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m mcibi_d2.tools.benchmark", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    memory = parts.add_parser("memory", help="the update of the feature memory")
    memory.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    memory.add_argument("--repeats", type=int, default=25, help="of each update (25)")
    memory.add_argument("--steps", type=int, default=3, help="training steps that are timed (3)")
    memory.add_argument("--no-step", action="store_true", help="leave the training step out")
    memory.add_argument("--config-file", default=str(CONFIG), help="of the training step")
    memory.add_argument("--json", metavar="FILE", help="write the JSON there, not to the output")
    args = parser.parse_args()
    try:
        results = benchmark_memory(args)
    except InputError as error:
        sys.exit(f"error: {error}")
    text = json.dumps(results, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
