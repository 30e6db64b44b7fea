"""Evaluation of semantic segmentation."""

from .evaluator import SemSegEvaluator
from .results import Results, read_results
from .tta import SemanticSegmentorWithTTA

__all__ = ["Results", "SemSegEvaluator", "SemanticSegmentorWithTTA", "read_results"]
