"""Parameters, FLOPs and time of the context modules (Table 3), or of a whole model.

``python -m mcibi_d2.tools.complexity`` prints the paper's table, computed from our modules for an
input of 2048 x 128 x 128. With ``--config-file`` it is a whole model on an image.

FLOPs are counted as the paper does: one per multiply-add of the convolutions, two per output of a
batch norm, one per output of a ReLU. The products of attention, which the paper leaves out, are
added in a column of their own.
"""

import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from statistics import median

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from tabulate import tabulate
from torch import Tensor, nn

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.setup import without_download
from mcibi_d2.modeling import Attention, MCIBISegmentor
from mcibi_d2.modeling.blocks import conv_norm_relu
from mcibi_d2.modeling.context import CONTEXTS
from mcibi_d2.modeling.fusion import ConcatFusion
from mcibi_d2.tools.command import ToolParser, run_tool

IN_CHANNELS, LOWER_CHANNELS, CHANNELS, ATTENTION_DIM, GRID = 2048, 1024, 512, 256, (128, 128)
# The paper's Table 3: millions of parameters, billions of FLOPs, milliseconds on a V100.
PAPER = {
    "DCA": (14.82, 242.80, 47.64),
    "ASPP": (42.21, 674.47, 101.44),
    "PPM": (23.07, 309.45, 29.57),
    "CCNet": (23.92, 397.38, 56.90),
    "DANet": (23.92, 392.02, 62.64),
    "ANN": (20.32, 335.24, 49.66),
    "DNL": (24.12, 395.25, 68.62),
    "APCNet": (30.46, 413.12, 54.20),
    "ASPP+DCA": (45.63, 730.56, 125.03),
}
_WITHIN = {
    "ASPP": "aspp",
    "PPM": "ppm",
    "CCNet": "cc",
    "DANet": "da",
    "ANN": "ann",
    "DNL": "dnl",
    "APCNet": "apc",
}


class DatasetContext(nn.Module):
    """DCA of Table 3: what MCIBI adds between the backbone and H2, but H1 and the memory's rows.

    Projection, attention and fusion; with ASPP, its map is attended to and fused as well. The
    table's DCA has 3x3 kernels, its ASPP + DCA 1x1.

    Args:
        aspp: with ASPP as the within-image module.
    """

    def __init__(self, aspp: bool = False):
        super().__init__()
        kernel = 1 if aspp else 3
        self.project = conv_norm_relu(IN_CHANNELS, CHANNELS, kernel)
        self.attention = Attention(CHANNELS, ATTENTION_DIM)
        self.fuse = ConcatFusion(CHANNELS, kernel)
        self.aspp = None
        if aspp:
            self.aspp = CONTEXTS["aspp"](IN_CHANNELS, CHANNELS)
            self.within_attention = Attention(CHANNELS, ATTENTION_DIM)
            self.within_fuse = ConcatFusion(CHANNELS, kernel)

    def forward(self, features: Tensor, gathered: Tensor) -> Tensor:
        """Context for R (N, 2048, h, w), from what the memory gave (N, 512, h, w)."""
        pixels = self.project(features)
        augmented = self.fuse(pixels, self.attention(pixels, gathered))
        if self.aspp is not None:
            within = self.within_attention(pixels, self.aspp(features)[0])
            augmented = self.within_fuse(within, augmented)
        return augmented


class _WithinImage(nn.Module):
    """A within-image module with its inputs as positional arguments, and its map alone."""

    def __init__(self, name: str):
        super().__init__()
        self.module = CONTEXTS[name](IN_CHANNELS, CHANNELS, lower_channels=LOWER_CHANNELS)

    def forward(self, features: Tensor, lower: Tensor) -> Tensor:
        return self.module(features, lower=lower)[0]


class _Network(nn.Module):
    """A segmentor without reading and resizing images."""

    def __init__(self, model: MCIBISegmentor):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.logits(images)


def _elements(value) -> int:
    return torch.Size(get_shape(value)).numel()


def _products(inputs: list, outputs: list) -> int:
    """Multiply-adds of a matrix product, batched or not."""
    return _elements(outputs[0]) * get_shape(inputs[0])[-1]


def _attention_products(inputs: list, outputs: list) -> int:
    """Multiply-adds of scaled_dot_product_attention: query with key, and weights with value."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    positions = torch.Size(query[:-1]).numel() * key[-2]
    return positions * (query[-1] + value[-1])


@torch.no_grad()
def count_flops(module: nn.Module, inputs: tuple) -> tuple[int, int]:
    """FLOPs by the paper's counting, and with the products of attention.

    Args:
        module: in evaluation mode.
        inputs: of its forward.
    """
    counts = FlopCountAnalysis(module, inputs)
    counts.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts.tracer_warnings("none")
    every_output = lambda inputs, outputs: _elements(outputs[0])  # noqa: E731
    for name in ("relu", "relu_", "leaky_relu", "leaky_relu_", "gelu"):
        counts.set_op_handle(f"aten::{name}", every_output)
    counts.set_op_handle("aten::batch_norm", lambda inputs, outputs: 2 * _elements(outputs[0]))
    for name in ("matmul", "bmm", "mm"):
        counts.set_op_handle(f"aten::{name}", _products)
    counts.set_op_handle("aten::scaled_dot_product_attention", _attention_products)
    by_operator = counts.by_operator()
    paper = {"conv", "batch_norm", "relu", "relu_", "leaky_relu", "leaky_relu_", "gelu"}
    paper |= {"linear", "addmm", "layer_norm"}  # of transformers, which the table has none of
    products = {"matmul", "bmm", "mm", "einsum", "scaled_dot_product_attention"}
    convolutions = sum(by_operator[name] for name in paper)
    return int(convolutions), int(convolutions + sum(by_operator[name] for name in products))


@torch.no_grad()
def _milliseconds(call: Callable, device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        before = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
    return median(times[1:]) * 1e3


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make_module(name: str) -> nn.Module:
    """The module of a row of Table 3; its forward takes two maps.

    They are R (N, 2048, h, w) and, for within-image modules, the stage before (N, 1024, h, w),
    else what the memory gave (N, 512, h, w).
    """
    return _WithinImage(_WITHIN[name]) if name in _WITHIN else DatasetContext("+" in name)


def measure_table(device: str, repeats: int) -> list[dict]:
    """The rows of Table 3, from our modules.

    Args:
        device: to time them on.
        repeats: of each; 0 leaves the time out (None).
    """
    results = []
    for name in PAPER:
        second = LOWER_CHANNELS if name in _WITHIN else CHANNELS
        print(f"measuring {name}", file=sys.stderr)
        module = make_module(name).eval().to(device)
        inputs = tuple(torch.rand(1, c, *GRID, device=device) for c in (IN_CHANNELS, second))
        flops, with_attention = count_flops(module, inputs)
        taken = None
        if repeats:
            taken = _milliseconds(lambda m=module, x=inputs: m(*x), device, repeats)
        results.append(
            {
                "module": name,
                "parameters": _parameters(module),
                "flops": flops,
                "flops_with_attention": with_attention,
                "milliseconds": taken,
            }
        )
    return results


def measure_model(
    config_file: str, size: tuple[int, int], repeats: int, options: Sequence[str] = ()
) -> dict:
    """A whole model on one image.

    Args:
        config_file: its config.
        size: height and width of the image.
        repeats: of the timing; 0 leaves it out.
        options: config keys and values.
    """
    cfg = without_download(load_config(config_file, list(options)))
    model = Trainer.build_model(cfg).eval()
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8)}]
    normalised = model.preprocess(inputs).tensor

    with torch.no_grad():
        flops, with_attention = count_flops(_Network(model).eval(), (normalised,))
    return {
        "module": config_file,
        "parameters": _parameters(model),
        "flops": flops,
        "flops_with_attention": with_attention,
        "milliseconds": _milliseconds(lambda: model(inputs), cfg.MODEL.DEVICE, repeats)
        if repeats
        else None,
    }


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("complexity", __doc__)
    parser.add_config_file(required=False, of="of a whole model, instead of the table")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"),
        help="of the image, with --config-file (512 512)",
    )  # fmt: skip
    parser.add_device()
    parser.add_argument("--repeats", type=int, default=3, help="of the timing; 0: no timing (3)")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead")
    parser.add_opts("MODEL.MCIBI.CONTEXT aspp")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    if args.opts and not args.config_file:
        raise InputError("--opts needs --config-file FILE, which builds the model")
    if args.config_file:
        options = ["MODEL.DEVICE", args.device, *args.opts]
        results = [measure_model(args.config_file, tuple(args.size), args.repeats, options)]
    else:
        results = measure_table(args.device, args.repeats)
    if args.json:
        print(json.dumps(results, indent=1))
        return
    rows = []
    for x in results:
        paper = PAPER.get(x["module"], (None, None, None))
        taken = x["milliseconds"]
        rows.append(
            [
                x["module"],
                f"{x['parameters'] / 1e6:.2f} M",
                f"{x['flops'] / 1e9:.2f} G",
                f"{x['flops_with_attention'] / 1e9:.2f} G",
                "-" if taken is None else f"{taken:.0f} ms",
                *(
                    "-" if value is None else f"{value:.2f} {unit}"
                    for value, unit in zip(paper, ("M", "G", "ms"), strict=True)
                ),
            ]
        )
    headers = ["module", "parameters", "FLOPs", "with attention", f"time, {args.device}"]
    headers += ["paper: parameters", "FLOPs", "time, V100"]
    print(tabulate(rows, headers=headers))


if __name__ == "__main__":
    run_tool(main)
