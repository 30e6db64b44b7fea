"""When the memory is initialised and updated."""

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.engine import HookBase
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from tqdm import tqdm

from ..modeling import FeatureMemory, MCIBIHead


def find_memories(model: nn.Module) -> list[FeatureMemory]:
    """The feature memories of a model, wrapped or not."""
    return [m for m in model.modules() if isinstance(m, FeatureMemory)]


def poly_momentum(iteration: int, max_iter: int, momentum: float, power: float) -> float:
    """m_t of Eq. 7: from m_0 down to m_0 / 100.

    Args:
        iteration: t, 0..max_iter.
        max_iter: T.
        momentum: m_0.
        power: p.
    """
    floor = momentum / 100
    return (1 - iteration / max_iter) ** power * (momentum - floor) + floor


class MemoryUpdateHook(HookBase):
    """Commit the observed features after every step (Eq. 6), with the momentum of Eq. 7.

    It must run on every process, after the optimiser's step and before the hook that changes the
    learning rate and the one that writes checkpoints: second in the list, after
    ``IterationTimer``.

    Args:
        momentum: m_0 of Eq. 7.
        power: p of Eq. 7.
    """

    def __init__(self, momentum: float = 0.9, power: float = 0.9):
        self.momentum = momentum
        self.power = power

    def before_train(self) -> None:
        """Find the memories of the trainer's model."""
        self._memories = find_memories(self.trainer.model)

    def after_step(self) -> None:
        """Update the rows, and log the momentum."""
        momentum = poly_momentum(
            self.trainer.iter, self.trainer.max_iter, self.momentum, self.power
        )
        for memory in self._memories:
            memory.commit(momentum)
        if self._memories:
            get_event_storage().put_scalar("memory/momentum", momentum, smoothing_hint=False)


class MemoryInitHook(HookBase):
    """Give each class one random pixel of the training set as its first row (section 3.2).

    Before the first iteration the untrained network, in evaluation mode, goes over training
    batches until every class has been seen, or a number of images. Of all pixels of a class in
    these images, each is equally likely to be taken. The draw is a function of the seed and of
    the images, not of the number of processes. Classes that were not found are initialised by the
    first batch that has them. A run that is resumed, or started from weights with a memory, keeps
    its rows.

    Args:
        seed: of the draw.
        max_images: at most this many images, of all processes together.
    """

    def __init__(self, seed: int, max_images: int = 2000):
        self.seed = seed
        self.max_images = max_images

    def before_train(self) -> None:
        """Fill the memory of the trainer's model."""
        if self.trainer.start_iter > 0:
            return
        model = self.trainer.model
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        for head in model.modules():
            if isinstance(head, MCIBIHead) and head.enabled:
                memory = head.memory
                if memory.update != "zero" and not memory.initialized.any():
                    loader = self.trainer.data_loader
                    draw_random_pixels(model, head, loader, self.seed, self.max_images)


@torch.no_grad()
def draw_random_pixels(
    model: nn.Module,
    head: MCIBIHead,
    data_loader: Iterable[list[dict]],
    seed: int,
    max_images: int,
) -> None:
    """Initialise a head's memory with one random pixel per class.

    Every pixel gets a random key, and each class keeps the pixel with its largest key, over all
    batches and all processes: a uniform draw that needs no second pass. The keys of an image are
    a function of the seed and of its place in the training stream.

    Args:
        model: a segmentor with a ``backbone``; it is run on the batches in evaluation mode.
        head: of the model; its projection gives the pixels.
        data_loader: training batches.
        seed: of the draw.
        max_images: stop after this many images of all processes.
    """
    memory = head.memory
    world_size = comm.get_world_size()
    best = torch.full((memory.num_classes,), -1.0, dtype=torch.float64, device=memory.rows.device)
    rows = torch.zeros_like(memory.rows)
    images = 0
    projected: list[Tensor] = []
    watch = head.project.register_forward_hook(lambda *args: projected.append(args[-1].float()))
    was_training = model.training
    model.eval()
    try:
        with tqdm(
            total=memory.num_classes,
            desc="Initialising the memory",
            unit="class",
            disable=not comm.is_main_process(),
        ) as progress:
            for batch in data_loader:
                projected.clear()
                model(batch)
                # The features cover the padded images of the batch.
                targets = ImageList.from_tensors(
                    [x["sem_seg"].to(rows.device) for x in batch],
                    model.backbone.size_divisibility,
                    head.ignore_value,
                ).tensor
                for place, x in enumerate(batch):
                    position = x.get("position", images + comm.get_rank() + place * world_size)
                    _keep_largest_keys(
                        best,
                        rows,
                        projected[0][place],
                        targets[place],
                        seed,
                        position,
                        head.ignore_value,
                    )
                images += len(batch) * world_size
                found = _merge(best, rows)
                progress.update(found - progress.n)
                if found == memory.num_classes or images >= max_images:
                    break
    finally:
        watch.remove()
        model.train(was_training)
    memory.initialize(rows, best >= 0)
    missing = (best < 0).nonzero().flatten().tolist()
    logging.getLogger(__name__).info(
        f"Memory initialised: {memory.num_classes - len(missing)} of {memory.num_classes} classes "
        f"from {images} images"
        + (f"; classes {missing} start with the first batch that has them." if missing else ".")
    )


def _keep_largest_keys(
    best: Tensor,
    rows: Tensor,
    feature: Tensor,
    labels: Tensor,
    seed: int,
    position: int,
    ignore_value: int,
) -> None:
    """Let the pixels of one image compete for the rows of their classes.

    Args:
        best: (K,) float64, the largest key so far; changed in place.
        rows: (K, C), the pixels of these keys; changed in place.
        feature: (C, h, w), R' of the image.
        labels: (H, W).
        seed: of the draw.
        position: of the image in the training stream.
        ignore_value: label to leave out.
    """
    # On the CPU, so that every device draws the same; 53 bits, so that keys do not tie.
    generator = torch.Generator().manual_seed(hash((seed, position)) & (2**63 - 1))
    keys = torch.rand(labels.numel(), generator=generator, dtype=torch.float64).to(labels.device)
    flat = labels.flatten()
    valid = ((flat >= 0) & (flat < len(best)) & (flat != ignore_value)).nonzero().flatten()
    keys, classes = keys[valid], flat[valid]
    largest = torch.full_like(best, -1).scatter_reduce(0, classes, keys, "amax")
    winners = valid[keys == largest[classes]]
    winners = winners[largest[flat[winners]] > best[flat[winners]]]
    if len(winners) == 0:
        return
    classes = flat[winners]
    best[classes] = largest[classes]
    upsampled = F.interpolate(
        feature[None], size=labels.shape, mode="bilinear", align_corners=False
    )
    rows[classes] = upsampled[0].flatten(1)[:, winners].t()


def _merge(best: Tensor, rows: Tensor) -> int:
    """Give every process the rows with the largest keys of all; returns how many classes have one.

    Args:
        best: (K,), changed in place.
        rows: (K, C), changed in place.
    """
    if comm.get_world_size() > 1:
        largest = best.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        # A key belongs to one process, or to all of them after an earlier merge.
        mine = (best == largest) & (largest >= 0)
        holders = mine.to(rows.dtype)
        rows.mul_(mine[:, None])
        dist.all_reduce(holders)
        dist.all_reduce(rows)
        rows.div_(holders.clamp_min(1)[:, None])
        best.copy_(largest)
    return int((best >= 0).sum())
