"""Pictures of segmentations."""

from .feature_plots import Panel, embedding_figure
from .overlay import blend, colorize, comparison_sheet, with_legend

__all__ = ["Panel", "blend", "colorize", "comparison_sheet", "embedding_figure", "with_legend"]
