"""One large image from bytes to labels, beside the released network in float32.

``inference`` is DeepLabV3-R50 + MCIBI on one image, with folded batch norms and in several
precisions (``TEST.FOLD_BATCH_NORM``, ``TEST.PRECISION``), beside the released network, or, where it
is not installed (``make parity``), beside ours with neither. The weights are random, which does not
matter for the time. The sides take turns, each in a process of its own, whose peak memory is all
that it takes beyond what the libraries do. Nothing of a side's first turn is left out, but for a
small image before it.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.inference import prepare_inference
from mcibi_d2.engine.setup import without_download
from mcibi_d2.model_zoo import get_config_file
from mcibi_d2.modeling.segmentor import PRECISIONS

from .measure import take_turns
from .training import as_data, has_released, print_sides, released_config

CONFIG = "cityscapes/mcibi_deeplabv3_R50.yaml"
SMALL = (64, 64)
MEAN, STD = 116.0, 58.0


def _calls(segment: Callable, size: tuple[int, int]) -> Callable[[], tuple[int, int]]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)

    @torch.no_grad()
    def call(image: torch.Tensor = image) -> tuple[int, int]:
        return tuple(segment(image).cpu().shape)

    call(image[:, : SMALL[0], : SMALL[1]])  # libraries load on first use
    return call


def make_ours(
    size: tuple[int, int], classes: int, options: list[str], device: str,
    precision: str = "float32", folded: bool = True,
) -> Callable[[], tuple[int, int]]:  # fmt: skip
    """Our network; the call returns the size of the labels."""
    options = [
        "MODEL.DEVICE", device, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes),
        "TEST.PRECISION", precision, "TEST.FOLD_BATCH_NORM", str(folded),
        "TEST.INFERENCE", "whole", *options,
    ]  # fmt: skip
    cfg = without_download(load_config(get_config_file(CONFIG), options))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg)
    memory = model.sem_seg_head.memory
    memory.initialize(torch.randn(memory.rows.shape).relu(), torch.ones_like(memory.initialized))
    model = prepare_inference(cfg, model)
    model.labels_only = True
    return _calls(lambda image: model([{"image": image}])[0]["labels"], size)


def make_released(
    size: tuple[int, int], classes: int, options: list[str], device: str
) -> Callable[[], tuple[int, int]]:
    """The released network in float32, as its tester runs it; ``options`` are ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ssseg.modules import SSSegInputStructure
        from ssseg.modules.models.segmentors.mcibi import MCIBI
    torch.manual_seed(0)
    net = MCIBI(released_config(classes, aspp=True), "TEST").to(device).eval()
    net.memory_module.memory.data.normal_().relu_()

    def segment(image: torch.Tensor) -> torch.Tensor:
        images = (image[None].to(device).float() - MEAN) / STD
        logits = net(SSSegInputStructure(images=images, mode="TEST")).seg_logits
        logits = F.interpolate(logits, image.shape[1:], mode="bilinear", align_corners=False)
        return logits[0].argmax(dim=0)

    return _calls(segment, size)


def benchmark_inference(args: argparse.Namespace) -> dict:
    """Measure, print a table, and return it as plain data."""
    for name, least in (("classes", 2), ("rounds", 1)):
        if getattr(args, name) < least:
            raise InputError(
                f"--{name} is {getattr(args, name)}, expected a whole number from {least} on"
            )
    if min(args.size) < 32:
        raise InputError(f"--size is {tuple(args.size)}, expected at least 32 pixels each")
    sides = {
        f"ours, {precision}": partial(make_ours, precision=precision)
        for precision in args.precision or PRECISIONS[:2]
    }
    if has_released():
        other, sides = "released, float32", {"released, float32": make_released, **sides}
    else:
        other = "ours, float32, not folded"
        sides = {other: partial(make_ours, folded=False), **sides}
    print(f"measuring {len(sides)} networks in turn", file=sys.stderr)
    case = (tuple(args.size), args.classes, args.opts)
    found = take_turns(sides, case, args.device, args.rounds, whole=True, first=False)
    height, width = args.size
    results = {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "options": args.opts,
        "case": f"image, {height} x {width}, K = {args.classes}",
        "sides": as_data(found, other),
    }
    print_sides(results, results["case"], "s", 1, ".2f")
    print()
    return results


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``inference`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    part = parts.add_parser("inference", help="one large image", description=__doc__)
    part.add_argument("--size", nargs=2, type=int, default=(1024, 2048), metavar=("H", "W"))
    part.add_argument("--classes", type=int, default=19, help="(19)")
    part.add_argument(
        "--precision", action="append", choices=PRECISIONS,
        help="again for several (float32 and bfloat16)",
    )  # fmt: skip
    part.add_argument("--rounds", type=int, default=3, help="turns of each network (3)")
    part.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    part.add_opts("MODEL.MCIBI.AGGREGATION rows")
    part.set_defaults(run=benchmark_inference)
    return [part]
