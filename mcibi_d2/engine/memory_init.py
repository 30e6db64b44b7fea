"""What the memory's rows are before the first iteration (section 3.2)."""

import logging
import os
from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..modeling import FeatureMemory, MCIBIHead
from ..modeling.memory import interpolate_pixels

# How rows may start; first_batch_mean is what the memory does by itself.
INITS = ("random_pixel", "clustering", "first_batch_mean", "file")


class MemoryInitHook(HookBase):
    """Fill the memory before the first iteration.

    - ``random_pixel``: each row is one random pixel of its class. The untrained network, in
      evaluation mode, goes over training batches until every class has as many pixels as rows, or
      a number of images. Of all pixels of a class in these images, each is equally likely to be
      taken.
    - ``clustering``: the same pass collects ``pixels`` random pixels per class; the rows are the
      centres of their clusters, see :func:`cluster_pixels`.
    - ``file``: see :func:`read_rows`.
    - ``first_batch_mean``: nothing is done here.

    A memory that is updated at ``random`` is drawn anew from the seed, whatever the choice; one
    that is held at ``zero`` stays so.

    The draw is a function of the seed and of the images, not of the number of processes. Rows that
    were not found are initialised by the first batch that has their class. A run that is resumed,
    or started from weights with a memory, keeps its rows (unless they are to come from a file).

    Args:
        init: one of the four.
        seed: of the draw and of the clustering.
        max_images: no further batch after this many images, of all processes together.
        pixels: per class, for ``clustering``.
        file: for ``file``.
    """

    def __init__(
        self,
        init: str = "random_pixel",
        seed: int = 0,
        max_images: int = 2000,
        pixels: int = 100,
        file: str = "",
    ):
        if init not in INITS:
            raise InputError(f"MemoryInitHook(init={init!r}): expected one of {', '.join(INITS)}")
        self.init = init
        self.seed = seed
        self.max_images = max_images
        self.pixels = pixels
        self.file = file

    def before_train(self) -> None:
        """Fill the memory of the trainer's model."""
        if self.trainer.start_iter > 0:
            return
        model = self.trainer.model
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        for head in model.modules():
            if not isinstance(head, MCIBIHead) or not head.enabled:
                continue
            memory = head.memory
            if memory.update == "random":
                memory.draw(self.seed)
            if memory.update in ("zero", "random") or self.init == "first_batch_mean":
                continue
            if self.init == "file":
                memory.initialized.zero_()
            if memory.initialized.any():
                logging.getLogger(__name__).info("The memory came with the weights: kept.")
                continue
            self._fill(model, head)

    def _fill(self, model: nn.Module, head: MCIBIHead) -> None:
        memory = head.memory
        if self.init == "file":
            rows, found = read_rows(self.file, memory)
            source = self.file
        else:
            wanted = memory.slots if self.init == "random_pixel" else self.pixels
            pixels, counts, images = draw_random_pixels(
                model, head, self.trainer.data_loader, self.seed, self.max_images, wanted
            )
            bad = (~pixels.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"the untrained network's features of classes {bad} are not finite, expected "
                    f"finite ones to initialise the memory with (MODEL.WEIGHTS?)"
                )
            if self.init == "random_pixel":
                rows = pixels.flatten(0, 1)
                found = torch.arange(wanted, device=rows.device) < counts[:, None]
                found = found.flatten()
            else:
                rows, found = cluster_pixels(pixels, counts, memory.slots, self.seed)
            source = f"{images} images"
        memory.initialize(rows.to(memory.rows.device), found.to(memory.rows.device))
        missing = sorted({row // memory.slots for row in (~found).nonzero().flatten().tolist()})
        logging.getLogger(__name__).info(
            f"Memory initialised ({self.init}): {int(found.sum())} of {len(found)} rows from "
            f"{source}"
            + (f"; classes {missing} start with the first batch that has them." if missing else ".")
        )


@torch.no_grad()
def draw_random_pixels(
    model: nn.Module,
    head: MCIBIHead,
    data_loader: Iterable[list[dict]],
    seed: int,
    max_images: int,
    wanted: int = 1,
) -> tuple[Tensor, Tensor, int]:
    """Draw random pixels of each class, each with the same probability.

    Every pixel gets a random key, and each class keeps the pixels with its largest keys, over all
    batches and all processes: a uniform draw that needs no second pass. The keys of an image are
    a function of the seed and of its place in the training stream.

    Args:
        model: a segmentor with a ``backbone``; it is run on the batches in evaluation mode.
        head: of the model; its projection gives the pixels.
        data_loader: training batches.
        seed: of the draw.
        max_images: stop after this many images of all processes.
        wanted: pixels per class, P; the pass stops when every class has them.

    Returns:
        The pixels (K, P, C), by falling key, zeros where there are too few; how many each class
        has (K,); and the number of images.
    """
    memory = head.memory
    world_size = comm.get_world_size()
    shape = (memory.num_classes, wanted)
    keys = torch.full(shape, -1.0, dtype=torch.float64, device=memory.rows.device)
    pixels = memory.rows.new_zeros(*shape, memory.channels)
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
                # Without the size of the whole images, to which the logits would be brought.
                model([{"image": x["image"]} for x in batch])
                # The features cover the padded images of the batch.
                targets = ImageList.from_tensors(
                    [x["sem_seg"].to(pixels.device) for x in batch],
                    model.backbone.size_divisibility,
                    head.ignore_value,
                ).tensor
                for place, x in enumerate(batch):
                    position = x.get("position", images + comm.get_rank() + place * world_size)
                    _keep_largest_keys(
                        keys,
                        pixels,
                        projected[0][place],
                        targets[place],
                        seed,
                        position,
                        head.ignore_value,
                    )
                images += len(batch) * world_size
                counts = (keys >= 0).sum(dim=1)
                if world_size > 1:
                    dist.all_reduce(counts)
                complete = int((counts >= wanted).sum())
                progress.update(complete - progress.n)
                if complete == memory.num_classes or images >= max_images:
                    break
    finally:
        watch.remove()
        model.train(was_training)
    keys, pixels = _merge(keys, pixels)
    return pixels, (keys >= 0).sum(dim=1), images


def _keep_largest_keys(
    keys: Tensor,
    pixels: Tensor,
    feature: Tensor,
    labels: Tensor,
    seed: int,
    position: int,
    ignore_value: int,
) -> None:
    """Let the pixels of one image compete with those that their classes have so far.

    Args:
        keys: (K, P) float64, the largest keys so far, falling, -1 for none; changed in place.
        pixels: (K, P, C), the pixels of these keys; changed in place.
        feature: (C, h, w), R' of the image.
        labels: (H, W).
        seed: of the draw.
        position: of the image in the training stream.
        ignore_value: label to leave out.
    """
    num_classes, wanted = keys.shape
    # On the CPU, so that every device draws the same; 53 bits, so that keys do not tie.
    state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0] >> 1))
    drawn = torch.rand(labels.numel(), generator=generator, dtype=torch.float64).to(labels.device)
    flat = labels.flatten().long()
    valid = (flat >= 0) & (flat < num_classes) & (flat != ignore_value)
    for k in flat[valid].unique().tolist():
        places = (flat == k).nonzero().flatten()
        own, order = drawn[places].topk(min(wanted, len(places)))
        fresh = interpolate_pixels(feature, tuple(labels.shape), places[order])
        both, order = torch.cat([keys[k], own]).topk(wanted)
        keys[k], pixels[k] = both, torch.cat([pixels[k], fresh.to(pixels)])[order]


def _merge(keys: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels with the largest keys of all processes, on every one of them.

    Args:
        keys: (K, P), of this process.
        pixels: (K, P, C), of this process.

    Returns:
        The same of all processes.
    """
    if comm.get_world_size() == 1:
        return keys, pixels
    of_all = [torch.empty_like(keys) for _ in range(comm.get_world_size())]
    dist.all_gather(of_all, keys)
    wanted = keys.shape[1]
    largest, order = torch.cat(of_all, dim=1).topk(wanted, dim=1)
    # Each process puts its own pixels in their places, and the sum is all of them.
    mine = (order // wanted == comm.get_rank()) & (largest >= 0)
    index = (order % wanted)[:, :, None].expand_as(pixels)
    merged = pixels.gather(1, index) * mine[:, :, None]
    dist.all_reduce(merged)
    return largest, merged


def cluster_pixels(pixels: Tensor, counts: Tensor, slots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Centres of each class's pixels by cosine k-means (Table 2, "Clustering").

    scikit-learn's k-means works on the pixels at length one. A centre has the direction of the
    mean of its cluster's directions, and the mean length of its pixels.

    Args:
        pixels: (K, P, C).
        counts: (K,), how many of the P are there.
        slots: S, clusters per class.
        seed: of k-means.

    Returns:
        (K * S, C) rows on the CPU, and (K * S,) bool, which of them were found. A class with fewer
        different directions than slots has as many rows.
    """
    from sklearn.cluster import KMeans

    rows = torch.zeros(len(pixels) * slots, pixels.shape[-1])
    found = torch.zeros(len(rows), dtype=torch.bool)
    if comm.is_main_process():
        for k, (own, count) in enumerate(zip(pixels.cpu().double(), counts.tolist(), strict=True)):
            lengths = own[:count].norm(dim=1)
            own, lengths = own[:count][lengths > 0], lengths[lengths > 0]
            units = own / lengths[:, None]
            clusters = min(slots, len(units.unique(dim=0)))
            if clusters == 0:
                continue
            means = KMeans(clusters, n_init=10, random_state=seed % 2**32).fit(units.numpy())
            for slot in range(clusters):
                members = torch.from_numpy(means.labels_ == slot)
                centre = units[members].mean(dim=0)
                if centre.norm() > 0:
                    row = k * slots + slot
                    rows[row] = centre / centre.norm() * lengths[members].mean()
                    found[row] = True
    # Every process has what the main one has found.
    rows, found = comm.all_gather((rows, found))[0]
    return rows, found


def read_rows(path: str, memory: FeatureMemory) -> tuple[Tensor, Tensor]:
    """Rows from a file.

    Args:
        path: ``.npy``, or what ``torch.save`` wrote: a tensor, or a checkpoint with a memory. The
            shape is that of the memory's rows, or (K, S, C).
        memory: that they are for.

    Returns:
        (K * S, C) rows, and (K * S,) bool, which of them are there: those that the checkpoint calls
        initialised, or those that are not zero.

    Raises:
        InputError: if the file cannot be read, has no memory, or one of another shape.
    """
    key = f"MODEL.MCIBI.MEMORY.INIT_FILE: {path}"
    if not PathManager.isfile(path):
        raise InputError(f"{key}: no such file, expected the rows of the memory")
    try:
        local = PathManager.get_local_path(path)
        if os.path.splitext(path)[1] == ".npy":
            loaded = torch.from_numpy(np.load(local, allow_pickle=False))
        else:
            loaded = torch.load(local, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{key}: cannot be read as .npy or .pth ({type(error).__name__}: {reason[:120]})"
        ) from error
    expected = tuple(memory.rows.shape)
    found = None
    if isinstance(loaded, dict):
        state = loaded["model"] if isinstance(loaded.get("model"), dict) else loaded
        names = [name for name in state if f".{name}".endswith(".memory.rows")]
        if len(names) != 1:
            raise InputError(f"{key}: has {len(names)} tensors called memory.rows, expected one")
        loaded = state[names[0]]
        found = state.get(names[0].removesuffix("rows") + "initialized")
        if found is not None and not (
            torch.is_tensor(found) and found.dtype == torch.bool and found.shape == expected[:1]
        ):
            raise InputError(
                f"{key}: its memory.initialized does not fit, expected {expected[0]} bools"
            )
    by_class = (memory.num_classes, memory.slots, memory.channels)
    if not torch.is_tensor(loaded) or tuple(loaded.shape) not in (expected, by_class):
        shape = tuple(loaded.shape) if torch.is_tensor(loaded) else type(loaded).__name__
        raise InputError(f"{key}: {shape}, expected rows of shape {expected} or {by_class}")
    if not loaded.is_floating_point():
        raise InputError(f"{key}: numbers of type {loaded.dtype}, expected floating point")
    rows = loaded.reshape(expected).float()
    if not rows.isfinite().all():
        bad = (~rows.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise InputError(f"{key}: rows {bad[:10]} are not finite, expected numbers")
    return rows, rows.any(dim=1) if found is None else found
