"""timm's networks as a Detectron2 backbone."""

import difflib

import timm
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.utils import comm
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch import Tensor, nn

from ..errors import InputError
from .blocks import resolve_norm


class TimmBackbone(Backbone):
    """A timm network in ``features_only`` form.

    Features are named by Detectron2's convention, by their stage: the feature with timm's index
    i is ``res{i+1}``. In a ResNet ``res2`` .. ``res5`` are the four stages; with ``output_stride``
    8 the last three have stride 8, by dilation.

    Args:
        name: of a timm model, e.g. ``resnet50c``, ``mobilenetv2_100``.
        output_stride: of the last feature: 8, 16 or 32.
        out_indices: timm's indices of the features to return.
        pretrained: take timm's weights, from its hub or its cache.
        norm: ``BN``, ``SyncBN`` or ``FrozenBN``, in place of the network's batch norms.
    """

    @configurable
    def __init__(
        self,
        name: str,
        *,
        output_stride: int = 8,
        out_indices: tuple[int, ...] = (3, 4),
        pretrained: bool = False,
        norm: str = "BN",
    ):
        super().__init__()
        if not timm.is_model(name):
            close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5))
            raise InputError(
                f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know"
                + (f"; close: {close}" if close else "")
            )
        self.net = _create(name, output_stride, tuple(out_indices), pretrained)
        if norm == "SyncBN":
            self.net = convert_sync_batchnorm(self.net)
        elif norm == "FrozenBN":
            self.net = freeze_batch_norm_2d(self.net)
        elif norm != "BN":
            raise InputError(f"MODEL.TIMM.NORM is {norm!r}, expected BN, SyncBN or FrozenBN")
        info = self.net.feature_info
        self._shapes = {
            f"res{index + 1}": ShapeSpec(channels=channels, stride=reduction)
            for index, channels, reduction in zip(
                info.out_indices, info.channels(), info.reduction(), strict=True
            )
        }

    @classmethod
    def from_config(cls, cfg, input_shape: ShapeSpec | None = None) -> dict:
        """Arguments of ``__init__`` from a config with :func:`mcibi_d2.add_mcibi_config`."""
        options = cfg.MODEL.TIMM
        return {
            "name": options.NAME,
            "output_stride": options.OUTPUT_STRIDE,
            "out_indices": options.OUT_INDICES,
            # A file to load makes the download pointless.
            "pretrained": options.PRETRAINED and not cfg.MODEL.WEIGHTS,
            "norm": resolve_norm(options.NORM, cfg.MODEL.DEVICE),
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Normalised images (N, 3, H, W) to features by name, each (N, C, ~H/stride, ~W/stride)."""
        return dict(zip(self._shapes, self.net(images), strict=True))

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each feature."""
        return dict(self._shapes)


def _create(name: str, output_stride: int, out_indices: tuple[int, ...], pretrained: bool):
    """Build the timm network; of several processes on a machine, one downloads."""
    first = comm.get_local_rank() == 0
    if pretrained and not first:
        comm.synchronize()
    try:
        net = timm.create_model(
            name,
            features_only=True,
            output_stride=output_stride,
            out_indices=out_indices,
            pretrained=pretrained,
        )
    except (IndexError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error) or type(error).__name__
        raise InputError(
            f"timm's {name} cannot give features {out_indices} at output stride {output_stride} "
            f"(MODEL.TIMM.OUT_INDICES, MODEL.TIMM.OUTPUT_STRIDE): {reason}"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise InputError(
            f"timm could not get the weights of {name} ({type(error).__name__}); put a state dict "
            f"at MODEL.WEIGHTS, or set MODEL.TIMM.PRETRAINED False to start from scratch"
        ) from error
    if pretrained and first:
        comm.synchronize()
    return net


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg, input_shape: ShapeSpec | None = None) -> nn.Module:
    """Build the backbone that ``MODEL.TIMM`` describes."""
    return TimmBackbone(cfg, input_shape)
