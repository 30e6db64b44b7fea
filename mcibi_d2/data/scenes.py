"""Generated scenes: a small data set without files, made so that context decides.

A scene is a function of its split and number. Its pairs of classes that look alike are told apart
by what is around them or by what other scenes have shown: sky and water, grass and foliage, road
and wall share their textures; a car and a boat share their shape; a lamp and the sun are the same
bright disc. Every texture group has several palettes and patterns. There are thin things (poles,
trunks) and small ones (lamps, birds, persons), and pixels without ground truth along contours and
in patches.

The files are virtual: ``scenes://train/00012/image.png`` and ``.../labels.png`` are opened through
iopath like any other file, so every Detectron2 tool can read them.
"""

import io
from functools import lru_cache

import cv2
import numpy as np
from iopath.common.file_io import PathHandler
from PIL import Image

PREFIX = "scenes://"
SPLITS = {"train": 2000, "val": 100}
HEIGHT, WIDTH = 128, 160
IGNORE = 255

(SKY, WATER, GRASS, FOLIAGE, TRUNK, ROAD, WALL, ROOF, WINDOW, CAR, BOAT, PERSON, POLE, LAMP, SUN,
 BIRD) = range(16)  # fmt: skip

# What classes look like: palettes (RGB) and patterns. Classes of one line look alike.
_LOOKS = {
    (SKY, WATER): (
        [(118, 160, 205), (150, 175, 190), (200, 160, 140), (90, 120, 165)],
        ["gradient", "clouds", "waves"],
    ),
    (GRASS, FOLIAGE): (
        [(80, 130, 60), (110, 140, 50), (60, 100, 70), (140, 130, 60)],
        ["noise", "clouds", "blades"],
    ),
    (ROAD, WALL): (
        [(125, 125, 125), (150, 140, 130), (105, 108, 118)],
        ["noise", "clouds", "bricks"],
    ),
    (ROOF, TRUNK): ([(130, 75, 55), (100, 65, 50), (95, 80, 75)], ["blades", "bricks", "noise"]),
    (CAR, BOAT): (
        [(190, 45, 45), (50, 70, 170), (225, 225, 220), (60, 60, 65), (210, 170, 50)],
        ["plain", "gradient"],
    ),
    (WINDOW, BIRD, POLE): ([(50, 55, 65), (75, 70, 70)], ["plain", "noise"]),
    (PERSON,): ([(170, 110, 90), (70, 60, 120), (180, 60, 110)], ["plain", "noise"]),
    (LAMP, SUN): ([(250, 240, 190), (250, 220, 150)], ["plain"]),
}
_LOOK_OF = {c: look for classes, look in _LOOKS.items() for c in classes}


class _Canvas:
    """An image and its labels, painted back to front."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.image = np.zeros((HEIGHT, WIDTH, 3), dtype=np.float32)
        self.labels = np.full((HEIGHT, WIDTH), IGNORE, dtype=np.uint8)
        # One look per class and scene, so that a scene is of a piece.
        self.textures: dict[int, np.ndarray] = {}

    def _texture(self, class_id: int) -> np.ndarray:
        if class_id in self.textures:
            return self.textures[class_id]
        rng = self.rng
        palettes, patterns = _LOOK_OF[class_id]
        color = np.array(palettes[rng.integers(len(palettes))], np.float32)
        color += rng.normal(0, 8, 3)
        y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
        match patterns[rng.integers(len(patterns))]:
            case "gradient":
                shade = (y / HEIGHT - 0.5) * rng.uniform(-50, 50)
            case "clouds":
                coarse = rng.normal(0, 16, (HEIGHT // 16, WIDTH // 16)).astype(np.float32)
                shade = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
            case "waves":
                shade = 9 * np.sin(y * rng.uniform(0.5, 1.2) + np.sin(x * 0.15) * 2)
            case "blades":
                shade = 14 * np.sin(x * rng.uniform(0.8, 1.6) + y * 0.2)
            case "bricks":
                step = rng.integers(5, 9)
                shade = 16.0 * (((y // step) % 2 * step / 2 + x) % step < 1) - 5 + y * 0
            case "noise":
                shade = rng.normal(0, 14, (HEIGHT, WIDTH))
            case "plain":
                shade = np.zeros((HEIGHT, WIDTH))
        texture = color + shade[..., None].astype(np.float32)
        self.textures[class_id] = texture
        return texture

    def _fill(self, mask: np.ndarray, class_id: int) -> None:
        inside = mask.astype(bool)
        self.image[inside] = self._texture(class_id)[inside]
        self.labels[inside] = class_id

    def polygon(self, class_id: int, points) -> None:
        """Fill a polygon of (x, y) points."""
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
        self._fill(mask, class_id)

    def box(self, class_id: int, x: float, y: float, width: float, height: float) -> None:
        """Fill a rectangle given by its upper left corner."""
        self.polygon(class_id, [(x, y), (x + width, y), (x + width, y + height), (x, y + height)])

    def disc(self, class_id: int, x: float, y: float, radius: float, flat: float = 1.0) -> None:
        """Fill an ellipse."""
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        axes = (max(1, round(radius)), max(1, round(radius * flat)))
        cv2.ellipse(mask, (round(x), round(y)), axes, 0, 0, 360, 1, -1)
        self._fill(mask, class_id)


def render(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Make one scene.

    Args:
        split: ``train`` or ``val``.
        number: from 0 on.

    Returns:
        RGB image (128, 160, 3) uint8 and labels (128, 160) uint8 with 255 where there is no
        ground truth.
    """
    rng = np.random.default_rng([list(SPLITS).index(split), number])
    canvas = _Canvas(rng)
    horizon = rng.uniform(0.3, 0.55) * HEIGHT
    canvas.box(SKY, 0, 0, WIDTH, HEIGHT)
    if rng.random() < 0.5:
        canvas.disc(
            SUN, rng.uniform(8, WIDTH - 8), rng.uniform(6, horizon * 0.6), rng.uniform(3, 6)
        )
    for _ in range(rng.integers(0, 4)):
        canvas.disc(BIRD, rng.uniform(4, WIDTH - 4), rng.uniform(4, horizon * 0.8), 3, 0.4)
    canvas.box(GRASS, 0, horizon, WIDTH, HEIGHT)
    match rng.choice(["street", "lake", "both"]):
        case "street":
            _town(canvas, horizon)
            _street(canvas, rng.uniform(horizon + 8, HEIGHT * 0.75))
        case "lake":
            _trees(canvas, horizon, rng.integers(2, 6))
            _lake(canvas, horizon + rng.uniform(0, 12))
        case "both":
            _lake(canvas, horizon)
            _trees(canvas, HEIGHT * 0.72, rng.integers(0, 3))
            _street(canvas, HEIGHT * 0.76)
    for _ in range(rng.integers(0, 4)):
        _person(canvas, rng.uniform(5, WIDTH - 5), rng.uniform(HEIGHT * 0.75, HEIGHT * 0.95))
    return _finish(canvas)


def _street(canvas: _Canvas, top: float) -> None:
    """A road with cars, poles with lamps along it."""
    rng = canvas.rng
    bottom = min(HEIGHT, top + rng.uniform(20, 40))
    slope = rng.uniform(-5, 5)
    canvas.polygon(
        ROAD, [(0, top + slope), (WIDTH, top - slope), (WIDTH, bottom), (0, bottom + slope)]
    )
    for x in np.arange(rng.uniform(8, 40), WIDTH, rng.uniform(35, 70)):
        height = rng.uniform(25, 45)
        canvas.box(POLE, x, top - height, 1, height + 3)
        canvas.disc(LAMP, x, top - height - 2, rng.uniform(2, 4))
    for _ in range(rng.integers(1, 4)):
        _vehicle(canvas, CAR, rng.uniform(0, WIDTH - 20), rng.uniform(top + 6, bottom - 2))


def _lake(canvas: _Canvas, top: float) -> None:
    """Water with boats."""
    rng = canvas.rng
    bottom = min(HEIGHT - 6, top + rng.uniform(25, 50))
    canvas.polygon(
        WATER,
        [(0, top), (WIDTH, top), (WIDTH, bottom + rng.uniform(-8, 8)), (0, bottom)],
    )
    for _ in range(rng.integers(1, 4)):
        _vehicle(canvas, BOAT, rng.uniform(0, WIDTH - 20), rng.uniform(top + 8, bottom - 3))


def _vehicle(canvas: _Canvas, class_id: int, x: float, bottom: float) -> None:
    """The shape that cars and boats share; each has a colour of its own."""
    canvas.textures.pop(class_id, None)
    size = canvas.rng.uniform(0.7, 1.4)
    outline = [(0, 0), (1, -6), (6, -6), (9, -11), (17, -11), (20, -6), (25, -5), (25, 0)]
    canvas.polygon(class_id, [(x + size * dx, bottom + size * dy) for dx, dy in outline])


def _town(canvas: _Canvas, horizon: float) -> None:
    """Houses: wall, windows, roof; trees between them."""
    rng = canvas.rng
    x = rng.uniform(-10, 15)
    while x < WIDTH - 10:
        width, height = rng.uniform(22, 42), rng.uniform(16, min(34, horizon - 4))
        base = horizon + rng.uniform(2, 8)
        canvas.box(WALL, x, base - height, width, height)
        peak = rng.uniform(5, 14)
        canvas.polygon(
            ROOF,
            [(x - 2, base - height), (x + width / 2, base - height - peak),
             (x + width + 2, base - height)],
        )  # fmt: skip
        for wx in np.arange(x + 4, x + width - 5, 9):
            for wy in np.arange(base - height + 4, base - 6, 10):
                canvas.box(WINDOW, wx, wy, 4, 5)
        x += width + rng.uniform(2, 25)
    _trees(canvas, horizon + 6, rng.integers(0, 3))


def _trees(canvas: _Canvas, base: float, count: int) -> None:
    rng = canvas.rng
    for _ in range(count):
        x, height = rng.uniform(0, WIDTH), rng.uniform(15, 32)
        foot = base + rng.uniform(0, 8)
        canvas.box(TRUNK, x, foot - height, rng.uniform(1, 3), height)
        for _ in range(3):
            canvas.disc(
                FOLIAGE,
                x + rng.normal(0, 4),
                foot - height + rng.normal(0, 3),
                rng.uniform(5, 10),
            )


def _person(canvas: _Canvas, x: float, foot: float) -> None:
    size = canvas.rng.uniform(0.8, 1.4)
    canvas.textures.pop(PERSON, None)
    canvas.box(PERSON, x - 1.5 * size, foot - 9 * size, 3 * size, 9 * size)
    canvas.disc(PERSON, x, foot - 11 * size, 2 * size)


def _finish(canvas: _Canvas) -> tuple[np.ndarray, np.ndarray]:
    """Light and sensor noise on the image; pixels without ground truth in the labels."""
    rng = canvas.rng
    image = canvas.image * rng.uniform(0.75, 1.2) + rng.normal(0, 6, canvas.image.shape)
    image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 0.8)).clip(0, 255).astype(np.uint8)
    labels = canvas.labels
    # As annotators do: half the contours between regions, and a patch, are left unlabelled.
    kernel = np.ones((2, 2), np.uint8)
    contour = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, kernel) > 0
    labels[contour & (rng.random(labels.shape) < 0.5)] = IGNORE
    if rng.random() < 0.3:
        y, x = rng.integers(0, HEIGHT - 16), rng.integers(0, WIDTH - 20)
        labels[y : y + 12, x : x + 16] = IGNORE
    return image, labels


def records(split: str) -> list[dict]:
    """Detectron2 records of a split."""
    return [
        {
            "file_name": f"{PREFIX}{split}/{number:05d}/image.png",
            "sem_seg_file_name": f"{PREFIX}{split}/{number:05d}/labels.png",
            "height": HEIGHT,
            "width": WIDTH,
        }
        for number in range(SPLITS[split])
    ]


@lru_cache(maxsize=8)
def _encoded(split: str, number: int) -> dict[str, bytes]:
    """The two files of a scene, as stored PNGs."""
    encoded = {}
    for name, array in zip(("image", "labels"), render(split, number), strict=True):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG", compress_level=1)
        encoded[f"{name}.png"] = buffer.getvalue()
    return encoded


class ScenesHandler(PathHandler):
    """Opens ``scenes://<split>/<number>/<image.png or labels.png>``."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs) -> io.BytesIO:
        if mode != "rb":
            raise ValueError(f"{path}: opened with mode {mode!r}, expected 'rb'")
        try:
            split, number, name = path[len(PREFIX) :].split("/")
            return io.BytesIO(_encoded(split, int(number))[name])
        except (KeyError, ValueError) as error:
            raise FileNotFoundError(f"{path}: no such generated file") from error

    def _exists(self, path: str, **kwargs) -> bool:
        parts = path[len(PREFIX) :].split("/")
        return len(parts) == 3 and parts[0] in SPLITS and parts[1].isdigit()

    _isfile = _exists
