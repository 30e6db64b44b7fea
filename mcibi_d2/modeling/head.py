"""The head: projection -> H1 -> memory -> attention -> fusion -> H2, and the losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..errors import InputError
from .attention import Attention
from .blocks import NormFactory, classifier, conv_norm_relu, make_leaky, resolve_norm
from .context import CONTEXTS, ContextModule
from .fusion import FUSIONS
from .losses import LOSSES, PixelLoss
from .memory import BATCH_NORMS, READERS, UPDATES, ConsistencyLoss, FeatureMemory, MemoryReader
from .memory import classify_rows as classify_memory_rows
from .norms import norm_factory

ACTIVATIONS = ("relu", "leaky_relu")
# Types in which the whole model can be, for inference.
HALVES = (torch.float16, torch.bfloat16)
CONTEXT_NAMES = ("none", *CONTEXTS)
# Of the projection and of the concat fusion.
KERNELS = (1, 3)


@dataclass
class HeadMaps:
    """What a head makes of the features of images, in its own order.

    Attributes:
        logits: O, (N, K, h, w).
        augmented: what the last classifier is given, (N, C, h, w): R_aug (Eq. 4), or the
            baseline's map.
        pixels: R', (N, C, h, w); None without a memory.
        coarse: the logits of H1, (N, K, h, w); None where there is no H1.
        aux: the logits of the auxiliary heads that ran, by the names of their features.
        losses: of the within-image module, in training.
    """

    logits: Tensor
    augmented: Tensor
    pixels: Tensor | None = None
    coarse: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)


@SEM_SEG_HEADS_REGISTRY.register()
class MCIBIHead(nn.Module):
    """Classify each pixel from its own features and what the memory holds of its likely classes.

    The paper's Figure 2, for a backbone feature R::

        R'    = conv-BN-ReLU(R)                  projection to 512 channels
        W     = softmax(H1(R'))                  Eq. 11
        C_bi  = attention(R', W M)               Eq. 12-14
        C_wi  = attention(R', A_wi(R))           Eq. 3; with a within-image module
        R_aug = F(C_wi, F(R', C_bi))             Eq. 4; F(R', C_bi) without
        O     = H2(R_aug)                        Eq. 5 without its up-sampling

    A_wi is any module of :data:`CONTEXTS`: ``none`` is FCN, ``ppm`` PSPNet, ``aspp`` DeepLabV3,
    ``ocr`` OCRNet. As in the released code, the pixels attend to the map that it gives, and a
    second fusion joins that to the first. A module that works from a coarse segmentation (``ocr``,
    ``acf``) takes that of the auxiliary head. C_bi is what a reader of :data:`READERS` gives.

    Without a memory it is the plain framework: the module's map (for FCN the projection), dropout,
    1x1 convolution.

    The contract is that of Detectron2's heads: in training it returns ``(None, losses)``, else
    ``(logits, {})`` with the logits at the stride of the feature. Losses, each an average:

    - ``loss_o``: of O, over valid pixels (Eq. 18), times ``loss_weight``;
    - ``loss_w``: of H1, over valid pixels, times ``loss_weight_w`` (Eq. 16);
    - ``loss_m``: :class:`ConsistencyLoss` of H2 on the memory; not there for a memory held at zero;
    - ``loss_aux``: of the auxiliary heads, over valid pixels, added, times ``aux_loss_weight``;
    - those of the within-image module, under its names.

    A batch without valid pixels gives losses of 0, with gradients of 0.

    The whole model can be cast to half precision (``model.half()``, ``model.bfloat16()``) for
    inference, not for training. The rows of the memory are cast with it, and gathered in float32.

    Args:
        in_feature: name of the backbone feature R.
        num_classes: K.
        classifier: H2, or the classifier of the baseline.
        pixel_loss: from logits (N, K, h, w) and labels (N, H, W) to a loss.
        project: from R to R'; None if the within-image module gives the baseline's map.
        context: the within-image module A_wi, if there is one.
        within_attention: of C_wi; with a memory and a context.
        within_fuse: F that joins C_wi; with a memory and a context.
        memory: of K classes and the channels of R'; None for the baseline.
        memory_loss: of the memory; needed with one.
        reader: of the memory. None: it is not read; it trains H2 by ``loss_m`` alone, and
            inference costs nothing.
        coarse_classifier: H1, for a reader.
        fuse: F that joins C_bi, for a reader.
        aux: auxiliary heads, by the names of their features. The last one is the stage before R
            for modules that want it.
        loss_weight: weight of ``loss_o``.
        loss_weight_w: alpha of Eq. 19.
        aux_loss_weight: weight of ``loss_aux``.
    """

    memory: FeatureMemory | None

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        num_classes: int,
        classifier: nn.Module,
        pixel_loss: PixelLoss,
        project: nn.Module | None = None,
        context: ContextModule | None = None,
        within_attention: nn.Module | None = None,
        within_fuse: nn.Module | None = None,
        memory: FeatureMemory | None = None,
        memory_loss: ConsistencyLoss | None = None,
        reader: MemoryReader | None = None,
        coarse_classifier: nn.Module | None = None,
        fuse: nn.Module | None = None,
        aux: Mapping[str, nn.Module] | None = None,
        loss_weight: float = 1.0,
        loss_weight_w: float = 0.4,
        aux_loss_weight: float = 0.4,
    ):
        super().__init__()
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.pixel_loss = pixel_loss
        self.loss_weight = loss_weight
        self.loss_weight_w = loss_weight_w
        self.aux_loss_weight = aux_loss_weight
        # The names and their order are those in checkpoints.
        self.aux = nn.ModuleDict(aux)
        self.context = context
        self.project = project
        self.memory = memory
        self.h1 = coarse_classifier
        self.attention = reader
        self.fuse = fuse
        self.within_attention = within_attention
        self.within_fuse = within_fuse
        self.memory_loss = memory_loss
        if memory is not None:
            self.h2 = classifier
        else:
            self.classify = classifier

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments of ``__init__`` from a config with :func:`mcibi_d2.add_mcibi_config`.

        Args:
            cfg: the config.
            input_shape: the backbone's ``output_shape()``.
        """
        head, mcibi = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MCIBI
        _check(cfg, input_shape)
        in_feature, num_classes, channels = head.IN_FEATURES[0], head.NUM_CLASSES, head.CONVS_DIM
        norm = norm_factory(resolve_norm(head.NORM, cfg.MODEL.DEVICE))
        in_channels = input_shape[in_feature].channels
        below = [input_shape[name].channels for name in head.AUX_FEATURES]

        def two_layers() -> nn.Sequential:
            """H1 or H2: two 1x1 convolutions (paper, sections 3.3 and 3.4)."""
            return nn.Sequential(
                *conv_norm_relu(channels, channels, 1, norm), *last_layer(channels)
            )

        def last_layer(channels: int) -> tuple[nn.Module, nn.Module]:
            return nn.Dropout2d(head.DROPOUT), classifier(channels, num_classes)

        def attend_and_fuse(attention: type[nn.Module], **options) -> tuple[nn.Module, nn.Module]:
            return (
                attention(channels, mcibi.ATTENTION_DIM, norm, **options),
                FUSIONS[mcibi.FUSION](channels, mcibi.FUSE_KERNEL, norm),
            )

        # In this order a seed gives the same weights as ever.
        parts: dict = {}
        parts["aux"] = nn.ModuleDict(
            {
                name: nn.Sequential(
                    *_aux_layers(size, channels, head.AUX_CONVS, head.AUX_UPSAMPLING, norm),
                    *last_layer(channels),
                )
                for name, size in zip(head.AUX_FEATURES, below, strict=True)
            }
        )
        if mcibi.CONTEXT != "none":
            parts["context"] = CONTEXTS[mcibi.CONTEXT](
                in_channels,
                channels,
                norm,
                lower_channels=below[-1] if below else 0,
                num_classes=num_classes,
                output_stride=input_shape[in_feature].stride,
                dilations=mcibi.ASPP_DILATIONS,
            )
        if mcibi.ENABLED or "context" not in parts:
            parts["project"] = conv_norm_relu(in_channels, channels, mcibi.PROJECT_KERNEL, norm)
        if mcibi.ENABLED:
            slots = mcibi.MEMORY.SLOTS
            parts["memory"] = FeatureMemory(
                num_classes, channels, mcibi.MEMORY.UPDATE, slots, mcibi.MEMORY.RENORMALIZE
            )
            parts["memory_loss"] = ConsistencyLoss(mcibi.LOSS_WEIGHT_M, mcibi.RCL_BN)
            several = slots > 1 and mcibi.AGGREGATION == "pixels"
            reader = READERS["slots" if several else mcibi.AGGREGATION]
            if reader is not None:
                parts["coarse_classifier"] = two_layers()
                parts["reader"], parts["fuse"] = attend_and_fuse(
                    reader, slots=slots, rows_bias=mcibi.ROWS_BIAS
                )
                parts["reader"].hard = mcibi.HARD_AGGREGATION
            if "context" in parts:
                parts["within_attention"], parts["within_fuse"] = attend_and_fuse(Attention)
            parts["classifier"] = two_layers()
        else:
            parts["classifier"] = nn.Sequential(*last_layer(channels))
        if head.ACTIVATION == "leaky_relu":
            for part in parts.values():
                make_leaky(part)
        return {
            **parts,
            "in_feature": in_feature,
            "num_classes": num_classes,
            "pixel_loss": PixelLoss(
                head.LOSS,
                head.CLASS_WEIGHTS,
                head.IGNORE_VALUE,
                head.OHEM.THRESHOLD,
                head.OHEM.MIN_KEPT,
            ),
            "loss_weight": head.LOSS_WEIGHT,
            "loss_weight_w": mcibi.LOSS_WEIGHT_W,
            "aux_loss_weight": head.AUX_LOSS_WEIGHT,
        }

    @property
    def enabled(self) -> bool:
        """Whether there is a memory; else the head is the plain framework's."""
        return self.memory is not None

    @property
    def ignore_value(self) -> int:
        """The label of pixels without ground truth."""
        return self.pixel_loss.ignore_value

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Run the head.

        Args:
            features: of the backbone, by name, each (N, C_i, h_i, w_i).
            targets: (N, H, W) class ids and ignore values; used in training only, where the
                features are observed by the memory too.

        Returns:
            ``(None, losses)`` in training, ``(logits (N, K, h, w), {})`` else.
        """
        if self.training and targets is None:
            raise ValueError("MCIBIHead in training mode needs targets (N, H, W)")
        if self.training and next(self.parameters()).dtype in HALVES:
            raise InputError(
                f"the model was cast to {next(self.parameters()).dtype}, which is for inference; "
                f"expected float32 in training (SOLVER.AMP.ENABLED True is mixed precision)"
            )
        maps = self.describe(features, targets)
        if not self.training:
            if self.memory is not None:
                self.memory.warn_if_empty()
            return maps.logits, {}

        losses = maps.losses
        losses["loss_o"] = self.loss_weight * self.pixel_loss(maps.logits, targets)
        if maps.aux:
            total = sum(self.pixel_loss(x, targets) for x in maps.aux.values())
            losses["loss_aux"] = self.aux_loss_weight * total
        if maps.coarse is not None:
            losses["loss_w"] = self.loss_weight_w * self.pixel_loss(maps.coarse, targets)
        if self.memory is not None:
            if self.memory.update != "zero":
                losses["loss_m"] = self.memory_loss(self.h2, self.memory)
            # Without gradients it is no training step: a pass for batch-norm statistics, say.
            if torch.is_grad_enabled():
                self.memory.observe(maps.pixels.detach(), targets, self.ignore_value)
        return None, losses

    def describe(self, features: dict[str, Tensor], targets: Tensor | None = None) -> HeadMaps:
        """The maps that the head makes, from the pixels' features to the logits.

        Args:
            features: see :meth:`forward`.
            targets: see :meth:`forward`; for the losses of the within-image module.
        """
        names = tuple(self.aux)
        wanted = names if self.training else ()
        if self.context is not None and self.context.needs_coarse:
            wanted = wanted or names[-1:]
        aux = {name: self.aux[name](features[name]) for name in wanted}
        within, losses = None, {}
        if self.context is not None:
            last = names[-1] if names else None
            within, losses = self.context(
                features[self.in_feature],
                lower=features.get(last),
                coarse=aux.get(last),
                targets=targets if self.training else None,
            )
        if self.memory is None:
            augmented = self.pixels(features) if within is None else within
            return HeadMaps(self.classify(augmented), augmented, aux=aux, losses=losses)
        pixels = augmented = self.pixels(features)
        coarse = None
        if self.attention is not None:
            coarse = self.h1(pixels)
            gathered = self.attention.read(pixels, coarse.float(), self.memory)
            augmented = self.fuse(pixels, gathered)
        if within is not None:
            augmented = self.within_fuse(self.within_attention(pixels, within), augmented)
        return HeadMaps(self.h2(augmented), augmented, pixels, coarse, aux, losses)

    def pixels(self, features: dict[str, Tensor]) -> Tensor:
        """R' (N, C, h, w) from the backbone's features."""
        return self.project(features[self.in_feature])

    def classify_rows(self) -> Tensor:
        """H2's probabilities for each row of the memory, (K * S, K)."""
        return classify_memory_rows(self.h2, self.memory)

    @torch.no_grad()
    def rows_accuracy(self) -> Tensor:
        """The share of the initialised rows that H2 gives to their own class, a 0-d tensor."""
        known = self.memory.initialized
        right = (self.classify_rows().argmax(dim=1) == self.memory.classes) & known
        return right.sum() / known.sum().clamp_min(1)


def _aux_layers(
    in_channels: int, channels: int, convs: int, upsampling: int, norm: NormFactory
) -> list[nn.Module]:
    """Of an auxiliary head, what is before its dropout and classifier."""
    layers = []
    for _ in range(convs):
        layers.append(conv_norm_relu(in_channels, channels, 3, norm))
        if upsampling > 1:
            layers.append(nn.Upsample(scale_factor=upsampling))
        in_channels = channels
    return layers


def _check(cfg, input_shape: dict[str, ShapeSpec]) -> None:
    """Raise an :class:`InputError` for values that there are no parts for."""
    head, mcibi = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MCIBI
    if len(head.IN_FEATURES) != 1:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {head.IN_FEATURES}, expected one feature name"
        )
    for key in ("IN_FEATURES", "AUX_FEATURES"):
        for name in head[key]:
            if name not in input_shape:
                raise InputError(
                    f"MODEL.SEM_SEG_HEAD.{key} has {name!r}, expected a feature of the backbone, "
                    f"which gives {', '.join(input_shape)}"
                )
    choices: list[tuple[str, object, Sequence]] = [
        ("MCIBI.CONTEXT", mcibi.CONTEXT, CONTEXT_NAMES),
        ("MCIBI.AGGREGATION", mcibi.AGGREGATION, tuple(READERS)),
        ("MCIBI.FUSION", mcibi.FUSION, tuple(FUSIONS)),
        ("MCIBI.PROJECT_KERNEL", mcibi.PROJECT_KERNEL, KERNELS),
        ("MCIBI.FUSE_KERNEL", mcibi.FUSE_KERNEL, KERNELS),
        ("MCIBI.MEMORY.UPDATE", mcibi.MEMORY.UPDATE, UPDATES),
        ("MCIBI.RCL_BN", mcibi.RCL_BN, BATCH_NORMS),
        ("SEM_SEG_HEAD.ACTIVATION", head.ACTIVATION, ACTIVATIONS),
        ("SEM_SEG_HEAD.LOSS", head.LOSS, LOSSES),
    ]
    for key, value, known in choices:
        if value not in known:
            raise InputError(
                f"MODEL.{key} is {value!r}, expected one of {', '.join(map(str, known))}"
            )
    if mcibi.HARD_AGGREGATION and not getattr(READERS[mcibi.AGGREGATION], "mixes", False):
        raise InputError(
            f"MODEL.MCIBI.HARD_AGGREGATION is True, which needs MODEL.MCIBI.AGGREGATION "
            f"pixels, not {mcibi.AGGREGATION}"
        )
    module = CONTEXTS.get(mcibi.CONTEXT)
    if module and (module.needs_lower or module.needs_coarse) and not head.AUX_FEATURES:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.AUX_FEATURES is empty, expected a feature for "
            f"MODEL.MCIBI.CONTEXT {mcibi.CONTEXT} to work from"
        )
    if head.CLASS_WEIGHTS and len(head.CLASS_WEIGHTS) != head.NUM_CLASSES:
        raise InputError(
            f"MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS has {len(head.CLASS_WEIGHTS)} values, "
            f"expected one for each of the {head.NUM_CLASSES} classes"
        )
