"""Context encoding (Zhang et al., CVPR 2018): EncNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class Encoding(nn.Module):
    """Residuals of the pixels to learned codewords, summed by soft assignment (Eq. 1).

    For pixels x_i, codewords d_k and smoothing factors s_k::

        a_ik = softmax_k(-s_k |x_i - d_k|^2)
        e_k  = sum_i a_ik (x_i - d_k)

    Args:
        channels: of the pixels and of the codewords.
        codewords: their number.
    """

    def __init__(self, channels: int, codewords: int):
        super().__init__()
        limit = (codewords * channels) ** -0.5
        self.codewords = nn.Parameter(torch.empty(codewords, channels).uniform_(-limit, limit))
        self.smoothing = nn.Parameter(torch.rand(codewords))

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (N, C, h, w) as (N, codewords, C)."""
        # Sums of squares and over thousands of pixels: in float32, whatever autocast says.
        with torch.autocast(pixels.device.type, enabled=False):
            dtype = torch.promote_types(self.codewords.dtype, torch.float32)
            words, pixels = self.codewords.to(dtype), pixels.to(dtype)
            pixels = pixels.flatten(2).transpose(1, 2)
            # |x - d|^2 and the sum of residuals in products: x - d would be (N, hw, k, C).
            distances = (
                pixels.square().sum(dim=2, keepdim=True)
                - 2 * pixels @ words.t()
                + words.square().sum(dim=1)
            )
            shares = (-self.smoothing * distances).softmax(dim=2)
            encoded = shares.transpose(1, 2) @ pixels - shares.sum(dim=1)[..., None] * words
            return encoded.to(self.codewords.dtype)


class ContextEncoding(ContextModule):
    """Scales each channel by what the whole image contains, and learns to say what that is.

    With x = conv3x3-BN-ReLU(R) and the encoding e of conv1x1-BN-ReLU(x)::

        e = mean_k ReLU(BN(e_k))            BN over images and channels, one scale per codeword
        C = ReLU(x + x * sigmoid(W e))      Eq. 2
        loss_se = 0.2 BCE(sigmoid(V e), is class k in the image?)

    The paper sums over the codewords where the authors' code, and this, takes the mean. The loss
    is an average over classes and over the images that have a valid pixel: targets outside
    0 .. num_classes - 1 are ignored, and nothing is known of an image with no others. A batch of
    such images has a loss of 0 with gradients of 0.

    Args:
        num_classes: K, at least 1.
        codewords: their number.
        loss_weight: of ``loss_se``.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        num_classes: int = 0,
        codewords: int = 32,
        loss_weight: float = 0.2,
        **others: object,
    ):
        super().__init__(**others)
        if num_classes < 1:
            raise ValueError(f"ContextEncoding found num_classes {num_classes}, expected 1 or more")
        self.num_classes = num_classes
        self.loss_weight = loss_weight
        self.pixels = conv_norm_relu(in_channels, channels, 3, norm)
        self.project = conv_norm_relu(channels, channels, 1, norm)
        self.encode = Encoding(channels, codewords)
        self.norm = norm(codewords)
        self.gate = nn.Linear(channels, channels)
        self.presence = nn.Linear(channels, num_classes)

    def forward(
        self,
        features: Tensor,
        lower: Tensor | None = None,
        coarse: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R (N, in_channels, h, w) to C_wi (N, channels, h, w), and ``loss_se`` in training."""
        pixels = self.pixels(features)
        # As (N, codewords, C, 1) any norm for maps will do, and has C values of a single image.
        encoded = self.norm(self.encode(self.project(pixels))[..., None])
        encoded = F.relu(encoded).mean(dim=(1, 3))
        context = F.relu(pixels + pixels * self.gate(encoded).sigmoid()[..., None, None])
        if not self.training or targets is None:
            return context, {}
        loss = presence_loss(self.presence(encoded).float(), targets)
        return context, {"loss_se": self.loss_weight * loss}


def presence_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of logits (N, K) and which classes are in ``targets`` (N, H, W).

    A 0-d average over the classes and the images with a valid pixel, 0 if there are none.
    """
    num_classes = logits.shape[1]
    targets = targets.flatten(1).long()
    valid = (targets >= 0) & (targets < num_classes)
    # Invalid pixels vote for one class more, which is then dropped.
    votes = targets.masked_fill(~valid, num_classes)
    present = logits.new_zeros(len(logits), num_classes + 1).scatter_(1, votes, 1.0)[:, :-1]
    losses = F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(dim=1)
    known = valid.any(dim=1)
    return (losses * known).sum() / known.sum().clamp_min(1)
