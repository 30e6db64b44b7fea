"""Predict a data set and write the files that an evaluation server takes, as a checked zip.

python -m mcibi_d2.tools.export_predictions --config-file configs/cityscapes/mcibi_R50.yaml \\
    --format cityscapes --dataset cityscapes_19_test --output output/server \\
    --opts MODEL.WEIGHTS X.pth

The same command again goes on where it was stopped.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.data import build_test_loader
from mcibi_d2.data.datasets import load_records
from mcibi_d2.engine import load_config
from mcibi_d2.engine.checkpoint import check_weights_exist
from mcibi_d2.engine.setup import check_config
from mcibi_d2.evaluation import SemanticSegmentorWithTTA
from mcibi_d2.evaluation.server_files import FORMATS, ServerFiles
from mcibi_d2.predict import load_model
from mcibi_d2.tools.command import ToolParser, run_tool


def make_config(args: argparse.Namespace) -> CfgNode:
    """The checked config of a command line."""
    cfg = load_config(args.config_file, args.opts)
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"DATASETS.TEST is {cfg.DATASETS.TEST}, expected one, or --dataset NAME")
    cfg.OUTPUT_DIR = str(args.output)
    check_weights_exist(cfg.MODEL.WEIGHTS)
    cfg.freeze()
    check_config(cfg, train=False)
    return cfg


def server_ids(form: str, dataset_name: str) -> list[int]:
    """The value of each class in the files of a format."""
    metadata = MetadataCatalog.get(dataset_name)
    if form == "png":
        return list(range(len(metadata.stuff_classes)))
    if metadata.get("server_ids") is None:
        raise InputError(
            f"data set {dataset_name} has no server_ids in its metadata, which --format {form} "
            f"needs"
        )
    return list(metadata.server_ids)


def check_same_run(cfg: CfgNode, form: str, record: Path) -> None:
    """Predictions of a folder come from one model, config and format, or none are added.

    Raises:
        InputError: the folder was begun with others.
    """
    weights = hashlib.sha256()
    with PathManager.open(cfg.MODEL.WEIGHTS, "rb") as file:
        while chunk := file.read(2**20):
            weights.update(chunk)
    model = cfg.MODEL.clone()
    model.defrost()
    model.WEIGHTS = model.DEVICE = ""
    run = {
        "--format": form,
        "DATASETS.TEST": list(cfg.DATASETS.TEST),
        "MODEL.WEIGHTS": weights.hexdigest(),
        "MODEL": model.dump(),
        "INPUT": cfg.INPUT.dump(),
        "TEST": cfg.TEST.dump(),
    }
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        other = [key for key, value in run.items() if before.get(key) != value]
        if other:
            raise InputError(
                f"{record.parent}: holds predictions made with another {other[0]}, expected the "
                f"same; remove them or name another --output"
            )
    record.write_text(json.dumps(run, indent=1), encoding="utf-8")


@torch.no_grad()
def predict(cfg: CfgNode, records: list[dict], files: ServerFiles) -> None:
    """Write the prediction of each record."""
    model = load_model(cfg)
    if cfg.TEST.AUG.ENABLED:
        model = SemanticSegmentorWithTTA(cfg, model)
    model.labels_only = True
    loader = build_test_loader(cfg, records)
    for inputs in tqdm(loader, desc="Predicting", unit="image"):
        for x in inputs:
            if files.form.size:
                x["height"], x["width"] = files.form.size
        for x, result in zip(inputs, model(inputs), strict=True):
            labels = result["labels"] if "labels" in result else result["sem_seg"].argmax(dim=0)
            files.write(x["file_name"], labels.cpu().numpy().astype(np.int64))


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("export_predictions", __doc__)
    parser.add_config_file()
    parser.add_argument("--format", required=True, choices=FORMATS, help="png: plain class ids")
    parser.add_argument("--dataset", help="registered name; default: DATASETS.TEST")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER",
        help="for the predictions and <data set>.zip",
    )  # fmt: skip
    parser.add_opts("MODEL.WEIGHTS X.pth TEST.AUG.ENABLED True")
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    cfg = make_config(args)
    (dataset,) = cfg.DATASETS.TEST
    ids = server_ids(args.format, dataset)
    records = load_records(dataset)
    images = [record["file_name"] for record in records]
    check_same_run(cfg, args.format, args.output / "predictions.json")
    files = ServerFiles(args.format, images, ids, args.output / "predictions")

    missing = set(files.missing())
    if len(missing) < len(images):
        print(f"{len(images) - len(missing)} of {len(images)} predictions are there already.")
    if missing:
        predict(cfg, [r for r in records if r["file_name"] in missing], files)
    for image in tqdm(images, desc="Checking", unit="image"):
        files.check(image)
    path = args.output / f"{dataset}.zip"
    files.zip(path)
    print(f"Wrote {path}: {len(images)} predictions with {len(ids)} ids from {min(ids)} to "
          f"{max(ids)}.")  # fmt: skip


if __name__ == "__main__":
    run_tool(main)
