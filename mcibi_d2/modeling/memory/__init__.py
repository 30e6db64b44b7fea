"""The feature memory: what it is, how pixels enter it, are read from it and learn from it."""

from .class_sums import ClassMeans, interpolate_pixels
from .consistency import BATCH_NORMS, ConsistencyLoss, classify_rows
from .files import classes_of_head, memory_in, rows_for
from .memory import MOVING, UPDATES, FeatureMemory
from .readers import READERS, MemoryReader

__all__ = [
    "BATCH_NORMS",
    "MOVING",
    "READERS",
    "UPDATES",
    "ClassMeans",
    "ConsistencyLoss",
    "FeatureMemory",
    "MemoryReader",
    "classes_of_head",
    "classify_rows",
    "interpolate_pixels",
    "memory_in",
    "rows_for",
]
