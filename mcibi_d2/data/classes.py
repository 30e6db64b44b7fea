"""Names and colours of classes, and the label that does not count, whoever registered the data set.

Detectron2's own data sets, and those that are registered as its tutorial says, have
``stuff_classes`` and seldom more. What they leave out has one default, here.
"""

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from detectron2.data import Metadata, MetadataCatalog

from ..errors import InputError

# Detectron2's, too.
IGNORE_LABEL = 255
# In the folder of a run: the classes that it was trained on.
CLASSES_FILE = "classes.json"


@dataclass(frozen=True)
class Classes:
    """What is known of the classes of a data set.

    Attributes:
        dataset: its name.
        names: of the classes, in the order of their ids.
        colors: [red, green, blue] of each.
        ignore_label: of pixels without ground truth.
        named: whether the names are those of the classes, not numbers.
    """

    dataset: str
    names: list[str]
    colors: list[list[int]]
    ignore_label: int = IGNORE_LABEL
    named: bool = True

    @classmethod
    def of(cls, dataset: str | Metadata) -> "Classes":
        """Of a registered data set.

        Its metadata need ``stuff_classes`` alone: colours that ``stuff_colors`` does not have are
        those of :func:`palette`, and ``ignore_label`` is 255.

        Raises:
            InputError: it has no ``stuff_classes``, or so many that 255 is one of them.
        """
        metadata = MetadataCatalog.get(dataset) if isinstance(dataset, str) else dataset
        names = class_names(metadata)
        return cls(
            metadata.name,
            names,
            _completed(metadata.get("stuff_colors") or (), len(names)),
            ignore_label(metadata),
        )

    @classmethod
    def numbered(cls, dataset: str, count: int) -> "Classes":
        """``count`` classes of which nothing is known: class_0, class_1, ..."""
        names = [f"class_{k}" for k in range(count)]
        return cls(dataset, names, palette(count), named=False)

    @classmethod
    def read(cls, path: Path) -> "Classes":
        """From a file that :meth:`dumps` was written to.

        Raises:
            InputError: naming the file.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            names, label = found["stuff_classes"], found.get("ignore_label", IGNORE_LABEL)
            colors = _completed(found.get("stuff_colors") or (), len(names))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError("stuff_classes are no names")
            return cls(str(found.get("dataset", "")), names, colors, int(label))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: cannot be read as the classes of a run ({type(error).__name__}: {error})"
            ) from error

    def dumps(self) -> bytes:
        """As JSON with the keys of Detectron2's metadata."""
        found = {
            "dataset": self.dataset,
            "stuff_classes": self.names,
            "stuff_colors": self.colors,
            "ignore_label": self.ignore_label,
        }
        return json.dumps(found, ensure_ascii=False, indent=1).encode()


def class_names(metadata: Metadata) -> list[str]:
    """The names of the classes, which nothing can replace: their number is that of the classes.

    Raises:
        InputError: there are none.
    """
    names = metadata.get("stuff_classes")
    if not names:
        raise InputError(
            f"data set {metadata.name} has no stuff_classes in its metadata, expected class names"
        )
    return list(map(str, names))


def ignore_label(metadata: Metadata) -> int:
    """The label of pixels without ground truth.

    Raises:
        InputError: it is not said, and 255 is a class.
    """
    label = metadata.get("ignore_label")
    if label is not None:
        return int(label)
    count = len(metadata.get("stuff_classes", ()))
    if count > IGNORE_LABEL:
        raise InputError(
            f"data set {metadata.name} has {count} classes and no ignore_label in its metadata, "
            f"expected one that is no class, such as 65535 ({IGNORE_LABEL}, the default, is one)"
        )
    return IGNORE_LABEL


def palette(count: int) -> list[list[int]]:
    """``count`` colors that differ: hues by the golden ratio, at three levels of brightness."""
    return [list(_color(i)) for i in range(count)]


@cache
def _color(i: int) -> tuple[int, ...]:
    parts = colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.8, 0.95 - 0.2 * (i % 3))
    return tuple(round(255 * part) for part in parts)


def _completed(colors: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    given = [[int(part) for part in color] for color in colors[:count]]
    return given + palette(count)[len(given) :]
