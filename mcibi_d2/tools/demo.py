"""Segment images, folders of them, videos, or what a webcam sees, and draw the result.

python -m mcibi_d2.tools.demo --config-file configs/ade20k/mcibi_R50.yaml \\
    --input street.jpg holiday.mp4 --output output/pictures --opts MODEL.WEIGHTS X.pth

Of photo.jpg, the output folder gets photo.jpg, with its classes laid over it and a legend beside
it; of film.avi, film.mp4. Folders in a folder stay folders; where two files differ in their endings
alone, the second gets a number (photo_2.jpg).

Images of more than 33 megapixels are drawn smaller, at most so large; label maps keep their size.
With TEST.INFERENCE slide and INPUT.MIN_SIZE_TEST 0, PNG, TIFF and JPEG files of that size are read
a row of windows at a time, in a bounded memory (pip install -e '.[large]'). INPUT.MAX_PIXELS 0 lets
those of more than 179 megapixels in.
"""

import math
import mimetypes
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from mcibi_d2 import InputError
from mcibi_d2.data.files import IMAGE_SUFFIXES, find_files
from mcibi_d2.data.image_rows import ImageRows
from mcibi_d2.engine import load_config
from mcibi_d2.predict import LARGE_PIXELS, MOST_PIXELS, Predictor
from mcibi_d2.tools.command import ToolParser, run_tool
from mcibi_d2.visualization import with_legend, write_picture

# Of a picture without its legend. JPEG has at most 65,535 pixels along a side.
MOST_SIDE = 60_000


class Clock:
    """Seconds spent on the model and on the demo's own work."""

    def __init__(self):
        self.seconds = {"read": 0.0, "model": 0.0, "draw and write": 0.0}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time of a block as that of a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def summary(self, frames: int) -> str:
        """Frames per second, and the share of each part."""
        total = sum(self.seconds.values())
        shares = ", ".join(f"{part} {100 * s / total:.0f} %" for part, s in self.seconds.items())
        return f"{frames} pictures, {frames / total:.2f} per second ({shares})."


class VideoFile:
    """A video that is written frame by frame.

    OpenCV changes names outside ASCII on Windows: such a video gets its name when it is complete.

    Args:
        path: of the file.
        rate: frames per second.
        size: (width, height) of the frames.

    Raises:
        InputError: OpenCV cannot write it.
    """

    def __init__(self, path: Path, rate: float, size: tuple[int, int]):
        self._path = path
        self._folder = None if str(path).isascii() else tempfile.mkdtemp()
        self._target = Path(self._folder, f"video{path.suffix}") if self._folder else path
        codec = cv2.VideoWriter_fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._target), codec, rate, size)
        if not self._writer.isOpened():
            if self._folder:
                shutil.rmtree(self._folder, ignore_errors=True)
            raise InputError(f"{path}: OpenCV cannot write this video")

    def write(self, frame: np.ndarray) -> None:
        """Append a frame (H, W, 3) uint8 BGR."""
        self._writer.write(frame)

    def close(self) -> None:
        """Complete the file."""
        self._writer.release()
        if self._folder:
            shutil.move(self._target, self._path)
            shutil.rmtree(self._folder, ignore_errors=True)


class Demo:
    """Predicts, draws and writes pictures.

    Args:
        predictor: of the model.
        output: folder to write to.
        labels: whether to write label maps, too.
        confidence: whether to write the probability of the labels, too.
        opacity: of the labels over the picture.
    """

    def __init__(
        self, predictor: Predictor, output: Path, labels: bool, confidence: bool, opacity: float
    ):
        self.predictor = predictor
        self.output = output
        self.labels = labels
        self.confidence = confidence
        self.opacity = opacity
        self.clock = Clock()
        self.frames = 0
        self.problems: list[str] = []
        self._waiting: list[tuple[str, np.ndarray]] = []
        self._names = predictor.classes.names
        self._colors = [color[::-1] for color in predictor.classes.colors]

    def segment(
        self, images: list[np.ndarray], fixed_size: bool
    ) -> Iterator[tuple[np.ndarray, ...]]:
        """Picture with legend, label map and confidence (0..255) of each of some BGR images."""
        if not images:
            return
        with self.clock("model"):
            if self.confidence:
                found = self.predictor.predict(images)
            else:
                found = [(labels, None) for labels in self.predictor.labels(images)]
        for image, (labels, scores) in zip(images, found, strict=True):
            with self.clock("draw and write"):
                confidence = None if scores is None else _shades(scores)
                picture = self._picture(image, labels, fixed_size)
            self.frames += 1
            yield picture, _for_png(labels), confidence

    def _picture(
        self, image: np.ndarray | ImageRows, labels: np.ndarray, fixed_size: bool
    ) -> np.ndarray:
        """An image with its labels over it and their legend; a large one is reduced."""
        factor, small = _reduction(labels.shape), labels
        if factor > 1 and not fixed_size:
            if not isinstance(image, ImageRows):
                image = ImageRows.of(image)
            image = image.reduced(factor)
            height, width = image.shape[:2]
            small = labels[factor // 2 :: factor, factor // 2 :: factor][:height, :width]
        picture = self.predictor.draw(image, small, self.opacity)
        return with_legend(picture, labels, self._names, self._colors, fixed_size)

    def _segment_rows(self, image: ImageRows) -> tuple[np.ndarray, ...]:
        """As :meth:`segment`, of an image that is read from its file by rows."""
        labels = confidence = None
        start = 0
        with self.clock("model"):
            for some, scores in self.predictor.bands(image):
                some = _for_png(some)
                if labels is None:
                    labels = np.empty(image.size, dtype=some.dtype)
                    confidence = np.empty(image.size, dtype=np.uint8) if self.confidence else None
                labels[start : start + len(some)] = some
                if confidence is not None:
                    confidence[start : start + len(some)] = _shades(scores)
                start += len(some)
        with self.clock("draw and write"):
            picture = self._picture(image, labels, fixed_size=False)
        self.frames += 1
        return picture, labels, confidence

    def _enough(self, images: Sequence[np.ndarray]) -> bool:
        """Whether there are enough images to be segmented together."""
        pixels = sum(image.shape[0] * image.shape[1] for image in images)
        return len(images) >= self.predictor.batch_size or pixels >= MOST_PIXELS

    def write(self, name: str, picture: np.ndarray) -> None:
        """Write a picture to a file of the output folder."""
        path = self.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_picture(path, picture)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error

    def image(self, path: Path, name: str) -> None:
        """Read an image file; it is segmented when there are enough, or by :meth:`flush`."""
        try:
            with self.clock("read"):
                image = self.predictor.read(path)
            if isinstance(image, ImageRows):
                self.flush()
                result = self._segment_rows(image)
        except InputError as error:
            self.problems.append(f"skipped {error}")
            return
        if isinstance(image, ImageRows):
            self._write(name, *result)
            return
        self._waiting.append((name, image))
        if self._enough([image for _, image in self._waiting]):
            self.flush()

    def flush(self) -> None:
        """Segment the image files that were read."""
        waiting, self._waiting = self._waiting, []
        results = self.segment([image for _, image in waiting], fixed_size=False)
        for (name, _), result in zip(waiting, results, strict=True):
            self._write(name, *result)

    def _write(
        self, name: str, picture: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None
    ) -> None:
        with self.clock("draw and write"):
            self.write(f"{name}.jpg", picture)
            if self.labels:
                self.write(f"{name}_labels.png", labels)
            if self.confidence:
                self.write(f"{name}_confidence.png", confidence)

    def video(self, source: str | int, name: str, most: int) -> None:
        """Segment a video file or what a webcam sees, up to ``most`` frames (0: all).

        Stopped by Ctrl-C, or where the file breaks off, it keeps the frames that are done.
        """
        capture = cv2.VideoCapture(source)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            if not capture.isOpened() and not str(source).isascii() and Path(source).is_file():
                # OpenCV does not find such names on Windows.
                copy = shutil.copyfile(source, Path(folder, f"video{Path(source).suffix}"))
                capture = cv2.VideoCapture(str(copy))
            if not capture.isOpened():
                self.problems.append(f"skipped {source}: cannot be read as a video")
                return
            self._frames(capture, source, name, most)

    def _frames(self, capture: cv2.VideoCapture, source: str | int, name: str, most: int) -> None:
        webcam = isinstance(source, int)
        said = 0 if webcam else max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        rate = capture.get(cv2.CAP_PROP_FPS) or 25
        total = min(said, most) if said and most else said or most
        writers: dict[str, VideoFile] = {}
        done, there = 0, True
        try:
            with tqdm(total=total or None, desc=name, unit="frame") as bar:
                while there and (not most or done < most):
                    frames: list[np.ndarray] = []
                    # What a webcam sees is shown at once.
                    while not (frames and (webcam or self._enough(frames))):
                        if most and done + len(frames) == most:
                            break
                        with self.clock("read"):
                            there, frame = capture.read()
                        if not there:
                            break
                        frames.append(frame)
                    for picture, labels, confidence in self.segment(frames, fixed_size=True):
                        with self.clock("draw and write"):
                            self._append(writers, name, rate, picture)
                            if self.labels:
                                self.write(f"{name}_labels/{done:06d}.png", labels)
                            if self.confidence:
                                shown = cv2.cvtColor(confidence, cv2.COLOR_GRAY2BGR)
                                self._append(writers, f"{name}_confidence", rate, shown)
                        done += 1
                        bar.update()
        except KeyboardInterrupt:
            self.problems.append(f"{source}: stopped after {done} frames")
            if not webcam:
                raise
        finally:
            capture.release()
            with self.clock("draw and write"):
                for writer in writers.values():
                    writer.close()
        if done == 0:
            self.problems.append(f"skipped {source}: has no frame that can be read")
        elif done < total:
            self.problems.append(f"{source}: ends after {done} of {total} frames, which are kept")

    def _append(
        self, writers: dict[str, VideoFile], name: str, rate: float, frame: np.ndarray
    ) -> None:
        # The codec wants even sides.
        frame = np.pad(
            frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge"
        )
        if name not in writers:
            path = self.output / f"{name}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            writers[name] = VideoFile(path, rate, frame.shape[1::-1])
        writers[name].write(frame)


def _shades(scores: np.ndarray) -> np.ndarray:
    """Probabilities as 0..255."""
    return np.nan_to_num(scores * 255).round().astype(np.uint8)


def _for_png(labels: np.ndarray) -> np.ndarray:
    """Labels of a type that PNG has: not 32 bits."""
    return labels if labels.dtype == np.uint8 else labels.astype(np.uint16)


def _reduction(size: tuple[int, int]) -> int:
    """By what each side of an image is divided so that its picture can be drawn and written."""
    return max(math.ceil(math.sqrt(size[0] * size[1] / LARGE_PIXELS)), -(-max(size) // MOST_SIDE))


class Input(NamedTuple):
    """What is segmented, and what its results are called, not yet told apart from others.

    Attributes:
        kind: ``image`` or ``video``.
        source: a file, or the number of a webcam.
        name: of a file below a folder its path in it, else the file's own name, without ending.
    """

    kind: str
    source: int | Path
    name: str


def find_inputs(arguments: list[str]) -> tuple[list[Input], list[str]]:
    """What the arguments of ``--input`` name, and a sentence for each link that is not followed.

    Raises:
        InputError: there is no such file, or a folder without images and videos.
    """
    found, links = [], []
    for argument in arguments:
        path = Path(argument).expanduser()
        webcam, _, number = argument.partition(":")
        if webcam == "webcam" and not path.exists():
            if number and not number.isdecimal():
                raise InputError(f"--input {argument}: expected webcam or webcam:NUMBER")
            found.append(Input("video", int(number or 0), f"webcam{int(number or 0)}"))
        elif path.is_dir():
            files, left_out = find_files(path)
            inside = [
                Input(kind, file, file.relative_to(path).with_suffix("").as_posix())
                for file in files
                if (kind := _kind(file)) in ("image", "video")
            ]
            if not inside:
                raise InputError(f"--input {argument}: has no images and no videos")
            found += inside
            links += left_out
        elif path.is_file():
            kind = "video" if _kind(path) == "video" else "image"
            found.append(Input(kind, path, path.stem))
        else:
            raise InputError(f"--input {argument}: no such file or folder")
    return found, links


def _kind(path: Path) -> str:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    return (mimetypes.guess_type(path.name)[0] or "").partition("/")[0]


def name_outputs(inputs: list[Input]) -> list[str]:
    """A name for what is written of each input: its own, numbered where several have it.

    Names that differ in capitals alone are one file to some systems, and count as one.
    """
    taken = {name.casefold() for _, _, name in inputs}
    first: set[str] = set()
    numbers: dict[str, int] = {}
    names = []
    for _, _, name in inputs:
        key = name.casefold()
        if key in first:
            number = numbers.get(key, 1) + 1
            while f"{key}_{number}" in taken:
                number += 1
            numbers[key] = number
            name = f"{name}_{number}"
            taken.add(name.casefold())
        first.add(key)
        names.append(name)
    return names


def check_output(folder: Path, force: bool) -> None:
    """Make the folder; it must be empty without ``force``."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file, expected a folder")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"--output {folder}: holds files already; --force writes there all the same"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder}: cannot be made ({error.strerror})") from error


def make_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser("demo", __doc__)
    parser.add_config_file()
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="INPUT",
        help="images, folders, videos, webcam or webcam:NUMBER",
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--labels", action="store_true", help="write label maps as PNG, too")
    parser.add_argument(
        "--confidence", action="store_true",
        help="write the probability of the labels, too: black 0, white 1",
    )  # fmt: skip
    parser.add_argument("--opacity", type=float, default=0.6, help="of the labels (0.6)")
    parser.add_argument(
        "--frames",
        type=int,
        default=0,
        help="of each video or webcam (0: until it ends, or Ctrl-C)",
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N",
        help="pictures of one size, or frames, that are run together (8)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true", help="write into a folder that holds files already"
    )
    parser.add_opts()
    return parser


def main() -> None:
    """Run the tool."""
    args = make_parser().parse_args()
    if not 0 <= args.opacity <= 1:
        raise InputError(f"--opacity is {args.opacity}, expected 0 to 1")
    if args.batch < 1:
        raise InputError(f"--batch is {args.batch}, expected 1 or more")
    if args.frames < 0:
        raise InputError(f"--frames is {args.frames}, expected 0 or more")
    inputs, links = find_inputs(args.input)
    predictor = Predictor(load_config(args.config_file, args.opts), batch_size=args.batch)
    check_output(args.output, args.force)
    demo = Demo(predictor, args.output, args.labels, args.confidence, args.opacity)
    demo.problems += links
    try:
        images = sum(kind == "image" for kind, _, _ in inputs)
        with tqdm(total=images, desc="Images", unit="image", disable=not images) as bar:
            for (kind, source, _), name in zip(inputs, name_outputs(inputs), strict=True):
                if kind == "image":
                    demo.image(source, name)
                    bar.update()
                else:
                    demo.flush()
                    demo.video(
                        source if isinstance(source, int) else str(source), name, args.frames
                    )
            demo.flush()
    except KeyboardInterrupt:
        demo.problems.append("stopped by Ctrl-C")
    for problem in demo.problems:
        print(problem)
    skipped = sum(problem.startswith("skipped") for problem in demo.problems)
    if skipped:
        print(f"{skipped} of {len(inputs)} inputs skipped.")
    if not demo.frames:
        sys.exit(f"error: --input: nothing could be read, nothing is in {args.output}")
    print(demo.clock.summary(demo.frames))
    print(f"Look at {args.output}.")


if __name__ == "__main__":
    run_tool(main)
