"""What all within-image context modules A_wi have in common (paper, Eq. 3)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class ContextModule(nn.Module):
    """Gathers context C_wi within an image: a feature map in, a map of ``channels`` out.

    Every module takes the same arguments, uses those that its paper needs, and gives the others to
    this class, which knows no further ones (a module's own docstring has its own options alone):

    - ``in_channels``: of the backbone's last feature R;
    - ``channels``: of the result (512 in the papers);
    - ``norm``: makes the norm layer for a number of channels;
    - ``lower_channels``: of the feature below R, if ``needs_lower``;
    - ``num_classes``: K;
    - ``output_stride``: of R, 8 or 16 (or another; dilations are those of stride 8 or 16);
    - ``dilations``: of ASPP; none for those of the output stride.

    ``needs_lower`` and ``needs_coarse`` say which of the inputs of ``forward`` it wants.
    """

    needs_lower = False
    needs_coarse = False

    def __init__(
        self,
        *,
        lower_channels: int = 0,
        num_classes: int = 0,
        output_stride: int = 8,
        dilations: Sequence[int] = (),
    ):
        super().__init__()

    def forward(
        self,
        features: Tensor,
        lower: Tensor | None = None,
        coarse: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gather context.

        Args:
            features: R, (N, in_channels, h, w).
            lower: the feature of the stage before R, (N, lower_channels, h', w').
            coarse: logits of the auxiliary head, (N, K, h'', w''), from the same images.
            targets: (N, H, W) class ids and ignore values, in training only.

        Returns:
            C_wi (N, channels, h, w), and the module's own losses by name, {} for most modules.
        """
        return self._gather(features), {}

    def _gather(self, features: Tensor) -> Tensor:
        """C_wi of a module that works from R alone, and has no losses."""
        raise NotImplementedError


class ContextBeside(ContextModule):
    """Maps of context beside R itself, joined by ``fuse``: ``C_wi = cbr3x3([R, Y_1, Y_2, ..])``."""

    fuse: nn.Module

    def _gather(self, features: Tensor) -> Tensor:
        return self.fuse(torch.cat([features, *self._maps(features)], dim=1))

    def _maps(self, features: Tensor) -> Iterable[Tensor]:
        """Y_1, Y_2, .., each of the size of R."""
        raise NotImplementedError
