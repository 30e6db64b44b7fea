"""Images per second of the predictor, one by one and several together.

``predict`` takes random images through :class:`mcibi_d2.predict.Predictor`, from arrays to labels
and probabilities, in turns: each of a list by itself, and the list. The weights are random, too,
which does not matter for the time.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from mcibi_d2.engine import load_config
from mcibi_d2.model_zoo import get_config_file
from mcibi_d2.predict import Predictor

from .measure import median_seconds, shown

MODELS = ("camvid/mcibi_MobileNetV2.yaml", "ade20k/mcibi_R50.yaml")


def make_predictor(config: str, device: str, batch: int) -> Predictor:
    """Of a config's network with random weights, at the size of the images themselves."""
    options = ["MODEL.DEVICE", device, "MODEL.TIMM.PRETRAINED", "False", "INPUT.MIN_SIZE_TEST", "0"]
    cfg = load_config(get_config_file(config), options)
    with tempfile.TemporaryDirectory() as folder:
        cfg.MODEL.WEIGHTS = str(Path(folder) / "weights.pth")
        torch.manual_seed(0)
        torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
        return Predictor(cfg, batch_size=batch)


def compare(config: str, size: tuple[int, int], batch: int, device: str, repeats: int) -> dict:
    """Images per second of both ways."""
    predictor = make_predictor(config, device, batch)
    images = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), dtype=np.uint8)
    seconds = median_seconds(
        {
            "single": lambda: [predictor.predict(image) for image in images],
            "together": lambda: predictor.predict(list(images)),
        },
        device,
        repeats,
    )
    return {
        "config": config,
        "size": list(size),
        "batch": batch,
        "single_per_second": batch / seconds["single"],
        "together_per_second": batch / seconds["together"],
        "ratio": seconds["single"] / seconds["together"],
    }


def benchmark_predict(args: argparse.Namespace) -> dict:
    """Measure, print a table, and return it as plain data."""
    found = []
    for config in args.configs:
        print(f"measuring {config}", file=sys.stderr)
        found.append(compare(config, tuple(args.size), args.batch, args.device, args.repeats))
    print(
        tabulate(
            [
                [
                    x["config"],
                    shown(x["single_per_second"], ".2f"),
                    shown(x["together_per_second"], ".2f"),
                    shown(x["ratio"], ".2f"),
                ]
                for x in found
            ],
            headers=["images per second", "one by one", f"{args.batch} together", "faster by"],
            disable_numparse=True,
        )
    )
    return {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "predictors": found,
    }


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``predict`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    part = parts.add_parser("predict", help="images per second, one by one and together")
    part.add_argument("--configs", nargs="+", default=MODELS, metavar="FILE", help=f"{MODELS}")
    part.add_argument("--size", nargs=2, type=int, default=(360, 480), metavar=("H", "W"))
    part.add_argument("--batch", type=int, default=8, help="images together (8)")
    part.add_argument("--repeats", type=int, default=7, help="of each way (7)")
    part.add_device()
    part.set_defaults(run=benchmark_predict)
    return [part]
