"""Resuming with other settings than the run had: what takes effect, and what is named."""

import logging

import torch
import yaml
from detectron2.config import CfgNode

from ..errors import InputError
from ..modeling.memory import MOVING

# What only the beginning of a run looks at, or what a checkpoint brings along.
FIXED = (
    "SEED",
    "MODEL.WEIGHTS",
    "MODEL.MCIBI.MEMORY.INIT",
    "MODEL.MCIBI.MEMORY.INIT_FILE",
    "MODEL.MCIBI.MEMORY.INIT_MAX_IMAGES",
    "MODEL.MCIBI.MEMORY.INIT_PIXELS",
)
UPDATE = "MODEL.MCIBI.MEMORY.UPDATE"
# Of one thing to the next, not of the run: a folder that was moved; what --resume itself sets.
_UNIMPORTANT = ("OUTPUT_DIR", "MODEL.TIMM.PRETRAINED")


class RunConfig:
    """The config that a run goes by, over all its beginnings.

    Args:
        cfg: of this beginning, before it is scaled to the number of processes.
    """

    def __init__(self, cfg: CfgNode):
        self._values = yaml.safe_load(cfg.dump())

    def dump(self) -> str:
        """The config as YAML, for a checkpoint; what had no effect is as it was."""
        return yaml.safe_dump(self._values)

    def follow(self, text: str) -> dict[str, object]:
        """Go on with a run; the log names every key that is another, with both values.

        Args:
            text: what :meth:`dump` gave when its checkpoint was written.

        Returns:
            The keys that are another and take effect, with what the run had.

        Raises:
            InputError: the rows of the memory would be made in another way.
        """
        before, now = _flatten(yaml.safe_load(text)), _flatten(self._values)
        differing = [
            key
            for key in sorted(before.keys() & now.keys())
            if before[key] != now[key] and key not in _UNIMPORTANT
        ]
        logger = logging.getLogger(__name__)
        if UPDATE in differing and not {before[UPDATE], now[UPDATE]} <= set(MOVING):
            raise InputError(
                f"{UPDATE} is {now[UPDATE]!r}, the run has {before[UPDATE]!r}, whose rows are made "
                f"at the beginning, expected the same to go on with it"
            )
        lost = [key for key in differing if key in FIXED]
        taken = [key for key in differing if key not in lost]
        if taken:
            described = ", ".join(f"{key} {now[key]!r} (was {before[key]!r})" for key in taken)
            logger.info(f"Other settings than the run had, from here on: {described}")
        if lost:
            described = ", ".join(
                f"{key} is {now[key]!r}, the run has {before[key]!r}" for key in lost
            )
            logger.warning(
                f"Without effect on a run that is resumed: {described}. To use the new values, "
                f"start another run."
            )
        for key in lost:
            *path, last = key.split(".")
            node = self._values
            for name in path:
                node = node[name]
            node[last] = before[key]
        return {key: before[key] for key in taken}


def _flatten(node: dict, prefix: str = "") -> dict[str, object]:
    values = {}
    for name, value in node.items():
        if isinstance(value, dict):
            values.update(_flatten(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


def regroup(state: dict, before: torch.optim.Optimizer, now: torch.optim.Optimizer) -> dict:
    """The state of an optimiser for one that has the same parameters in other groups.

    Args:
        state: of ``before``.
        before: an optimiser as the one that ``state`` is of.
        now: another of the same parameters.

    Raises:
        InputError: ``state`` is not of ``before``.
    """
    order = [p for group in before.param_groups for p in group["params"]]
    saved = [index for group in state["param_groups"] for index in group["params"]]
    if len(saved) != len(order):
        raise InputError(
            f"the checkpoint's optimiser has {len(saved)} parameters, expected {len(order)}, those "
            f"of the model"
        )
    of = {id(p): state["state"].get(index) for p, index in zip(order, saved, strict=True)}
    fresh = now.state_dict()
    parameters = [p for group in now.param_groups for p in group["params"]]
    fresh["state"] = {
        index: of[id(p)] for index, p in enumerate(parameters) if of[id(p)] is not None
    }
    return fresh
