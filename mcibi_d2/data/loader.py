"""The order of training: a stream of samples that is a function of the seed alone."""

import random
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from detectron2.data import build_detection_train_loader, get_detection_dataset_dicts
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

from .mapper import SemSegMapper


class TrainingStream(Dataset):
    """An endless stream of mapped samples: position p is a function of the seed and p.

    Every pass over the records has its own order, and every position its own random state for
    the augmentation. So a batch does not depend on workers, on processes, or on where a run was
    stopped and resumed.

    Args:
        records: of the data set.
        mapper: from a record to a sample.
        seed: of the stream.
    """

    def __init__(self, records: list[dict], mapper: Callable[[dict], dict], seed: int):
        self.records = records
        self.mapper = mapper
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        """Samples in one pass."""
        return len(self.records)

    def __getitem__(self, position: int) -> dict:
        """The sample at a position of the stream (0, 1, 2, ... without end)."""
        epoch, place = divmod(position, len(self.records))
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.records))
            self._order = (epoch, order)
        record = self.records[self._order[1][place]]
        # The two generators that Detectron2's augmentations draw from.
        state = int(np.random.SeedSequence([self.seed, position, 1]).generate_state(1)[0])
        np.random.seed(state)
        random.seed(state)
        sample = self.mapper(record)
        sample["position"] = position
        return sample


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
        A ``DataLoader`` of Detectron2 that yields lists of ``IMS_PER_BATCH / processes`` samples.
    """
    records = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
    return build_detection_train_loader(
        TrainingStream(records, mapper or SemSegMapper(cfg, True), max(cfg.SEED, 0)),
        mapper=None,
        sampler=StreamSampler(0, comm.get_rank(), comm.get_world_size()),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=False,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


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
