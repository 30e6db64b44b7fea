"""mIoU by Detectron2's evaluator, on labels read as training reads them."""

import contextlib
import logging
import os

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator

from ..data.labels import read_labels
from ..errors import InputError


class SemSegEvaluator(Detectron2SemSegEvaluator):
    """Detectron2's ``SemSegEvaluator`` with three differences.

    - Ground truth goes through the data set's label table (:func:`read_labels`), as in training,
      so no prepared copy of the labels is needed, and a wrong label is an error that names the
      file, the value and the table.
    - No run-length encoded copy of every prediction is made: neither kept in memory, nor sent
      between processes, nor written.
    - Its "boundary IoU", which erodes the label map as if ids were gray values, is left out.

    Results are the same to the last digit: ``mIoU``, ``fwIoU``, ``mACC``, ``pACC`` and per-class
    ``IoU-<class>`` and ``ACC-<class>``, in percent. ``mIoU`` leaves out classes without ground
    truth.

    Args:
        dataset_name: a registered data set with ``stuff_classes`` and ``ignore_label``.
        distributed: whether to add up the counts of all processes.
        output_dir: where ``sem_seg_evaluation.pth`` goes; None for nowhere.
    """

    def __init__(self, dataset_name: str, distributed: bool = True, output_dir: str | None = None):
        metadata = MetadataCatalog.get(dataset_name)
        for key in ("stuff_classes", "ignore_label"):
            if metadata.get(key) is None:
                raise InputError(
                    f"data set {dataset_name} has no {key} in its metadata, which evaluation needs"
                )
        unlabelled = [
            r["file_name"] for r in DatasetCatalog.get(dataset_name) if "sem_seg_file_name" not in r
        ]
        if unlabelled:
            raise InputError(
                f"data set {dataset_name} has no labels for {len(unlabelled)} images, such as "
                f"{unlabelled[0]}: it cannot be evaluated"
            )
        super().__init__(dataset_name, distributed, output_dir)
        self._compute_boundary_iou = False

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Count the pixels of a batch.

        Args:
            inputs: records with ``file_name``.
            outputs: dicts with ``sem_seg``, logits (K, height, width) at the label's size.
        """
        side = self._num_classes + 1
        for x, output in zip(inputs, outputs, strict=True):
            predicted = output["sem_seg"].argmax(dim=0).cpu().numpy()
            truth = read_labels(
                self.input_file_to_gt_file[x["file_name"]], self._dataset_name, predicted.shape
            )
            truth = np.where(truth == self._ignore_label, self._num_classes, truth)
            counts = np.bincount((side * predicted + truth).reshape(-1), minlength=side * side)
            self._conf_matrix += counts.reshape(side, side)

    def evaluate(self) -> dict | None:
        """The results on the main process, None on the others."""
        # Detectron2 would write an empty list of predictions, and log the results as one long
        # dict, which the caller prints as a table.
        folder, self._output_dir = self._output_dir, None
        with _quiet(self._logger):
            results = super().evaluate()
        self._output_dir = folder
        if results and folder:
            os.makedirs(folder, exist_ok=True)
            torch.save(results["sem_seg"], os.path.join(folder, "sem_seg_evaluation.pth"))
        return results


@contextlib.contextmanager
def _quiet(logger: logging.Logger):
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
