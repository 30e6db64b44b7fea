"""From counted pixels to measures, tables and result files."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from tabulate import tabulate

from ..data.files import find_files
from ..errors import InputError
from ..files import read_data

FILE_NAME = "sem_seg_evaluation"
MEASURES = ("mIoU", "mIoU-union", "fwIoU", "mACC", "pACC", "mBoundaryIoU")


def measures(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """The measures of semantic segmentation, in percent.

    With T_k pixels of class k in the truth, P_k in the prediction and H_k in both:
    IoU_k = H_k / (T_k + P_k - H_k) and ACC_k = H_k / T_k, both nan where the truth has no class k;
    ``mIoU`` and ``mACC`` are their means over the classes of the truth (Detectron2's rule);
    ``mIoU-union`` is the mean over the classes of truth or prediction, so that a class that is
    predicted but absent counts zero (the released code's rule, and mmsegmentation's);
    ``fwIoU`` = sum IoU_k T_k / sum T_k and ``pACC`` = sum H_k / sum T_k.

    Args:
        confusion: (K + 1, K + 1) counts, rows predicted, columns truth; the last column is pixels
            without ground truth, the last row pixels without a prediction. Neither is scored.
        classes: K names.

    Returns:
        ``mIoU``, ``mIoU-union``, ``fwIoU``, ``IoU-<class>``, ``mACC``, ``pACC``, ``ACC-<class>``.
    """
    counts = np.asarray(confusion)[:-1, :-1].astype(float)
    hits, truth, predicted = counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1)
    union = truth + predicted - hits
    present = truth > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(present, hits / union, np.nan)
        acc = np.where(present, hits / truth, np.nan)
        found = {
            "mIoU": iou[present].sum() / present.sum(),
            "mIoU-union": iou[present].sum() / (union > 0).sum(),
            "fwIoU": (iou[present] * (truth / truth.sum())[present]).sum(),
            **{f"IoU-{name}": value for name, value in zip(classes, iou, strict=True)},
            "mACC": acc[present].sum() / present.sum(),
            "pACC": hits.sum() / truth.sum(),
            **{f"ACC-{name}": value for name, value in zip(classes, acc, strict=True)},
        }
    return {name: float(100 * value) for name, value in found.items()}


def boundary_measures(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Boundary IoU, in percent: ``BoundaryIoU-<class>``, and ``mBoundaryIoU``, their mean.

    Args:
        confusion: (K + 1, K + 1) counts of boundary pixels, rows predicted, columns truth, the
            last of both for pixels in no boundary; see :func:`~.boundary.boundaries`.
        classes: K names.
    """
    counts = np.asarray(confusion).astype(float)
    hits, truth, predicted = (
        x[:-1] for x in (counts.diagonal(), counts.sum(axis=0), counts.sum(axis=1))
    )
    present = truth > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(present, 100 * hits / (truth + predicted - hits), np.nan)
        mean = iou[present].sum() / present.sum()
    return {
        "mBoundaryIoU": float(mean),
        **{f"BoundaryIoU-{name}": float(x) for name, x in zip(classes, iou, strict=True)},
    }


@dataclass
class Results:
    """What an evaluation found.

    Args:
        values: measure -> percent, nan for a class without ground truth.
        classes: the names of the K classes.
        dataset: name of the data set; "" where a file does not say it.
        images: how many images were counted; None where a file does not say it.
        confusion: (K + 1, K + 1) as in :func:`measures`; None where a file has none.
        errors: what was wrong with images; those are not, or not wholly, counted.
    """

    values: dict[str, float]
    classes: list[str]
    dataset: str = ""
    images: int | None = None
    confusion: np.ndarray | None = None
    errors: list[str] = field(default_factory=list)

    def write(self, folder: str) -> None:
        """Write ``sem_seg_evaluation.pth``, as Detectron2, and ``.json``, which has all of it."""
        PathManager.mkdirs(folder)
        with PathManager.open(os.path.join(folder, f"{FILE_NAME}.pth"), "wb") as file:
            torch.save(self.values, file)
        described = {
            "dataset": self.dataset,
            "images": self.images,
            "errors": self.errors,
            "results": {k: None if math.isnan(v) else v for k, v in self.values.items()},
            "classes": self.classes,
            # One row per predicted class, one column per class of the truth; the last of both
            # is for pixels without one.
            "confusion": np.asarray(self.confusion).tolist(),
        }
        with PathManager.open(os.path.join(folder, f"{FILE_NAME}.json"), "w") as file:
            json.dump(described, file)

    def table(self) -> str:
        """The measures, and one line per class; a class without ground truth is "absent"."""
        counts = None if self.confusion is None else self.confusion[:-1, :-1]
        columns = [kind for kind in ("IoU", "ACC", "BoundaryIoU") if self._has(kind)]
        lines = []
        for k, name in enumerate(self.classes):
            line = [name, *(show(self.values[f"{kind}-{name}"]) for kind in columns)]
            if counts is not None:
                total = max(counts.sum(), 1)
                line += [f"{100 * counts.sum(axis=i)[k] / total:.2f}" for i in (0, 1)]
            lines.append(line)
        shares = [] if counts is None else ["% of truth", "% of prediction"]
        head = ", ".join(f"{k} {self.values[k]:.2f}" for k in MEASURES if k in self.values)
        body = tabulate(
            lines,
            headers=["class", *columns, *shares],
            colalign=["left", *["right"] * (len(columns) + len(shares))],
            disable_numparse=True,
        )
        return f"{head}\n{body}"

    def _has(self, kind: str) -> bool:
        return f"{kind}-{self.classes[0]}" in self.values


def show(value: float) -> str:
    """A measure of a class as tables show it."""
    return "absent" if math.isnan(value) else f"{value:.2f}"


def find_result_file(path: str) -> Path:
    """The result file that a path means: itself, or the one of a run's folder.

    Raises:
        InputError: there is none, or a folder has several.
    """
    given = Path(path)
    if given.is_file():
        return given
    if not given.is_dir():
        raise InputError(f"{path}: no such file or folder, expected {FILE_NAME}.json or .pth")
    for folder in (given, given / "inference"):
        for suffix in (".json", ".pth"):
            if (folder / f"{FILE_NAME}{suffix}").is_file():
                return folder / f"{FILE_NAME}{suffix}"
    files = [file for folder in given.glob("inference*") for file in find_files(folder).files]
    found = sorted({file.parent for file in files if file.stem == FILE_NAME})
    if not found:
        raise InputError(f"{path}: holds no {FILE_NAME}.json or .pth, expected that of a run")
    if len(found) > 1:
        raise InputError(
            f"{path}: holds results in {', '.join(map(str, found))}, expected the name of one"
        )
    return find_result_file(str(found[0]))


def read_results(path: str) -> Results:
    """Read a result file, ours or Detectron2's, or that of a run's folder.

    Raises:
        InputError: naming the file, if there is none or it is another file.
    """
    file = find_result_file(path)
    try:
        if file.suffix == ".json":
            found = json.loads(file.read_text())
            results = Results(
                {k: math.nan if v is None else float(v) for k, v in found["results"].items()},
                list(found["classes"]),
                found["dataset"],
                found["images"],
                np.array(found["confusion"], dtype=np.int64),
                list(found["errors"]),
            )
        else:
            values = read_data(str(file), "the result file of an evaluation")
            values = {str(k): float(v) for k, v in values.items()}
            names = [k.removeprefix("IoU-") for k in values if k.startswith("IoU-")]
            results = Results(values, names)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{file}: cannot be read as the result file of an evaluation "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    if not results.classes:
        raise InputError(f"{file}: has no IoU-<class>, expected the results of an evaluation")
    for name in results.classes:
        for key in (f"IoU-{name}", f"ACC-{name}"):
            if key not in results.values:
                raise InputError(f"{file}: has no {key}, expected it for each class")
    return results
