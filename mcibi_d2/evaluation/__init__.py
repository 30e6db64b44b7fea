"""Evaluation of semantic segmentation, and what a memory holds."""

from .class_features import class_features, separation
from .evaluator import SemSegEvaluator
from .memory_contents import MemoryContents, gathered_rows
from .results import Results, read_results
from .tta import SemanticSegmentorWithTTA

__all__ = [
    "MemoryContents",
    "Results",
    "SemSegEvaluator",
    "SemanticSegmentorWithTTA",
    "class_features",
    "gathered_rows",
    "read_results",
    "separation",
]
