"""From a data set record to what the model takes."""

import copy

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image

from ..errors import InputError
from .augmentation import build_test_augmentation, build_train_augmentation
from .labels import read_labels


class SemSegMapper:
    """Read an image and, in training, its labels; augment both.

    Args:
        is_train: whether labels are read. At test time they are the evaluator's business.
        augmentations: applied to image and labels alike.
        image_format: ``RGB`` or ``BGR``.
        dataset_name: whose label table is used for records that do not name their data set
            (key ``dataset_name``).
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: list[T.Augmentation],
        image_format: str = "RGB",
        dataset_name: str | None = None,
    ):
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.dataset_name = dataset_name

    @classmethod
    def from_config(cls, cfg, is_train: bool) -> dict:
        """Arguments of ``__init__`` from a config."""
        return {
            "is_train": is_train,
            "augmentations": build_train_augmentation(cfg)
            if is_train
            else build_test_augmentation(cfg),
            "image_format": cfg.INPUT.FORMAT,
            "dataset_name": cfg.DATASETS.TRAIN[0] if is_train else None,
        }

    def __call__(self, record: dict) -> dict:
        """Map one record.

        Args:
            record: ``file_name``; in training ``sem_seg_file_name`` too.

        Returns:
            The record with ``image`` (3, H, W) uint8 tensor, ``height`` and ``width`` of the file,
            and in training ``sem_seg`` (H, W) long tensor.

        Raises:
            InputError: naming the file that cannot be read or does not fit.
        """
        record = copy.copy(record)
        file_name = record["file_name"]
        try:
            image = detection_utils.read_image(file_name, self.image_format)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{file_name}: cannot be read as an image ({error})") from error
        record["height"], record["width"] = image.shape[:2]

        label_file = record.pop("sem_seg_file_name", None)
        labels = None
        if self.is_train:
            if label_file is None:
                raise InputError(
                    f"{file_name}: its record has no sem_seg_file_name, which training needs"
                )
            name = record.get("dataset_name", self.dataset_name)
            labels = read_labels(label_file, name, image.shape[:2])
            # Detectron2 resizes label maps of these two types only.
            labels = labels.astype(np.uint8 if labels.max() < 256 else np.float32)
        inputs = T.AugInput(image, sem_seg=labels)
        self.augmentations(inputs)

        record["image"] = torch.from_numpy(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if labels is not None:
            record["sem_seg"] = torch.from_numpy(np.ascontiguousarray(inputs.sem_seg)).long()
        return record
