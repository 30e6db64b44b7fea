"""Pictures of segmentations."""

from .overlay import blend, colorize, comparison_sheet

__all__ = ["blend", "colorize", "comparison_sheet"]
