"""From the network's logits to counted confusion, side by side with Detectron2's own way.

``evaluation`` takes logits at stride 8 and a label file. Detectron2's way resizes twice (its heads
by the stride, its ``SemanticSegmentor`` to the image's size), takes the argmax, and calls its
``SemSegEvaluator``. Ours is what ``--eval-only`` does.
"""

import argparse
import atexit
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from detectron2.modeling.postprocessing import sem_seg_postprocess
from PIL import Image
from tabulate import tabulate
from torch import Tensor

from mcibi_d2.evaluation import SemSegEvaluator
from mcibi_d2.modeling.score_maps import ResizedMap

from .measure import extra_peak, growth, median_seconds, shown

STRIDE = 8
IGNORED = 255
# Logits whose two best differ by less than this share can be told apart differently.
RELATIVE = 1e-4


@dataclass(frozen=True)
class Case:
    """Logits of K classes for an image of height x width, with labels in patches."""

    classes: int
    size: tuple[int, int]
    present: int

    def __str__(self) -> str:
        """The sizes, as the tables show them."""
        return f"{self.classes} x {self.size[0]} x {self.size[1]}"

    def make_logits(self, device: str = "cpu") -> Tensor:
        """(K, h, w), in favour of patches of some classes, and noise."""
        generator = torch.Generator().manual_seed(0)
        grid = [-(-side // STRIDE) for side in self.size]
        noise = torch.randn(1, self.classes, *(-(-side // 4) for side in grid), generator=generator)
        logits = F.interpolate(noise, size=grid, mode="bilinear")[0]
        names = torch.randperm(self.classes, generator=generator)[: self.present]
        patches = [-(-side // 16) for side in grid]
        patches = names[torch.randint(0, self.present, patches, generator=generator)]
        patches = patches.repeat_interleave(16, 0).repeat_interleave(16, 1)[: grid[0], : grid[1]]
        logits += 4 * F.one_hot(patches, self.classes).permute(2, 0, 1)
        return (logits + 0.1 * torch.randn(logits.shape, generator=generator)).to(device)

    def make_labels(self) -> np.ndarray:
        """(height, width) uint8, mostly what the logits say, moved a little, some ignored."""
        labels = F.interpolate(self.make_logits()[None], size=self.size, mode="bilinear")
        labels = labels[0].argmax(dim=0).roll((9, 14), (0, 1)).byte().numpy()
        labels[-10:] = IGNORED
        return labels


TINY = Case(8, (64, 96), 3)
CASES = (Case(150, (512, 683), 10), Case(19, (1024, 2048), 15))


def register(case: Case, labels: np.ndarray | None = None, count: int = 1000) -> str:
    """Register a data set of the case, whose records share one label file.

    Args:
        case: sizes and classes.
        labels: of the file; by default those of the case.
        count: of records; each can be evaluated once.

    Returns:
        The name of the data set.
    """
    folder = tempfile.mkdtemp(prefix="mcibi_d2_benchmark_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = str(Path(folder) / "labels.png")
    Image.fromarray(case.make_labels() if labels is None else labels).save(file)
    records = [{"file_name": f"{folder}/{i}.jpg", "sem_seg_file_name": file} for i in range(count)]
    DatasetCatalog.register(folder, lambda: records)
    classes = [str(k) for k in range(case.classes)]
    MetadataCatalog.get(folder).set(stuff_classes=classes, ignore_label=IGNORED)
    return folder


def _read_as_detectron2(file_name: str, dtype: type) -> np.ndarray:
    # Detectron2's own function for this raises an error on numpy 2.
    with open(file_name, "rb") as file:
        return np.asarray(Image.open(file)).astype(dtype)


def make_detectron2(case: Case, device: str, name: str = "") -> tuple:
    """Detectron2's evaluator, the records, the logits and the size of the image."""
    name = name or register(case)
    evaluator = Detectron2SemSegEvaluator(
        name, distributed=False, sem_seg_loading_fn=_read_as_detectron2
    )
    evaluator.reset()
    return evaluator, iter(DatasetCatalog.get(name)), case.make_logits(device), case.size


def make_ours(case: Case, device: str, name: str = "") -> tuple:
    """The same with our evaluator."""
    name = name or register(case)
    evaluator = SemSegEvaluator(name, distributed=False)
    return evaluator, iter(DatasetCatalog.get(name)), case.make_logits(device), case.size


def run_detectron2(
    evaluator: Detectron2SemSegEvaluator, records: Iterator, logits: Tensor, size: tuple[int, int]
) -> None:
    """The logits of one image to confusion, as Detectron2's head, model and evaluator do it."""
    resized = F.interpolate(logits[None], scale_factor=STRIDE, mode="bilinear", align_corners=False)
    resized = sem_seg_postprocess(resized[0], size, *size)
    evaluator.process([next(records)], [{"sem_seg": resized}])


def run_ours(
    evaluator: SemSegEvaluator, records: Iterator, logits: Tensor, size: tuple[int, int]
) -> None:
    """The logits of one image to confusion, as our model and evaluator do it."""
    padded = tuple(side * STRIDE for side in logits.shape[1:])
    labels = ResizedMap(logits, padded, size, size).labels()
    evaluator.process([next(records)], [{"labels": labels}])


def count_disagreement(case: Case, device: str) -> dict:
    """Confusion of the pixels whose two best logits are apart, counted both ways."""
    resized = F.interpolate(
        case.make_logits(device)[None], scale_factor=STRIDE, mode="bilinear", align_corners=False
    )[0, :, : case.size[0], : case.size[1]]
    best, second = resized.topk(2, dim=0).values
    close = (best - second) <= RELATIVE * torch.maximum(best.abs(), second.abs())
    labels = case.make_labels()
    labels[close.cpu().numpy()] = IGNORED
    name = register(case, labels, count=1)
    counted = []
    for make, run in ((make_detectron2, run_detectron2), (make_ours, run_ours)):
        evaluator, *arguments = make(case, device, name)
        run(evaluator, *arguments)
        evaluator.evaluate()
        counted.append(evaluator._conf_matrix[:-1, :-1])
    return {
        "pixels": int(counted[0].sum()),
        "close_pixels": int(close.sum()),
        "differences": int(np.abs(counted[0] - counted[1]).sum()),
    }


@torch.no_grad()
def compare_evaluations(case: Case, device: str, repeats: int, images: int) -> dict:
    """Time, memory and results of both ways."""
    name = register(case)
    ways: dict[str, tuple[Callable, Callable]] = {
        "ours": (make_ours, run_ours),
        "detectron2": (make_detectron2, run_detectron2),
    }
    made = {way: make(case, device, name) for way, (make, _) in ways.items()}
    seconds = median_seconds(
        {way: lambda way=way: ways[way][1](*made[way]) for way in ways}, device, repeats
    )
    peaks = {way: extra_peak(run, make, TINY, case, device) for way, (make, run) in ways.items()}
    return {
        "case": str(case),
        "ours_seconds": seconds["ours"],
        "detectron2_seconds": seconds["detectron2"],
        "ratio": seconds["detectron2"] / seconds["ours"],
        "ours_peak_mib": peaks["ours"],
        "detectron2_peak_mib": peaks["detectron2"],
        **count_disagreement(case, device),
        "images": images,
        "ours_growth_mib": growth(run_ours, make_ours, case, device, 10, images),
    }


def benchmark_evaluation(args: argparse.Namespace) -> dict:
    """Measure, print a table, and return it as plain data."""
    found = []
    for case in CASES:
        print(f"measuring {case}", file=sys.stderr)
        found.append(compare_evaluations(case, args.device, args.repeats, args.images))
    print(
        tabulate(
            [
                [
                    x["case"],
                    shown(x["ours_seconds"] * 1e3, ".0f"),
                    shown(x["detectron2_seconds"] * 1e3, ".0f"),
                    shown(x["ratio"], ".1f"),
                    shown(x["ours_peak_mib"], ".0f"),
                    shown(x["detectron2_peak_mib"], ".0f"),
                    shown(x["ours_growth_mib"], ".1f"),
                    f"{x['differences']} of {x['pixels']}",
                ]
                for x in found
            ],
            headers=["logits -> confusion", "ours ms", "Detectron2 ms", "faster by", "ours MiB",
                     "Detectron2 MiB", "growth MiB", "differences"],
            disable_numparse=True,
        )
    )  # fmt: skip
    print(
        f"\nMiB: extra peak memory of one image. growth: of ours, memory after {args.images} "
        f"images less that after 10.\ndifferences: of the confusion matrices, without the "
        f"{', '.join(str(x['close_pixels']) for x in found)} pixels whose two best logits are "
        f"within {RELATIVE} of each other.\n"
    )
    return {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "evaluations": found,
    }


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``evaluation`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    part = parts.add_parser("evaluation", help="from logits at stride 8 to counted confusion")
    part.add_argument("--repeats", type=int, default=7, help="of each way (7)")
    part.add_argument("--images", type=int, default=500, help="over which memory may grow (500)")
    part.add_device()
    part.set_defaults(run=benchmark_evaluation)
    return [part]
