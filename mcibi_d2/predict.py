"""A trained model for one image at a time: labels, their probabilities, and a picture."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from torch import nn

from .data.augmentation import build_test_augmentation
from .engine import Checkpointer, Trainer
from .engine.checkpoint import check_weights_exist
from .engine.class_names import check_data_sets, class_names
from .engine.setup import check_config, without_download
from .errors import InputError
from .modeling.resize import best_class
from .modeling.score_maps import ResizedMap, ScoreMap
from .visualization import blend


def load_model(cfg: CfgNode, names: Sequence[str] | None = None) -> nn.Module:
    """The model of a config with its weights, in evaluation mode.

    Args:
        cfg: of the model.
        names: of its classes; default: those of the first data set of the config.

    Raises:
        InputError: ``MODEL.WEIGHTS`` is empty, is no file, or does not fit the model, or its
            classes have other names.
    """
    check_weights_exist(cfg.MODEL.WEIGHTS)
    model = Trainer.build_model(without_download(cfg))
    checkpointer = Checkpointer(
        model,
        class_names=class_names(cfg) if names is None else names,
        allow_other_classes=cfg.DATASETS.ALLOW_OTHER_CLASSES,
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False, strict=True)
    return model.eval()


class Prediction(NamedTuple):
    """What :class:`Predictor` says of an image.

    Attributes:
        labels: (H, W) class ids, uint8 up to 255 classes, else int32; the number of classes, which
            is no class, where a logit is NaN.
        scores: (H, W) float32, the probability of the label.
        overlay: (H, W, 3) uint8 BGR, the image with its labels laid over it.
    """

    labels: np.ndarray
    scores: np.ndarray
    overlay: np.ndarray


class Predictor:
    """Segment images as ``--eval-only`` does: same test size, whole or in windows.

    Test-time augmentation is not applied.

    Attributes:
        metadata: of the data set whose classes the model has.
        model: in evaluation mode.
        white_level: of the config, for :func:`mcibi_d2.data.read_image`.

    Args:
        cfg: with ``MODEL.WEIGHTS``. The first of ``DATASETS.TEST`` (else of ``DATASETS.TRAIN``)
            gives names and colours of the classes; its files are not needed.

    Raises:
        InputError: naming the key or the file.
    """

    def __init__(self, cfg: CfgNode):
        datasets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
        check_data_sets(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATASETS.TEST = ()
        cfg.freeze()
        if not datasets:
            raise InputError("DATASETS.TEST is empty, expected the data set of the classes")
        check_config(cfg, train=False)
        self.metadata = MetadataCatalog.get(datasets[0])
        classes = self.metadata.get("stuff_classes", ())
        if len(classes) != cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES}, but "
                f"{datasets[0]} has {len(classes)} classes"
            )
        self.model = load_model(cfg, classes)
        self._augmentations = T.AugmentationList(build_test_augmentation(cfg))
        self.white_level = cfg.INPUT.WHITE_LEVEL
        self._rgb = cfg.INPUT.FORMAT == "RGB"

    def __call__(self, image: np.ndarray) -> Prediction:
        """Segment one image.

        Args:
            image: (H, W, 3) uint8 BGR, as OpenCV reads it and Detectron2's ``DefaultPredictor``
                takes it, whatever ``INPUT.FORMAT`` is.
        """
        labels, scores = self.predict(image)
        return Prediction(labels, scores, self.draw(image, labels))

    @torch.no_grad()
    def predict(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first two parts of a :class:`Prediction`, without the picture."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(
                f"image has shape {image.shape} and type {image.dtype}, expected (H, W, 3) uint8"
            )
        height, width = image.shape[:2]
        inputs = T.AugInput(np.ascontiguousarray(image[..., ::-1]) if self._rgb else image)
        self._augmentations(inputs)
        tensor = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        score_map = self._score_map({"image": tensor, "height": height, "width": width})
        labels, scores = [], []
        for start, stop in score_map.bands():
            rows = score_map.rows(start, stop)
            best = rows.amax(dim=0)
            if not score_map.probabilities:
                # Softmax, of its largest value alone.
                best = (best - rows.logsumexp(dim=0)).exp()
            scores.append(best)
            labels.append(best_class(rows))  # overwrites the rows
        return torch.cat(labels).cpu().numpy(), torch.cat(scores).cpu().numpy()

    def _score_map(self, x: dict) -> ScoreMap:
        if hasattr(self.model, "score_maps"):
            return self.model.score_maps([x])[0]
        logits = self.model([x])[0]["sem_seg"]
        size = tuple(logits.shape[1:])
        return ResizedMap(logits, size, size, size)

    def draw(self, image: np.ndarray, labels: np.ndarray, opacity: float = 0.6) -> np.ndarray:
        """An image (H, W, 3) uint8 BGR with labels (H, W) laid over it in the classes' colours."""
        return blend(image, labels, [c[::-1] for c in self.metadata.stuff_colors], opacity)
