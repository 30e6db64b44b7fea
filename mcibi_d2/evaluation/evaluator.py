"""mIoU and its kin, counted where the predictions are, on labels read as training reads them."""

import json
import logging
import os
import shutil
from collections import OrderedDict
from typing import IO

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..data.classes import Classes
from ..data.datasets import load_records
from ..data.image_file import MAX_PIXELS
from ..data.labels import read_labels
from ..errors import InputError, sentence
from .boundary import boundaries
from .results import Results, boundary_measures, measures

# Images between two looks at what a GPU found; each look waits for it.
_LOOK_PERIOD = 64
# Pixels that are counted at a time on a CPU.
_CPU_PIXELS = 2**17
# As many faulty images are named; the others are counted.
_MAX_ERRORS = 10
_PREDICTIONS = "sem_seg_predictions.json"

_logger = logging.getLogger(__name__)


class SemSegEvaluator(Detectron2SemSegEvaluator):
    """Detectron2's ``SemSegEvaluator``, faster, in constant memory, and telling what is wrong.

    - The same measures to the last digit, and more: see :func:`~.results.measures`.
    - Ground truth goes through the data set's label table (:func:`read_labels`), as in training,
      so no prepared copy of the labels is needed.
    - Pixels are counted on the device that holds the prediction, and the counts of all processes
      are added up once, at the end.
    - A faulty image does not end the evaluation, unless it is the first: the others are counted
      and reported, and then :meth:`evaluate` raises an :class:`InputError` that names it. Faulty
      are a wrong label file, NaN logits, and an image predicted twice or not at all.
    - Run-length encoded predictions are written only if asked for, image by image.
    - Detectron2's "boundary IoU", which erodes the label map as if ids were gray values, is
      replaced by the one of the paper (:func:`~.boundary.boundaries`), off by default.

    Attributes:
        title: what reports and result files call the data set; by default its name.

    Args:
        dataset_name: a registered data set with ``stuff_classes``.
        distributed: whether to add up the counts of all processes.
        output_dir: where ``sem_seg_evaluation.pth`` and ``.json`` go; None for nowhere.
        boundary_iou: whether ``mBoundaryIoU`` and ``BoundaryIoU-<class>`` are measured too.
        write_predictions: whether ``sem_seg_predictions.json`` goes to ``output_dir``, too.

    Raises:
        InputError: the data set has no labels, or its metadata is incomplete.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        boundary_iou: bool = False,
        write_predictions: bool = False,
    ):
        classes = Classes.of(dataset_name)
        unlabelled = [
            r["file_name"]
            for r in load_records(dataset_name, own_labels=True)
            if "sem_seg_file_name" not in r
        ]
        if unlabelled:
            raise InputError(
                f"data set {dataset_name} has no labels for {len(unlabelled)} images, such as "
                f"{unlabelled[0]}: it cannot be evaluated"
            )
        if write_predictions and output_dir is None:
            raise InputError("write_predictions is True and output_dir None, expected a folder")
        # Detectron2 calls this argument deprecated, and asks metadata for what few have.
        said = MetadataCatalog.get(dataset_name).get("ignore_label") is not None
        label = None if said else classes.ignore_label
        super().__init__(dataset_name, distributed, output_dir, ignore_label=label)
        self.title = dataset_name
        self._compute_boundary_iou = boundary_iou
        self._write_predictions = write_predictions
        self._numbers = {name: i for i, name in enumerate(self.input_file_to_gt_file)}
        self._stream: IO[str] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything that was counted."""
        super().reset()
        # Device -> one flat confusion matrix of all pixels, and one of boundary pixels.
        self._counts: dict[torch.device, Tensor] = {}
        self._seen = np.zeros(len(self._numbers), dtype=np.int32)
        self._images = 0
        # Images whose number of pixels without a class is still on its device.
        self._pending: list[tuple[str, Tensor]] = []
        self._errors: list[str] = []
        self._num_errors = 0
        self._broken_off = False
        self._reported = False
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._write_predictions and PathManager.isfile(self._part(comm.get_rank())):
            PathManager.rm(self._part(comm.get_rank()))  # of a run that was broken off

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Count the pixels of a batch.

        Args:
            inputs: records with ``file_name``.
            outputs: dicts with ``labels``, class ids (height, width), or else ``sem_seg``, logits
                (K, height, width), both at the label's size. A pixel without a class has id K
                (NaN logits), or -1, which is a fault only where there is ground truth.

        Raises:
            InputError: what is wrong with an image, if no other was counted before it.
        """
        for x, output in zip(inputs, outputs, strict=True):
            try:
                self._process(x["file_name"], output)
            except InputError as error:
                self.fail(x["file_name"], error)

    def fail(self, file_name: str, error: InputError) -> None:
        """Go on without an image, which could not be predicted or counted.

        Args:
            file_name: of the image.
            error: why; raised here if no other image was counted before.
        """
        if self._images == 0:
            raise error
        if file_name in self._numbers:
            self._seen[self._numbers[file_name]] = 1
        self._note(str(error))

    def _process(self, file_name: str, output: dict) -> None:
        number = self._numbers.get(file_name)
        if number is None:
            raise InputError(
                f"{file_name}: was predicted, but is not one of the {len(self._numbers)} images "
                f"of {self.title}"
            )
        if self._seen[number]:
            raise InputError(f"{file_name}: was predicted twice, expected once")
        self._seen[number] = 1
        prediction = self._checked(file_name, output)
        height, width = prediction.shape[-2:]
        labels = self.input_file_to_gt_file[file_name]
        # As large as the image, which was not refused.
        most = max(MAX_PIXELS, height * width)
        truth = torch.from_numpy(read_labels(labels, self._dataset_name, max_pixels=most))
        if truth.shape != (height, width):
            raise InputError(
                f"{labels}: labels of {truth.shape[0]} x {truth.shape[1]} (height x width), but "
                f"the prediction of {file_name} has {height} x {width}"
            )
        # On a CPU what is made in between stays in its cache, and never makes the process grow.
        whole = (
            prediction.device.type != "cpu" or self._compute_boundary_iou or self._write_predictions
        )
        step = height if whole else max(1, _CPU_PIXELS // width)
        faulty = sum(
            self._count_rows(file_name, prediction[..., start : start + step, :], rows)
            for start, rows in zip(range(0, height, step), truth.split(step), strict=True)
        )
        self._images += 1
        self._pending.append((file_name, faulty))
        if prediction.device.type == "cpu" or len(self._pending) >= _LOOK_PERIOD:
            self._look()

    def _checked(self, file_name: str, output: dict) -> Tensor:
        """The prediction: class ids (height, width) or logits (K, height, width)."""
        labels, classes = output.get("labels"), self._num_classes
        if labels is None:
            logits = output["sem_seg"]
            if logits.ndim != 3 or len(logits) != classes:
                raise InputError(
                    f"{file_name}: logits of shape {tuple(logits.shape)}, expected (classes, "
                    f"height, width) with the {classes} classes of {self.title}"
                )
            return logits
        if labels.ndim != 2 or labels.is_floating_point():
            raise InputError(
                f"{file_name}: labels of shape {tuple(labels.shape)} and type {labels.dtype}, "
                f"expected class ids (height, width)"
            )
        return labels

    def _count_rows(self, file_name: str, prediction: Tensor, truth: Tensor) -> Tensor:
        """Count some rows of an image; returns how many of its pixels should have a class."""
        classes = self._num_classes
        if prediction.ndim == 3:
            # NaN is the largest of all to `max`, so a single one shows.
            largest, ids = prediction.max(dim=0)
            predicted = ids.int().masked_fill_(largest.isnan(), classes)
        else:
            predicted = prediction.int()
        truth = truth.to(predicted.device, torch.int32, non_blocking=True)
        truth = truth.masked_fill(truth == self._ignore_label, classes)
        faulty = (predicted >= classes) | ((predicted < 0) & (truth < classes))
        predicted = predicted.masked_fill(faulty | (predicted < 0), classes)
        self._count(0, predicted, truth)
        if self._compute_boundary_iou:
            # Where there is no truth there is no contour of a prediction either.
            scored = predicted.masked_fill(truth == classes, classes)
            self._count(1, *(boundaries(x, classes) for x in (scored, truth)))
        if self._write_predictions:
            self._write(predicted.cpu().numpy(), file_name)
        return faulty.sum()

    def _count(self, which: int, predicted: Tensor, truth: Tensor) -> None:
        side = self._num_classes + 1
        index = torch.add(truth, predicted, alpha=side).flatten()
        counts = self._counts.get(index.device)
        if counts is None:
            counts = torch.zeros(2, side * side, dtype=torch.int64, device=index.device)
            self._counts[index.device] = counts
        if index.device.type == "cpu":
            counts[which] += torch.bincount(index, minlength=side * side)
        else:
            # `bincount` would wait for the device to learn the largest index.
            one = torch.ones(1, dtype=torch.int64, device=index.device)
            counts[which].scatter_add_(0, index.long(), one.expand_as(index))

    def _look(self) -> None:
        """Note the images that have pixels without a class."""
        for file_name, faulty in self._pending:
            if faulty:
                self._note(
                    f"{file_name}: {int(faulty)} pixels have no class (NaN logits, or ids that "
                    f"are outside 0..{self._num_classes - 1})"
                )
        self._pending.clear()

    def _note(self, error: str, what_then: str = "going on with the other images") -> None:
        self._num_errors += 1
        if self._num_errors <= _MAX_ERRORS:
            _logger.error(f"{error}; {what_then}")
            self._errors.append(error)

    def break_off(self, error: InputError) -> None:
        """End early, because of an error that is not of an image that was predicted.

        Where images were counted, the counts of all processes are reported: the others go on to
        the end of their shares and wait for this one in :meth:`evaluate`. No result file is
        written.

        Args:
            error: why.

        Raises:
            InputError: ``error``, in the words of :meth:`evaluate`, if images were counted.
        """
        if self._images and not self._reported:
            self._broken_off = True
            self._note(sentence(error), "broken off")
            self.evaluate()

    def _own_counts(self) -> np.ndarray:
        """(2, K + 1, K + 1) counts of this process."""
        side = self._num_classes + 1
        counts = torch.zeros(2, side * side, dtype=torch.int64)
        for x in self._counts.values():
            counts += x.cpu()
        return counts.view(2, side, side).numpy()

    def evaluate(self) -> dict | None:
        """Add up, report and write.

        Returns:
            ``{"sem_seg": measures}`` on the main process, None on the others.

        Raises:
            InputError: on every process and after the report, if an image was faulty.
        """
        self._look()
        own = (
            self._own_counts(), self._seen, self._images, self._errors, self._num_errors,
            self._broken_off,
        )  # fmt: skip
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        shares = comm.all_gather(own) if self._distributed else [own]
        counts, seen, images = (sum(share[i] for share in shares) for i in range(3))
        errors = [error for share in shares for error in share[3]][:_MAX_ERRORS]
        num_errors, broken_off = sum(share[4] for share in shares), any(x[5] for x in shares)
        for wrong, text in (
            (seen > 1, "predicted by several processes"),
            ((seen == 0) & (not broken_off), "not predicted"),
        ):
            if wrong.any():
                num_errors += 1
                first = list(self._numbers)[wrong.argmax()]
                errors.append(
                    f"{first}: was {text}, as were {wrong.sum()} of the {len(seen)} images of "
                    f"{self.title}, expected each once"
                )
        self._conf_matrix, self._b_conf_matrix = counts
        results = None
        if comm.is_main_process() or not self._distributed:
            results = self._report(images, errors, write=not broken_off)
            if self._write_predictions and not broken_off:
                self._join_predictions(len(shares))
        self._reported = True
        if errors:
            if self._distributed:
                # An error ends all processes, so that it waits until the report is written.
                comm.synchronize()
            more = f" (and {num_errors - 1} more, see the log)" if num_errors > 1 else ""
            raise InputError(f"{errors[0]}{more}; the {images} images that were counted are above")
        return results and OrderedDict({"sem_seg": results.values})

    def _report(self, images: int, errors: list[str], write: bool) -> Results:
        values = measures(self._conf_matrix, self._class_names)
        if self._compute_boundary_iou:
            values |= boundary_measures(self._b_conf_matrix, self._class_names)
        names = list(self._class_names)
        results = Results(values, names, self.title, images, self._conf_matrix, errors)
        _logger.info(f"{self.title}, {images} images: {results.table()}")
        present = np.flatnonzero(self._conf_matrix[:-1, :-1].sum(axis=0))
        if len(present) == 1:
            _logger.warning(
                f"{self.title}: every pixel with ground truth is {names[present[0]]!r}, so "
                f"these measures say nothing; is what is not {names[present[0]]!r} ignored, where "
                f"it should be a class?"
            )
        if self._output_dir and write:
            results.write(self._output_dir)
        return results

    def _write(self, predicted: np.ndarray, file_name: str) -> None:
        """Append the masks of an image to this process's list."""
        if self._stream is None:
            PathManager.mkdirs(self._output_dir)
            self._stream = PathManager.open(self._part(comm.get_rank()), "w")
        for mask in self.encode_json_sem_seg(predicted, file_name):
            if self._stream.tell():
                self._stream.write(", ")
            self._stream.write(json.dumps(mask))

    def _part(self, rank: int) -> str:
        return os.path.join(self._output_dir, f"{_PREDICTIONS}.{rank}")

    def _join_predictions(self, processes: int) -> None:
        """One JSON list of the lists of all processes, copied piece by piece."""
        ranks = range(processes) if self._distributed else [comm.get_rank()]
        parts = list(filter(PathManager.isfile, map(self._part, ranks)))
        if self._reported and not parts:
            return  # joined by an earlier call of `evaluate`
        with PathManager.open(os.path.join(self._output_dir, _PREDICTIONS), "w") as whole:
            whole.write("[")
            for part in parts:
                with PathManager.open(part) as file:
                    if whole.tell() > 1:
                        whole.write(", ")
                    shutil.copyfileobj(file, whole)
                PathManager.rm(part)
            whole.write("]")
