"""An exported ONNX file on onnxruntime beside the model itself, on the CPU."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from tabulate import tabulate
from torch import nn

from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.setup import without_download
from mcibi_d2.modeling import MCIBISegmentor

from .. import export
from .measure import median_seconds

DEFAULTS = ("ade20k/mcibi_R50.yaml", "camvid/mcibi_MobileNetV2.yaml")
BATCHES = ((1, (512, 512)), (1, (333, 500)))


def make_model(config_file: str, options: Sequence[str] = ()) -> tuple[CfgNode, MCIBISegmentor]:
    """The model of a config on the CPU, drawn at random, whose activations are of normal size."""
    cfg = without_download(load_config(config_file, ["MODEL.DEVICE", "cpu", *options]))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None  # the mean of what it sees
    with torch.no_grad():
        if cfg.MODEL.MCIBI.ENABLED:
            memory = model.sem_seg_head.memory
            there = torch.ones_like(memory.initialized)
            memory.initialize(torch.randn_like(memory.rows).relu(), there)
        images = model.preprocess([{"image": torch.rand(3, 128, 128) * 255} for _ in range(2)])
        model.sem_seg_head(model.backbone(images.tensor))
    return cfg, model.eval()


@torch.no_grad()
def benchmark_export(args: argparse.Namespace) -> dict:
    """Measure, print a table, and return everything as plain data."""
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "cases": []}
    for config_file in args.config_file or DEFAULTS:
        print(f"measuring {config_file}", file=sys.stderr)
        cfg, model = make_model(config_file, args.opts)
        export.check_exportable(cfg, "onnx")
        module = export.ImagesToLogits(model, cfg.INPUT.FORMAT, "RGB").eval()
        module.requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            with path.open("wb") as file:
                export.record(module, "onnx")(file)
            exported = export.load(str(path), "onnx", model.device)
        for batch, size in BATCHES:
            images = torch.rand(batch, 3, *size) * 255
            expected = module(images)
            span = expected.max() - expected.min()
            difference = (exported(images) - expected).abs().max() / span
            calls = {"eager": lambda x=(module, images): x[0](x[1]),
                     "onnx": lambda x=(exported, images): x[0](x[1])}  # fmt: skip
            seconds = median_seconds(calls, "cpu", args.repeats)
            results["cases"].append(
                {
                    "config": Path(config_file).stem,
                    "images": f"{batch} x 3 x {size[0]} x {size[1]}",
                    "eager_seconds": seconds["eager"],
                    "onnx_seconds": seconds["onnx"],
                    "ratio": seconds["eager"] / seconds["onnx"],
                    "largest_difference": difference.item(),
                }
            )
    rows = [
        [x["config"], x["images"], f"{x['eager_seconds'] * 1e3:.0f}",
         f"{x['onnx_seconds'] * 1e3:.0f}", f"{x['ratio']:.2f}", f"{x['largest_difference']:.1e}"]
        for x in results["cases"]
    ]  # fmt: skip
    headers = ["config", "images", "eager ms", "onnxruntime ms", "faster by", "of the range"]
    print(tabulate(rows, headers=headers, disable_numparse=True) + "\n")
    return results


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``export`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    part = parts.add_parser("export", help="an ONNX file on onnxruntime")
    part.add_argument(
        "--config-file", action="append", metavar="FILE",
        help="again for several; default: FCN + MCIBI on R50 and MobileNetV2",
    )  # fmt: skip
    part.add_argument("--repeats", type=int, default=5, help="of each call (5)")
    part.add_opts("MODEL.MCIBI.CONTEXT aspp")
    part.set_defaults(run=benchmark_export)
    return [part]
