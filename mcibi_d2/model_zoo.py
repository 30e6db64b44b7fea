"""Configs and models by name, as ``detectron2.model_zoo`` has them.

``model_zoo.get("ade20k/mcibi_R50.yaml")`` is a model; the names are those of the files in
``configs``, with or without a checkout.
"""

import torch
from detectron2.config import CfgNode
from torch import nn

from .config_files import get_config_file
from .engine import Checkpointer, Trainer, load_config
from .errors import InputError

__all__ = ["get", "get_config", "get_config_file"]


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """The config of a file in ``configs``, to be changed and used.

    Args:
        config_path: such as ``ade20k/mcibi_R50.yaml``.
        trained: whether ``MODEL.WEIGHTS`` is to be a trained model. There are none of this project,
            so True is refused.

    Raises:
        InputError: there is no such file, or ``trained`` is True.
    """
    cfg = load_config(get_config_file(config_path))
    if trained:
        raise InputError(
            f"{config_path}: has no trained model, expected trained=False and a checkpoint of your "
            f"own in MODEL.WEIGHTS"
        )
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """A model in training mode, on its device.

    Its backbone starts as the config says: with timm's pretrained weights, which are downloaded,
    unless ``MODEL.TIMM.PRETRAINED`` is False, and with ``MODEL.WEIGHTS`` if that is not empty. All
    else is random. (Without a network: ``get_config``, ``MODEL.TIMM.PRETRAINED`` False, and
    Detectron2's ``build_model``.)

    Args:
        config_path: see :func:`get_config`.
        trained: see :func:`get_config`.
        device: default: ``MODEL.DEVICE``, or the CPU where torch sees no GPU.

    Raises:
        InputError: see :func:`get_config`; or the weights cannot be had.
    """
    cfg = get_config(config_path, trained)
    if device is None and not torch.cuda.is_available():
        device = "cpu"
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = Trainer.build_model(cfg)
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
