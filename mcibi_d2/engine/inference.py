"""A model as it is evaluated: with folded batch norms, in the precision of the config."""

import copy

import torch
from detectron2.config import CfgNode
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..modeling import MCIBISegmentor
from ..modeling.folding import fold_batch_norms

# (height, width) of the image that shows which batch norm follows which convolution.
_SIZE = (64, 64)


def prepare_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Do what ``TEST.FOLD_BATCH_NORM`` and ``TEST.PRECISION`` say, in place.

    The results are those of the model up to rounding. It cannot be trained afterwards, and its
    state dict is no longer that of a checkpoint.

    Args:
        cfg: with these keys.
        model: with its weights. Models of other classes than :class:`MCIBISegmentor` are left as
            they are.

    Returns:
        The model, in evaluation mode.
    """
    model.eval()
    if not isinstance(model, MCIBISegmentor):
        return model
    if cfg.TEST.FOLD_BATCH_NORM:
        image = torch.zeros(3, *_SIZE, dtype=torch.uint8)
        fold_batch_norms(model, lambda: model([{"image": image}]))
    return model.to_precision(getattr(torch, cfg.TEST.PRECISION))


def inference_copy(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """A copy of a model as :func:`prepare_inference` makes it; the model is not changed.

    Args:
        cfg: see :func:`prepare_inference`.
        model: wrapped in DDP or not. Other than :class:`MCIBISegmentor` there is no copy.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    as_it_is = not cfg.TEST.FOLD_BATCH_NORM and cfg.TEST.PRECISION == "float32"
    if as_it_is or not isinstance(inner, MCIBISegmentor):
        return model
    return prepare_inference(cfg, copy.deepcopy(inner))
