"""What the memory's rows are before the first iteration (section 3.2)."""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.structures import ImageList
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from torch import Tensor, nn
from tqdm import tqdm

from ..data.loader import TrainingStream
from ..errors import InputError
from ..files import read_data
from ..modeling import FeatureMemory, MCIBIHead, MCIBISegmentor
from ..modeling.labels import classes_of
from ..modeling.memory import interpolate_pixels, rows_for
from .class_names import names_in, require_same
from .memory_hooks import part_of, unwrap
from .stop import end_if_asked

# How rows may start; first_batch_mean is what the memory does by itself.
INITS = ("random_pixel", "clustering", "first_batch_mean", "file")
# Of images that wait for the network on each process; with more it runs on them at once.
HELD_BYTES = 2**28
# So many images that were seen before, and at least as many as there are: it was the whole set.
REPEATED = 100
# Classes without pixels that are named.
MAX_NAMED = 20


class MemoryInitHook(HookBase):
    """Fill the memory before the first iteration.

    - ``random_pixel``: each row is one random pixel of its class. The labels of training batches
      are looked at until every class has as many pixels as rows, or to the end of the set, or a
      number of images; then the untrained network, in evaluation mode, runs on the images with a
      pixel that was drawn. Of all pixels of a class in these labels, each is equally likely to be
      taken.
    - ``clustering``: the same passes collect ``pixels`` random pixels per class; the rows are the
      centres of their clusters, see :func:`cluster_pixels`.
    - ``file``: see :func:`read_rows`.
    - ``first_batch_mean``: nothing is done here.

    A memory that is updated at ``random`` is drawn anew from the seed, whatever the choice; one
    that is held at ``zero`` stays so.

    The draw is a function of the seed and of the images, not of the number of processes. Rows that
    were not found are initialised by the first batch that has their class; the log names these
    classes, with the number of their pixels in the labels. A run that is resumed,
    or started from weights with a memory, keeps its rows (unless they are to come from a file).

    Args:
        init: one of the four.
        seed: of the draw and of the clustering.
        max_images: no further batch after this many images, of all processes together.
        pixels: per class, for ``clustering``.
        file: for ``file``.
        class_names: for what is logged, and for a comparison with those of a checkpoint in
            ``file``.
        allow_other_classes: take the rows of a checkpoint whose classes have other names.
    """

    def __init__(
        self,
        init: str = "random_pixel",
        seed: int = 0,
        max_images: int = 2000,
        pixels: int = 100,
        file: str = "",
        class_names: Sequence[str] = (),
        allow_other_classes: bool = False,
    ):
        if init not in INITS:
            raise InputError(f"MemoryInitHook(init={init!r}): expected one of {', '.join(INITS)}")
        self.init = init
        self.seed = seed
        self.max_images = max_images
        self.pixels = pixels
        self.file = file
        self.class_names = class_names
        self.allow_other_classes = allow_other_classes

    def before_train(self) -> None:
        """Fill the memory of the trainer's model."""
        if self.trainer.start_iter > 0:
            return
        model = unwrap(part_of(self.trainer, "model", self))
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
            names = () if self.allow_other_classes else self.class_names
            rows, found = read_rows(self.file, memory, names)
            source = self.file
        else:
            wanted = memory.slots if self.init == "random_pixel" else self.pixels
            pixels, counts, images = draw_random_pixels(
                model,
                head,
                part_of(self.trainer, "data_loader", self),
                self.seed,
                self.max_images,
                wanted,
                self.class_names,
            )
            bad = (~pixels.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"the untrained network's features of classes {bad} are not finite, expected "
                    f"finite ones to initialise the memory with (MODEL.WEIGHTS?)"
                )
            if self.init == "random_pixel":
                rows = pixels.flatten(0, 1)
                found = torch.arange(wanted) < counts[:, None]
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


class _Draw:
    """The pixels that are drawn so far: by class, with the largest keys, where to find each.

    Args:
        classes: K.
        wanted: pixels per class, P.
        channels: C.
        device: of the pixels; all else is on the CPU, so that nothing waits for a device.
    """

    def __init__(self, classes: int, wanted: int, channels: int, device: torch.device):
        # Falling; -1 for none.
        self.keys = torch.full((classes, wanted), -1.0, dtype=torch.float64)
        # The image of each, a key of `images`, and the pixel in its labels, y * W + x. The image is
        # -1 once the pixel is made (or belongs to another process).
        self.image = torch.full((classes, wanted), -1)
        self.place = torch.zeros(classes, wanted, dtype=torch.int64)
        self.pixels = torch.zeros(classes, wanted, channels, device=device)
        # Images with a drawn pixel that is not made yet, with the size of their labels.
        self.images: dict[int, tuple[Tensor, tuple[int, int]]] = {}
        # Pixels of each class in all labels.
        self.count = torch.zeros(classes, dtype=torch.int64)

    def add(self, image: Tensor, labels: Tensor, number: int, seed: int, position: int) -> None:
        """Let the pixels of one image compete with those that their classes have so far.

        Args:
            image: as the model takes it.
            labels: (H, W) int64; K for what has no class.
            number: of the image.
            seed: of the draw.
            position: of the image in the training stream.
        """
        classes, wanted = self.keys.shape
        # On the CPU, so that every device draws the same; 53 bits, so that keys do not tie.
        state = np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        drawn = torch.rand(labels.numel(), generator=generator, dtype=torch.float64)
        flat = labels.flatten()
        counted = flat.bincount(minlength=classes + 1)[:classes]
        self.count += counted
        taken = False
        for k in counted.nonzero().flatten().tolist():
            places = (flat == k).nonzero().flatten()
            own, order = drawn[places].topk(min(wanted, len(places)))
            fresh = len(own)
            self.keys[k], best = torch.cat([self.keys[k], own]).topk(wanted)
            self.image[k] = torch.cat([self.image[k], torch.full((fresh,), number)])[best]
            self.place[k] = torch.cat([self.place[k], places[order]])[best]
            made = self.pixels[k]
            self.pixels[k] = torch.cat([made, made.new_zeros(fresh, made.shape[1])])[best]
            taken = taken or bool((best >= wanted).any())
        if taken:
            # A copy: what worker processes send lies in shared memory, which is short.
            self.images[number] = (image.clone(), tuple(labels.shape))
            still = set(self.image.unique().tolist())
            self.images = {n: held for n, held in self.images.items() if n in still}

    def make(self, project: Callable[[list[Tensor]], Tensor], batch_size: int) -> Iterator[int]:
        """Run the network on the images that hold a drawn pixel; yields how many it ran on.

        Args:
            project: from images of one size to their R'.
            batch_size: most images at a time.
        """
        # Images of one size together: none is padded for another's sake.
        numbers = sorted(self.images, key=lambda n: (self.images[n][0].shape, n))
        while numbers:
            shape = self.images[numbers[0]][0].shape
            batch = [n for n in numbers[:batch_size] if self.images[n][0].shape == shape]
            numbers = numbers[len(batch) :]
            features = project([self.images[n][0] for n in batch]).float()
            for number, feature in zip(batch, features, strict=True):
                mine = self.image == number
                places = self.place[mine].to(feature.device)
                made = interpolate_pixels(feature, self.images.pop(number)[1], places)
                self.pixels[mine.to(self.pixels.device)] = made.to(self.pixels)
                self.image[mine] = -1
            yield len(batch)

    def merge(self) -> Tensor:
        """Keep the largest keys of all processes, and of the pixels only those of this process.

        Returns:
            (K, P) bool, which pixels are this process's.
        """
        wanted = self.keys.shape[1]
        of_all = comm.all_gather((self.keys, self.count))
        self.count = sum(count for _, count in of_all)
        self.keys, order = torch.cat([keys for keys, _ in of_all], dim=1).topk(wanted, dim=1)
        mine = (order // wanted == comm.get_rank()) & (self.keys >= 0)
        order = order % wanted
        self.image = self.image.gather(1, order).masked_fill(~mine, -1)
        self.place = self.place.gather(1, order)
        index = order.to(self.pixels.device)[:, :, None].expand_as(self.pixels)
        self.pixels = self.pixels.gather(1, index)
        still = set(self.image.unique().tolist())
        self.images = {n: held for n, held in self.images.items() if n in still}
        return mine


@torch.no_grad()
def draw_random_pixels(
    model: nn.Module,
    head: MCIBIHead,
    data_loader: Iterable[list[dict]],
    seed: int,
    max_images: int,
    wanted: int = 1,
    class_names: Sequence[str] = (),
) -> tuple[Tensor, Tensor, int]:
    """Draw random pixels of each class, each with the same probability.

    Every pixel gets a random key, and each class keeps the pixels with its largest keys, over all
    batches and all processes: a uniform draw that needs no second pass. The keys of an image are
    a function of the seed and of its place in the training stream. They need its labels alone, so
    that the network, in evaluation mode, runs on the images that hold a drawn pixel and on no
    others, after all labels were seen (but for more images than are kept, :data:`HELD_BYTES`).

    Each image is looked at once: the pass ends with the set. An image that comes again before
    (from another project's loader) is passed over.

    Args:
        model: a segmentor with a ``backbone``.
        head: of the model; its projection gives the pixels.
        data_loader: training batches.
        seed: of the draw.
        max_images: stop after this many images of all processes.
        wanted: pixels per class, P; the pass stops when every class has them.
        class_names: for what is logged of classes that were not found.

    Returns:
        The pixels (K, P, C), by falling key, zeros where there are too few; how many each class
        has (K,), on the CPU; and the number of images.
    """
    memory = head.memory
    draw = _Draw(memory.num_classes, wanted, memory.channels, memory.rows.device)
    project = _projection(model, head)
    rank, world_size = comm.get_rank(), comm.get_world_size()
    in_set = _images_of(data_loader)
    seen, images, repeated, numbers, batch_size = set(), 0, 0, itertools.count(), 1
    was_training = model.training
    model.eval()
    try:
        batches = iter(data_loader)
        with tqdm(
            total=memory.num_classes,
            desc="Initialising the memory: labels",
            unit="class",
            disable=not comm.is_main_process(),
        ) as progress:
            while images < min(max_images, in_set):
                end_if_asked()
                batch = next(batches, None)
                names = comm.all_gather(batch and [_identity(x) for x in batch])
                if any(name is None for name in names):
                    break  # a loader has come to its end
                batch_size = max(batch_size, len(batch))
                # In the order of the stream: the first of each process, the second of each, ...
                for place, of_all in enumerate(itertools.zip_longest(*names)):
                    for process, name in enumerate(of_all):
                        again = name in seen and name is not None
                        repeated = repeated + 1 if again else 0
                        seen.add(name)
                        if again or process != rank or place >= len(batch):
                            continue
                        x = batch[place]
                        draw.add(
                            x["image"],
                            _padded_labels(x["sem_seg"], model, head),
                            next(numbers),
                            seed,
                            x.get("position", images + rank + place * world_size),
                        )
                images += len(batch) * world_size
                counts = sum(comm.all_gather((draw.keys >= 0).sum(dim=1)))
                complete = int((counts >= wanted).sum())
                progress.update(complete - progress.n)
                # An endless loader of another make, that has nothing new to show.
                if complete == memory.num_classes or repeated >= max(REPEATED, len(seen)):
                    break
                if sum(image.nbytes for image, _ in draw.images.values()) > HELD_BYTES:
                    for _ in draw.make(project, batch_size):
                        pass
        mine = draw.merge()
        _report_missing(draw, class_names, images)
        with tqdm(
            total=len(draw.images),
            desc="Initialising the memory: network",
            unit="image",
            disable=not comm.is_main_process(),
        ) as progress:
            for done in draw.make(project, batch_size):
                progress.update(done)
    finally:
        model.train(was_training)
    pixels = draw.pixels * mine.to(draw.pixels.device)[:, :, None]
    if world_size > 1:
        dist.all_reduce(pixels)  # each process has put its own in their places
    return pixels, (draw.keys >= 0).sum(dim=1), images


def _images_of(data_loader: Iterable) -> float:
    """The number of images in one pass over a loader's set; infinity if it cannot be told."""
    stream = data_loader
    while stream is not None:
        if isinstance(stream, TrainingStream):
            return len(stream)
        stream = getattr(stream, "dataset", None)
    return math.inf


def _identity(x: dict) -> tuple | int | None:
    """What makes a sample's image another than the others, None if nothing does."""
    if "file_name" in x:
        return x["file_name"], x.get("sem_seg_file_name"), x.get("image_id")
    return x.get("position")


def _padded_labels(labels: Tensor, model: nn.Module, head: MCIBIHead) -> Tensor:
    """The classes of an image, (H, W), where its features cover it; K for what has none."""
    unit = model.backbone.size_divisibility
    labels = ImageList.from_tensors([labels.cpu()], unit, head.ignore_value).tensor[0]
    return classes_of(labels, head.num_classes, head.ignore_value)[0]


def _projection(model: nn.Module, head: MCIBIHead) -> Callable[[list[Tensor]], Tensor]:
    """From images of one size to their R' (N, C, h, w)."""
    if isinstance(model, MCIBISegmentor):

        def project(images: list[Tensor]) -> Tensor:
            images = model.preprocess([{"image": image} for image in images])
            return head.pixels(model.backbone(images.tensor))

        return project

    def stop(*args) -> None:
        raise _Projected(args[-1])  # all that comes later would be for nothing

    def watch(images: list[Tensor]) -> Tensor:
        handle = head.project.register_forward_hook(stop)
        try:
            model([{"image": image} for image in images])
        except _Projected as projected:
            return projected.args[0]
        finally:
            handle.remove()
        raise InputError(
            f"{type(model).__name__} did not call the projection of its head, expected a segmentor"
        )

    return watch


class _Projected(Exception):
    """Carries R' out of a segmentor of another project."""


def _report_missing(draw: _Draw, class_names: Sequence[str], images: int) -> None:
    """Name the classes that have fewer pixels than are wanted, before the network runs."""
    found = (draw.keys >= 0).sum(dim=1).tolist()
    wanted = draw.keys.shape[1]
    missing = [
        f"{k} ({class_names[k]}): {draw.count[k]}"
        if k < len(class_names)
        else f"{k}: {draw.count[k]}"
        for k, number in enumerate(found)
        if number < wanted
    ]
    if not missing or not comm.is_main_process():
        return
    more = f", and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    logging.getLogger(__name__).warning(
        f"The labels of {images} training samples have fewer than {wanted} pixels of "
        f"{len(missing)} classes: {', '.join(missing[:MAX_NAMED])}{more}"
    )


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


def read_rows(
    path: str, memory: FeatureMemory, class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Rows from the file of ``MODEL.MCIBI.MEMORY.INIT_FILE``.

    Args:
        path: ``.npy``, or what ``torch.save`` wrote; see
            :func:`mcibi_d2.modeling.memory.rows_for`.
        memory: that they are for.
        class_names: of the memory's classes; a checkpoint with others is refused.

    Returns:
        (K * S, C) rows, and (K * S,) bool, which of them are there.

    Raises:
        InputError: if the file cannot be read, has no memory, or one of another shape, or for
            other classes.
    """
    try:
        if not PathManager.isfile(path):
            raise InputError(f"{path}: no such file, expected the rows of the memory")
        content = read_data(PathManager.get_local_path(path), ".npy or .pth")
        if isinstance(content, dict):
            require_same(class_names, "this run", names_in(content), path)
        return rows_for(memory, content, path)
    except InputError as error:
        raise InputError(f"MODEL.MCIBI.MEMORY.INIT_FILE: {error}") from error
