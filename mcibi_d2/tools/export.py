"""Write a model as one file that runs without this project: TorchScript, ONNX or torch.export.

python -m mcibi_d2.tools.export --config-file configs/ade20k/mcibi_R50.yaml --format onnx \\
    --output mcibi_R50.onnx --opts MODEL.WEIGHTS X.pth

The file takes images (N, 3, H, W) and gives logits (N, K, H, W), both float32, for any N, H and W.
Padding is inside, and so is the memory, as a constant. The file is run on images of two sizes, one
and three at a time, and is kept if its logits are those of the model.
"""

import argparse
import importlib
import logging
import math
import operator
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from mcibi_d2 import InputError
from mcibi_d2.engine import load_config
from mcibi_d2.engine.checkpoint import check_weights_exist, replacing
from mcibi_d2.engine.setup import check_config
from mcibi_d2.modeling import MCIBISegmentor
from mcibi_d2.predict import load_model
from mcibi_d2.tools.command import ToolParser, run_tool

FORMATS = ("torchscript", "onnx", "pt2")
PREPROCESSING = ("RGB", "BGR", "none")
# What every ONNX runtime of the last years knows. The attention operator of opset 23 is slower on
# the CPU (onnxruntime 1.32).
OPSET = 18
# Of the images that the graph is recorded with: no size that a network could take for special.
EXAMPLE = (2, 3, 107, 139)
CHECKED_BATCHES = (1, 3)
CHECKED_SIZES = ((512, 512), (333, 500))
# What the network computes in, and how far the file's logits may be from the model's in the same
# type, as a share of their range. In half precision runtimes round at other places than torch.
PRECISIONS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
# What cannot be recorded for any size, by MODEL.MCIBI.CONTEXT.
FIXED_SIZE = {"psa": "it goes through the rows of the map one by one"}


class ImagesToLogits(nn.Module):
    """From images to logits of their size in one call, as :class:`MCIBISegmentor` in evaluation.

    Args:
        model: of the images in one piece.
        image_format: of its images, ``INPUT.FORMAT``.
        preprocessing: what is given: ``RGB`` or ``BGR`` images of 0..255, or ``none``, images that
            are normalised already, in the model's own order of channels.
    """

    def __init__(self, model: MCIBISegmentor, image_format: str, preprocessing: str):
        super().__init__()
        self.model = model
        self.normalize = preprocessing != "none"
        self.flip = self.normalize and preprocessing != image_format

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) float32 to logits (N, K, H, W) float32."""
        model = self.model
        if self.flip:
            images = images.flip(1)
        if self.normalize:
            images = model.normalize(images)
        images = images.to(model.dtype)
        height, width = images.shape[-2:]
        unit = model.backbone.size_divisibility
        if unit > 1:
            images = F.pad(images, (0, -width % unit, 0, -height % unit))
        images = images.contiguous(memory_format=torch.channels_last)
        logits = model.logits(images)
        covered = (height, width) if model.released else images.shape[-2:]
        logits = F.interpolate(logits.float(), covered, mode="bilinear", align_corners=False)
        if unit > 1:
            # No slice: torch.export would demand that it is smaller than the whole.
            cut = [size - whole for size, whole in zip((height, width), covered, strict=True)]
            logits = F.pad(logits, (0, cut[1], 0, cut[0]))
        return logits


def make_config(args: argparse.Namespace) -> CfgNode:
    """The checked config of a command line."""
    cfg = load_config(args.config_file, args.opts)
    if args.format == "onnx":
        cfg.MODEL.DEVICE = "cpu"  # an ONNX file is for no device
    check_weights_exist(cfg.MODEL.WEIGHTS)
    if not args.output.absolute().parent.is_dir():
        raise InputError(f"--output {args.output}: {args.output.parent} is not a folder")
    if args.output.is_dir():
        raise InputError(f"--output {args.output} is a folder, expected the name of a file")
    if cfg.TEST.INFERENCE != "whole":
        raise InputError(
            f"TEST.INFERENCE is {cfg.TEST.INFERENCE!r}, expected whole: the file takes each image "
            f"(or window) in one piece"
        )
    cfg.DATASETS.TEST = ()
    cfg.TEST.PRECISION = args.precision
    cfg.freeze()
    check_config(cfg, train=False)
    return cfg


def check_exportable(cfg: CfgNode, form: str) -> None:
    """Raise an :class:`InputError` for what is known not to work, and for what is missing."""
    context = cfg.MODEL.MCIBI.CONTEXT
    if context in FIXED_SIZE:
        raise InputError(
            f"MODEL.MCIBI.CONTEXT is {context}, which cannot be exported for images of any size: "
            f"{FIXED_SIZE[context]}"
        )
    if form != "torchscript" and torch.__version__ < (2, 6):
        raise InputError(f"--format {form} needs torch 2.6 or newer, this is {torch.__version__}")
    for package in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(
                f"--format onnx needs the package {package}, which is not installed; "
                f"pip install 'mcibi_d2[export]' brings it"
            ) from error


@torch.no_grad()
def record(module: ImagesToLogits, form: str) -> Callable[[IO[bytes]], None]:
    """The model in a format, recorded for any batch and size; returns what writes it to a file."""
    example = torch.zeros(EXAMPLE, device=module.model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they say what the check finds out
        if form == "torchscript":
            # Without the optimisations of numbers, which would make them others.
            traced = torch.jit.trace(module, example, check_trace=False)
            frozen = torch.jit.freeze(traced, optimize_numerics=False)
            return lambda file: torch.jit.save(frozen, file)
        free = torch.export.Dim.DYNAMIC
        program = torch.export.export(
            module, (example,), dynamic_shapes=({0: free, 2: free, 3: free},)
        )
        if form == "pt2":
            _make_saveable(program)
            return lambda file: torch.export.save(program, file)
        import onnx

        program = program.run_decompositions(
            {
                torch.ops.aten.adaptive_avg_pool2d.default: average_regions,
                torch.ops.aten.conv2d.default: filter_channels,
            }
        )
        made = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            verbose=False,
        )
        return lambda file: onnx.save_model(made.model_proto, file)


def average_regions(maps: Tensor, regions: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d`` in two matrix products; ONNX's exporter has it for known sizes.

    Args:
        maps: (N, C, h, w).
        regions: their number along the height and the width.

    Returns:
        (N, C, *regions).
    """
    down, across = (
        _shares(length, count, maps) for length, count in zip(maps.shape[-2:], regions, strict=True)
    )
    return down @ maps @ across.t()


def _shares(length: int, count: int, like: Tensor) -> Tensor:
    """The share of each of ``length`` pixels in the mean of ``count`` regions, (count, length)."""
    region = torch.arange(count, device=like.device)[:, None]
    first, behind = region * length // count, ((region + 1) * length + count - 1) // count
    place = torch.arange(length, device=like.device)
    inside = (place >= first) & (place < behind)
    return inside.to(like.dtype) / (behind - first)


def filter_channels(
    maps: Tensor,
    filters: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The depthwise ``F.conv2d`` of the context ``dm``, one tap of the filters after the other.

    ONNX has no convolution whose number of groups depends on the batch. Others are left alone.

    Args:
        maps: (1, G, h, w).
        filters: (G, 1, k, k).
        bias: there is none.
        stride: 1.
        padding: k // 2.
        dilation: 1.
        groups: G; a number that is known is that of another convolution.

    Returns:
        (1, G, h, w).
    """
    if isinstance(groups, int):
        return NotImplemented
    height, width = maps.shape[-2:]
    maps = F.pad(maps, (padding[1], padding[1], padding[0], padding[0]))
    taps = filters[None, :, 0, :, :, None, None]
    total = 0
    for y in range(filters.shape[-2]):
        for x in range(filters.shape[-1]):
            total = total + taps[:, :, y, x] * maps[..., y : y + height, x : x + width]
    return total


def _make_saveable(program: torch.export.ExportedProgram) -> None:
    """Write ``ceil(a / b)``, which timm pads by, in operators that a saved program may have."""
    graph = program.graph
    for node in graph.nodes:
        quotient = node.args[0] if node.target is math.ceil else None
        if getattr(quotient, "target", None) is not operator.truediv:
            continue
        values = [getattr(x, "meta", {"val": x})["val"] for x in quotient.args]
        with graph.inserting_before(node):
            negative = graph.call_function(operator.neg, quotient.args[:1])
            negative.meta["val"] = -values[0]
            floor = graph.call_function(operator.floordiv, (negative, quotient.args[1]))
            floor.meta["val"] = -values[0] // values[1]
            ceiling = graph.call_function(operator.neg, (floor,))
            ceiling.meta["val"] = -(-values[0] // values[1])
        node.replace_all_uses_with(ceiling)
        graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def load(path: str, form: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """What a file computes. ONNX files run on the CPU, with as many threads as torch has."""
    if form == "torchscript":
        return torch.jit.load(path, map_location=device)
    if form == "pt2":
        with open(path, "rb") as file:
            return torch.export.load(file).module()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised, too
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def check(
    exported: Callable[[Tensor], Tensor], model: MCIBISegmentor, given: Callable[[Tensor], Tensor]
) -> float:
    """Run a file beside the model, on images of every checked size and number.

    Args:
        exported: of :func:`load`.
        model: in evaluation mode.
        given: makes what the file is given of the model's images.

    Returns:
        The largest difference of logits, as a share of the range of the model's.

    Raises:
        InputError: it is more than :data:`PRECISIONS` has, or the file does not run.
    """
    tolerance = PRECISIONS[str(model.dtype).removeprefix("torch.")]
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for height, width in CHECKED_SIZES:
        for batch in CHECKED_BATCHES:
            images = torch.randint(0, 256, (batch, 3, height, width), generator=generator)
            images = images.float().to(model.device)
            scores = model.score_maps([{"image": image} for image in images])
            expected = torch.stack([image_scores.scores() for image_scores in scores])
            case = f"at {batch} x 3 x {height} x {width}"
            try:
                found = exported(given(images))
            except Exception as error:
                raise InputError(f"the exported file cannot run {case}: {_line(error)}") from error
            if found.shape != expected.shape:
                raise InputError(
                    f"the exported file gives logits {tuple(found.shape)} {case}, expected "
                    f"{tuple(expected.shape)}"
                )
            span = expected.max() - expected.min()
            difference = ((found - expected).abs().max() / span).item()
            if not difference <= tolerance:  # nor NaN
                raise InputError(
                    f"the exported file's logits differ from the model's by {difference:.1e} of "
                    f"their range {case}, expected at most {tolerance:.0e}"
                )
            print(f"  {batch} x 3 x {height} x {width}: largest difference {difference:.1e} of "
                  f"the logits' range", flush=True)  # fmt: skip
            largest = max(largest, difference)
    return largest


def export(cfg: CfgNode, model: MCIBISegmentor, form: str, preprocessing: str, path: Path) -> float:
    """Write a model to a file and check it; returns what :func:`check` does.

    Args:
        cfg: of the model.
        model: in evaluation mode; its parameters lose their gradient.
        form: one of :data:`FORMATS`.
        preprocessing: see :class:`ImagesToLogits`.
        path: of the file. With an error there is none, or what has been there before.

    Raises:
        InputError: the model cannot be exported, or the file is not the model.
    """
    check_exportable(cfg, form)
    module = ImagesToLogits(model.requires_grad_(False), cfg.INPUT.FORMAT, preprocessing).eval()

    def given(images: Tensor) -> Tensor:
        """The model's images as the file wants them."""
        if not module.normalize:
            return (images - model.pixel_mean.float()) / model.pixel_std.float()
        return images.flip(1) if module.flip else images

    what = f"MODEL.MCIBI.CONTEXT {cfg.MODEL.MCIBI.CONTEXT}"
    if cfg.MODEL.BACKBONE.NAME == "build_timm_backbone":
        what = f"MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} with {what}"
    try:
        write = record(module, form)
    except Exception as error:
        raise InputError(
            f"{what} cannot be exported as {form} for any batch and size: {_line(error)}"
        ) from error
    with replacing(str(path)) as file:
        write(file)
        file.flush()
        # TensorFloat-32 alone would be more than the tolerance.
        with torch.backends.cudnn.flags(allow_tf32=False):
            try:
                return check(load(file.name, form, model.device), model, given)
            except InputError as error:
                raise InputError(f"{what} cannot be exported as {form}: {error}") from error


def _line(error: Exception) -> str:
    """The last line that an error says something in."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:200] if lines else ''}"


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("export", __doc__)
    parser.add_config_file()
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--preprocessing", default="RGB", choices=PREPROCESSING,
        help="the file takes RGB (default) or BGR images of 0..255, or (none) images from which "
             "MODEL.PIXEL_MEAN is taken and that are divided by PIXEL_STD, in the order of "
             "INPUT.FORMAT",
    )  # fmt: skip
    parser.add_argument(
        "--precision", default="float32", choices=list(PRECISIONS),
        help="what the network computes in, with all of its weights (images and logits are "
             "float32); the file's logits must be the model's in that type, to 1e-4, 1e-2 and 5e-2 "
             "of their range",
    )  # fmt: skip
    parser.add_opts("MODEL.WEIGHTS X.pth; MODEL.DEVICE is what a TorchScript or pt2 file is for")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    cfg = make_config(args)
    check_exportable(cfg, args.format)
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if not issubclass(architecture, MCIBISegmentor):
        raise InputError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, expected MCIBISegmentor"
        )
    model = load_model(cfg)
    print(f"Exporting as {args.format}, and comparing with the model:", flush=True)
    export(cfg, model, args.format, args.preprocessing, args.output)
    version = f"opset {OPSET}" if args.format == "onnx" else f"torch {torch.__version__}"
    images = {"none": f"normalised {cfg.INPUT.FORMAT}"}.get(
        args.preprocessing, f"{args.preprocessing} 0..255"
    )
    print(
        f"Wrote {args.output}: {args.format}, {version}, {args.precision}, "
        f"{os.path.getsize(args.output) / 2**20:.1f} MiB; images (N, 3, H, W), {images} -> logits "
        f"(N, {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}, H, W)."
    )


if __name__ == "__main__":
    run_tool(main)
