"""Data sets, how they are read and augmented, and the order they are trained in."""

from .datasets import register_all_datasets
from .loader import build_train_loader
from .mapper import SemSegMapper

__all__ = ["SemSegMapper", "build_train_loader", "register_all_datasets"]
