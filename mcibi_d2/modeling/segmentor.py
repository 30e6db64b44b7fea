"""The meta-architecture: normalise -> backbone -> head -> resize."""

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_sem_seg_head,
)
from detectron2.structures import ImageList
from torch import Tensor, nn


@META_ARCH_REGISTRY.register()
class MCIBISegmentor(nn.Module):
    """A semantic segmentor in Detectron2's format, for :class:`MCIBIHead` and heads like it.

    Unlike Detectron2's ``SemanticSegmentor`` it brings the logits from the head's stride to the
    size of the image in one interpolation, whatever the padding, and makes no full-size tensor
    in between.

    Args:
        backbone: a Detectron2 backbone.
        sem_seg_head: a head with ``ignore_value``; see :class:`MCIBIHead` for its contract.
        pixel_mean: per channel, in the order and range (0..255) of the input.
        pixel_std: per channel.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
    ):
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Arguments of ``__init__`` from a config."""
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images and pad them to one size (and the backbone's divisibility)."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        batch = ImageList.from_tensors(images, self.backbone.size_divisibility)
        # The layout in which convolutions are fastest, on CPUs and on tensor cores.
        batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Run on a batch.

        Args:
            batched_inputs: dicts with

                - ``image``: (C, H, W) tensor of ``INPUT.FORMAT``, 0..255;
                - ``sem_seg``: (H, W) long tensor of class ids; in training only;
                - ``height``, ``width``: size of the result, in inference; default: the image's.

        Returns:
            The losses in training. Else one dict per image, with ``sem_seg`` (K, height, width):
            the logits.
        """
        images = self.preprocess(batched_inputs)
        features = self.backbone(images.tensor)
        if self.training:
            targets = [x["sem_seg"].to(self.device, non_blocking=True) for x in batched_inputs]
            targets = ImageList.from_tensors(
                targets, self.backbone.size_divisibility, self.sem_seg_head.ignore_value
            ).tensor
            _, losses = self.sem_seg_head(features, targets)
            return losses

        logits, _ = self.sem_seg_head(features)
        results = []
        for image_logits, size, x in zip(logits, images.image_sizes, batched_inputs, strict=True):
            out_size = (x.get("height", size[0]), x.get("width", size[1]))
            resized = resize_logits(image_logits, images.tensor.shape[-2:], size, out_size)
            results.append({"sem_seg": resized})
        return results


def resize_logits(
    logits: Tensor, padded_size: tuple[int, int], size: tuple[int, int], out_size: tuple[int, int]
) -> Tensor:
    """Bring logits from the head's stride to an image's size in one bilinear interpolation.

    Args:
        logits: (K, h, w), covering the padded image.
        padded_size: (H, W) of the padded image.
        size: (H, W) of the image in its upper left corner.
        out_size: (height, width) of the result, which covers the image without its padding.

    Returns:
        (K, height, width) float32.
    """
    logits = logits[None].float()
    if tuple(padded_size) == tuple(size):
        return F.interpolate(logits, size=out_size, mode="bilinear", align_corners=False)[0]
    # The whole map is scaled so that the image alone gets `out_size`; the rest is cut away. The
    # factor is above the exact one by less than float32 resolves, so that the size of the result
    # never rounds to one too few.
    factors = [
        padded / grid * out / valid * (1 + 1e-9)
        for padded, grid, out, valid in zip(
            padded_size, logits.shape[-2:], out_size, size, strict=True
        )
    ]
    resized = F.interpolate(
        logits,
        scale_factor=factors,
        mode="bilinear",
        align_corners=False,
        recompute_scale_factor=False,
    )
    return resized[0, :, : out_size[0], : out_size[1]]
