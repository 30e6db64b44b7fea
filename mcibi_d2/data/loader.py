"""The order of training: a stream of samples that is a function of the seed alone."""

import math
import random
from collections.abc import Callable, Iterable, Iterator

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetFromList,
    MapDataset,
)
from detectron2.data import transforms as T
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.common import ToIterableDataset
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch.utils.data import Dataset, Sampler, get_worker_info

from ..errors import InputError
from .augmentation import build_test_augmentation
from .datasets import load_records
from .image_file import open_image
from .mapper import SemSegMapper
from .workers import WorkerLoader

# So many bad samples in a row are not a few bad files, but a wrong folder.
MAX_SKIPPED = 100


class TrainingStream(Dataset):
    """An endless stream of mapped samples: position p is a function of the seed and p.

    Every pass over the records has its own order, and every position its own random state for
    the augmentation. So a batch does not depend on workers, on processes, or on where a run was
    stopped and resumed.

    Args:
        records: of the data set.
        mapper: from a record to a sample.
        seed: of the stream.
        skip_bad: whether a sample that the mapper refuses is replaced by the next good one of the
            same pass, which is a function of the seed and p, too.
    """

    def __init__(
        self,
        records: list[dict],
        mapper: Callable[[dict], dict],
        seed: int,
        skip_bad: bool = False,
    ):
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self.skip_bad = skip_bad
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        """Samples in one pass."""
        return len(self.records)

    def __getitem__(self, position: int) -> dict:
        """The sample at a position of the stream (0, 1, 2, ... without end).

        Its ``position`` is in it, and in ``skipped`` why others were not taken, one sentence each.

        Raises:
            InputError: the sample is bad; with ``skip_bad``: all are, or very many in a row.
        """
        epoch, place = divmod(position, len(self.records))
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
            self._order = (epoch, order)
            if get_worker_info() is not None:
                cv2.setNumThreads(0)  # a worker is one of many: threads of its own get in their way
        skipped: list[str] = []
        tries = min(len(self.records), MAX_SKIPPED) if self.skip_bad else 1
        for further in range(tries):
            record = self.records[self._order[1][(place + further) % len(self.records)]]
            # The two generators that Detectron2's augmentations draw from.
            state = int(np.random.SeedSequence([self.seed, position, 1]).generate_state(1)[0])
            np.random.seed(state)
            random.seed(state)
            try:
                sample = self.mapper(record)
            except InputError as error:
                if not self.skip_bad:
                    raise
                skipped.append(str(error))
                continue
            sample["position"] = position
            if skipped:
                sample["skipped"] = skipped
            return sample
        raise InputError(
            f"{skipped[0]}; the {tries - 1} samples after it are bad, too, expected a good one for "
            f"DATALOADER.SKIP_BAD to take"
        )


class StreamSampler(Sampler):
    """This process's positions of a stream, from ``start`` on.

    Args:
        start: first position, of all processes together.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, start: int = 0, rank: int = 0, world_size: int = 1):
        self.start = start
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[int]:
        """Positions without end."""
        position = self.start + self.rank
        while True:
            yield position
            position += self.world_size


def build_train_loader(cfg, mapper: Callable[[dict], dict] | None = None):
    """The endless training loader of ``DATASETS.TRAIN``.

    Args:
        cfg: a config; its ``SEED`` is the stream's, 0 where it is negative.
        mapper: default: :class:`SemSegMapper`.

    Returns:
        A loader that yields lists of ``IMS_PER_BATCH / processes`` samples.

    Raises:
        InputError: while iterating: a sample or a worker is bad, or nothing came within
            ``DATALOADER.TIMEOUT``.
    """
    if not cfg.DATASETS.TRAIN:
        raise InputError("DATASETS.TRAIN is (), expected the name of a data set")
    # Another mapper may do without labels; one without is a bad sample like others.
    labelled = mapper is None and not cfg.DATALOADER.SKIP_BAD
    records = [record for name in cfg.DATASETS.TRAIN for record in load_records(name, labelled)]
    stream = TrainingStream(
        records,
        mapper or SemSegMapper(cfg, True),
        max(cfg.SEED, 0),
        cfg.DATALOADER.SKIP_BAD,
    )
    sampler = StreamSampler(0, comm.get_rank(), comm.get_world_size())
    batch, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    if rest:
        raise InputError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, expected a multiple of the "
            f"{comm.get_world_size()} processes"
        )
    return WorkerLoader(
        ToIterableDataset(stream, sampler, shard_chunk_size=batch),
        batch_size=batch,
        drop_last=True,
        worker_init_fn=worker_init_reset_seed,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
        sample_bytes=_sample_bytes(cfg, records, labels=True, train=True),
        **_worker_options(cfg),
    )


def build_test_loader(
    cfg, data: str | list[dict], mapper: Callable[[dict], dict] | None = None
) -> WorkerLoader:
    """Images as in testing, one at a time, shared out to the processes.

    Args:
        cfg: a config.
        data: name of a data set, or records.
        mapper: default: :class:`SemSegMapper`, which reads no labels.

    Raises:
        InputError: as of :func:`build_train_loader`.
    """
    records = data
    if isinstance(data, str):
        records = load_records(data)
    mapper = mapper or SemSegMapper(cfg, False)
    labels = getattr(mapper, "is_train", False)
    return WorkerLoader(
        MapDataset(DatasetFromList(records, copy=False), mapper),
        batch_size=1,
        sampler=InferenceSampler(len(records)),
        sample_bytes=_sample_bytes(cfg, records, labels, train=False),
        **_worker_options(cfg),
    )


def _worker_options(cfg: CfgNode) -> dict:
    return {
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "timeout": cfg.DATALOADER.TIMEOUT,
        "collate_fn": trivial_batch_collator,
    }


def _sample_bytes(cfg: CfgNode, records: list[dict], labels: bool, train: bool) -> int | None:
    """Bytes of the tensors of a large sample, from the headers of a few files; None: not known."""
    if cfg.DATALOADER.NUM_WORKERS == 0:
        return None
    channels = 3 + 8 * labels  # these are long integers
    if train and cfg.INPUT.CROP.ENABLED:
        return channels * cfg.INPUT.CROP.SIZE[0] * cfg.INPUT.CROP.SIZE[1]
    resize = T.AugmentationList([] if train else build_test_augmentation(cfg))
    largest = 0
    for record in records[:: -(-len(records) // 8)]:
        try:
            with PathManager.open(record["file_name"], "rb") as file, open_image(file, 0) as image:
                width, height = image.size
        except Exception:
            continue  # whoever reads it will say so
        if train:
            base = cfg.INPUT.SCALE_BASE if any(cfg.INPUT.SCALE_BASE) else (height, width)
            height, width = (cfg.INPUT.SCALE_RANGE[1] * side for side in base)
        else:
            # Not filled, so that it takes no memory.
            transforms = resize(T.AugInput(np.empty((height, width, 3), dtype=np.uint8)))
            width, height = transforms.apply_coords(np.array([[width, height]], dtype=float))[0]
        largest = max(largest, math.ceil(height) * math.ceil(width))
    return channels * largest or None


def move_to_iteration(data_loader: Iterable, cfg, seed: int, iteration: int) -> None:
    """Let a loader of :func:`build_train_loader` begin with the batch of an iteration.

    Loaders of another make are left as they are.

    Args:
        data_loader: not yet iterated over.
        cfg: that it was built from.
        seed: of the stream.
        iteration: whose batch comes first.
    """
    stream = getattr(data_loader, "dataset", None)
    if isinstance(getattr(stream, "sampler", None), StreamSampler):
        stream.sampler.start = iteration * cfg.SOLVER.IMS_PER_BATCH
        stream.dataset.seed = seed


def build_labelled_loader(
    cfg: CfgNode, dataset_name: str, images: int | None = None
) -> Iterable[list[dict]]:
    """Images as in testing, each with its labels brought to the same size (``sem_seg``).

    Args:
        cfg: of the model.
        dataset_name: registered.
        images: only so many, spread evenly over the set; None for all.

    Raises:
        InputError: the data set has no labels.
    """
    records = load_records(dataset_name)
    count = min(images or len(records), len(records))
    records = [records[i * len(records) // count] for i in range(count)]
    unlabelled = next((r for r in records if "sem_seg_file_name" not in r), None)
    if unlabelled:
        raise InputError(
            f"data set {dataset_name} has no labels for {unlabelled['file_name']}, expected a data "
            f"set with labels in DATASETS.TEST"
        )
    mapper = SemSegMapper(
        is_train=True,
        augmentations=build_test_augmentation(cfg),
        image_format=cfg.INPUT.FORMAT,
        dataset_name=dataset_name,
        own_config=cfg if cfg.DATASETS.OWN.NAME else None,
        white_level=cfg.INPUT.WHITE_LEVEL,
        max_pixels=cfg.INPUT.MAX_PIXELS,
    )
    return build_test_loader(cfg, records, mapper)
