"""Pictures of segmentations."""

from .overlay import colorize, comparison_sheet

__all__ = ["colorize", "comparison_sheet"]
