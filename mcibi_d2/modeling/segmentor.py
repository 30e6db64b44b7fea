"""The meta-architecture: normalise -> backbone -> head -> resize, for the image or for windows."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import transforms as T
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_sem_seg_head,
)
from detectron2.structures import ImageList
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..input_size import build_test_resize
from .checkpointing import checkpoint_blocks
from .score_maps import ResizedMap, ScoreMap
from .sliding import SlidingWindow, WindowedMap

# How a test image is taken: in one piece, or in windows.
INFERENCES = ("whole", "slide")
# What the network computes in at test time.
PRECISIONS = ("float32", "bfloat16", "float16")

# The logits of more windows are not there together, but made row by row when they are needed.
WINDOW_BYTES = 256 * 2**20


@META_ARCH_REGISTRY.register()
class MCIBISegmentor(nn.Module):
    """A semantic segmentor in Detectron2's format, for :class:`MCIBIHead` and heads like it.

    Unlike Detectron2's ``SemanticSegmentor`` it brings the logits from the head's stride to the
    size of the image in one interpolation, whatever the padding, and makes no full-size tensor
    in between.

    Attributes:
        labels_only: give labels instead of logits. They are made several times faster, and in a
            fraction of the memory; see :func:`labels_only`.

    Args:
        backbone: a Detectron2 backbone.
        sem_seg_head: a head with ``ignore_value``; see :class:`MCIBIHead` for its contract.
        pixel_mean: per channel, in the order and range (0..255) of the input.
        pixel_std: per channel.
        sliding: how images are cut into windows at test time; None: they are not.
        released: bring logits to the size of the image with its padding instead of cutting that
            off, as the authors' released code does it. For one image at a time.
        test_resize: to what images are resized at test time that come with ``height`` and ``width``
            and do not have this size yet. From a config it is ``INPUT.FIXED_SIZE_TEST`` of
            ``INPUT.TEST_RESIZE fixed``, which ``DefaultPredictor`` and Detectron2's mapper do not
            know; they bring images to ``shortest_edge`` themselves.
        checkpointing: keep less of the backbone for the backward pass, and compute it again, see
            :func:`mcibi_d2.modeling.checkpointing.checkpoint_blocks`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        sem_seg_head: nn.Module,
        pixel_mean: tuple[float, ...],
        pixel_std: tuple[float, ...],
        sliding: SlidingWindow | None = None,
        released: bool = False,
        test_resize: T.Augmentation | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.backbone = backbone
        self.sem_seg_head = sem_seg_head
        for name, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            values = torch.tensor(values, dtype=torch.float32)  # of whole numbers, too
            self.register_buffer(name, values.view(-1, 1, 1), False)
        self.sliding = sliding
        self.released = released
        self.test_resize = test_resize
        self.labels_only = False
        _lay_out(self)
        if checkpointing:
            checkpoint_blocks(backbone)

    @classmethod
    def from_config(cls, cfg) -> dict:
        """Arguments of ``__init__`` from a config."""
        backbone, test_resize = build_backbone(cfg), build_test_resize(cfg)
        slide = cfg.TEST.SLIDE
        sliding = SlidingWindow(
            tuple(slide.WINDOW),
            tuple(slide.STRIDE),
            slide.WEIGHTS,
            slide.ACCUMULATE_ON_CPU,
            slide.BATCH_SIZE,
            cfg.TEST.RELEASED,
        )
        return {
            "backbone": backbone,
            "sem_seg_head": build_sem_seg_head(cfg, backbone.output_shape()),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "sliding": sliding if cfg.TEST.INFERENCE == "slide" else None,
            "released": cfg.TEST.RELEASED,
            "test_resize": test_resize if cfg.INPUT.TEST_RESIZE == "fixed" else None,
            "checkpointing": cfg.MODEL.BACKBONE.CHECKPOINTING,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in: the type of its weights."""
        return next((p.dtype for p in self.parameters()), self.pixel_mean.dtype)

    def to_precision(self, dtype: torch.dtype) -> "MCIBISegmentor":
        """Cast the network for inference, in place, as ``to(dtype)`` does, but for two things.

        What images are normalised with stays in float32: 123.675 is 123.5 in bfloat16. So do
        depthwise convolutions, whose few weights do not average their rounding.
        """
        if dtype == torch.float32:
            return self.to(dtype)
        mean, std = self.pixel_mean, self.pixel_std
        depthwise = [
            (parent, name, layer)
            for parent in self.modules()
            for name, layer in parent.named_children()
            if isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels
        ]
        for parent, name, _ in depthwise:
            setattr(parent, name, nn.Identity())
        self.to(dtype)
        for parent, name, layer in depthwise:
            setattr(parent, name, _InFloat32(layer))
        self.pixel_mean, self.pixel_std = mean, std
        return self

    def preprocess(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images and pad them to one size (and the backbone's divisibility)."""
        images = [x["image"].to(self.device, non_blocking=True) for x in batched_inputs]
        images = [self.normalize(x) for x in images]
        batch = ImageList.from_tensors(images, self.backbone.size_divisibility)
        # The layout in which convolutions are fastest, on CPUs and on tensor cores.
        batch.tensor = batch.tensor.contiguous(memory_format=torch.channels_last)
        return batch

    def normalize(self, image: Tensor) -> Tensor:
        """An image or images (.., 3, H, W), less the pixels' mean and divided by their deviation.

        In float32 at least, and then in the type of a model in half precision.
        """
        dtype = torch.promote_types(self.pixel_mean.dtype, torch.float32)
        normalized = (image.to(dtype) - self.pixel_mean.to(dtype)) / self.pixel_std.to(dtype)
        return normalized.to(self.dtype)

    def pad_targets(self, targets: list[Tensor]) -> Tensor:
        """Labels (H_i, W_i) of images, (N, H, W) at the size that :meth:`preprocess` pads these to.

        What is added is to be ignored. They are on the model's device.
        """
        targets = [x.to(self.device, non_blocking=True) for x in targets]
        unit = self.backbone.size_divisibility
        return ImageList.from_tensors(targets, unit, self.sem_seg_head.ignore_value).tensor

    def logits(self, images: Tensor) -> Tensor:
        """The logits at the head's stride, (N, K, h, w), of images that are preprocessed."""
        return self.sem_seg_head(self.backbone(images))[0]

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        """Run on a batch.

        Args:
            batched_inputs: dicts with

                - ``image``: (C, H, W) tensor of ``INPUT.FORMAT``, 0..255;
                - ``sem_seg``: (H, W) long tensor of class ids; in training only;
                - ``height``, ``width``: size of the result, in inference; default: the image's.

        Returns:
            The losses in training. Else one dict per image, with

            - ``sem_seg``: (K, height, width) float32, the logits;
            - with ``labels_only`` instead ``labels``: (height, width), the class of the largest
              logit, uint8 up to 255 classes, else int32; K, which is no class, where a logit is
              NaN.
        """
        if self.training:
            images = self.preprocess(batched_inputs)
            features = self.backbone(images.tensor)
            targets = self.pad_targets([x["sem_seg"] for x in batched_inputs])
            _, losses = self.sem_seg_head(features, targets)
            return losses

        maps = self.score_maps(batched_inputs)
        if self.labels_only:
            return [{"labels": scores.labels()} for scores in maps]
        return [{"sem_seg": scores.scores()} for scores in maps]

    def score_maps(
        self, batched_inputs: list[dict], probabilities: bool = False, resize: bool = True
    ) -> list[ScoreMap]:
        """The logits of each image of a batch at its own size, not made yet.

        Args:
            batched_inputs: as of :meth:`forward`.
            probabilities: turn the logits of whole images into probabilities before they are
                resized. (Of windows, ``sliding`` says what is averaged.)
            resize: whether images are brought to the test size first, see :meth:`at_test_size`.
        """
        if resize:
            batched_inputs = [self.at_test_size(x) for x in batched_inputs]
        if self.sliding is not None:
            return [self._slide(x) for x in batched_inputs]
        logits, images = self._logits(batched_inputs)
        if probabilities:
            logits = logits.float().softmax(dim=1)
        padded_size = images.image_sizes[0] if self.released else images.tensor.shape[-2:]
        return [
            ResizedMap(image_logits, tuple(padded_size), tuple(size), _out_size(x))
            for image_logits, size, x in zip(
                logits, images.image_sizes, batched_inputs, strict=True
            )
        ]

    def at_test_size(self, x: dict) -> dict:
        """An input at ``test_resize``, as :class:`SemSegMapper` makes it, which others do not.

        One that does not say how large its file is, is no test image, and stays as it is.
        """
        if self.test_resize is None or "height" not in x:
            return x
        size = tuple(x["image"].shape[1:])
        resize = self.test_resize.get_transform(np.empty((*size, 3), dtype=np.uint8))
        if isinstance(resize, T.NoOpTransform) or size == (resize.new_h, resize.new_w):
            return x
        # `DefaultPredictor` gives bytes as floats, which would be resized in another way.
        image = x["image"].permute(1, 2, 0).round().clamp(0, 255).byte().cpu().numpy()
        image = resize.apply_image(image)
        image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {**x, "image": image}

    def _logits(self, batched_inputs: list[dict]) -> tuple[Tensor, ImageList]:
        images = self.preprocess(batched_inputs)
        return self.logits(images.tensor), images

    def _slide(self, x: dict) -> ScoreMap:
        """The scores of one image from its windows."""
        image = x["image"].to(self.device, non_blocking=True)
        size = tuple(image.shape[-2:])
        return self.slide(lambda start, stop: image[:, start:stop], size, _out_size(x))

    def slide(
        self,
        rows: Callable[[int, int], Tensor],
        size: tuple[int, int],
        out_size: tuple[int, int] | None = None,
    ) -> ScoreMap:
        """The scores of an image from its windows, of which some rows of pixels suffice at a time.

        Each window is padded as an image of its own.

        Args:
            rows: of the image, (C, stop - start, W), 0..255, by ``start`` and ``stop``. It is asked
                for a row of windows at a time; what is above one is not asked for again while the
                scores are read from above, but for the first rows, twice.
            size: (H, W) of the image, which is not resized.
            out_size: (height, width) of the scores; default: ``size``.
        """
        sliding = self.sliding
        out_size = size if out_size is None else out_size
        height, width = sliding.window_on(size)
        tops, lefts = sliding.starts(size)
        count = len(tops) * len(lefts)

        def windows(first: int, stop: int) -> Iterator[dict]:
            row, pixels = None, None
            for number in range(first, stop):
                i, j = divmod(number, len(lefts))
                if i != row:
                    row, pixels = i, rows(tops[i], tops[i] + height)
                yield {"image": pixels[:, :, lefts[j] : lefts[j] + width]}

        covered = (height, width)

        def collect(first: int, stop: int, most_bytes: float = math.inf) -> list[Tensor] | None:
            """The logits of some windows; None if they have more bytes."""
            nonlocal covered
            there, done, logits = windows(first, stop), 0, None
            while batch := list(itertools.islice(there, sliding.batch_size)):
                found, padded = self._logits(batch)
                covered = covered if self.released else tuple(padded.tensor.shape[-2:])
                if logits is None:
                    if found[0].nbytes * (stop - first) > most_bytes:
                        return None
                    # In one place: kept one by one they would take that of freed pixels, each a
                    # little of it, and memory would grow as if the pixels were kept.
                    device = "cpu" if sliding.accumulate_on_cpu else found.device
                    logits = found.new_empty((stop - first, *found.shape[1:]), device=device)
                logits[done : done + len(found)] = found
                done += len(found)
            return list(logits)

        logits = collect(0, count, WINDOW_BYTES)
        if logits is None:

            def logits(i: int) -> list[Tensor]:
                return collect(i * len(lefts), (i + 1) * len(lefts))

        return WindowedMap(sliding, logits, covered, size, out_size)


class _InFloat32(nn.Module):
    """A layer that computes in float32 in a network of another type."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(x.dtype)


def _lay_out(module: nn.Module) -> None:
    """Give the weights of convolutions the layout of the images, see ``preprocess``.

    Their gradients come in it, and would be copied into another one in every training step. Values
    and shapes are the same.
    """
    for parameter in module.parameters():
        # Of a single position or channel, the layouts are one.
        if parameter.dim() == 4 and parameter.shape[1] > 1 and parameter[0, 0].numel() > 1:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _out_size(x: dict) -> tuple[int, int]:
    """Size of the result for an input: that of the file, if it is known, else of the image."""
    height, width = x["image"].shape[-2:]
    return x.get("height", height), x.get("width", width)


@contextlib.contextmanager
def labels_only(model: nn.Module) -> Iterator[None]:
    """Let a model that can (one with ``labels_only``) give labels instead of logits in a block."""
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not hasattr(model, "labels_only"):
        yield
        return
    before, model.labels_only = model.labels_only, True
    try:
        yield
    finally:
        model.labels_only = before
