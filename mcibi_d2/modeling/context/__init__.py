"""The within-image context modules A_wi (paper, Eq. 3), by the names of ``MODEL.MCIBI.CONTEXT``."""

from .acf import ClassCenterContext
from .ann import AsymmetricNonLocal
from .apc import AdaptivePyramid
from .aspp import AtrousPyramid
from .base import ContextModule
from .cc import CrissCross
from .da import DualAttention
from .dm import DynamicFilterContext
from .dnl import DisentangledNonLocal
from .ema import EMContext
from .enc import ContextEncoding
from .isa import InterlacedContext
from .ocr import ObjectContext
from .ppm import PyramidPooling
from .psa import PointwiseContext

CONTEXTS: dict[str, type[ContextModule]] = {
    "ppm": PyramidPooling,
    "aspp": AtrousPyramid,
    "ocr": ObjectContext,
    "cc": CrissCross,
    "da": DualAttention,
    "ann": AsymmetricNonLocal,
    "dnl": DisentangledNonLocal,
    "apc": AdaptivePyramid,
    "enc": ContextEncoding,
    "ema": EMContext,
    "isa": InterlacedContext,
    "acf": ClassCenterContext,
    "dm": DynamicFilterContext,
    "psa": PointwiseContext,
}

__all__ = ["CONTEXTS", "ContextModule", "EMContext"]
