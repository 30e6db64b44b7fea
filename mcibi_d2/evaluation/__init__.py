"""Evaluation of semantic segmentation."""

from .evaluator import SemSegEvaluator

__all__ = ["SemSegEvaluator"]
