"""The update of the memory and the attention, side by side with the plain way.

``memory`` measures ``FeatureMemory.observe`` and ``commit`` against the update as the equations say
it: up-sample the features, loop over the classes. ``attention`` measures the attention of Eq. 13-14
against its softmax written out, and against attention to the memory's rows.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.setup import without_download
from mcibi_d2.modeling import Attention, FeatureMemory
from mcibi_d2.modeling.memory import READERS

from .measure import extra_peak, median_seconds, shown, wait

MOMENTUM = 0.9


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


TINY = Case(1, 8, (4, 4), (32, 32), 3, 1)
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


@torch.no_grad()
def _seconds(update: Callable, case: Case, device: str, repeats: int) -> list[float]:
    memory, features, labels = case.make(device)
    start = memory.rows.clone()
    times = []
    for _ in range(repeats + 1):
        memory.rows.copy_(start)
        wait(device)
        before = time.perf_counter()
        update(memory, features, labels)
        wait(device)
        times.append(time.perf_counter() - before)
    return times[1:]  # without the first, which warms up


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
        "ours_peak_mib": extra_peak(our_update, Case.make, TINY, case, device),
        "literal_peak_mib": extra_peak(literal_update, Case.make, TINY, case, device),
        "largest_difference": difference,
        "ours_all_seconds": ours,
        "literal_all_seconds": literal,
    }


def time_training_step(
    config_file: str,
    device: str,
    precision: str,
    size: int,
    batch: int,
    repeats: int,
    options: Sequence[str] = (),
) -> dict:
    """A whole training step on random images, and the memory's share of it."""
    cfg = without_download(load_config(config_file, ["MODEL.DEVICE", device, *options]))
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
            wait(device)
            before = time.perf_counter()
            function(*args)
            wait(device)
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


def written_out_attention(block: Attention, pixels: Tensor, context: Tensor) -> Tensor:
    """Eq. 13-14 as they stand, with the matrix P of all pairs of positions."""
    query, key, value = (
        f(x).flatten(2).transpose(1, 2)
        for f, x in ((block.query, pixels), (block.key, context), (block.value, context))
    )
    relations = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(dim=-1)
    refined = (relations @ value).transpose(1, 2)
    return block.out(refined.reshape(len(pixels), -1, *pixels.shape[-2:]))


def _make_attention(
    side: tuple[int, int], device: str, layout: torch.memory_format = torch.channels_last
) -> tuple[Attention, Tensor, Tensor]:
    """The block of the released models and its two maps, by default in the model's layout."""
    torch.manual_seed(0)
    block = Attention().to(device).eval()
    maps = [torch.randn(1, 512, *side, device=device) for _ in range(2)]
    return block, *(x.contiguous(memory_format=layout) for x in maps)


def compare_attention(device: str, repeats: int) -> dict:
    """Our attention and the written-out one: time at 128 x 128, memory at 128 x 256."""
    found = {"case": "forward, 1 x 512 x 128 x 128", "layouts": []}
    for name, layout in (
        ("channels last, as in the model", torch.channels_last),
        ("contiguous", torch.contiguous_format),
    ):
        block, pixels, context = _make_attention((128, 128), device, layout)
        with torch.no_grad():
            seconds = median_seconds(
                {
                    "ours": lambda x=(block, pixels, context): x[0](*x[1:]),
                    "written_out": lambda x=(block, pixels, context): written_out_attention(*x),
                },
                device,
                repeats,
            )
            difference = block(pixels, context) - written_out_attention(block, pixels, context)
        found["layouts"].append(
            {
                "layout": name,
                "ours_seconds": seconds["ours"],
                "written_out_seconds": seconds["written_out"],
                "ratio": seconds["written_out"] / seconds["ours"],
                "largest_difference": difference.abs().max().item(),
            }
        )
    for name, call in (("ours", _run_ours), ("written_out", written_out_attention)):
        peak = extra_peak(call, _make_attention, (4, 4), (128, 256), device)
        found[f"{name}_peak_mib_at_128x256"] = peak
    return found


def _run_ours(block: Attention, pixels: Tensor, context: Tensor) -> None:
    block(pixels, context)


def compare_aggregations(device: str, repeats: int, side: int = 128, classes: int = 150) -> dict:
    """Reading the memory by attention to pixels and to rows, forward and backward."""
    torch.manual_seed(0)
    memory = FeatureMemory(classes, 512).to(device)
    memory.initialize(torch.rand_like(memory.rows), torch.ones_like(memory.initialized))
    by_pixels, by_rows = READERS["pixels"]().to(device), READERS["rows"]().to(device)
    pixels = torch.randn(1, 512, side, side, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last).requires_grad_()
    coarse = torch.randn(1, classes, side, side, device=device, requires_grad=True)

    def read_pixels() -> None:
        by_pixels.read(pixels, coarse, memory).sum().backward()

    def read_rows() -> None:
        by_rows.read(pixels, coarse, memory).sum().backward()

    seconds = median_seconds({"pixels": read_pixels, "rows": read_rows}, device, repeats)
    return {
        "case": f"forward and backward, 1 x 512 x {side} x {side}, K = {classes}",
        "pixels_seconds": seconds["pixels"],
        "rows_seconds": seconds["rows"],
        "ratio": seconds["pixels"] / seconds["rows"],
    }


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
            time_training_step(
                args.config_file, args.device, precision, 512, 2, args.steps, args.opts
            )
        )

    print(
        tabulate(
            [
                [
                    x["case"],
                    x["classes"],
                    x["present"],
                    shown(x["ours_seconds"] * 1e3, ".1f"),
                    shown(x["literal_seconds"] * 1e3, ".0f"),
                    shown(x["ratio"], ".0f"),
                    shown(x["ours_peak_mib"], ".0f"),
                    shown(x["literal_peak_mib"], ".0f"),
                    shown(x["largest_difference"], ".1e"),
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


def benchmark_attention(args: argparse.Namespace) -> dict:
    """Measure, print what was found, and return it as plain data."""
    print("measuring attention", file=sys.stderr)
    attention = compare_attention(args.device, args.repeats)
    print("measuring aggregations", file=sys.stderr)
    aggregation = compare_aggregations(args.device, args.repeats)
    ours, written = (attention[f"{x}_peak_mib_at_128x256"] for x in ("ours", "written_out"))
    for x in attention["layouts"]:
        print(
            f"{attention['case']}, {x['layout']}: ours {x['ours_seconds']:.2f} s, written out "
            f"{x['written_out_seconds']:.2f} s, {x['ratio']:.1f} times faster, largest difference "
            f"{x['largest_difference']:.1e}"
        )
    print(
        f"extra peak memory, 1 x 512 x 128 x 256: ours {shown(ours, '.0f')} MiB, written out "
        f"{shown(written, '.0f')} MiB\n"
        f"{aggregation['case']}: pixels {aggregation['pixels_seconds']:.3f} s, rows "
        f"{aggregation['rows_seconds']:.3f} s, {aggregation['ratio']:.1f} times cheaper\n"
    )
    return {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "precision": "float32",
        "attention": attention,
        "aggregation": aggregation,
    }


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``memory`` and ``attention`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    memory = parts.add_parser("memory", help="the update of the feature memory")
    memory.add_argument("--repeats", type=int, default=25, help="of each update (25)")
    memory.add_argument("--steps", type=int, default=3, help="training steps that are timed (3)")
    memory.add_argument("--no-step", action="store_true", help="leave the training step out")
    memory.add_argument(
        "--config-file", default="ade20k/mcibi_R50.yaml", metavar="FILE",
        help="config of the training step (ade20k/mcibi_R50.yaml)",
    )  # fmt: skip
    memory.add_opts("MODEL.MCIBI.CONTEXT aspp")
    memory.set_defaults(run=benchmark_memory)
    attention = parts.add_parser("attention", help="reading the memory")
    attention.add_argument("--repeats", type=int, default=5, help="of each call (5)")
    attention.set_defaults(run=benchmark_attention)
    for part in (memory, attention):
        part.add_device()
    return [memory, attention]
