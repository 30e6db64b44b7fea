"""A memory in what a file holds: a checkpoint, or rows alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError
from .memory import FeatureMemory


@dataclass
class StoredMemory:
    """A memory as a checkpoint has it.

    Attributes:
        rows: (K * S, C) float32.
        initialized: (K * S,) bool; of checkpoints without it, whether a row is not zero.
        num_classes: K by the classifier beside the memory, None without one.
    """

    rows: Tensor
    initialized: Tensor
    num_classes: int | None


def classes_of_head(state: dict, prefix: str) -> int | None:
    """The number of classes of the head beside a memory, None if it is not in the state.

    Args:
        state: of a model, or a part of it.
        prefix: of the head's names in it.
    """
    # The last bias of H2 has one number for each class.
    biases = [v for k, v in state.items() if k.startswith(f"{prefix}h2.") and k.endswith("bias")]
    return len(biases[-1]) if biases and torch.is_tensor(biases[-1]) else None


def memory_in(checkpoint: dict, path: str) -> StoredMemory | None:
    """The memory in a checkpoint, or in the state of a model; None if it has none.

    Args:
        checkpoint: what the file holds.
        path: of the file, for the errors.

    Raises:
        InputError: it has several, or its tensors do not fit each other.
    """
    state = checkpoint["model"] if isinstance(checkpoint.get("model"), dict) else checkpoint
    names = [name for name in state if f".{name}".endswith(".memory.rows")]
    if not names:
        return None
    if len(names) > 1:
        raise InputError(f"{path}: has {len(names)} tensors called memory.rows, expected one")
    rows, prefix = state[names[0]], names[0].removesuffix("rows")
    if not torch.is_tensor(rows) or rows.dim() != 2:
        raise InputError(f"{path}: its {names[0]} is no matrix, expected a checkpoint")
    if not rows.is_floating_point():
        raise InputError(f"{path}: numbers of type {rows.dtype}, expected floating point")
    known = state.get(f"{prefix}initialized")
    if known is None:
        known = rows.any(dim=1)
    num_classes = classes_of_head(state, prefix.removesuffix("memory."))
    if not torch.is_tensor(known) or known.dtype != torch.bool or known.shape != rows.shape[:1]:
        raise InputError(f"{path}: its memory.initialized does not fit, expected {len(rows)} bools")
    if num_classes and len(rows) % num_classes:
        raise InputError(
            f"{path}: its memory has {len(rows)} rows and {len(known)} flags for {num_classes} "
            f"classes, expected as many for each"
        )
    return StoredMemory(rows.float(), known, num_classes)


def rows_for(memory: FeatureMemory, content: object, path: str) -> tuple[Tensor, Tensor]:
    """The rows for a memory in what a file holds.

    Args:
        memory: that they are for.
        content: a checkpoint with a memory, or a tensor or an array of rows: (K * S, C) or
            (K, S, C).
        path: of the file, for the errors.

    Returns:
        (K * S, C) float32 rows, and (K * S,) bool, which of them are there: those that the
        checkpoint calls initialised, or those that are not zero.

    Raises:
        InputError: there are none, or not such ones.
    """
    found, expected = None, tuple(memory.rows.shape)
    if isinstance(content, dict):
        stored = memory_in(content, path)
        if stored is None:
            raise InputError(f"{path}: has 0 tensors called memory.rows, expected one")
        if stored.num_classes not in (None, memory.num_classes):
            raise InputError(
                f"{path}: its memory is for {stored.num_classes} classes, expected one for "
                f"{memory.num_classes}"
            )
        content, found = stored.rows, stored.initialized
    if isinstance(content, np.ndarray) and content.dtype.kind == "f":
        content = torch.from_numpy(content.astype(np.float32))  # of any byte order
    by_class = (memory.num_classes, memory.slots, memory.channels)
    whole = torch.is_tensor(content) and not content.is_floating_point()
    if whole or isinstance(content, np.ndarray):
        raise InputError(f"{path}: numbers of type {content.dtype}, expected floating point")
    shape = tuple(content.shape) if torch.is_tensor(content) else type(content).__name__
    if shape not in (expected, by_class):
        raise InputError(f"{path}: {shape}, expected rows of shape {expected} or {by_class}")
    rows = content.reshape(expected).float()
    if not rows.isfinite().all():
        bad = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise InputError(f"{path}: rows {bad[:10]} are not finite, expected numbers")
    return rows, rows.any(dim=1) if found is None else found
