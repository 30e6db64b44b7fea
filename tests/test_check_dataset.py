import sys

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pseudo import make_pseudo, save

from mcibi_d2 import InputError
from mcibi_d2.tools import check_dataset
from mcibi_d2.visualization import blend


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def table_of(printed):
    """Pixels and images of each class name in the printed table."""
    rows = {}
    for line in printed.splitlines():
        parts = line.split("  ")
        parts = [part.strip() for part in parts if part.strip()]
        if len(parts) == 7 and parts[0].isdigit():
            rows[parts[1]] = (int(parts[3].replace(",", "")), int(parts[5].replace(",", "")))
    return rows


def test_good_data_set(root, capsys):
    make_pseudo(root, "cityscapes_19", count=4)
    assert check_dataset.check("cityscapes_19_train", 0, root / "out")
    printed = capsys.readouterr().out
    assert "4 images, not the published 2,975 (-2,971)" in printed and "No problems" in printed
    # The histogram, counted anew from the files.
    values = [
        np.asarray(Image.open(r["sem_seg_file_name"]))
        for r in DatasetCatalog.get("cityscapes_19_train")
    ]
    rows = table_of(printed)
    metadata = MetadataCatalog.get("cityscapes_19_train")
    for name, value in zip(metadata.stuff_classes, metadata.label_ids, strict=True):
        assert rows[name] == (sum((v == value).sum() for v in values),
                              sum((v == value).any() for v in values))  # fmt: skip
    assert sum(pixels for pixels, _ in rows.values()) == sum(v.size for v in values)
    sheet = np.asarray(Image.open(root / "out" / "cityscapes_19_train.png"))
    assert sheet.shape[0] > 300 and sheet.std() > 10
    assert not (root / "out" / "cityscapes_19_train_problems.txt").exists()


def test_workers_give_the_same_table(root, capsys):
    make_pseudo(root, "camvid_11", count=5)
    tables = []
    for workers in (0, 2):
        assert check_dataset.check("camvid_11_trainval", workers, root / "out")
        tables.append(table_of(capsys.readouterr().out))
    assert tables[0] == tables[1] and len(tables[0]) == 12


def test_every_problem_is_found_and_named(root, capsys, monkeypatch):
    make_pseudo(root, "ade20k_150", count=8)
    images = root / "ADEChallengeData2016/images/training"
    labels = root / "ADEChallengeData2016/annotations/training"
    name = "ADE_train_0000000{}".format
    (labels / f"{name(1)}.png").unlink()
    (images / f"{name(2)}.jpg").unlink()
    data = (images / f"{name(3)}.jpg").read_bytes()
    (images / f"{name(3)}.jpg").write_bytes(data[: len(data) // 2])
    save(labels / f"{name(4)}.png", np.zeros((5, 6), np.uint8))
    values = np.array(Image.open(labels / f"{name(5)}.png"))
    values[0, 0] = 151
    save(labels / f"{name(5)}.png", values)
    save(labels / f"{name(6)}.png", np.zeros((*values.shape, 3), np.uint8))
    (labels / f"{name(7)}.png").write_bytes(b"")

    monkeypatch.setattr(
        sys, "argv",
        ["x", "ade20k_150_train", "--workers", "0", "--output", str(root / "out")],
    )  # fmt: skip
    with pytest.raises(SystemExit) as exit_info:
        check_dataset.main()
    assert exit_info.value.code == 1
    problems = (root / "out" / "ade20k_150_train_problems.txt").read_text().splitlines()
    printed = capsys.readouterr().out
    assert len(problems) == 7 and "7 problems" in printed
    for number, file, text in (
        (1, images, "no label"),
        (2, labels, "no image"),
        (3, images, "cannot be read as an image"),
        (4, labels, "labels of 5 x 6"),
        (5, labels, "label 151 is not in the table"),
        (6, labels, "expected one channel"),
        (7, labels, "cannot be read as a label image"),
    ):
        (problem,) = [p for p in problems if name(number) in p.split(": ")[0]]
        assert problem.startswith(str(file)) and text in problem
        assert problem in printed
    # Once mended, the list of problems goes away.
    for stem in map(name, range(1, 8)):
        for path in (images / f"{stem}.jpg", labels / f"{stem}.png"):
            path.unlink(missing_ok=True)
    with pytest.raises(SystemExit) as exit_info:
        check_dataset.main()
    assert exit_info.value.code == 0
    assert not (root / "out" / "ade20k_150_train_problems.txt").exists()


def test_listed_image_that_is_not_there(root):
    make_pseudo(root, "lip_20")
    stem = (root / "LIP/TrainVal_images/val_id.txt").read_text().split()[1]
    (root / f"LIP/TrainVal_images/val_images/{stem}.jpg").unlink()
    assert not check_dataset.check("lip_20_val", 0, root / "out")
    problems = (root / "out" / "lip_20_val_problems.txt").read_text()
    assert f"{stem}.jpg: listed" in problems


def test_test_split_has_no_table(root, capsys):
    make_pseudo(root, "lip_20")
    assert check_dataset.check("lip_20_test", 0, root / "out")
    printed = capsys.readouterr().out
    assert "it has no labels" in printed and "% of pixels" not in printed
    assert (root / "out" / "lip_20_test.png").is_file()


def test_missing_folder_and_unknown_name(root, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "ade20k_150_train"])
    with pytest.raises(InputError, match="no such folder.*DETECTRON2_DATASETS"):
        check_dataset.main()
    with pytest.raises(InputError, match="'ade20k_train' is not.*close: ade20k_150_train"):
        check_dataset.check("ade20k_train", 0, root)


@pytest.mark.parametrize("colors", [{}, {"stuff_colors": [[1, 2, 3], [4, 5, 6]]}])
def test_another_projects_data_set(root, capsys, colors):
    name = "test_check_other"
    save(root / "a.jpg", np.zeros((8, 8, 3), np.uint8))
    save(root / "a.png", np.array([[0, 1], [1, 9]], np.uint8).repeat(4, 0).repeat(4, 1))
    record = {"file_name": str(root / "a.jpg"), "sem_seg_file_name": str(root / "a.png")}
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(stuff_classes=["x", "y"], ignore_label=9, **colors)
    try:
        assert check_dataset.check(name, 0, root / "out")
        rows = table_of(capsys.readouterr().out)
        assert rows == {"x": (16, 1), "y": (32, 1), "(no ground truth)": (16, 1)}
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def not_there():
    raise FileNotFoundError("nowhere")


@pytest.mark.parametrize(
    "load, metadata, message",
    [
        (not_there, {"stuff_classes": ["x"]}, "test_check_other, which another .*nowhere"),
        (list, {"stuff_classes": ["x"]}, "test_check_other is empty, expected"),
        (lambda: [{"file_name": "x"}], {}, "test_check_other has no stuff_classes"),
    ],
)
def test_another_projects_data_set_that_cannot_be_used(root, load, metadata, message):
    name = "test_check_other"
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
    try:
        with pytest.raises(InputError, match=message):
            check_dataset.check(name, 0, root / "out")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_blend():
    image = np.full((1, 3, 3), 100, np.uint8)
    mixed = blend(image, np.array([[0, 1, 255]]), [(200, 0, 0), (0, 0, 0)], opacity=0.5)
    assert mixed.tolist() == [[[150, 50, 50], [50, 50, 50], [100, 100, 100]]]


def test_real_files(real_data, tmp_path, monkeypatch):
    folder = real_data if (real_data / "LIP").is_dir() else real_data / "samples"
    if not folder.is_dir():
        pytest.skip(f"no {folder}: real files are not tested")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder))
    for name in ("lip_20_val", "coco_stuff_164k_val", "cihp_20_train", "ade20k_150_val"):
        assert check_dataset.check(name, 0, tmp_path)
