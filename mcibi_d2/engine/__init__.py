"""Training: the trainer, its step, its hooks, its checkpoints, and how it is launched."""

from .checkpoint import Checkpointer
from .launch import launch
from .memory_hooks import MemoryUpdateHook
from .memory_init import MemoryInitHook
from .schedule import build_lr_scheduler
from .setup import argument_parser, load_config, setup
from .trainer import Trainer

__all__ = [
    "Checkpointer",
    "MemoryInitHook",
    "MemoryUpdateHook",
    "Trainer",
    "argument_parser",
    "build_lr_scheduler",
    "launch",
    "load_config",
    "setup",
]
