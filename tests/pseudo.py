"""Pseudo data sets: small made-up files in every published layout and label encoding.

``make_pseudo(root, "cityscapes_19")`` writes every split below ``root``; with
``DETECTRON2_DATASETS`` set to ``root`` the data set is then read and trained on as the real one.
The encodings are written down here once more, so that tests do not compare the package's tables
with themselves.
"""

from pathlib import Path

import numpy as np
from PIL import Image

CELL = 8  # side of the squares that labels are made of, in pixels

ADE20K_VALUES = range(151)
CITYSCAPES_VALUES = range(34)
HUMAN_VALUES = range(20)
# Of the 182 ids of COCO-Stuff, those without any pixel.
COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
COCO_IDS = [i for i in range(1, 183) if i not in COCO_UNUSED_IDS]
COCO_PNG_VALUES = [*(i - 1 for i in COCO_IDS), 255]
CAMVID_VALUES = range(12)


def make_pseudo(root, dataset: str, count: int = 3, size=(48, 64), **layout) -> Path:
    """Write all splits of a data set.

    Args:
        root: what ``DETECTRON2_DATASETS`` is to be.
        dataset: the name without its split, such as ``ade20k_150``.
        count: images per split.
        size: (height, width) of image 0; the others are a few pixels larger where the real sizes
            differ too.
        layout: as the data set's own function takes it.

    Returns:
        ``root`` as a path.
    """
    root = Path(root)
    if dataset != "scenes":  # which needs no file
        _WRITERS[dataset](root, count, size, **layout)
    return root


def label_map(rng: np.random.Generator, values, size) -> np.ndarray:
    """(height, width) of squares, each of one of the values."""
    rows, columns = -(-size[0] // CELL), -(-size[1] // CELL)
    cells = rng.choice(np.asarray(values), (rows, columns))
    return cells.repeat(CELL, 0).repeat(CELL, 1)[: size[0], : size[1]]


def picture(rng: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8: a colour per label value, with noise."""
    color = np.stack([labels * 67, labels * 29 + 80, labels * 151 + 160], axis=-1) % 256
    return (color + rng.normal(0, 10, color.shape)).clip(0, 255).astype(np.uint8)


def save(path: Path, array: np.ndarray) -> None:
    """Write an image file; its folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def _pairs(seed: int, values, count: int, size, equal_sizes: bool = False):
    """(number, image, labels), count times."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        grown = size if equal_sizes else (size[0] + 2 * i, size[1] + 3 * i)
        labels = label_map(rng, values, grown)
        yield i, picture(rng, labels), labels.astype(np.uint8)


def ade20k(root: Path, count: int, size) -> None:
    """``ADEChallengeData2016`` and ``release_test``: 0 unlabelled, 1..150."""
    base = root / "ADEChallengeData2016"
    for seed, (split, name) in enumerate((("training", "train"), ("validation", "val"))):
        for i, image, labels in _pairs(seed, ADE20K_VALUES, count, size):
            save(base / f"images/{split}/ADE_{name}_{i + 1:08d}.jpg", image)
            save(base / f"annotations/{split}/ADE_{name}_{i + 1:08d}.png", labels)
    for i, image, _ in _pairs(2, ADE20K_VALUES, count, size):
        save(root / f"release_test/testing/ADE_test_{i + 1:08d}.jpg", image)


def cityscapes(root: Path, count: int, size) -> None:
    """``cityscapes``: fine and coarse labelIds 0..33 beside the files that are not wanted."""
    base = root / "cityscapes"
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt",), "test": ("berlin",),
              "train_extra": ("augsburg",)}  # fmt: skip
    for seed, (split, names) in enumerate(cities.items()):
        # The labels of the test split are dummies: 0 and 1 are void.
        values = (0, 1) if split == "test" else CITYSCAPES_VALUES
        kinds = {"test": ["gtFine"], "train_extra": ["gtCoarse"]}.get(split, ["gtFine", "gtCoarse"])
        for i, image, labels in _pairs(seed, values, count, size, equal_sizes=True):
            city = names[i % len(names)]
            stem = f"{city}_{i:06d}_000019"
            save(base / f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png", image)
            for kind in kinds:
                start = base / kind / split / city / f"{stem}_{kind}"
                # Coarse labels leave the upper rows of squares out.
                ids = labels if kind == "gtFine" else labels * (np.arange(size[0]) >= CELL)[:, None]
                save(Path(f"{start}_labelIds.png"), ids.astype(np.uint8))
                instances = np.where(ids >= 24, ids.astype(np.uint16) * 1000, ids)
                save(Path(f"{start}_instanceIds.png"), instances.astype(np.uint16))
                save(Path(f"{start}_color.png"), image)
                Path(f"{start}_polygons.json").write_text("{}\n")


def lip(root: Path, count: int, size, layout: str = "nested") -> None:
    """``LIP``: 0..19, in the layout ``nested`` (official), ``doubled`` or ``flat``.

    Validation image 0 is grayscale, as some of the real ones.
    """
    base = root / "LIP"
    images, labels_at, test = {
        "nested": ("TrainVal_images", "TrainVal_parsing_annotations", "Testing_images"),
        "doubled": ("TrainVal_images/TrainVal_images",
                    "TrainVal_parsing_annotations/TrainVal_parsing_annotations",
                    "Testing_images/Testing_images"),
        "flat": (".", ".", "."),
    }[layout]  # fmt: skip
    for seed, (split, offset) in enumerate(
        {"train": 100000, "val": 200000, "test": 300000}.items()
    ):
        stems = []
        folder = base / (test if split == "test" else images)
        name = "testing_images" if split == "test" else f"{split}_images"
        for i, image, labels in _pairs(seed, HUMAN_VALUES, count, size):
            stems.append(f"{offset + i}_{483681 + i}")
            if split == "val" and i == 0:
                image = image.mean(axis=2).astype(np.uint8)
            save(folder / name / f"{stems[-1]}.jpg", image)
            if split != "test":
                save(base / labels_at / f"{split}_segmentations" / f"{stems[-1]}.png", labels)
        (folder / f"{split}_id.txt").write_text("\n".join(stems) + "\n")


def cihp(root: Path, count: int, size, folder: str = "instance-level_human_parsing") -> None:
    """``instance-level_human_parsing``: Category_ids 0..19 beside the folders not wanted."""
    for seed, split in enumerate(("Training", "Validation")):
        base = root / folder / split
        stems = []
        for i, image, labels in _pairs(seed, HUMAN_VALUES, count, size):
            stems.append(f"{i + 6:07d}")
            save(base / f"Images/{stems[-1]}.jpg", image)
            save(base / f"Category_ids/{stems[-1]}.png", labels)
            save(base / f"Categories/{stems[-1]}.png", image)
            save(base / f"Human_ids/{stems[-1]}.png", (labels > 0).astype(np.uint8))
        name = {"Training": "train", "Validation": "val"}[split]
        (base / f"{name}_id.txt").write_text("\n".join(stems) + "\n")


def coco_stuff_164k(root: Path, count: int, size, layout: str = "coco_stuff") -> None:
    """Stuff-thing maps, id - 1 and 255, in the folder ``coco_stuff`` or beside ``coco``."""
    images, labels_at = {
        "coco_stuff": ("coco_stuff/images", "coco_stuff/annotations"),
        "coco": ("coco", "coco/stuffthingmaps"),
    }[layout]
    for seed, split in enumerate(("train2017", "val2017")):
        for i, image, labels in _pairs(seed, COCO_PNG_VALUES, count, size):
            save(root / images / split / f"{i + 139:012d}.jpg", image)
            save(root / labels_at / split / f"{i + 139:012d}.png", labels)


def coco_stuff_10k(root: Path, count: int, size) -> None:
    """``coco_stuff_10k`` as prepared: images, lists, and labels in the encoding of the 164k set."""
    base = root / "coco_stuff_10k"
    for seed, split in enumerate(("train", "test")):
        stems = []
        for i, image, labels in _pairs(seed, COCO_PNG_VALUES, count, size):
            stems.append(f"COCO_train2014_{1000 * seed + i:012d}")
            save(base / f"images/{stems[-1]}.jpg", image)
            save(base / f"labels/{split}/{stems[-1]}.png", labels)
        (base / "imageLists").mkdir(exist_ok=True)
        (base / f"imageLists/{split}.txt").write_text("\n".join(stems) + "\n")


def coco_stuff_10k_mat(root: Path, count: int, size, version: str = "1.1") -> None:
    """``coco_stuff_10k`` as published: ``.mat`` label files of v1.1 or v1.0.

    v1.1 is MATLAB 5: 0 unlabeled, ids 1..182. v1.0 is MATLAB 7.3, which is HDF5 and stores
    columns first: 1 unlabeled, 2..172 the classes in the order of their ids.
    """
    base = root / "coco_stuff_10k"
    (base / "annotations").mkdir(parents=True, exist_ok=True)
    (base / "imageLists").mkdir(exist_ok=True)
    values = [0, *COCO_IDS] if version == "1.1" else range(1, 173)
    for seed, split in enumerate(("train", "test")):
        stems = []
        for i, image, labels in _pairs(seed, values, count, size):
            stems.append(f"COCO_train2014_{1000 * seed + i:012d}")
            save(base / f"images/{stems[-1]}.jpg", image)
            write_mat(base / f"annotations/{stems[-1]}.mat", labels, version)
        (base / f"imageLists/{split}.txt").write_text("\n".join(stems) + "\n")


def write_mat(path: Path, labels: np.ndarray, version: str) -> None:
    """A ``.mat`` file with the field ``S``. Needs scipy (v1.1) or h5py (v1.0)."""
    if version == "1.1":
        import scipy.io

        scipy.io.savemat(path, {"S": labels, "captions": np.array(["a", "b"], object)})
        return
    import h5py

    with h5py.File(path, "w", userblock_size=512) as file:
        file["S"] = labels.T.astype(np.float64)
    header = b"MATLAB 7.3 MAT-file".ljust(116) + bytes(8) + b"\x00\x02IM"
    with open(path, "r+b") as file:
        file.write(header)


def camvid(root: Path, count: int, size) -> None:
    """``CamVid`` of SegNet: 0..10, 11 void; lists with another machine's paths."""
    base = root / "CamVid"
    for seed, split in enumerate(("train", "val", "test")):
        lines = []
        for i, image, labels in _pairs(seed, CAMVID_VALUES, count, size, equal_sizes=True):
            name = f"0001TP_{6690 + 1000 * seed + i:06d}.png"
            save(base / split / name, image)
            save(base / f"{split}annot" / name, labels)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}")
        (base / f"{split}.txt").write_text("\n".join(lines) + "\n")


_WRITERS = {
    "ade20k_150": ade20k,
    "cityscapes_19": cityscapes,
    "lip_20": lip,
    "cihp_20": cihp,
    "coco_stuff_164k": coco_stuff_164k,
    "coco_stuff_182_164k": coco_stuff_164k,
    "coco_stuff_10k": coco_stuff_10k,
    "coco_stuff_182_10k": coco_stuff_10k,
    "camvid_11": camvid,
}
