"""Representation-consistent learning: the classifier must know the memory's rows (Eq. 15, 17)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .memory import FeatureMemory

# What the classifier's batch norms do with the rows: see ConsistencyLoss.
BATCH_NORMS = ("running", "batch")


class ConsistencyLoss(nn.Module):
    """Cross-entropy of a classifier of pixels on the memory's rows.

    With H2, the initialised rows M_k and their classes y_k::

        loss = - weight * mean_k log softmax(H2(M_k))_{y_k}

    Args:
        weight: beta of Eq. 19.
        batch_norm: what H2's batch norms do with the rows. ``"running"``: they use their running
            statistics, and do not change them. ``"batch"``: they use those of the initialised
            rows, which also enter the running ones, as in the released code; with a single row,
            which has no variance, they do as with ``"running"``.

    Attributes:
        active: if False the loss is 0, and so is its gradient;
            :class:`mcibi_d2.engine.MemoryUpdateHook` sets it, for a loss that starts later.
    """

    def __init__(self, weight: float = 1.0, batch_norm: str = "running"):
        super().__init__()
        self.weight = weight
        self.batch_norm = batch_norm
        self.active = True

    def forward(self, classifier: nn.Sequential, memory: FeatureMemory) -> Tensor:
        """The loss, 0-d; 0 without initialised rows."""
        known = memory.initialized
        logits = memory.rows[:, :, None, None]
        for layer in classifier:
            if isinstance(layer, _BatchNorm):
                logits = self._normalize(layer, logits.flatten(1), known)[:, :, None, None]
            else:
                logits = layer(logits)
        losses = F.cross_entropy(logits.float().flatten(1), memory.classes, reduction="none")
        loss = (losses * known).sum() / known.sum().clamp_min(1)
        return (self.weight if self.active else 0.0) * loss

    def _normalize(self, norm: _BatchNorm, rows: Tensor, known: Tensor) -> Tensor:
        """A batch norm on what has become of the rows (n, C)."""
        mean, var = norm.running_mean, norm.running_var
        if self.batch_norm == "batch" and self.active:
            # All processes have the same rows, so nothing is to be synchronised.
            rows = rows.float()
            known = known[:, None]
            count = known.sum()
            enough = count > 1
            own_mean = (rows * known).sum(dim=0) / count.clamp_min(1)
            own_var = ((rows - own_mean).square() * known).sum(dim=0) / count.clamp_min(1)
            if torch.is_grad_enabled():  # else it is a pass for the statistics of the pixels
                rate = norm.momentum * enough
                unbiased = own_var.detach() * count / (count - 1).clamp_min(1)
                # By .data, as batch norm itself does it: unseen by the backward pass, which does
                # not need the running statistics of a layer in training.
                mean.data.add_(rate * (own_mean.detach() - mean))
                var.data.add_(rate * (unbiased - var))
            mean, var = torch.where(enough, own_mean, mean), torch.where(enough, own_var, var)
        return (rows - mean) * (var + norm.eps).rsqrt() * norm.weight + norm.bias


@torch.no_grad()
def classify_rows(classifier: nn.Module, memory: FeatureMemory) -> Tensor:
    """The probabilities that a classifier of pixels gives each row of a memory, (K * S, K)."""
    training = classifier.training
    logits = classifier.eval()(memory.rows[:, :, None, None]).flatten(1)
    classifier.train(training)
    return logits.float().softmax(dim=1)
