"""Pictures of segmentations, memories and runs."""

from .curves import curves_figure
from .feature_plots import Panel, embedding_figure
from .memory_plots import cosines_figure, gathered_figure, norms_figure
from .overlay import blend, colorize, comparison_sheet, with_legend
from .png import png, rgb, write_picture

__all__ = [
    "Panel",
    "blend",
    "colorize",
    "comparison_sheet",
    "cosines_figure",
    "curves_figure",
    "embedding_figure",
    "gathered_figure",
    "norms_figure",
    "png",
    "rgb",
    "with_legend",
    "write_picture",
]
