"""Which classes a model is for, by name: data sets, checkpoints and memories have to agree."""

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..errors import InputError

# Where a checkpoint keeps the names of its run's classes.
CLASSES = "classes"
_ALLOWED_BY = "DATASETS.ALLOW_OTHER_CLASSES True takes them for the same"


def class_names(cfg: CfgNode) -> list[str]:
    """The names of a model's classes, of the first training set, else test set, that has some.

    [] where no data set is known.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get("stuff_classes")
        if names:
            return [str(name) for name in names]
    return []


def check_data_sets(cfg: CfgNode) -> None:
    """Raise an :class:`InputError` if the data sets of a config have other classes than the first.

    Of other names, or in another order. Those without names are left out.
    """
    if cfg.DATASETS.ALLOW_OTHER_CLASSES:
        return
    named = [
        (name, MetadataCatalog.get(name).get("stuff_classes"))
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    ]
    named = [(name, classes) for name, classes in named if classes]
    for name, classes in named[1:]:
        require_same(named[0][1], f"data set {named[0][0]}", classes, f"data set {name}")


def names_in(checkpoint: dict) -> list[str]:
    """The names that a checkpoint keeps, [] if it has none, as one of another project."""
    names = checkpoint.get(CLASSES)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    return names


def require_same(
    expected: Sequence[str], expected_in: str, found: Sequence[str], found_in: str
) -> None:
    """Raise an :class:`InputError` that names the first class with another name.

    Names that differ in upper and lower case, or in the number of blanks, are the same. Without
    names on one side there is nothing to compare. Nor is there with another number of classes,
    which is another error's business.

    Args:
        expected: names, in the order of the class ids.
        expected_in: whose they are.
        found: names.
        found_in: whose they are.
    """
    here, there = ([_plain(name) for name in names] for names in (expected, found))
    if len(here) != len(there) or here == there:
        return
    k = next(k for k, pair in enumerate(zip(here, there, strict=True)) if pair[0] != pair[1])
    order = "; they are the same names in another order" * (sorted(here) == sorted(there))
    raise InputError(
        f"{found_in} has other classes than {expected_in}: class {k} is {found[k]!r}, expected "
        f"{expected[k]!r}{order}; {_ALLOWED_BY}"
    )


def _plain(name: str) -> str:
    return " ".join(str(name).split()).casefold()
