"""Disentangled non-local block (DNL: Yin, Yao, Cao, Li, Zhang, Lin and Hu, ECCV 2020)."""

from torch import Tensor, nn

from ..attention import attend
from ..blocks import NormFactory, conv_norm_relu
from .base import ContextBeside

TEMPERATURE = 0.05


class DisentangledBlock(nn.Module):
    """A non-local block whose pairwise and unary terms have a softmax each.

    With query q, key k and value g of D channels and m of one, all 1x1 convolutions of the map X,
    and mu the means of q and k over the positions of the image::

        w_ij = softmax_j((q_i - mu_q) . (k_j - mu_k) / (t sqrt(D))) + softmax_j(m_j)
        Y_i  = X_i + out(sum_j w_ij g_j)

    out is a 1x1 conv-BN whose norm has a weight of 0 at first; the temperature t is 0.05, as in
    the authors' code.

    Args:
        channels: of the map; D is half of them.
        norm: makes the norm layer for a number of channels.
    """

    def __init__(self, channels: int, norm: NormFactory = nn.BatchNorm2d):
        super().__init__()
        self.depth = max(1, channels // 2)
        self.query = nn.Conv2d(channels, self.depth, 1)
        self.key = nn.Conv2d(channels, self.depth, 1)
        self.value = nn.Conv2d(channels, self.depth, 1)
        self.mask = nn.Conv2d(channels, 1, 1)
        # Without the ReLU.
        self.out = conv_norm_relu(self.depth, channels, 1, norm)[:2]
        weight = getattr(self.out[1], "weight", None)
        # The weight of a frozen norm is a buffer, which no training would bring back from 0.
        if isinstance(weight, nn.Parameter):
            nn.init.zeros_(weight)

    def forward(self, maps: Tensor) -> Tensor:
        """X (N, C, h, w) to Y (N, C, h, w). The (hw x hw) matrix is never stored."""
        query, key, value = (x(maps).flatten(2) for x in (self.query, self.key, self.value))
        query = query - query.mean(dim=2, keepdim=True)
        # The mean key drops out of the softmax; off, it leaves half precision smaller products.
        key = key - key.mean(dim=2, keepdim=True)
        pairwise = attend(query, key, value, scale=1 / (TEMPERATURE * self.depth**0.5))
        # The unary weights are the same for every i: (N, D, hw) times (N, hw, 1).
        unary = value @ self.mask(maps).flatten(2).softmax(dim=2).transpose(1, 2)
        return maps + self.out((pairwise + unary).unflatten(2, maps.shape[-2:]))


class DisentangledNonLocal(ContextBeside):
    """DNL's block in its network for segmentation.

    With dnl a :class:`DisentangledBlock`::

        C_wi = cbr3x3([R, cbr3x3(dnl(cbr3x3(R)))])

    cbr is conv-BN-ReLU.
    """

    def __init__(
        self, in_channels: int, channels: int, norm: NormFactory = nn.BatchNorm2d, **others: object
    ):
        super().__init__(**others)
        self.before = conv_norm_relu(in_channels, channels, 3, norm)
        self.block = DisentangledBlock(channels, norm)
        self.after = conv_norm_relu(channels, channels, 3, norm)
        self.fuse = conv_norm_relu(in_channels + channels, channels, 3, norm)

    def _maps(self, features: Tensor) -> list[Tensor]:
        return [self.after(self.block(self.before(features)))]
