"""Evaluate a folder of predicted label maps against a folder of labels, without a model.

python -m mcibi_d2.tools.evaluate_folder output/predictions data/CamVid/valannot \\
    --dataset camvid_11_val

Files belong together whose names are the same but for their endings (.png, .mat, and those of
Cityscapes). The labels are read by the label table of the data set, whose own files are not used.
"""

import logging
import sys

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

import mcibi_d2  # noqa: F401  registers the data sets
from mcibi_d2 import InputError
from mcibi_d2.data.datasets import check_registered
from mcibi_d2.evaluation import SemSegEvaluator
from mcibi_d2.evaluation.folders import PIXELS, find_labels, find_predictions, read_prediction
from mcibi_d2.tools.command import ToolParser, run_tool


def evaluate_folder(
    predictions: str,
    labels: str,
    dataset: str,
    pixels: str = "classes",
    boundary_iou: bool = False,
    output: str | None = None,
) -> dict[str, float]:
    """The measures of predictions; see :class:`SemSegEvaluator` for the arguments it shares.

    Args:
        predictions: a folder.
        labels: a folder.
        dataset: whose classes and label table are used.
        pixels: what predictions hold: class ids 0..K-1 (``classes``), or values as the label files
            have them (``labels``), as the evaluation servers want.
        boundary_iou: whether to measure that, too.
        output: folder for the result files; None: none are written.

    Raises:
        InputError: a file is missing or wrong.
    """
    check_registered(dataset, "--dataset")
    predicted, truth = find_predictions(predictions), find_labels(labels)
    for missing, found, folder, kind in (
        (sorted(truth.keys() - predicted.keys()), truth, predictions, "prediction"),
        (sorted(predicted.keys() - truth.keys()), predicted, labels, "label"),
    ):
        if missing:
            raise InputError(
                f"{found[missing[0]]}: has no {kind} in {folder}, as {len(missing)} of "
                f"{len(found)} have none, expected one of the same name for each"
            )
    name = f"{dataset} ({labels})"
    records = [
        {"file_name": str(predicted[image]), "sem_seg_file_name": str(truth[image])}
        for image in sorted(truth)
    ]
    DatasetCatalog.register(name, lambda: records)
    metadata = MetadataCatalog.get(dataset).as_dict()
    MetadataCatalog.get(name).set(**{k: v for k, v in metadata.items() if k != "name"})
    try:
        evaluator = SemSegEvaluator(name, False, output, boundary_iou=boundary_iou)
        evaluator.title = dataset
        for record in tqdm(records, desc="Evaluating", unit="image"):
            try:
                ids = torch.from_numpy(read_prediction(record["file_name"], name, pixels))
            except InputError as error:
                evaluator.fail(record["file_name"], error)
            else:
                evaluator.process([record], [{"labels": ids}])
        return evaluator.evaluate()["sem_seg"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("evaluate_folder", __doc__)
    parser.add_argument("predictions", metavar="PREDICTIONS", help="folder of PNGs")
    parser.add_argument("labels", metavar="LABELS", help="folder of label files, as published")
    parser.add_argument("--dataset", required=True, metavar="NAME", help="a registered data set")
    parser.add_argument(
        "--pixels", choices=PIXELS, default=PIXELS[0],
        help="what predictions hold: class ids 0..K-1 (default), or values as in the label files, "
        "as the evaluation servers want",
    )  # fmt: skip
    parser.add_argument("--boundary-iou", action="store_true", help="measure it, too")
    parser.add_argument("--output", metavar="FOLDER", help="for sem_seg_evaluation.json and .pth")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("mcibi_d2").setLevel(logging.INFO)
    evaluate_folder(**vars(args))


if __name__ == "__main__":
    run_tool(main)
