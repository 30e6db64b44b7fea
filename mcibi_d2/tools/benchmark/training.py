"""The loss without full-size logits, and a whole training step, beside the plain way.

``loss`` is the cross-entropy of logits at stride 8 with its gradient: ours, by PyTorch's
``F.cross_entropy(F.interpolate(...))``, and by the loss of the authors' released code where that is
installed (``make parity``). ``step`` is a training step of FCN-R50 + MCIBI with the optimiser's and
the memory's: ours beside that of the released network, or, where it is not installed, beside ours
with PyTorch's loss. The sides take turns, each in a process of its own, so that its peak memory is
its own. That of a step is all that its process takes beyond what the libraries do.
"""

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from mcibi_d2 import InputError
from mcibi_d2.engine import Trainer, load_config
from mcibi_d2.engine.setup import without_download
from mcibi_d2.model_zoo import get_config_file
from mcibi_d2.modeling.losses import PixelLoss, hard_pixels_cross_entropy, resized_cross_entropy

from .measure import shown, take_turns

CONFIG = "ade20k/mcibi_R50.yaml"
IGNORED = 255
STRIDE = 8
# Of the class's pixels in the memory, in both networks.
MOMENTUM = 0.1
PRECISIONS = ("float32", "bfloat16", "float16")


def make_labels(batch: int, classes: int, size: int) -> Tensor:
    """(batch, size, size) int64: patches of 32 x 32 of up to 24 classes, one of them ignored."""
    generator = torch.Generator().manual_seed(0)
    side = -(-size // 32)
    labels = torch.randint(0, min(classes, 24), (batch, side, side), generator=generator)
    labels[:, -1, -1] = IGNORED if side > 1 else 0
    return labels.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :size, :size].contiguous()


# --- The loss.


def plain_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as it stands, with the logits at the size of the labels."""
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED)


def _make_loss(
    function: Callable, batch: int, classes: int, size: int, device: str
) -> Callable[[], tuple]:
    generator = torch.Generator().manual_seed(0)
    grid = -(-size // STRIDE)
    logits = 3 * torch.randn(batch, classes, grid, grid, generator=generator)
    labels = make_labels(batch, classes, size).to(device)
    # In the network's layout.
    logits = logits.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
    few = torch.zeros(1, 2, 2, 2, device=device, requires_grad=True)
    function(few, torch.zeros(1, 4, 4, dtype=torch.long, device=device)).backward()  # loads

    def call() -> tuple:
        logits.grad = None
        loss = function(logits, labels)
        loss.backward()
        # As arrays, which need no process that shares them.
        return loss.item(), logits.grad.cpu().numpy()

    return call


def make_our_loss(*case) -> Callable[[], tuple]:
    """Ours."""
    return _make_loss(resized_cross_entropy, *case)


def make_hard_loss(*case) -> Callable[[], tuple]:
    """Ours over hard pixels alone."""
    return _make_loss(hard_pixels_cross_entropy, *case)


def make_plain_loss(*case) -> Callable[[], tuple]:
    """PyTorch's."""
    return _make_loss(plain_cross_entropy, *case)


def make_released_loss(*case) -> Callable[[], tuple]:
    """That of the released code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ssseg.modules.models.losses import BuildLoss
    criterion = BuildLoss({"type": "CrossEntropyLoss", "ignore_index": IGNORED})

    def released(logits: Tensor, labels: Tensor) -> Tensor:
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        return criterion(logits, labels)

    return _make_loss(released, *case)


def has_released() -> bool:
    """Whether the networks of the released code are installed."""
    return importlib.util.find_spec("ssseg") is not None


def benchmark_loss(args: argparse.Namespace) -> dict:
    """Measure, print a table, and return it as plain data."""
    _check(args)
    case = (args.batch, args.classes, args.size)
    sides = {
        "ours": make_our_loss,
        "ours, ohem": make_hard_loss,
        "F.cross_entropy": make_plain_loss,
    }
    if has_released():
        sides["released"] = make_released_loss
    print("measuring losses", file=sys.stderr)
    found = take_turns(sides, case, args.device, args.repeats)
    (loss, gradient), (exact, of_exact) = found["ours"].result, found["F.cross_entropy"].result
    grid = -(-args.size // STRIDE)
    results = {
        **_about(args),
        "case": f"{args.batch} x {args.classes} x {grid} x {grid} -> {args.size} x {args.size}",
        "sides": as_data(found, "F.cross_entropy"),
        "loss_difference": abs(loss - exact),
        "gradient_difference": float(abs(gradient - of_exact).max() / abs(of_exact).max()),
    }
    print_sides(results, f"loss and gradient, {results['case']}", "ms", 1e3, ".0f")
    print(
        f"\nours and F.cross_entropy: losses {results['loss_difference']:.1e} apart, gradients "
        f"{results['gradient_difference']:.1e} of the largest value.\n"
    )
    return results


# --- The step.


class _PlainLoss(PixelLoss):
    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return plain_cross_entropy(logits.float(), targets)


def _images(batch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch, 3, size, size), generator=generator)


def make_our_step(
    batch: int, classes: int, size: int, precision: str, options: list[str], device: str,
    plain: bool = False,
) -> Callable[[], float]:  # fmt: skip
    """A training step of our network, as the trainer makes it."""
    options = [
        "MODEL.DEVICE", device, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", str(classes), *options,
    ]  # fmt: skip
    cfg = without_download(load_config(get_config_file(CONFIG), options))
    torch.manual_seed(0)
    model = Trainer.build_model(cfg).train()
    head, optimizer = model.sem_seg_head, Trainer.build_optimizer(cfg, model)
    head.memory.initialize(
        torch.randn(head.memory.rows.shape).relu(), torch.ones_like(head.memory.initialized)
    )
    if plain:
        head.pixel_loss = _PlainLoss()
    labels = make_labels(batch, classes, size)
    inputs = [
        {"image": image, "sem_seg": label}
        for image, label in zip(_images(batch, size), labels, strict=True)
    ]
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision == "float16")

    def step() -> float:
        with _autocast(device, precision):
            losses = model(inputs)
        total = sum(losses.values())
        optimizer.zero_grad()
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        head.memory.commit(MOMENTUM)
        return total.item()

    return step


def make_literal_step(*case) -> Callable[[], float]:
    """The same with PyTorch's loss."""
    return make_our_step(*case, plain=True)


def make_released_step(
    batch: int, classes: int, size: int, precision: str, options: list[str], device: str
) -> Callable[[], float]:
    """A training step of the released network, as its trainer makes it; ``options`` are ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ssseg.modules import SSSegInputStructure
        from ssseg.modules.models.segmentors.mcibi import MCIBI
    torch.manual_seed(0)
    net = MCIBI(released_config(classes), "TRAIN").to(device).train()
    net.memory_module.memory.data.normal_().relu_()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=5e-4)
    images = ((_images(batch, size) - 116.0) / 58.0).to(device)
    labels = make_labels(batch, classes, size).to(device)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=precision == "float16")

    def step() -> float:
        inputs = SSSegInputStructure(images=images, seg_targets=labels, mode="TRAIN")
        with _autocast(device, precision):
            loss = net(inputs, learning_rate=0.01, epoch=2).loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return step


def released_config(classes: int, aspp: bool = False) -> dict:
    """FCN-R50 + MCIBI with the losses and the update that ours has, for the released code.

    Args:
        classes: their number.
        aspp: DeepLabV3 in place of FCN.
    """
    loss = {"type": "CrossEntropyLoss", "ignore_index": IGNORED, "reduction": "mean"}
    return {
        "type": "MCIBI",
        "num_classes": classes,
        "align_corners": False,
        "norm_cfg": {"type": "BatchNorm2d"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": {
            "type": "ResNet",
            "depth": 50,
            "structure_type": "resnet50conv3x3stem",
            "pretrained": False,
            "outstride": 8,
            "use_conv3x3_stem": True,
            "selected_indices": (2, 3),
        },
        "head": {
            "downsample_backbone": {"kernel_size": 3, "stride": 1, "padding": 1, "bias": False},
            "context_within_image": {
                "is_on": aspp,
                "type": "aspp",
                "cfg": {"dilations": [1, 12, 24, 36]},
            },
            "use_hard_aggregate": False,
            "in_channels": 2048,
            "feats_channels": 512,
            "out_channels": 512,
            "transform_channels": 256,
            "num_feats_per_cls": 1,
            "use_loss": True,
            "loss_cfg": loss,
            "dropout": 0.1,
            "update_cfg": {
                "ignore_index": IGNORED,
                "strategy": "cosine_similarity",
                "momentum_cfg": {"base_momentum": MOMENTUM, "adjust_by_learning_rate": False},
            },
        },
        "auxiliary": {"in_channels": 1024, "out_channels": 512, "dropout": 0.1},
        "losses": {
            "loss_aux": {**loss, "scale_factor": 0.4},
            "loss_cls_stage1": {**loss, "scale_factor": 0.4},
            "loss_cls_stage2": loss,
        },
    }


def _autocast(device: str, precision: str) -> torch.autocast:
    dtype = getattr(torch, precision)
    return torch.autocast(
        device.split(":")[0],
        torch.bfloat16 if dtype == torch.float32 else dtype,
        enabled=dtype != torch.float32,
    )


def benchmark_step(args: argparse.Namespace) -> dict:
    """Measure, print a table, and return it as plain data."""
    _check(args)
    other, make = "literal loss", make_literal_step
    if has_released():
        other, make = "released", make_released_step
    results = {**_about(args), "options": args.opts, "steps": []}
    for precision in args.precision or PRECISIONS[:2]:
        print(f"measuring a step in {precision}", file=sys.stderr)
        case = (args.batch, args.classes, args.size, precision, args.opts)
        sides = {"ours": make_our_step, other: make}
        found = take_turns(sides, case, args.device, args.repeats, whole=True)
        title = f"step, {args.batch} x {args.size} x {args.size}, K = {args.classes}, {precision}"
        results["steps"].append({"case": title, "sides": as_data(found, other)})
        print_sides(results["steps"][-1], title, "s", 1, ".2f")
        print()
    return results


# --- Both.


def _check(args: argparse.Namespace) -> None:
    for name, least in (("batch", 1), ("classes", 2), ("size", 1), ("repeats", 1)):
        if getattr(args, name) < least:
            raise InputError(
                f"--{name} is {getattr(args, name)}, expected a whole number from {least} on"
            )


def _about(args: argparse.Namespace) -> dict:
    return {
        "torch": torch.__version__,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
    }


def as_data(found: dict, reference: str) -> dict:
    """What was found of each side as plain data, compared with one of them."""
    base = found[reference]
    return {
        name: {
            "seconds": side.median,
            "all_seconds": side.seconds,
            "peak_mib": side.peak_mib,
            "faster_by": base.median / side.median,
            "share_of_memory": side.peak_mib / base.peak_mib
            if side.peak_mib is not None and base.peak_mib
            else None,
        }
        for name, side in found.items()
    }


def print_sides(results: dict, title: str, unit: str, factor: float, form: str) -> None:
    """The table of the sides in ``results``.

    Args:
        results: with what :func:`as_data` gives as ``sides``.
        title: of the first column.
        unit: of the times.
        factor: of it in a second.
        form: of the times' figures.
    """
    rows = [
        [
            name,
            shown(x["seconds"] * factor, form),
            shown(x["faster_by"], ".2f"),
            shown(x["peak_mib"], ".0f"),
            shown(None if x["share_of_memory"] is None else 100 * x["share_of_memory"], ".0f"),
        ]
        for name, x in results["sides"].items()
    ]
    headers = [title, unit, "faster by", "peak MiB", "% of memory"]
    print(tabulate(rows, headers=headers, disable_numparse=True))


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``loss`` and ``step`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    loss = parts.add_parser("loss", help="the cross-entropy over pixels", description=__doc__)
    loss.set_defaults(run=benchmark_loss)
    step = parts.add_parser("step", help="a whole training step", description=__doc__)
    step.add_argument(
        "--precision", action="append", choices=PRECISIONS,
        help="again for several (float32 and bfloat16)",
    )  # fmt: skip
    step.set_defaults(run=benchmark_step)
    for part, repeats in ((loss, 11), (step, 3)):
        part.add_argument("--batch", type=int, default=2, help="images (2)")
        part.add_argument("--classes", type=int, default=150, help="(150)")
        part.add_argument("--size", type=int, default=512, help="height and width (512)")
        part.add_argument(
            "--repeats", type=int, default=repeats, help=f"of each side, after one ({repeats})"
        )
        part.add_device()
    step.add_opts("MODEL.BACKBONE.CHECKPOINTING True")
    return [loss, step]
