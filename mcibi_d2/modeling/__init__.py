"""The model: memory, attention, fusion, head, segmentor, backbones."""

from .attention import Attention
from .backbones import TimmBackbone, build_dilated_resnet_backbone, build_timm_backbone
from .head import MCIBIHead
from .memory import FeatureMemory
from .segmentor import MCIBISegmentor
from .sliding import SlidingWindow

__all__ = [
    "Attention",
    "FeatureMemory",
    "MCIBIHead",
    "MCIBISegmentor",
    "SlidingWindow",
    "TimmBackbone",
    "build_dilated_resnet_backbone",
    "build_timm_backbone",
]
