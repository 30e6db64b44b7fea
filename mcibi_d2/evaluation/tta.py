"""Test-time augmentation: scales and mirror images, averaged as probabilities."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data import read_image
from ..data.image_file import MAX_PIXELS
from ..modeling.resize import best_class
from ..modeling.score_maps import ResizedMap, ScoreMap


class SemanticSegmentorWithTTA(nn.Module):
    """A model whose probabilities are averaged over scales and mirror images of the input.

    In this order, for each scale, plain and mirrored: the file's image is resized (not the image
    that was resized for the test already), mirrored, run through the model, in windows if the model
    does so, brought to the size of the result, mirrored back with left and right classes exchanged,
    turned into probabilities by a softmax, and added up. Labels alone are made by bands of rows,
    from the small logits of all augmentations.

    It takes the place of the model in ``inference_on_dataset``.

    Attributes:
        labels_only: give labels instead of probabilities. Of a model with ``score_maps`` these are
            never all there then.

    Args:
        cfg: a config; or the following, by name.
        model: a segmentor. Of another class than :class:`MCIBISegmentor` it gives logits
            ``sem_seg`` (K, height, width) for each input, as Detectron2's does.
        scales: factors of the size of the ``image`` that it is called with.
        flip: whether to add the mirror image at each scale.
        flip_pairs: pairs of classes that a mirror exchanges, for inputs whose data set (their
            ``dataset_name``) has no ``flip_pairs`` in its metadata.
        image_format: ``RGB`` or ``BGR``.
        softmax: whether probabilities are added up, or logits.
        released: as the authors' released code: the resized image is scaled, bilinearly, and the
            softmax is before the resizing of the result.
        white_level: see :func:`read_image`.
        max_pixels: see :func:`read_image`.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        scales: Sequence[float],
        flip: bool = True,
        flip_pairs: Sequence[Sequence[int]] = (),
        image_format: str = "RGB",
        softmax: bool = True,
        released: bool = False,
        white_level: int = 0,
        max_pixels: int = MAX_PIXELS,
    ):
        super().__init__()
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.training = self.model.training
        self.scales = tuple(scales)
        self.flip = flip
        self.flip_pairs = flip_pairs
        self.image_format = image_format
        self.softmax = softmax
        self.white_level = white_level
        self.max_pixels = max_pixels
        self.released = released
        self.labels_only = False

    @classmethod
    def from_config(cls, cfg, model: nn.Module) -> dict:
        """Arguments of ``__init__`` from a config and a model."""
        datasets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
        pairs = MetadataCatalog.get(datasets[0]).get("flip_pairs", ()) if datasets else ()
        return {
            "model": model,
            "scales": cfg.TEST.AUG.SCALES,
            "flip": cfg.TEST.AUG.FLIP,
            "flip_pairs": pairs,
            "image_format": cfg.INPUT.FORMAT,
            "white_level": cfg.INPUT.WHITE_LEVEL,
            "max_pixels": cfg.INPUT.MAX_PIXELS,
            "softmax": cfg.TEST.AUG.SOFTMAX,
            "released": cfg.TEST.RELEASED,
        }

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """Run on a batch, one image after the other.

        Args:
            batched_inputs: as for :class:`MCIBISegmentor`, with ``file_name`` where there is one.

        Returns:
            One dict per image, with ``sem_seg`` (K, height, width), the mean probabilities (or
            logits), or, with ``labels_only``, ``labels`` (height, width).
        """
        return [self._forward_one(x) for x in batched_inputs]

    def _forward_one(self, x: dict) -> dict:
        if hasattr(self.model, "at_test_size"):
            x = self.model.at_test_size(x)
        maps = self._maps(x)
        if self.labels_only and hasattr(self.model, "score_maps"):
            return {"labels": SumMap(list(maps)).labels()}
        total, count = None, 0
        for scores in maps:
            if total is None:
                total = torch.zeros((scores.num_classes, *scores.size), device=scores.device)
            for start, stop in scores.bands():
                total[:, start:stop] += scores.rows(start, stop)
            count += 1
        if self.labels_only:
            return {"labels": torch.cat([best_class(total[:, a:b]) for a, b in scores.bands()])}
        return {"sem_seg": total.div_(count)}

    def _maps(self, x: dict) -> Iterator[ScoreMap]:
        """What each augmentation says, one after the other."""
        height, width = _out_size(x)
        for image, mirrored in self._augmented(x):
            scores = self._scores({"image": image, "height": height, "width": width})
            swapped = self._swapped(x, scores) if mirrored else None
            yield AugmentedMap(scores, swapped, self.softmax and not self.released)

    def _scores(self, x: dict) -> ScoreMap:
        early = self.softmax and self.released
        if hasattr(self.model, "score_maps"):
            return self.model.score_maps([x], probabilities=early, resize=False)[0]
        logits = self.model([x])[0]["sem_seg"]
        if early:
            logits = logits.softmax(dim=0)
        size = tuple(logits.shape[1:])
        return ResizedMap(logits, size, size, size)

    def _augmented(self, x: dict) -> Iterator[tuple[Tensor, bool]]:
        """Each augmented (C, H, W) image, and whether it is a mirror image."""
        original = None
        for scale in self.scales:
            image = x["image"]
            if scale != 1 and self.released:
                image = F.interpolate(image[None].float(), scale_factor=scale, mode="bilinear")[0]
            elif scale != 1:
                original = self._original(x) if original is None else original
                height, width = (max(1, round(side * scale)) for side in image.shape[1:])
                resize = T.ResizeTransform(*original.shape[:2], height, width)
                resized = np.ascontiguousarray(resize.apply_image(original).transpose(2, 0, 1))
                image = torch.from_numpy(resized)
            yield image, False
            if self.flip:
                yield image.flip(2), True

    def _original(self, x: dict) -> np.ndarray:
        """The (H, W, C) image of the file, or, without one, that which the model takes."""
        if "file_name" in x:
            image = read_image(
                x["file_name"],
                self.image_format,
                white_level=self.white_level,
                max_pixels=self.max_pixels,
            )
            # Else the file was turned or cut before it became the input.
            if image.shape[:2] == _out_size(x):
                return image
        return x["image"].permute(1, 2, 0).contiguous().cpu().numpy()

    def _swapped(self, x: dict, scores: ScoreMap) -> Tensor:
        """Which class of a mirror image each class is."""
        pairs = self.flip_pairs
        if "dataset_name" in x:
            pairs = MetadataCatalog.get(x["dataset_name"]).get("flip_pairs", pairs)
        classes = list(range(scores.num_classes))
        for i, j in pairs:
            classes[i], classes[j] = j, i
        return torch.tensor(classes, device=scores.device)


def _out_size(x: dict) -> tuple[int, int]:
    return x.get("height", x["image"].shape[1]), x.get("width", x["image"].shape[2])


class AugmentedMap(ScoreMap):
    """The scores of one augmentation, mirrored back if they are of a mirror image.

    Args:
        scores: logits or probabilities.
        swapped: of a mirror image, which of its classes each class is; else None.
        softmax: whether to turn logits into probabilities.
    """

    def __init__(self, scores: ScoreMap, swapped: Tensor | None, softmax: bool):
        super().__init__(scores.num_classes, scores.size, scores.device)
        self._scores = scores
        self._swapped = swapped
        self._softmax = softmax and not scores.probabilities

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`ScoreMap.rows`."""
        scores = self._scores.rows(start, stop)
        if self._softmax:
            scores = scores.softmax(dim=0)
        return scores if self._swapped is None else scores[self._swapped].flip(2)


class SumMap(ScoreMap):
    """The sum of maps.

    Args:
        maps: of one image, at least one.
    """

    def __init__(self, maps: Sequence[ScoreMap]):
        super().__init__(maps[0].num_classes, maps[0].size, maps[0].device)
        self._maps = maps

    def rows(self, start: int, stop: int) -> Tensor:
        """See :meth:`ScoreMap.rows`."""
        total = self._maps[0].rows(start, stop)
        for scores in self._maps[1:]:
            total += scores.rows(start, stop)
        return total
