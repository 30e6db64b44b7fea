"""Evaluation of semantic segmentation."""

from .class_features import class_features, separation
from .evaluator import SemSegEvaluator
from .results import Results, read_results
from .tta import SemanticSegmentorWithTTA

__all__ = [
    "Results",
    "SemSegEvaluator",
    "SemanticSegmentorWithTTA",
    "class_features",
    "read_results",
    "separation",
]
