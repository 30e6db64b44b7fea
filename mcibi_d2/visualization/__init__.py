"""Pictures of segmentations."""

from .overlay import blend, colorize, comparison_sheet, with_legend

__all__ = ["blend", "colorize", "comparison_sheet", "with_legend"]
