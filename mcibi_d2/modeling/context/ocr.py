"""Object-contextual representations (Yuan, Chen, Wang, ECCV 2020): OCRNet."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import Attention
from ..blocks import NormFactory, conv_norm_relu
from .base import ContextModule


class ObjectContext(ContextModule):
    """Each pixel attends to K object regions, which a coarse segmentation lays out.

    With pixels x = conv3x3-BN-ReLU(R) and the coarse logits l, resized to R's size::

        m_k = softmax over pixels of l_k                            soft object regions
        f_k = sum_i m_ki x_i                                        object region representations
        y_i = rho(sum_k softmax_k(phi(x_i) . psi(f_k) / sqrt(256)) delta(f_k))
        C_i = dropout(g([y_i, x_i]))

    phi and psi are two 1x1 conv-BN-ReLU to ``key_channels``, delta one, rho one back to
    ``channels``, g one from twice ``channels``. The scale 1 / sqrt(256) and the rate 0.05 of
    Dropout2d are those of the authors' code; the paper names neither. As there, the gradient goes
    through the regions into the coarse logits.

    OCRNet + MCIBI is in no released code. Here it is wired as MCIBI's paper has every module (Eq.
    3-4): l is the auxiliary head's prediction, as in OCRNet, and H1's W, from R', is for the
    memory alone, as neither paper lets one stand for the other. C is C_wi before its refinement:
    :class:`mcibi_d2.modeling.MCIBIHead` lets R' attend to it, by an attention block of its own,
    and fuses the result with what the memory gave. x and R' are two projections of R.

    Args:
        key_channels: channels of query, key and value.
        dropout: probability of Dropout2d on the result.
    """

    needs_coarse = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        norm: NormFactory = nn.BatchNorm2d,
        *,
        key_channels: int = 256,
        dropout: float = 0.05,
        **others: object,
    ):
        super().__init__(**others)
        self.pixels = conv_norm_relu(in_channels, channels, 3, norm)
        self.attention = Attention(channels, key_channels, norm)
        self.join = conv_norm_relu(2 * channels, channels, 1, norm)
        self.dropout = nn.Dropout2d(dropout)

    def forward(
        self,
        features: Tensor,
        lower: Tensor | None = None,
        coarse: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """R (N, in_channels, h, w) and ``coarse`` (N, K, h', w') to C_wi (N, channels, h, w)."""
        if coarse is None:
            raise ValueError("ObjectContext found no coarse logits, expected (N, K, h, w)")
        pixels = self.pixels(features)
        regions = object_regions(pixels, coarse)
        if self.training and regions.shape[0] * regions.shape[2] == 1:
            # Batch norm refuses a single value. The attention over a region and its copy is the
            # one over the region, and so are the batch's mean and variance.
            regions = regions.repeat(1, 1, 2, 1)
        context = self.attention(pixels, regions)
        return self.dropout(self.join(torch.cat([context, pixels], dim=1))), {}


def object_regions(pixels: Tensor, coarse: Tensor) -> Tensor:
    """The representations f_k: pixels (N, C, h, w), logits (N, K, h', w') to (N, C, K, 1)."""
    # A softmax and a sum over thousands of pixels: in float32, whatever autocast says.
    with torch.autocast(pixels.device.type, enabled=False):
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        coarse = F.interpolate(
            coarse.to(dtype), size=pixels.shape[-2:], mode="bilinear", align_corners=False
        )
        regions = coarse.flatten(2).softmax(dim=2)
        regions = pixels.to(dtype).flatten(2) @ regions.transpose(1, 2)
        return regions[..., None].to(pixels.dtype)
