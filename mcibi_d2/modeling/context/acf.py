"""Attentional class features (Zhang et al., ICCV 2019): ACFNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class ClassCenterContext(ContextModule):
    """Each pixel gets a mixture of class centers, by its own coarse class probabilities.

    With x = dropout(conv1x1-BN-ReLU(R)) and P the softmax over classes of the coarse logits,
    resized to R's size::

        c_k = sum_i P_ki x_i / sum_i P_ki        class center block
        a_i = sum_k P_ki c_k                     class attention block
        C   = conv3x3-BN-ReLU([conv1x1-BN-ReLU(a), R])

    The formulas are the paper's. The public code differs: it multiplies logits and features and
    normalises by a softmax over channels. As in both, the gradient goes through P into the coarse
    logits. The rate of Dropout2d is that of the public code.

    Args:
        dropout: probability of Dropout2d on x.
    """

    needs_coarse = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        dropout: float = 0.2,
        **others: object,
    ):
        super().__init__(**others)
        self.reduce = conv_norm_relu(in_channels, channels, 1, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.refine = conv_norm_relu(channels, channels, 1, norm)
        self.join = conv_norm_relu(channels + in_channels, channels, 3, norm)

    def forward(
        self,
        features: Tensor,
        lower: Tensor | None = None,
        coarse: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R (N, in_channels, h, w) and ``coarse`` (N, K, h', w') to C_wi (N, channels, h, w)."""
        if coarse is None:
            raise ValueError("ClassCenterContext found no coarse logits, expected (N, K, h, w)")
        pixels = self.dropout(self.reduce(features))
        context = self.refine(class_features(pixels, coarse))
        return self.join(torch.cat([context, features], dim=1)), {}


def class_features(pixels: Tensor, coarse: Tensor) -> Tensor:
    """The mixtures a: pixels (N, C, h, w) and logits (N, K, h', w') to (N, C, h, w)."""
    # Sums over thousands of pixels: in float32, whatever autocast says.
    with torch.autocast(pixels.device.type, enabled=False):
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        coarse = F.interpolate(
            coarse.to(dtype), size=pixels.shape[-2:], mode="bilinear", align_corners=False
        )
        probabilities = coarse.softmax(dim=1).flatten(2)
        # P / sum P before the product, so that a class which is nowhere likely has a center too.
        log_shares = F.log_softmax(coarse, dim=1).flatten(2)
        shares = log_shares.softmax(dim=2)
        centers = pixels.to(dtype).flatten(2) @ shares.transpose(1, 2)
        return (centers @ probabilities).unflatten(2, pixels.shape[-2:]).to(pixels.dtype)
