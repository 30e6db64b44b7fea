"""How fast training samples are made, and where the time goes.

The rate is that of one worker: one process, one thread, files in the page cache. Each pipeline is
that of its config file. Its data set is read from ``DETECTRON2_DATASETS`` if it is there; if not,
files of its kind and usual sizes are generated, whose contents are like photographs in size only.
"plain" is the same augmentation by Detectron2's own transforms.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from PIL import Image
from tabulate import tabulate

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper, build_train_loader, read_image, scenes
from mcibi_d2.data.augmentation import RandomScale
from mcibi_d2.engine import load_config
from mcibi_d2.model_zoo import get_config_file


@dataclass(frozen=True)
class Pipeline:
    """A training set, and what its files are like: ``noise`` makes them as large as real ones."""

    config: str
    dataset: str
    sizes: tuple[tuple[int, int], ...]
    suffix: str
    noise: float
    flip_pairs: tuple[tuple[int, int], ...] = ()


PIPELINES = {
    "ade20k": Pipeline(
        "ade20k/fcn_R50.yaml", "ade20k_150_train", ((512, 683), (683, 512)), "jpg", 5
    ),
    "cityscapes": Pipeline(
        "cityscapes/fcn_R50.yaml", "cityscapes_19_train", ((1024, 2048),), "png", 2
    ),
    "lip": Pipeline(
        "lip/fcn_R50.yaml",
        "lip_20_train",
        ((350, 180), (220, 130), (480, 280)),
        "jpg",
        9,
        ((14, 15), (16, 17), (18, 19)),
    ),
    "coco_stuff": Pipeline(
        "coco_stuff/fcn_R50.yaml", "coco_stuff_164k_train", ((480, 640), (640, 480)), "jpg", 9
    ),
    "camvid": Pipeline("camvid/fcn_MobileNetV2.yaml", "camvid_11_train", ((360, 480),), "png", 5),
}
STAGES = {
    "RandomScaleCrop": "scale, crop",
    "RandomScale": "scale",
    "RandomFlip": "flip",
    "RandomRotation": "rotate",
    "ColorJitter": "colour",
    "PadToSize": "pad",
}


def make_files(folder: Path, pipeline: Pipeline, classes: int, count: int) -> list[dict]:
    """Write images and labels of a pipeline's sizes.

    Args:
        folder: where to.
        pipeline: what they are like.
        classes: of the labels.
        count: of the images.

    Returns:
        Their records.
    """
    rng = np.random.default_rng(0)
    records = []
    for number, size in enumerate(islice(cycle(pipeline.sizes), count)):
        image, labels = scenes.render("train", number)
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
        image += rng.normal(0, pipeline.noise, image.shape)
        labels = cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)
        labels[labels != scenes.IGNORE] %= classes
        files = [folder / f"{number}.{suffix}" for suffix in (pipeline.suffix, "label.png")]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(files[0], quality=90)
        Image.fromarray(labels).save(files[1])
        records.append(dict(zip(("file_name", "sem_seg_file_name"), map(str, files), strict=True)))
    return records


@contextmanager
def data_set(pipeline: Pipeline, classes: int, count: int) -> Iterator[tuple[str, bool]]:
    """A registered data set for a pipeline, and whether it is the real one."""
    try:
        found = pipeline.dataset in DatasetCatalog.list() and DatasetCatalog.get(pipeline.dataset)
    except InputError:
        found = False
    if found:
        yield pipeline.dataset, True
        return
    name = f"benchmark_{pipeline.dataset}"
    with tempfile.TemporaryDirectory() as folder:
        records = make_files(Path(folder), pipeline, classes, count)
        DatasetCatalog.register(name, lambda: [{**r, "dataset_name": name} for r in records])
        MetadataCatalog.get(name).set(
            stuff_classes=[str(k) for k in range(classes)],
            ignore_label=255,
            flip_pairs=[list(pair) for pair in pipeline.flip_pairs],
        )
        try:
            yield name, False
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def plain_augmentations(cfg: CfgNode) -> list:
    """What ``build_train_augmentation`` does, by Detectron2's own transforms."""
    size, inputs = tuple(cfg.INPUT.CROP.SIZE), cfg.INPUT
    base = tuple(inputs.SCALE_BASE)
    scale = RandomScale(
        *inputs.SCALE_RANGE, None if base == (0, 0) else base, inputs.SCALE_KEEP_RATIO
    )
    limit = inputs.CROP.SINGLE_CATEGORY_MAX_AREA
    built = [
        scale,
        T.RandomCrop_CategoryAreaConstraint("absolute", size, limit, 255),
        T.FixedSizeCrop(size, seg_pad_value=255),
        T.RandomFlip(),
    ]
    if inputs.ROTATION_DEGREES:
        turn = T.RandomRotation([-inputs.ROTATION_DEGREES, inputs.ROTATION_DEGREES], expand=False)
        built.append(T.RandomApply(turn, inputs.ROTATION_PROB))
    if inputs.COLOR_AUG_SSD:
        built.append(ColorAugSSDTransform(inputs.FORMAT))
    return built


def images_per_second(mapper: SemSegMapper, records: list[dict], count: int) -> float:
    """The rate of a mapper in this process."""
    np.random.seed(0)
    start = time.perf_counter()
    for record in islice(cycle(records), count):
        mapper(record)
    return count / (time.perf_counter() - start)


def time_stages(mapper: SemSegMapper, records: list[dict], count: int) -> dict[str, float]:
    """Milliseconds per image of each of a mapper's steps."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] += time.perf_counter() - start

    np.random.seed(0)
    for record in islice(cycle(records), count):
        label_file = record["sem_seg_file_name"]
        with stage("read image"):
            image = read_image(record["file_name"], mapper.image_format, label_file)
        with stage("read labels"):
            inputs = mapper.with_labels(image, label_file, record["dataset_name"])
        for augmentation in mapper.augmentations.augs:
            name = type(augmentation).__name__
            with stage(STAGES.get(name, name)):
                augmentation(inputs)
        with stage("to tensors"):
            mapper.to_tensors(inputs)
    return {name: 1000 * total / count for name, total in seconds.items()}


def loader_rate(cfg: CfgNode, count: int) -> float:
    """Images per second of the training loader with ``DATALOADER.NUM_WORKERS``."""
    batches = iter(build_train_loader(cfg))
    for _ in range(cfg.DATALOADER.NUM_WORKERS + 1):  # the workers have started
        next(batches)
    wanted = max(2 * cfg.DATALOADER.NUM_WORKERS, count // cfg.SOLVER.IMS_PER_BATCH)
    start = time.perf_counter()
    for _ in range(wanted):
        next(batches)
    return wanted * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - start)


def measure(name: str, count: int, workers: int) -> dict:
    """Everything about one pipeline, as plain data."""
    pipeline = PIPELINES[name]
    cfg = load_config(get_config_file(pipeline.config), ["MODEL.DEVICE", "cpu"])
    with data_set(pipeline, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, 24) as (dataset, real):
        cfg.DATASETS.TRAIN = (dataset,)
        cfg.DATALOADER.NUM_WORKERS = workers
        cfg.SOLVER.IMS_PER_BATCH = 4
        records = DatasetCatalog.get(dataset)
        # Evenly from the whole set, the same files for each measurement.
        records = [records[i * len(records) // count] for i in range(min(count, len(records)))]
        mapper = SemSegMapper(cfg, True)
        plain = SemSegMapper(cfg, True)
        plain.augmentations = T.AugmentationList(plain_augmentations(cfg))
        images_per_second(mapper, records, len(records))  # brings the files into the page cache
        sizes = [read_image(record["file_name"], "RGB").shape[:2] for record in records]
        return {
            "pipeline": name,
            "config": pipeline.config,
            "real": real,
            "files": len(records),
            "mean_kilobytes": float(np.mean([Path(r["file_name"]).stat().st_size for r in records]))
            / 1000,
            "mean_size": np.mean(sizes, axis=0).round().tolist(),
            "crop": list(cfg.INPUT.CROP.SIZE),
            "images_per_second": images_per_second(mapper, records, count),
            "plain_images_per_second": images_per_second(plain, records, count),
            "stages_ms": time_stages(mapper, records, count),
            "workers": workers,
            "loader_images_per_second": loader_rate(cfg, count) if workers else None,
        }


def benchmark_data(args: argparse.Namespace) -> dict:
    """Measure, print tables, and return everything as plain data."""
    for name in args.pipelines:
        if name not in PIPELINES:
            raise InputError(f"pipeline {name!r}: unknown, expected one of {', '.join(PIPELINES)}")
    if args.images < 1 or args.workers < 0:
        raise InputError(
            f"--images {args.images} --workers {args.workers}: expected at least 1 and 0"
        )
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    results = []
    try:
        for name in args.pipelines or PIPELINES:
            print(f"measuring {name}", file=sys.stderr)
            results.append(measure(name, args.images, args.workers))
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])
    print(
        tabulate(
            [
                [
                    x["pipeline"],
                    "real" if x["real"] else "generated",
                    "{:.0f} x {:.0f}".format(*x["mean_size"]),
                    f"{x['mean_kilobytes']:.0f}",
                    "{} x {}".format(*x["crop"]),
                    f"{x['images_per_second']:.1f}",
                    f"{x['plain_images_per_second']:.1f}",
                    "-" if not x["workers"] else f"{x['loader_images_per_second']:.1f}",
                    f"{args.rate / x['images_per_second']:.1f}",
                ]
                for x in results
            ],
            headers=["pipeline", "files", "mean size", "kB", "crop", "images/s", "plain",
                     f"{args.workers} workers", f"workers for {args.rate:g}/s"],
            disable_numparse=True,
        )
    )  # fmt: skip
    stages = list(dict.fromkeys(stage for x in results for stage in x["stages_ms"]))
    print("\nMilliseconds per image:")
    print(
        tabulate(
            [
                [x["pipeline"], *(f"{x['stages_ms'].get(stage, 0):.2f}" for stage in stages)]
                for x in results
            ],
            headers=["", *stages],
            disable_numparse=True,
        )
    )
    print()
    return {"rate": args.rate, "pipelines": results}


def add_commands(parts) -> list[argparse.ArgumentParser]:
    """Add ``data`` to the command line.

    Args:
        parts: argparse's subparsers.
    """
    data = parts.add_parser("data", help="making training samples", description=__doc__)
    data.add_argument(
        "pipelines", nargs="*", metavar="PIPELINE", help=f"of {', '.join(PIPELINES)} (all)"
    )
    data.add_argument("--images", type=int, default=100, help="that are timed (100)")
    data.add_argument("--workers", type=int, default=2, help="of the loader; 0: leave it out (2)")
    data.add_argument(
        "--rate", type=float, default=100, help="images per second that workers must make (100)"
    )
    data.set_defaults(run=benchmark_data)
    return [data]
