"""The head: projection -> H1 -> memory -> attention -> fusion -> H2, and the losses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn

from ..errors import InputError
from .attention import Attention, RowAttention, SlotAttention
from .blocks import classifier, conv_norm_relu, make_leaky, resolve_norm
from .context import CONTEXTS
from .fusion import FUSIONS
from .losses import hard_pixels_cross_entropy, resized_cross_entropy
from .memory import UPDATES, FeatureMemory
from .norms import norm_factory

# Batch norm in the memory loss: see MCIBIHead.
RCL_BATCH_NORMS = ("running", "batch")
# How the memory is read: see MCIBIHead.
AGGREGATIONS = ("pixels", "rows", "none")
ACTIVATIONS = ("relu", "leaky_relu")
# Types in which the whole model can be, for inference.
HALVES = (torch.float16, torch.bfloat16)
CONTEXT_NAMES = ("none", *CONTEXTS)
# Of the projection and of the concat fusion.
KERNELS = (1, 3)
# Of the cross-entropies over pixels: see MCIBIHead.
LOSSES = ("cross_entropy", "ohem")


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
    ``acf``) takes that of the auxiliary head.

    With ``enabled=False`` it is the plain framework: the module's map (for FCN the projection),
    dropout, 1x1 convolution.

    The contract is that of Detectron2's heads: in training it returns ``(None, losses)``, else
    ``(logits, {})`` with the logits at the stride of the feature. Losses, each an average:

    - ``loss_o``: cross-entropy of O, over valid pixels (Eq. 18);
    - ``loss_w``: cross-entropy of H1, over valid pixels, times ``loss_weight_w`` (Eq. 16);
    - ``loss_m``: cross-entropy of H2 on the initialised memory rows, times ``loss_weight_m``
      (Eq. 15 and 17), the representation-consistent loss; not there for a memory held at zero,
      and 0 while ``memory_loss_active`` is False (:class:`mcibi_d2.engine.MemoryUpdateHook` sets
      it, for a loss that starts later);
    - ``loss_aux``: cross-entropy of an FCN head on each of ``aux_features``, over valid pixels,
      added, times ``aux_loss_weight``;
    - those of the within-image module, under its names.

    A batch without valid pixels gives losses of 0, with gradients of 0.

    The whole model can be cast to half precision (``model.half()``, ``model.bfloat16()``) for
    inference, not for training. The rows of the memory are cast with it, and gathered in float32.

    Args:
        input_shape: the backbone's ``output_shape()``.
        in_feature: name of the backbone feature R.
        num_classes: K.
        channels: of R' and of the memory.
        attention_dim: channels of query, key and value.
        enabled: with or without everything that the memory is for.
        context: within-image module, a name in :data:`CONTEXTS`, or ``none``.
        aggregation: how the memory is read. ``pixels``: Eq. 12-14. ``rows``: each pixel attends to
            the rows themselves, :class:`RowAttention`. ``none``: it is not; it trains H2 by
            ``loss_m`` alone, and inference costs nothing. There is no H1 then.
        rows_bias: of ``rows``, whether H1's distribution has a say.
        hard: of ``pixels``, whether each pixel reads the row of its most likely class alone.
        fusion: ``concat`` | ``add`` | ``weighted_add`` (Table 1).
        project_kernel: kernel of the projection, 1 or 3.
        fuse_kernel: kernel of the concat fusion, 1 or 3.
        dropout: probability of Dropout2d before each classifier.
        norm: name for ``detectron2.layers.get_norm``.
        memory_update: see :class:`FeatureMemory`.
        memory_slots: see :class:`FeatureMemory`.
        memory_renormalize: see :class:`FeatureMemory`.
        aspp_dilations: of the context ``aspp``; empty: by the stride of R.
        activation: ``relu``, or ``leaky_relu`` (slope 0.01) in its place in every layer.
        rcl_bn: what H2's batch norms do with the memory rows in ``loss_m``. ``"running"``: they
            use their running statistics, and do not change them. ``"batch"``: they use those of
            the initialised rows, which also enter the running ones, as in the released code; with
            a single row, which has no variance, they do as with ``"running"``.
        loss: ``cross_entropy``, over all valid pixels, or ``ohem``, over the hard ones of each
            prediction alone: :func:`mcibi_d2.modeling.losses.hard_pixels_cross_entropy`.
        ohem_threshold: of ``ohem``, the probability below which a pixel is hard.
        ohem_min_kept: of ``ohem``, the least number of pixels in a batch of one process.
        loss_weight: weight of ``loss_o``.
        loss_weight_w: alpha of Eq. 19.
        loss_weight_m: beta of Eq. 19.
        aux_features: names of the features with an auxiliary head. The last one is the stage
            before R for modules that want it.
        aux_loss_weight: weight of ``loss_aux``.
        aux_convs: 3x3 convolutions of an auxiliary head.
        aux_upsampling: factor of the up-sampling (nearest) after each of them.
        class_weights: K weights of the cross-entropies over pixels; empty for equal ones.
        ignore_value: label of pixels without ground truth.
    """

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_feature: str,
        num_classes: int,
        channels: int = 512,
        attention_dim: int = 256,
        enabled: bool = True,
        context: str = "none",
        aggregation: str = "pixels",
        rows_bias: bool = True,
        hard: bool = False,
        fusion: str = "concat",
        project_kernel: int = 3,
        fuse_kernel: int = 3,
        dropout: float = 0.1,
        norm: str = "BN",
        memory_update: str = "cosine",
        memory_slots: int = 1,
        memory_renormalize: bool = True,
        aspp_dilations: Sequence[int] = (),
        activation: str = "relu",
        rcl_bn: str = "running",
        loss: str = "cross_entropy",
        ohem_threshold: float = 0.7,
        ohem_min_kept: int = 100_000,
        loss_weight: float = 1.0,
        loss_weight_w: float = 0.4,
        loss_weight_m: float = 1.0,
        aux_features: Sequence[str] = (),
        aux_loss_weight: float = 0.4,
        aux_convs: int = 1,
        aux_upsampling: int = 1,
        class_weights: Sequence[float] = (),
        ignore_value: int = 255,
    ):
        super().__init__()
        for key, name in (
            ("IN_FEATURES", in_feature),
            *(("AUX_FEATURES", name) for name in aux_features),
        ):
            if name not in input_shape:
                raise InputError(
                    f"MODEL.SEM_SEG_HEAD.{key} has {name!r}, expected a feature of the backbone, "
                    f"which gives {', '.join(input_shape)}"
                )
        for key, value, known in (
            ("MCIBI.CONTEXT", context, CONTEXT_NAMES),
            ("MCIBI.AGGREGATION", aggregation, AGGREGATIONS),
            ("MCIBI.FUSION", fusion, tuple(FUSIONS)),
            ("MCIBI.PROJECT_KERNEL", project_kernel, KERNELS),
            ("MCIBI.FUSE_KERNEL", fuse_kernel, KERNELS),
            ("MCIBI.MEMORY.UPDATE", memory_update, UPDATES),
            ("MCIBI.RCL_BN", rcl_bn, RCL_BATCH_NORMS),
            ("SEM_SEG_HEAD.ACTIVATION", activation, ACTIVATIONS),
            ("SEM_SEG_HEAD.LOSS", loss, LOSSES),
        ):
            if value not in known:
                raise InputError(
                    f"MODEL.{key} is {value!r}, expected one of {', '.join(map(str, known))}"
                )
        if hard and aggregation != "pixels":
            raise InputError(
                f"MODEL.MCIBI.HARD_AGGREGATION is True, which needs MODEL.MCIBI.AGGREGATION "
                f"pixels, not {aggregation}"
            )
        module = CONTEXTS.get(context)
        if module and (module.needs_lower or module.needs_coarse) and not aux_features:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.AUX_FEATURES is empty, expected a feature for "
                f"MODEL.MCIBI.CONTEXT {context} to work from"
            )
        if class_weights and len(class_weights) != num_classes:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.CLASS_WEIGHTS has {len(class_weights)} values, "
                f"expected one for each of the {num_classes} classes"
            )
        self.in_feature = in_feature
        self.num_classes = num_classes
        self.enabled = enabled
        self.aggregation = aggregation
        self.hard = hard
        self.loss = loss
        self.ohem_threshold = ohem_threshold
        self.ohem_min_kept = ohem_min_kept
        self.loss_weight = loss_weight
        self.loss_weight_w = loss_weight_w
        self.loss_weight_m = loss_weight_m
        self.aux_features = tuple(aux_features)
        self.aux_loss_weight = aux_loss_weight
        self.ignore_value = ignore_value
        self.rcl_bn = rcl_bn
        self.memory_loss_active = True
        weights = torch.tensor(class_weights, dtype=torch.float32) if class_weights else None
        self.register_buffer("class_weights", weights, persistent=False)

        make_norm = norm_factory(norm)
        in_channels = input_shape[in_feature].channels
        self.aux = nn.ModuleDict(
            {
                name: nn.Sequential(
                    *self._aux_layers(
                        input_shape[name].channels, channels, aux_convs, aux_upsampling, make_norm
                    ),
                    nn.Dropout2d(dropout),
                    classifier(channels, num_classes),
                )
                for name in aux_features
            }
        )
        self.context = None
        if module:
            self.context = module(
                in_channels,
                channels,
                make_norm,
                lower_channels=input_shape[aux_features[-1]].channels if aux_features else 0,
                num_classes=num_classes,
                output_stride=input_shape[in_feature].stride,
                dilations=aspp_dilations,
            )
        if enabled or not module:
            self.project = conv_norm_relu(in_channels, channels, project_kernel, make_norm)
        if enabled:
            self.memory = FeatureMemory(
                num_classes, channels, memory_update, memory_slots, memory_renormalize
            )
            if aggregation != "none":
                self.h1 = self._two_layer_head(channels, num_classes, dropout, make_norm)
                if aggregation == "rows":
                    self.attention = RowAttention(channels, attention_dim, make_norm, rows_bias)
                elif memory_slots == 1:
                    self.attention = Attention(channels, attention_dim, make_norm)
                else:
                    self.attention = SlotAttention(memory_slots, channels, attention_dim, make_norm)
                self.fuse = FUSIONS[fusion](channels, fuse_kernel, make_norm)
            if module:
                self.within_attention = Attention(channels, attention_dim, make_norm)
                self.within_fuse = FUSIONS[fusion](channels, fuse_kernel, make_norm)
            self.h2 = self._two_layer_head(channels, num_classes, dropout, make_norm)
        else:
            self.classify = nn.Sequential(nn.Dropout2d(dropout), classifier(channels, num_classes))
        if activation == "leaky_relu":
            make_leaky(self)

    @staticmethod
    def _aux_layers(in_channels, channels, convs, upsampling, norm) -> list[nn.Module]:
        """Of an auxiliary head, what is before its dropout and classifier."""
        layers = []
        for _ in range(convs):
            layers.append(conv_norm_relu(in_channels, channels, 3, norm))
            if upsampling > 1:
                layers.append(nn.Upsample(scale_factor=upsampling))
            in_channels = channels
        return layers

    @staticmethod
    def _two_layer_head(channels, num_classes, dropout, norm) -> nn.Sequential:
        """H1 or H2: two 1x1 convolutions (paper, sections 3.3 and 3.4)."""
        return nn.Sequential(
            *conv_norm_relu(channels, channels, 1, norm),
            nn.Dropout2d(dropout),
            classifier(channels, num_classes),
        )

    @classmethod
    def from_config(cls, cfg, input_shape: dict[str, ShapeSpec]) -> dict:
        """Arguments of ``__init__`` from a config with :func:`mcibi_d2.add_mcibi_config`."""
        head, mcibi = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MCIBI
        if len(head.IN_FEATURES) != 1:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.IN_FEATURES is {head.IN_FEATURES}, expected one feature name"
            )
        return {
            "input_shape": input_shape,
            "in_feature": head.IN_FEATURES[0],
            "num_classes": head.NUM_CLASSES,
            "channels": head.CONVS_DIM,
            "attention_dim": mcibi.ATTENTION_DIM,
            "enabled": mcibi.ENABLED,
            "context": mcibi.CONTEXT,
            "aggregation": mcibi.AGGREGATION,
            "rows_bias": mcibi.ROWS_BIAS,
            "hard": mcibi.HARD_AGGREGATION,
            "fusion": mcibi.FUSION,
            "project_kernel": mcibi.PROJECT_KERNEL,
            "fuse_kernel": mcibi.FUSE_KERNEL,
            "dropout": head.DROPOUT,
            "norm": resolve_norm(head.NORM, cfg.MODEL.DEVICE),
            "memory_update": mcibi.MEMORY.UPDATE,
            "memory_slots": mcibi.MEMORY.SLOTS,
            "memory_renormalize": mcibi.MEMORY.RENORMALIZE,
            "aspp_dilations": mcibi.ASPP_DILATIONS,
            "activation": head.ACTIVATION,
            "rcl_bn": mcibi.RCL_BN,
            "loss": head.LOSS,
            "ohem_threshold": head.OHEM.THRESHOLD,
            "ohem_min_kept": head.OHEM.MIN_KEPT,
            "loss_weight": head.LOSS_WEIGHT,
            "loss_weight_w": mcibi.LOSS_WEIGHT_W,
            "loss_weight_m": mcibi.LOSS_WEIGHT_M,
            "aux_features": head.AUX_FEATURES,
            "aux_loss_weight": head.AUX_LOSS_WEIGHT,
            "aux_convs": head.AUX_CONVS,
            "aux_upsampling": head.AUX_UPSAMPLING,
            "class_weights": head.CLASS_WEIGHTS,
            "ignore_value": head.IGNORE_VALUE,
        }

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
        losses = {}
        within = None
        wanted = self.aux_features if self.training else ()
        if self.context and self.context.needs_coarse:
            wanted = wanted or self.aux_features[-1:]
        aux = {name: self.aux[name](features[name]) for name in wanted}
        if self.context:
            last = self.aux_features[-1] if self.aux_features else None
            within, losses = self.context(
                features[self.in_feature],
                lower=features.get(last),
                coarse=aux.get(last),
                targets=targets if self.training else None,
            )
        coarse = None
        if not self.enabled:
            if within is None:
                within = self.project(features[self.in_feature])
            logits = self.classify(within)
        else:
            pixels = augmented = self.project(features[self.in_feature])
            if self.aggregation != "none":
                coarse = self.h1(pixels)
                augmented = self.fuse(pixels, self._gather(pixels, coarse.float()))
            if within is not None:
                augmented = self.within_fuse(self.within_attention(pixels, within), augmented)
            logits = self.h2(augmented)
        if not self.training:
            if self.enabled:
                self.memory.warn_if_empty()
            return logits, {}

        losses["loss_o"] = self.loss_weight * self._pixel_loss(logits, targets)
        if aux:
            total = sum(self._pixel_loss(x, targets) for x in aux.values())
            losses["loss_aux"] = self.aux_loss_weight * total
        if coarse is not None:
            losses["loss_w"] = self.loss_weight_w * self._pixel_loss(coarse, targets)
        if self.enabled:
            if self.memory.update != "zero":
                weight = self.loss_weight_m if self.memory_loss_active else 0.0
                losses["loss_m"] = weight * self._memory_loss()
            # Without gradients it is no training step: a pass for batch-norm statistics, say.
            if torch.is_grad_enabled():
                self.memory.observe(pixels.detach(), targets, self.ignore_value)
        return None, losses

    def _gather(self, pixels: Tensor, coarse: Tensor) -> Tensor:
        """C_bi (N, C, h, w) for R' (N, C, h, w) and the logits of H1 (N, K, h, w)."""
        if self.aggregation == "rows":
            log_weights = coarse.log_softmax(dim=1).repeat_interleave(self.memory.slots, dim=1)
            rows, known = self.memory.rows, self.memory.initialized
            return self.attention(pixels, rows, known, log_weights)
        gathered = self.memory.read(self.read_weights(coarse))
        return self.attention(pixels, gathered.to(pixels.dtype))

    def read_weights(self, coarse: Tensor) -> Tensor:
        """W of Eq. 11 (N, K, h, w) from the logits of H1: what each pixel asks of each class."""
        if not self.hard:
            return coarse.softmax(dim=1)
        best = coarse.argmax(dim=1, keepdim=True)
        return torch.zeros_like(coarse).scatter_(1, best, 1.0)

    def _pixel_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy at the targets' size, averaged over valid pixels (Eq. 16, 18)."""
        arguments = (logits, targets, self.class_weights, self.ignore_value)
        if self.loss == "ohem":
            return hard_pixels_cross_entropy(*arguments, self.ohem_threshold, self.ohem_min_kept)
        return resized_cross_entropy(*arguments)

    def _memory_loss(self) -> Tensor:
        """Cross-entropy of H2 on the memory's rows, over the initialised ones (Eq. 15, 17)."""
        known = self.memory.initialized
        logits = self.memory.rows[:, :, None, None]
        for layer in self.h2:
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                logits = self._normalize_rows(layer, logits.flatten(1))[:, :, None, None]
            else:
                logits = layer(logits)
        losses = F.cross_entropy(logits.float().flatten(1), self.memory.classes, reduction="none")
        return (losses * known).sum() / known.sum().clamp_min(1)

    def _normalize_rows(self, norm: nn.modules.batchnorm._BatchNorm, rows: Tensor) -> Tensor:
        """A batch norm on what has become of the rows (n, C), see ``rcl_bn``."""
        mean, var = norm.running_mean, norm.running_var
        if self.rcl_bn == "batch" and self.memory_loss_active:
            # All processes have the same rows, so nothing is to be synchronised.
            rows = rows.float()
            known = self.memory.initialized[:, None]
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
    def classify_rows(self) -> Tensor:
        """H2's probabilities for each row of the memory, (K * S, K)."""
        training = self.h2.training
        logits = self.h2.eval()(self.memory.rows[:, :, None, None]).flatten(1)
        self.h2.train(training)
        return logits.float().softmax(dim=1)

    @torch.no_grad()
    def rows_accuracy(self) -> Tensor:
        """The share of the initialised rows that H2 gives to their own class, a 0-d tensor."""
        known = self.memory.initialized
        right = (self.classify_rows().argmax(dim=1) == self.memory.classes) & known
        return right.sum() / known.sum().clamp_min(1)
