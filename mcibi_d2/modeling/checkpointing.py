"""Activation checkpointing of a backbone: less memory for a second forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import InputError


def checkpoint_blocks(backbone: nn.Module) -> int:
    """Let a backbone keep the inputs of its blocks only, and compute them again when they are due.

    Blocks are the smallest modules of several layers that stand in a row: the residual blocks of a
    ResNet or ConvNeXt, the layers of a transformer. Losses, gradients and batch-norm statistics are
    those of the backbone without: the second pass repeats the random numbers of the first and
    leaves the running statistics alone. Evaluation is not touched.

    Args:
        backbone: changed in place; names of parameters stay.

    Returns:
        The number of blocks.

    Raises:
        InputError: there are no such blocks.
    """
    blocks = _blocks(backbone)
    if not blocks:
        raise InputError(
            f"MODEL.BACKBONE.CHECKPOINTING is True, but {type(backbone).__name__} has no blocks in "
            f"a row that could be computed again, expected False"
        )
    for block in blocks:
        block.forward = partial(_run, block, block.forward)
    return len(blocks)


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    in_a_row = [
        child
        for container in backbone.modules()
        if isinstance(container, nn.Sequential | nn.ModuleList)
        for child in container
        if not isinstance(child, nn.Sequential | nn.ModuleList) and _layers(child) > 1
    ]
    found = set(in_a_row)
    return [x for x in in_a_row if not any(m in found for m in x.modules() if m is not x)]


def _layers(module: nn.Module) -> int:
    """The number of modules with parameters of their own."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _run(block: nn.Module, forward: Callable, *args, **kwargs):
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_kept(block)),
        **kwargs,
    )


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms update copies of their running statistics, which are thrown away."""
    kept = [(m, dict(m._buffers)) for m in block.modules() if isinstance(m, _BatchNorm)]
    for norm, buffers in kept:
        norm._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
