"""Norm layers by their names in ``MODEL.SEM_SEG_HEAD.NORM``."""

from detectron2.layers import get_norm
from torch import nn

from ..errors import InputError
from .blocks import NormFactory

# Of detectron2.layers.get_norm, those that work on one process and on several, on any device; ""
# is no norm.
NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "naiveSyncBN", "naiveSyncBN_N", "")


def norm_factory(name: str) -> NormFactory:
    """What makes the norm layer for a number of channels.

    Args:
        name: one of :data:`NORMS`.

    Raises:
        InputError: there is no such norm, or, when it makes a layer, none of so many channels.
    """
    if name not in NORMS:
        known = ", ".join(known or "''" for known in NORMS)
        raise InputError(f"MODEL.SEM_SEG_HEAD.NORM is {name!r}, expected one of {known}")

    def make(channels: int) -> nn.Module:
        try:
            return get_norm(name, channels) or nn.Identity()
        except ValueError as error:  # of GroupNorm
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.NORM is {name}, which cannot norm {channels} channels "
                f"({error}); expected fitting channels (MODEL.SEM_SEG_HEAD.CONVS_DIM, "
                f"MODEL.MCIBI.ATTENTION_DIM) or another norm"
            ) from error

    return make
