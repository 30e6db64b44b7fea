"""The tools that work from files: compare and evaluate_folder."""

import json
import logging
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import ExifTags, Image

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper
from mcibi_d2.data.labels import read_labels
from mcibi_d2.evaluation import Results, SemSegEvaluator, read_results
from mcibi_d2.evaluation.folders import find_labels, find_predictions, image_name
from mcibi_d2.evaluation.results import measures
from mcibi_d2.tools import compare, evaluate_folder

NAME = "test_compare"
CLASSES = ["sky", "left-arm", "tree", "never"]
COUNT = 4


def truth(number):
    """Class ids and, in the first row, pixels without truth (3 stands for those)."""
    labels = np.random.default_rng(number).integers(0, 3, (24, 32))
    labels[0] = 3
    return labels


def predicted(number, wrong):
    """The truth, with a share of rows that say class 1."""
    labels = np.where(truth(number) == 3, 0, truth(number))
    labels[: int(wrong * 24)] = 1
    return labels


@pytest.fixture
def folder(tmp_path):
    """A data set whose label files hold 10, 20, 30, and predictions of two runs."""
    for name in ("images", "labels", "a", "b"):
        (tmp_path / name).mkdir()
    records = []
    for i in range(COUNT):
        image, label = tmp_path / "images" / f"{i}.jpg", tmp_path / "labels" / f"{i}.png"
        Image.fromarray(np.full((24, 32, 3), 50 * i, np.uint8)).save(image)
        values = np.array([10, 20, 30, 0])[truth(i)]
        Image.fromarray(values.astype(np.uint8)).save(label)
        records.append({"file_name": str(image), "sem_seg_file_name": str(label)})
        for run, wrong in (("a", 0.5), ("b", 0.5 + 0.1 * i)):
            labels = predicted(i, wrong).astype(np.uint8)
            Image.fromarray(labels).save(tmp_path / run / f"{i}.png")
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(
        stuff_classes=CLASSES, stuff_colors=[(9, 9, 9)] * 4, label_ids=[10, 20, 30, 40],
        label_ignored=[0], ignore_label=255,
    )  # fmt: skip
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def call(monkeypatch, tool, *args):
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, args)])
    tool.main()


# --- evaluate_folder.


def test_folder_gives_what_the_evaluator_gives(folder, monkeypatch):
    evaluator = SemSegEvaluator(NAME, distributed=False)
    for i, record in enumerate(DatasetCatalog.get(NAME)):
        evaluator.process([record], [{"labels": torch.from_numpy(predicted(i, 0.5))}])
    expected = evaluator.evaluate()["sem_seg"]
    call(monkeypatch, evaluate_folder, folder / "a", folder / "labels", "--dataset", NAME,
         "--output", folder / "out")  # fmt: skip
    read = read_results(str(folder / "out"))
    assert (read.dataset, read.images) == (NAME, COUNT)
    assert repr(read.values) == repr(dict(expected))
    assert 20 < read.values["mIoU"] < 90
    assert NAME in DatasetCatalog.list() and len(DatasetCatalog.list()) == len(
        [n for n in DatasetCatalog.list() if str(folder) not in n]
    )


def test_predictions_in_the_values_of_the_labels(folder):
    expected = evaluate_folder.evaluate_folder(folder / "a", folder / "labels", NAME)
    for path in (folder / "a").iterdir():
        Image.fromarray((np.asarray(Image.open(path)) + 1) * 10).save(path)
    assert repr(expected) == repr(
        evaluate_folder.evaluate_folder(folder / "a", folder / "labels", NAME, "labels")
    )
    with pytest.raises(InputError, match=r"0\.png: predicts class 30, .* classes 0\.\.3"):
        evaluate_folder.evaluate_folder(folder / "a", folder / "labels", NAME)


def test_predictions_of_one_bit_and_endings_in_capitals(folder):
    for path in list((folder / "a").iterdir()):
        labels = np.minimum(np.asarray(Image.open(path)), 1)
        Image.fromarray(labels).save(path)
        Image.fromarray(labels.astype(bool)).save(folder / "b" / path.name)
        (folder / "b" / path.name).rename(folder / "b" / path.with_suffix(".PNG").name)
    found = [evaluate_folder.evaluate_folder(folder / x, folder / "labels", NAME) for x in "ab"]
    assert repr(found[0]) == repr(found[1])


def test_labels_may_be_evaluated_against_themselves(folder):
    found = evaluate_folder.evaluate_folder(folder / "labels", folder / "labels", NAME, "labels")
    assert found["mIoU"] == 100


def test_real_labels_against_themselves(real_data):
    folder = real_data / "CamVid" / "valannot"
    found = evaluate_folder.evaluate_folder(folder, folder, "camvid_11_val", "labels")
    assert found["pACC"] == found["mIoU"] == 100


def test_ignored_in_a_prediction_is_a_fault_where_there_is_truth(folder):
    values = np.asarray(Image.open(folder / "labels" / "1.png")).copy()
    values[3, :7] = 0
    for i in range(COUNT):
        (folder / "a" / f"{i}.png").write_bytes((folder / "labels" / f"{i}.png").read_bytes())
    Image.fromarray(values).save(folder / "a" / "1.png")
    with pytest.raises(InputError, match=r"a/1\.png: 7 pixels have no class"):
        evaluate_folder.evaluate_folder(folder / "a", folder / "labels", NAME, "labels")


def test_cityscapes_names_belong_together(tmp_path):
    for name in ("gtFine_labelIds", "gtFine_instanceIds", "gtFine_color"):
        (tmp_path / "gt" / "ulm").mkdir(parents=True, exist_ok=True)
        (tmp_path / "gt" / "ulm" / f"ulm_000000_000019_{name}.png").touch()
    (tmp_path / "ulm_000000_000019_leftImg8bit.png").touch()
    assert (
        image_name("leftImg8bit/val/ulm/ulm_000000_000019_leftImg8bit.png") == "ulm_000000_000019"
    )
    (label,) = find_labels(tmp_path / "gt").items()
    assert label == (
        "ulm_000000_000019",
        tmp_path / "gt" / "ulm" / "ulm_000000_000019_gtFine_labelIds.png",
    )
    with pytest.raises(InputError, match="is of the same image as"):
        find_predictions(tmp_path)


def test_the_last_prediction_does_not_lose_the_others(folder, caplog):
    Image.fromarray(np.full((24, 32), 9, np.uint8)).save(folder / "a" / "3.png")
    with (
        caplog.at_level(logging.INFO, "mcibi_d2"),
        pytest.raises(InputError, match=r"^\S*3\.png: predicts class 9.* the 3 images that were"),
    ):
        evaluate_folder.evaluate_folder(folder / "a", folder / "labels", NAME)
    assert f"{NAME}, 3 images: mIoU" in caplog.text


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: (f / "a" / "2.png").unlink(), r"labels/2\.png: has no prediction in .*1 of 4"),
        (lambda f: (f / "labels" / "2.png").unlink(), r"a/2\.png: has no label in .*1 of 4"),
        (lambda f: [p.unlink() for p in (f / "a").iterdir()], r"a: holds no files"),
        (lambda f: cv2.imwrite(f"{f}/a/0.png", np.zeros((24, 32, 3))), r"0\.png: an image of sha"),
        (
            lambda f: cv2.imwrite(f"{f}/a/0.png", np.zeros((4, 4))),
            r"labels/0\.png: labels of 24 x 32 .* the prediction of \S*a/0\.png has 4 x 4",
        ),
        (lambda f: (f / "a" / "0.png").write_text("x"), r"0\.png: cannot be read as a predict"),
    ],
)
def test_wrong_folders_are_said(folder, spoil, match):
    spoil(folder)
    with pytest.raises(InputError, match=match):
        evaluate_folder.evaluate_folder(folder / "a", folder / "labels", NAME)


def test_wrong_names_are_said(folder):
    with pytest.raises(InputError, match="--dataset: 'test_compar' is not .* close: test_compare"):
        evaluate_folder.evaluate_folder(folder / "a", folder / "labels", "test_compar")
    with pytest.raises(InputError, match=r"nowhere: no such folder"):
        evaluate_folder.evaluate_folder(folder / "nowhere", folder / "labels", NAME)


# --- compare.


def make_run(folder, counts, **changes):
    """A run's folder with the results of a confusion matrix."""
    confusion = np.zeros((5, 5), dtype=np.int64)
    confusion[:4, :4] = counts
    changes = {"classes": CLASSES, "dataset": NAME, "images": COUNT, **changes}
    values = measures(confusion, changes["classes"])
    Results(values, confusion=confusion, **changes).write(str(folder / "inference"))
    return folder


# Rows are predicted. Class 0 loses a little, 1 gains, 2 loses much, 3 is absent.
BASELINE = [[90, 10, 0, 0], [10, 70, 0, 0], [0, 20, 100, 0], [0, 0, 0, 0]]
OURS = [[89, 0, 0, 0], [10, 95, 30, 0], [1, 5, 70, 0], [0, 0, 0, 0]]


def test_table_of_differences(tmp_path, monkeypatch, capsys):
    runs = make_run(tmp_path / "fcn", BASELINE), make_run(tmp_path / "mcibi", OURS)
    call(monkeypatch, compare, *runs)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    iou = [[100 * c[k][k] / (sum(c[k]) + sum(r[k] for r in c) - c[k][k]) for k in range(3)]
           for c in (BASELINE, OURS)]  # fmt: skip
    better, worse = lines.index(next(x for x in lines if x[:2] == ["Better", "in"])), lines.index(
        next(x for x in lines if x[:2] == ["Worse", "in"])
    )  # fmt: skip
    rows = {x[0]: x for x in lines if x and x[0] in CLASSES}
    assert better < lines.index(rows["sky"]) < worse < lines.index(rows["tree"])
    for k, name in ((0, "sky"), (2, "tree")):
        a, b = iou[0][k], iou[1][k]
        assert rows[name][1:4] == [f"{a:.2f}", f"{b:.2f}", f"{b - a:+.2f}"]
    assert rows["tree"][4:] == ["-30.00", "33.33"]
    miou = np.mean(iou, axis=1)
    assert ["mIoU", *(f"{x:.2f}" for x in miou), f"{miou[1] - miou[0]:+.2f}"] in lines
    assert "Absent: never" in out and "A: fcn, 4 images" in out and "No pictures" in out
    order = [x[0] for x in lines[better:worse] if x and x[0] in CLASSES]
    gains = {name: iou[1][k] - iou[0][k] for k, name in enumerate(CLASSES[:3])}
    assert order == sorted((k for k in gains if gains[k] > 0), key=lambda k: -gains[k])


def test_a_file_of_detectron2_is_compared(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "fcn", BASELINE)
    values = {k: np.float64(v) for k, v in read_results(str(run)).values.items()}
    torch.save({k: v for k, v in values.items() if "union" not in k}, tmp_path / "other.pth")
    call(monkeypatch, compare, tmp_path / "other.pth", run)
    out = capsys.readouterr().out
    assert "The same IoU: sky, left-arm, tree" in out and "Better" not in out


def test_pictures_where_the_runs_differ_most(folder, monkeypatch, capsys):
    runs = make_run(folder / "fcn", BASELINE), make_run(folder / "mcibi", OURS)
    sheet = folder / "new" / "sheet.png"
    call(monkeypatch, compare, *runs, "--predictions", folder / "a", folder / "b",
         "--pictures", 2, "--output", sheet)  # fmt: skip
    named = [x.split(":")[0] for x in capsys.readouterr().out.splitlines() if "% of its pix" in x]
    assert named == [str(folder / "images" / f"{i}.jpg") for i in (3, 2)]
    height, width = np.asarray(Image.open(sheet)).shape[:2]
    assert width > height  # four columns, two rows
    found = compare.find_disagreements(NAME, (folder / "a", folder / "b"), 9)
    for share, record in found:
        i = int(record["file_name"][-5])
        labelled = read_labels(record["sem_seg_file_name"], NAME) != 255
        differs = predicted(i, 0.5) != predicted(i, 0.5 + 0.1 * i)
        assert share == pytest.approx(differs[labelled].sum() / labelled.sum())
    assert len(found) == COUNT


def test_pictures_show_what_the_mapper_reads(folder, monkeypatch):
    record = DatasetCatalog.get(NAME)[3]
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # sideways, with labels as it is stored
    ramp = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 85
    Image.fromarray(ramp).save(record["file_name"], "PNG", exif=turned)
    rows = []
    sheet = compare.comparison_sheet
    monkeypatch.setattr(compare, "comparison_sheet", lambda x, *y: rows.extend(x) or sheet(x, *y))
    run = make_run(folder / "fcn", BASELINE)
    call(monkeypatch, compare, run, run, "--predictions", folder / "a", folder / "b",
         "--pictures", 1, "--output", folder / "sheet.png")  # fmt: skip
    mapped = SemSegMapper(True, augmentations=[], dataset_name=NAME)(record)["image"]
    assert (rows[0]["image"] == mapped.numpy().transpose(1, 2, 0)).all()
    assert rows[0]["image"].shape == (24, 32, 3)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"classes": ["sky", "arm", "tree", "never"]}, "B: has 'arm' where A has 'left-arm'"),
        ({"dataset": "other"}, "B: is of data set other, expected test_compare as A"),
    ],
)
def test_other_results_are_not_compared(tmp_path, monkeypatch, changes, match):
    runs = make_run(tmp_path / "a", BASELINE), make_run(tmp_path / "b", OURS, **changes)
    with pytest.raises(InputError, match=match):
        call(monkeypatch, compare, *runs)


def test_missing_pictures_and_runs_are_said(folder, monkeypatch):
    run = make_run(folder / "fcn", BASELINE)
    (folder / "b" / "1.png").unlink()
    with pytest.raises(InputError, match=r"b: has no 1\.png"):
        call(monkeypatch, compare, run, run, "--predictions", folder / "a", folder / "b")
    for run_folder in ("a", "b"):
        (folder / "b" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes())
        wrong = folder / run_folder / "1.png"
        cv2.imwrite(str(wrong), np.zeros((4, 5)))
        with pytest.raises(InputError, match=f"^{wrong}: 4 x 5 pixels .* expected 24 x 32"):
            call(monkeypatch, compare, run, run, "--predictions", folder / "a", folder / "b")
        cv2.imwrite(str(wrong), np.zeros((24, 32)))
    with pytest.raises(InputError, match="nowhere: no such file or folder"):
        call(monkeypatch, compare, run, folder / "nowhere")


def test_pictures_without_colors_and_without_labels(folder, monkeypatch):
    runs, sheet = [make_run(folder / "fcn", BASELINE)] * 2, folder / "sheet.png"
    options = ["--predictions", folder / "a", folder / "b", "--output", sheet]
    MetadataCatalog.get(NAME).__dict__.pop("stuff_colors")
    call(monkeypatch, compare, *runs, *options)
    assert len(np.unique(np.asarray(Image.open(sheet).convert("RGB")).reshape(-1, 3), axis=0)) > 4
    records = [{"file_name": r["file_name"]} for r in DatasetCatalog.get(NAME)]
    DatasetCatalog.remove(NAME)
    DatasetCatalog.register(NAME, lambda: records)
    with pytest.raises(InputError, match=rf"--dataset {NAME}: has no labels for \S*0\.jpg"):
        call(monkeypatch, compare, *runs, *options)


@pytest.mark.parametrize("key", ["IoU-tree", "ACC-sky"])
def test_results_without_a_measure_are_said(tmp_path, key):
    make_run(tmp_path, BASELINE)
    path = tmp_path / "inference" / "sem_seg_evaluation.json"
    found = json.loads(path.read_text())
    del found["results"][key]
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=rf"\.json: has no {key}, expected it for each class"):
        read_results(str(path))


def test_run_with_several_data_sets_asks_which(tmp_path):
    for name in ("one", "two"):
        make_run(tmp_path / "inference" / name, BASELINE)
    with pytest.raises(InputError, match="holds results in .*one.*two.*expected the name of one"):
        read_results(str(tmp_path))
    assert read_results(str(tmp_path / "inference" / "one")).images == COUNT


def test_result_file_is_plain_json(tmp_path):
    run = make_run(tmp_path, BASELINE)
    text = (run / "inference" / "sem_seg_evaluation.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["results"]["IoU-never"] is None
