"""MCIBI for Detectron2: a feature memory for any semantic segmentation framework.

Importing this package registers, in Detectron2's registries, the meta-architecture
``MCIBISegmentor``, the head ``MCIBIHead``, the backbone ``build_timm_backbone`` and the data sets.
"""

from importlib.util import find_spec

if find_spec("detectron2") is None:
    raise ImportError(
        "mcibi_d2 needs Detectron2, which is not installed. Either `make install` in a checkout of "
        "mcibi_d2 (a wheel from PyPI, no compiler needed), or `pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git` (compiles it)."
    )

__version__ = "0.2.0"

from . import (
    config_files,  # noqa: E402  lets Detectron2 open mcibi_d2://...
    modeling,  # noqa: E402  registers the meta-architecture, the head and the backbone
)
from .config import add_mcibi_config  # noqa: E402
from .data import register_all_datasets  # noqa: E402
from .errors import InputError  # noqa: E402

register_all_datasets()

__all__ = [
    "InputError",
    "__version__",
    "add_mcibi_config",
    "config_files",
    "modeling",
    "register_all_datasets",
]
