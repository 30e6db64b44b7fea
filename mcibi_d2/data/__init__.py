"""Data sets, how they are read and augmented, and the order they are trained in."""

from .datasets import register_all_datasets
from .loader import build_labelled_loader, build_test_loader, build_train_loader
from .mapper import SemSegMapper, read_image
from .own import register_own_dataset

__all__ = [
    "SemSegMapper",
    "build_labelled_loader",
    "build_test_loader",
    "build_train_loader",
    "read_image",
    "register_all_datasets",
    "register_own_dataset",
]
