"""Expectation-maximisation attention (Li et al., ICCV 2019): EMANet."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class EMContext(ContextModule):
    """Rebuilds the map from a few bases that are fitted to each image, from running bases on.

    With p = conv3x3-BN-ReLU(R), x = conv1x1(p), and the bases mu_k of length 1, started at the
    running ones, T times::

        z_nk = softmax_k(x_n . mu_k)                                expectation
        mu_k = sum_n z_nk x_n / sum_n z_nk, then mu_k / |mu_k|      maximisation

    and then::

        x'_n = sum_k z_nk mu_k
        C    = conv3x3-BN-ReLU(ReLU(p + BN(conv1x1(ReLU(x')))))

    No gradient goes through x': so do the authors, who found it a little better. Their first 1x1
    convolution, which it leaves as it was drawn, maps non-negative p to numbers of both signs;
    here it is two buffers, ``projection`` and ``projection_bias``, so that every parameter has a
    gradient. They and the first bases are drawn from a seed of their own, alike on all processes.

    **The running bases**, a buffer (channels, bases), move as the rows of a
    :class:`mcibi_d2.modeling.FeatureMemory` do: a forward pass in training adds the fitted bases to
    sums, and :meth:`commit` moves the running ones, after the optimiser's step, by
    ``mu <- momentum mu + (1 - momentum) mean of the fitted mu``, the mean over the images of all
    forward passes since the last one, and of all processes. Up to there all passes see the same
    bases, among them the second pass of ``torch.utils.checkpoint``, whose fitted bases are those
    of the first and leave their mean as it is.

    Args:
        bases: their number.
        iterations: T, at least 1.
        momentum: weight of the running bases when they move.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        bases: int = 64,
        iterations: int = 3,
        momentum: float = 0.9,
        **others: object,
    ):
        super().__init__(**others)
        if iterations < 1:
            raise ValueError(f"EMContext found iterations {iterations}, expected 1 or more")
        self.iterations = iterations
        self.momentum = momentum
        self.pixels = conv_norm_relu(in_channels, channels, 3, norm)
        # Always the same numbers: processes with seeds of their own have to begin alike, and
        # DistributedDataParallel does not send buffers with the setting that Detectron2 gives it.
        generator = torch.Generator().manual_seed(0)
        projection = torch.randn(channels, channels, 1, 1, generator=generator)
        self.register_buffer("projection", projection * (2 / channels) ** 0.5)
        bias = torch.rand(channels, generator=generator)
        self.register_buffer("projection_bias", (2 * bias - 1) * channels**-0.5)
        drawn = torch.randn(channels, bases, generator=generator)
        self.register_buffer("bases", F.normalize(drawn, dim=0))
        self.rebuild = conv_norm_relu(channels, channels, 1, norm)[:2]  # without its ReLU
        self.out = conv_norm_relu(channels, channels, 3, norm)
        # Of the images since the last commit, the sum of their bases, and in the last row their
        # number.
        self.register_buffer("_sums", torch.zeros(channels + 1, bases), persistent=False)

    def _gather(self, features: Tensor) -> Tensor:
        pixels = self.pixels(features)
        with torch.no_grad():
            projected = F.conv2d(pixels, self.projection, self.projection_bias)
            # Sums over thousands of pixels: in float32, whatever autocast says.
            with torch.autocast(pixels.device.type, enabled=False):
                dtype = torch.promote_types(self.bases.dtype, torch.float32)
                rebuilt, fitted = self._fit(projected.to(dtype).flatten(2))
        # Without gradients it is no training step: a pass for batch-norm statistics, say.
        if self.training and torch.is_grad_enabled():
            self._observe(fitted)
        rebuilt = self.rebuild(F.relu(rebuilt).view_as(pixels).to(pixels.dtype))
        return self.out(F.relu(pixels + rebuilt))

    def _fit(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (N, C, hw) to the rebuilt ones and each image's bases (N, C, k)."""
        bases = self.bases.to(pixels.dtype).expand(pixels.shape[0], -1, -1)
        for _ in range(self.iterations):
            shares = (pixels.transpose(1, 2) @ bases).softmax(dim=2)
            # The division by sum_n z_nk would not outlive the one by the length.
            bases = F.normalize(pixels @ F.normalize(shares, p=1, dim=1), dim=1)
        return bases @ shares.transpose(1, 2), bases

    @torch.no_grad()
    def _observe(self, fitted: Tensor) -> None:
        """Add the bases of each image (N, C, k) to the sums."""
        # An image with overflowed features must not spoil the running bases for ever.
        sound = fitted.isfinite().flatten(1).all(dim=1)
        self._sums[:-1] += fitted.masked_fill(~sound[:, None, None], 0.0).sum(dim=0)
        self._sums[-1] += sound.sum()

    @torch.no_grad()
    def commit(self) -> None:
        """Move the running bases by what was observed on all processes, and clear the sums.

        A collective operation: every process of the default group must call it. With nothing to go
        by, not a single sound image, the bases stay.
        """
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        total, count = self._sums[:-1], self._sums[-1, 0]
        rate = (1 - self.momentum) * (count > 0)
        self.bases += rate * (total / count.clamp_min(1) - self.bases)
        self._sums.zero_()
