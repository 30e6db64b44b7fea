"""A trained model for images: labels, their probabilities, and a picture."""

import logging
from collections.abc import Callable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import transforms as T
from PIL import Image
from torch import nn

from .config import add_mcibi_config
from .data import read_image
from .data.augmentation import build_test_augmentation
from .data.classes import CLASSES_FILE, Classes
from .data.image_rows import ImageRows, open_rows
from .data.mapper import image_array, size_in_header
from .engine import Checkpointer, Trainer
from .engine.checkpoint import check_weights_exist
from .engine.class_names import check_data_sets, class_names
from .engine.config_check import check_config, check_values, merge_file
from .engine.inference import prepare_inference
from .engine.setup import without_download
from .errors import InputError
from .modeling.resize import best_class, label_type
from .modeling.score_maps import ResizedMap, ScoreMap
from .visualization import blend

# Pixels of the network's input that are run together, but for an image that has more.
MOST_PIXELS = 2**22
# Convolutions on a CPU gain nothing from a batch of larger images, and its features (128 bytes a
# pixel and more) would pass the 32 MiB from which the C library gives each tensor new pages: eight
# images of 360 x 480 took a third of their time for those.
MOST_PIXELS_ON_CPU = 2**18
# Of an image of more pixels, windows are cut from some rows at a time.
LARGE_PIXELS = 2**25
# Pixels that are drawn together.
_DRAWN_PIXELS = 2**22
_logger = logging.getLogger(__name__)

_EXPECTED = "(H, W, 3) uint8 in the order BGR"


def load_model(cfg: CfgNode, names: Sequence[str] | None = None) -> nn.Module:
    """The model of a config with its weights, ready for inference, see ``prepare_inference``.

    Args:
        cfg: of the model.
        names: of its classes; default: those of the first data set of the config.

    Raises:
        InputError: ``MODEL.WEIGHTS`` is empty, is no file, or does not fit the model, or its
            classes have other names.
    """
    if not cfg.MODEL.WEIGHTS:
        raise InputError("MODEL.WEIGHTS is empty, expected a checkpoint")
    check_weights_exist(cfg.MODEL.WEIGHTS)
    model = Trainer.build_model(without_download(cfg))
    checkpointer = Checkpointer(
        model,
        class_names=class_names(cfg) if names is None else names,
        allow_other_classes=cfg.DATASETS.ALLOW_OTHER_CLASSES,
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False, strict=True)
    return prepare_inference(cfg, model)


class Prediction(NamedTuple):
    """What :class:`Predictor` says of an image.

    Attributes:
        labels: (H, W) class ids, uint8 up to 255 classes, else int32; the number of classes, which
            is no class, where a logit is NaN.
        scores: (H, W) float32, the probability of the label.
        overlay: (H, W, 3) uint8 BGR, the image with its labels laid over it.
    """

    labels: np.ndarray
    scores: np.ndarray
    overlay: np.ndarray


# What is taken as an image: see Predictor.__call__.
PredictorInput = np.ndarray | Image.Image | ImageRows | str | PathLike


class Predictor:
    """Segment images as ``--eval-only`` does: same test size, whole or in windows.

    Test-time augmentation is not applied.

    Of an image of more than 33 megapixels (:data:`LARGE_PIXELS`), ``TEST.INFERENCE slide`` with
    ``INPUT.MIN_SIZE_TEST 0`` needs a row of windows at a time. Of a PNG, TIFF or JPEG file they are
    read so (with the extra ``large``), and the image is never in memory as a whole.

    Attributes:
        classes: of the model.
        metadata: of the data set whose classes the model has, for Detectron2's ``Visualizer``.
        model: in evaluation mode.
        white_level: of the config, for :func:`mcibi_d2.data.read_image`.
        max_pixels: of the config, for the same.

    Args:
        cfg: with ``MODEL.WEIGHTS``. The first of ``DATASETS.TEST`` (else of ``DATASETS.TRAIN``)
            gives names and colours of the classes; its files are not needed.
        classes: names and colours of the classes, for which no data set is asked then.
        batch_size: of a list, at most so many images of one size are run together, and no more
            than 4 megapixels of the network's input, or a quarter of one on a CPU, where larger
            batches are slower.

    Raises:
        InputError: naming the key or the file.
    """

    def __init__(self, cfg: CfgNode, *, classes: Classes | None = None, batch_size: int = 8):
        if not isinstance(cfg, CfgNode):
            raise InputError(
                f"cfg is {_kind(cfg)}, expected a config of mcibi_d2.engine.load_config; of the "
                f"folder of a run, Predictor.from_run makes a predictor"
            )
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}, expected a whole number of 1 or more")
        check_values(cfg)
        datasets = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)
        if classes is None:
            check_data_sets(cfg)
        cfg = without_download(cfg)
        cfg.DATASETS.TEST = ()
        cfg.freeze()
        if classes is None and not datasets:
            raise InputError("DATASETS.TEST is empty, expected the data set of the classes")
        check_config(cfg, train=False, output=False)
        registered = {}
        if classes is None:
            classes = Classes.of(datasets[0])
            registered = MetadataCatalog.get(datasets[0]).as_dict()
        count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        if len(classes.names) != count:
            raise InputError(
                f"MODEL.SEM_SEG_HEAD.NUM_CLASSES is {count}, but {classes.dataset} has "
                f"{len(classes.names)} classes"
            )
        self.classes = classes
        self.metadata = Metadata(
            **registered
            | {
                "name": classes.dataset,
                "stuff_classes": classes.names,
                "stuff_colors": classes.colors,
                "ignore_label": classes.ignore_label,
            }
        )
        self.batch_size = batch_size
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        self._most_pixels = MOST_PIXELS_ON_CPU if on_cpu else MOST_PIXELS
        self.model = load_model(cfg, classes.names if classes.named else [])
        self._augmentations = T.AugmentationList(build_test_augmentation(cfg))
        self.white_level = cfg.INPUT.WHITE_LEVEL
        self.max_pixels = cfg.INPUT.MAX_PIXELS
        self._rgb = cfg.INPUT.FORMAT == "RGB"
        # Whether a large image is taken in windows of its own size.
        self._windows = (
            cfg.TEST.INFERENCE == "slide"
            and not self._augmentations.augs
            and hasattr(self.model, "slide")
        )
        self._said = False

    @classmethod
    def from_run(
        cls,
        folder: str | PathLike,
        weights: str | PathLike | None = None,
        *,
        device: str | None = None,
        batch_size: int = 8,
    ) -> "Predictor":
        """The model of a run, from the folder that it was written to, and from nothing else.

        Neither data sets nor their registrations are needed, and nothing is downloaded: the folder
        has ``config.yaml``, ``classes.json`` and the weights. Where an older run has no
        ``classes.json``, its config or the registered data set names the classes; failing these
        they are numbered, with a warning.

        Args:
            folder: ``OUTPUT_DIR`` of the run, wherever it lies now.
            weights: a file of the folder, or elsewhere. Default: ``model_best.pth``, or else
                ``model_final.pth``, or else the last checkpoint.
            device: default: that of the run, or the CPU where that is a GPU and there is none.
            batch_size: see :class:`Predictor`.

        Raises:
            InputError: naming the file that is missing or wrong.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder, expected OUTPUT_DIR of a run")
        file = folder / "config.yaml"
        if not file.is_file():
            raise InputError(
                f"{file}: no such file, expected the config that a training writes to OUTPUT_DIR"
            )
        cfg = get_cfg()
        add_mcibi_config(cfg)
        merge_file(cfg, str(file), older=True)
        if (folder / CLASSES_FILE).is_file():
            classes = Classes.read(folder / CLASSES_FILE)
            count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
            if len(classes.names) != count:
                raise InputError(
                    f"{folder / CLASSES_FILE}: has {len(classes.names)} stuff_classes, expected "
                    f"the {count} of MODEL.SEM_SEG_HEAD.NUM_CLASSES in {file}"
                )
        else:
            classes = _classes_of_older_run(cfg, folder)
        cfg.MODEL.WEIGHTS = str(_weights_of_run(folder, weights))
        if device is not None:
            cfg.MODEL.DEVICE = device
        elif cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            _logger.warning(f"{folder} was trained on a GPU, and there is none: using the CPU.")
            cfg.MODEL.DEVICE = "cpu"
        cfg.DATASETS.OWN.NAME = ""
        return cls(cfg, classes=classes, batch_size=batch_size)

    def __call__(
        self, image: PredictorInput | Sequence[PredictorInput]
    ) -> Prediction | list[Prediction]:
        """Segment an image, or several.

        Args:
            image: (H, W, 3) uint8 BGR, as OpenCV reads it and Detectron2's ``DefaultPredictor``
                takes it, whatever ``INPUT.FORMAT`` is; or a Pillow image, or the path of a file.
                Of a list, those that have one size for the network are run together.

        Returns:
            A :class:`Prediction`, or a list of them in the order of the images. Its scores and its
            overlay have seven bytes for each pixel: of a large image :meth:`labels` or
            :meth:`bands` need less.
        """
        if not isinstance(image, list | tuple):
            return self([image])[0]
        images = [self._open(x, i if len(image) > 1 else None) for i, x in enumerate(image)]
        return [
            Prediction(labels, scores, self.draw(x, labels))
            for x, (labels, scores) in zip(images, self.predict(images), strict=True)
        ]

    def predict(
        self, image: PredictorInput | Sequence[PredictorInput]
    ) -> tuple[np.ndarray, np.ndarray] | list[tuple[np.ndarray, np.ndarray]]:
        """The first two parts of a :class:`Prediction`, without the picture."""
        if not isinstance(image, list | tuple):
            return self.predict([image])[0]
        return self._segment(image, _labels_and_scores)

    def labels(
        self, image: PredictorInput | Sequence[PredictorInput]
    ) -> np.ndarray | list[np.ndarray]:
        """The labels of a :class:`Prediction` alone, as ``--eval-only`` makes them."""
        if not isinstance(image, list | tuple):
            return self.labels([image])[0]
        return self._segment(image, lambda score_map: score_map.labels().cpu().numpy())

    @torch.no_grad()
    def bands(self, image: PredictorInput) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What :meth:`predict` gives, for some rows of an image after the other, from above."""
        image = self._open(image)
        rows = self._rows(image)
        score_map = self._slide(rows) if rows else self._score_maps([self._prepare(image)])[0]
        for start, stop in score_map.bands():
            labels, scores = _band(score_map, start, stop)
            yield labels.cpu().numpy(), scores.cpu().numpy()

    def read(self, path: str | PathLike) -> np.ndarray | ImageRows:
        """A file as :meth:`predict` and :meth:`draw` take it.

        Returns:
            (H, W, 3) uint8 BGR, or, of a large image that windows suffice of, its rows.

        Raises:
            InputError: naming the file.
        """
        size = (size_in_header(str(path)) or (0, 0))[::-1]
        reader = open_rows if self._in_windows(size) else read_image
        return reader(str(path), "BGR", white_level=self.white_level, max_pixels=self.max_pixels)

    def _in_windows(self, size: tuple[int, int]) -> bool:
        return self._windows and size[0] * size[1] > LARGE_PIXELS

    def _segment(
        self, images: Sequence[PredictorInput], finish: Callable[[ScoreMap], object]
    ) -> list:
        """What ``finish`` makes of the scores of each image."""
        found: list = [None] * len(images)
        waiting: dict[tuple[int, ...], list[tuple[int, dict]]] = {}
        for number, x in enumerate(images):
            x = self._open(x, number if len(images) > 1 else None)
            if rows := self._rows(x):
                with torch.no_grad():
                    found[number] = finish(self._slide(rows))
                continue
            inputs = self._prepare(x)
            shape = tuple(inputs["image"].shape)
            batch = waiting.setdefault(shape, [])
            batch.append((number, inputs))
            if len(batch) >= min(self.batch_size, self._most_pixels // (shape[1] * shape[2])):
                self._run(waiting.pop(shape), found, finish)
        for batch in waiting.values():
            self._run(batch, found, finish)
        return found

    def _open(self, image: PredictorInput, number: int | None = None) -> np.ndarray | ImageRows:
        """An image (H, W, 3) uint8 BGR, or the rows of a large one.

        Args:
            image: what a caller gave.
            number: in the caller's list, for the error.
        """
        what = "image" if number is None else f"image {number} of the list"
        if isinstance(image, str | PathLike):
            return self.read(image)
        if isinstance(image, ImageRows):
            return image
        if isinstance(image, Image.Image):
            try:
                return image_array(image, "BGR", white_level=self.white_level)
            except Exception as error:  # whatever Pillow raises when it loads a file
                raise InputError(f"{what} cannot be read ({error})") from error
        if not isinstance(image, np.ndarray):
            hint = ""
            if isinstance(image, torch.Tensor):
                hint = f" of shape {tuple(image.shape)} and type {image.dtype}"
            raise InputError(
                f"{what} is {_kind(image)}{hint}, expected {_EXPECTED}, a Pillow image or a path"
            )
        shape = image.shape
        if image.dtype != np.uint8 or image.ndim != 3 or shape[2] != 3 or not image.size:
            raise InputError(
                f"{what} has shape {shape} and type {image.dtype}, expected {_EXPECTED}"
                f"{_hint(image)}"
            )
        return image

    def _rows(self, image: np.ndarray | ImageRows) -> ImageRows | None:
        """The rows of a large image that windows suffice of; None: the network takes it whole."""
        if isinstance(image, np.ndarray) and self._in_windows(image.shape[:2]):
            return ImageRows.of(image)
        return image if isinstance(image, ImageRows) and self._windows else None

    def _slide(self, image: ImageRows) -> ScoreMap:
        def rows(start: int, stop: int) -> torch.Tensor:
            return self._tensor(image(start, stop)).to(self.model.device, non_blocking=True)

        return self.model.slide(rows, image.size)

    def _prepare(self, image: np.ndarray | ImageRows) -> dict:
        """A BGR image as the model takes it."""
        if isinstance(image, ImageRows):
            image = image(0, image.size[0])
        height, width = image.shape[:2]
        inputs = T.AugInput(image)
        self._augmentations(inputs)
        tensor = self._tensor(inputs.image).contiguous()
        pixels = tensor[0].numel()
        if pixels > LARGE_PIXELS and pixels >= height * width and not self._said:
            self._said = True
            _logger.warning(
                f"An image of {width} x {height} pixels (width x height) is in memory as a whole, "
                f"at {tensor.shape[2]} x {tensor.shape[1]} for the network: TEST.INFERENCE slide "
                f"with INPUT.MIN_SIZE_TEST 0 and INPUT.TEST_RESIZE shortest_edge takes windows"
            )
        return {"image": tensor, "height": height, "width": width}

    def _tensor(self, image: np.ndarray) -> torch.Tensor:
        """BGR pixels (H, W, 3) as (3, H, W), in the model's order."""
        image = np.ascontiguousarray(image[..., ::-1] if self._rgb else image)
        return torch.from_numpy(image).permute(2, 0, 1)

    @torch.no_grad()
    def _run(
        self, batch: list[tuple[int, dict]], found: list, finish: Callable[[ScoreMap], object]
    ) -> None:
        """Put what ``finish`` makes of each of a batch where it belongs."""
        maps = self._score_maps([inputs for _, inputs in batch])
        for (number, _), score_map in zip(batch, maps, strict=True):
            found[number] = finish(score_map)

    def _score_maps(self, batch: list[dict]) -> list[ScoreMap]:
        if hasattr(self.model, "score_maps"):
            return self.model.score_maps(batch)
        maps = []
        for result in self.model(batch):
            size = tuple(result["sem_seg"].shape[1:])
            maps.append(ResizedMap(result["sem_seg"], size, size, size))
        return maps

    def draw(
        self, image: np.ndarray | ImageRows, labels: np.ndarray, opacity: float = 0.6
    ) -> np.ndarray:
        """An image (H, W, 3) uint8 BGR with labels (H, W) laid over it in the classes' colours."""
        colors = [c[::-1] for c in self.classes.colors]
        height, width = labels.shape
        picture = np.empty((height, width, 3), dtype=np.uint8)
        step = max(1, _DRAWN_PIXELS // width)
        for start in range(0, height, step):
            stop = min(start + step, height)
            rows = image(start, stop) if isinstance(image, ImageRows) else image[start:stop]
            picture[start:stop] = blend(rows, labels[start:stop], colors, opacity)
        return picture


def _labels_and_scores(score_map: ScoreMap) -> tuple[np.ndarray, np.ndarray]:
    """The class of every pixel and its probability, made by bands of rows."""
    size, device = score_map.size, score_map.device
    labels = torch.empty(size, dtype=label_type(score_map.num_classes), device=device)
    scores = torch.empty(size, device=device)
    for start, stop in score_map.bands():
        labels[start:stop], scores[start:stop] = _band(score_map, start, stop)
    return labels.cpu().numpy(), scores.cpu().numpy()


def _band(score_map: ScoreMap, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The class of every pixel of some rows, and its probability."""
    rows = score_map.rows(start, stop)
    best = scores = rows.amax(dim=0)
    if not score_map.probabilities:
        # Softmax, of its largest value alone.
        scores = (rows - best).exp_().sum(dim=0).reciprocal_()
    return best_class(rows, best=best), scores  # overwrites the rows


def _hint(image: np.ndarray) -> str:
    """How what was given may become an image, for the end of a sentence."""
    if not image.size:
        return " with pixels"
    if image.dtype == np.uint8 and (image.ndim == 2 or image.ndim == 3 and image.shape[2] == 1):
        return ": of a gray image, cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)"
    if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 4:
        return ": of three channels and alpha, image[..., :3]"
    if image.ndim == 4:
        return "; several images are a list"
    return ""


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__module__}.{type(value).__qualname__}"


def _weights_of_run(folder: Path, weights: str | PathLike | None) -> Path:
    if weights is not None:
        path = folder / Path(weights).expanduser()
        if not path.is_file():
            raise InputError(f"{path}: no such file, expected the weights of a run")
        return path
    last = folder / "last_checkpoint"
    names = ["model_best.pth", "model_final.pth"]
    if last.is_file():
        names.append(last.read_text().strip())
    names += sorted((path.name for path in folder.glob("model_*.pth")), reverse=True)
    for name in names:
        if name and (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{folder}: holds no weights, expected model_best.pth, model_final.pth or a checkpoint"
    )


def _classes_of_older_run(cfg: CfgNode, folder: Path) -> Classes:
    """What a config and the registered data sets know of the classes."""
    own, count = cfg.DATASETS.OWN, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    datasets = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if own.NAME and any(name.startswith(f"{own.NAME}_") for name in datasets):
        metadata = Metadata(
            name=own.NAME,
            stuff_classes=list(own.CLASS_NAMES),
            stuff_colors=list(own.CLASS_COLORS),
            ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        )
        return Classes.of(metadata)
    for name in datasets:
        if name in DatasetCatalog and MetadataCatalog.get(name).get("stuff_classes"):
            return Classes.of(name)
    _logger.warning(
        f"{folder}: has no {CLASSES_FILE}, and {', '.join(datasets) or 'no data set'} is not "
        f"registered here: its classes are called class_0 to class_{count - 1}"
    )
    return Classes.numbered(datasets[0] if datasets else str(folder), count)
