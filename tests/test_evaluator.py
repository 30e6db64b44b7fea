import json
import logging
import time
import tracemalloc

import cv2
import numpy as np
import processes
import pytest
import torch
from conftest import ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator as Detectron2SemSegEvaluator
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.data.labels import read_labels
from mcibi_d2.engine import Trainer
from mcibi_d2.evaluation import Results, SemSegEvaluator, read_results
from mcibi_d2.evaluation.boundary import boundaries
from mcibi_d2.evaluation.results import measures

NAME = "test_evaluator"
CLASSES = 4


def make_labels(folder, count=5):
    rng = np.random.default_rng(0)
    for i in range(count):
        labels = rng.integers(0, CLASSES, (6 + i, 8))  # the file's values are ids * 10
        labels[labels == 3] = 1  # the last class has no ground truth
        values = labels * 10
        values[0, :3] = 99
        Image.fromarray(values.astype(np.uint8)).save(f"{folder}/{i}.png")


def register(folder, count=5, **changes):
    records = [
        {"file_name": f"{folder}/{i}.jpg", "sem_seg_file_name": f"{folder}/{i}.png"}
        for i in range(count)
    ]
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(**{
        "stuff_classes": list("abcd"), "label_ids": [0, 10, 20, 30], "label_ignored": [99],
        "ignore_label": 255, **changes,
    })  # fmt: skip


def unregister():
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


@pytest.fixture
def dataset(tmp_path):
    make_labels(tmp_path)
    register(tmp_path)
    yield tmp_path
    unregister()


def predictions(count=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(CLASSES, 6 + i, 8, generator=generator) for i in range(count)]


def literal_confusion(folder, outputs):
    """Counted pixel by pixel: rows are classes of the truth, columns predicted ones."""
    confusion = np.zeros((CLASSES, CLASSES), dtype=int)
    for i, output in enumerate(outputs):
        values = np.asarray(Image.open(f"{folder}/{i}.png"))
        predicted = output.argmax(0).numpy()
        for y, x in np.ndindex(values.shape):
            if values[y, x] != 99:
                confusion[values[y, x] // 10, predicted[y, x]] += 1
    return confusion


def literal_measures(confusion):
    """The measures from their definitions, class by class."""
    iou, acc, iou_union, total = [], [], [], confusion.sum()
    frequency_weighted = 0.0
    for k in range(CLASSES):
        truth, predicted, hits = confusion[k].sum(), confusion[:, k].sum(), confusion[k, k]
        if truth:
            iou.append(hits / (truth + predicted - hits))
            acc.append(hits / truth)
            frequency_weighted += iou[-1] * truth / total
        if truth or predicted:
            iou_union.append(hits / (truth + predicted - hits))
    return {
        "mIoU": 100 * np.mean(iou),
        "mIoU-union": 100 * np.mean(iou_union),
        "fwIoU": 100 * frequency_weighted,
        "mACC": 100 * np.mean(acc),
        "pACC": 100 * confusion.trace() / total,
        "IoU-a": 100 * iou[0],
        "ACC-b": 100 * acc[1],
    }


def evaluate(folder, numbers, outputs, distributed=False, key="sem_seg", **kwargs):
    evaluator = SemSegEvaluator(NAME, distributed=distributed, **kwargs)
    evaluator.reset()
    for i in numbers:
        evaluator.process([{"file_name": f"{folder}/{i}.jpg"}], [{key: outputs[i]}])
    return evaluator.evaluate()


def test_equals_a_literal_count(dataset):
    outputs = predictions()
    confusion = literal_confusion(dataset, outputs)
    results = evaluate(dataset, range(5), outputs, output_dir=str(dataset / "out"))["sem_seg"]
    for key, value in literal_measures(confusion).items():
        assert results[key] == pytest.approx(value, rel=1e-12), key
    assert confusion[:, 3].sum() > 0 == confusion[3].sum()  # predicted, but absent
    assert np.isnan(results["IoU-d"]) and np.isnan(results["ACC-d"])
    assert results["mIoU-union"] == pytest.approx(results["mIoU"] * 3 / 4, rel=1e-12)
    assert not any("Boundary" in key for key in results)
    counted = read_results(str(dataset / "out")).confusion
    assert np.array_equal(counted[:-1, :-1], confusion.T)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_takes_labels_in_place_of_logits(dataset, dtype):
    outputs = predictions()
    labels = [x.argmax(0).to(dtype) for x in outputs]
    expected = evaluate(dataset, range(5), outputs)["sem_seg"]
    results = evaluate(dataset, range(5), labels, key="labels")["sem_seg"]
    assert repr(results) == repr(expected)


def detectron2_results(outputs, name=NAME):
    """Of Detectron2's own evaluator, which reads labels by our table."""
    evaluator = Detectron2SemSegEvaluator(
        name,
        distributed=False,
        sem_seg_loading_fn=lambda file, dtype: read_labels(file, name).astype(dtype),
    )
    evaluator.reset()
    for record, output in zip(DatasetCatalog.get(name), outputs, strict=True):
        evaluator.process([record], [{"sem_seg": output}])
    return evaluator.evaluate()["sem_seg"]


def assert_as_detectron2(results, expected):
    compared = [k for k in expected if "Boundary" not in k and "min(" not in k]
    assert len(compared) >= 4
    for key in compared:
        assert results[key] == pytest.approx(expected[key], rel=1e-12, nan_ok=True), key


def test_equals_detectron2_on_random_labels(dataset):
    outputs = predictions()
    results = evaluate(dataset, range(5), outputs)["sem_seg"]
    assert_as_detectron2(results, detectron2_results(outputs))


def test_detectron2s_evaluator_reads_labels_as_its_document_says(dataset):
    """Its own reader fails under NumPy 2."""
    text = (ROOT / "mcibi_d2" / "README.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("reader = lambda file"))
    scope = {"np": np, "Image": Image}
    exec(line, scope)
    for record in DatasetCatalog.get(NAME):  # it knows no tables of labels
        file = record["sem_seg_file_name"]
        Image.fromarray(read_labels(file, NAME).astype(np.uint8)).save(file)
    unregister()
    register(dataset, label_ids=[0, 1, 2, 3], label_ignored=[255])
    evaluator = Detectron2SemSegEvaluator(
        NAME, distributed=False, sem_seg_loading_fn=scope["reader"]
    )
    evaluator.reset()
    outputs = predictions()
    for record, output in zip(DatasetCatalog.get(NAME), outputs, strict=True):
        evaluator.process([record], [{"sem_seg": output}])
    assert_as_detectron2(
        evaluate(dataset, range(5), outputs)["sem_seg"], evaluator.evaluate()["sem_seg"]
    )


def test_equals_detectron2_on_real_labels(real_data, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(real_data))
    name = "camvid_11_val"
    records = DatasetCatalog.get(name)
    outputs = []
    for record in records:
        labels = torch.from_numpy(read_labels(record["sem_seg_file_name"], name)).long()
        labels = labels.roll((5, -9), (0, 1)).clamp(max=10)
        outputs.append(torch.nn.functional.one_hot(labels, 11).permute(2, 0, 1).float())
    evaluator = SemSegEvaluator(name, distributed=False)
    evaluator.process(records, [{"sem_seg": x} for x in outputs])
    results = evaluator.evaluate()["sem_seg"]
    assert 20 < results["mIoU"] < 95
    assert_as_detectron2(results, detectron2_results(outputs, name))


def test_nothing_is_kept_per_image(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "0.png")
    records = [
        {"file_name": f"{i}.jpg", "sem_seg_file_name": f"{tmp_path}/0.png"} for i in range(500)
    ]
    DatasetCatalog.register(NAME, lambda: records)
    MetadataCatalog.get(NAME).set(stuff_classes=list("abcd"), ignore_label=255)
    evaluator = SemSegEvaluator(NAME, distributed=False)
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    tracemalloc.start()
    try:
        used = []
        for i, record in enumerate(records):
            evaluator.process([record], [{"labels": labels}])
            if i in (9, 499):
                used.append(tracemalloc.get_traced_memory()[0])
        assert used[1] - used[0] < 20_000
        assert evaluator._predictions == []
    finally:
        tracemalloc.stop()
        unregister()


def _share(rank, world_size, folder):
    register(folder)
    shares = [[0, 1, 2], [3, 4], []]
    results = evaluate(folder, shares[rank], predictions(), True, output_dir=f"{folder}/out",
                       write_predictions=True, boundary_iou=True)  # fmt: skip
    assert (results is not None) == (rank == 0)
    if rank == 0:
        torch.save(dict(results["sem_seg"]), f"{folder}/results.pth")


def test_three_processes_with_uneven_shares_equal_one(dataset, tmp_path):
    alone = str(tmp_path / "alone")
    expected = evaluate(dataset, range(5), predictions(), output_dir=alone,
                        write_predictions=True, boundary_iou=True)["sem_seg"]  # fmt: skip
    processes.run(_share, 3, tmp_path)
    assert repr(torch.load(tmp_path / "results.pth")) == repr(dict(expected))
    files = [tmp_path / folder / "sem_seg_predictions.json" for folder in ("alone", "out")]
    masks = [json.loads(file.read_text()) for file in files]
    assert masks[0] == masks[1] and len({x["file_name"] for x in masks[0]}) == 5
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == [
        "sem_seg_evaluation.json", "sem_seg_evaluation.pth", "sem_seg_predictions.json"
    ]  # fmt: skip


def test_written_predictions_are_those_of_detectron2(dataset, tmp_path):
    outputs = predictions()
    evaluate(dataset, range(5), outputs, output_dir=str(tmp_path / "a"), write_predictions=True)
    other = Detectron2SemSegEvaluator(NAME, distributed=False)
    expected = []
    for i, output in enumerate(outputs):
        expected += other.encode_json_sem_seg(output.argmax(0).numpy(), f"{dataset}/{i}.jpg")
    assert json.loads((tmp_path / "a" / "sem_seg_predictions.json").read_text()) == expected


def test_evaluating_twice_changes_nothing_and_a_reset_forgets_all(dataset, tmp_path):
    outputs, records = predictions(), DatasetCatalog.get(NAME)
    evaluator = SemSegEvaluator(NAME, False, str(tmp_path / "a"), write_predictions=True)
    file, found = tmp_path / "a" / "sem_seg_predictions.json", []
    for again in (False, False, True):
        if again or not found:
            evaluator.reset()
            evaluator.process(records, [{"sem_seg": x} for x in outputs])
        found.append((repr(evaluator.evaluate()), file.read_text()))
    assert found[0] == found[1] == found[2]
    assert len(json.loads(file.read_text())) >= 5


def test_result_file_is_read_again(dataset, tmp_path):
    folder = tmp_path / "run" / "inference"
    results = evaluate(dataset, range(5), predictions(), output_dir=str(folder))["sem_seg"]
    read = read_results(str(tmp_path / "run"))
    assert (read.dataset, read.classes, read.images) == (NAME, list("abcd"), 5)
    assert repr(read.values) == repr(dict(results))
    assert repr(measures(read.confusion, read.classes)) == repr(dict(results))
    assert repr(torch.load(folder / "sem_seg_evaluation.pth")) == repr(dict(results))
    torch.save(detectron2_results(predictions()), tmp_path / "other.pth")  # numpy's numbers
    other = read_results(str(tmp_path / "other.pth"))
    assert other.classes == list("abcd")
    assert other.values["mIoU"] == pytest.approx(results["mIoU"], rel=1e-12)


@pytest.mark.parametrize("text", ["{}", "no json", '{"results": 3}'])
def test_other_files_are_no_results(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=r"x\.json: cannot be read as the result file"):
        read_results(str(tmp_path / "x.json"))
    with pytest.raises(InputError, match="holds no sem_seg_evaluation"):
        read_results(str(tmp_path))


def test_table_says_absent(dataset, caplog):
    with caplog.at_level(logging.INFO, "mcibi_d2"):
        evaluate(dataset, range(5), predictions())
    table = caplog.text
    assert "5 images: mIoU " in table and "mIoU-union " in table
    (line,) = (line for line in table.splitlines() if line.startswith("d "))
    assert line.split()[:3] == ["d", "absent", "absent"]
    assert "nan" not in table


# --- Boundary IoU.


def literal_boundary_confusion(truth, predicted, classes):
    """As the paper's code does it: per class, a mask minus its erosion, step by step."""
    ignored = truth == classes
    height, width = truth.shape
    distance = max(1, int(round(0.02 * np.sqrt(height**2 + width**2))))
    found = []
    for k in range(classes):
        edges = []
        for labels in (truth, predicted):
            mask = ((labels == k) & ~ignored).astype(np.uint8)
            eroded = np.pad(mask, 1)
            eroded = cv2.erode(eroded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
            edges.append((mask - eroded).astype(bool))
        found.append([(edges[0] & edges[1]).sum(), (edges[0] | edges[1]).sum()])
    return np.array(found)


def blobs(shape, classes, seed):
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((classes, *shape)).astype(np.float32)
    return np.stack([cv2.GaussianBlur(x, (0, 0), 6) for x in noise]).argmax(0).astype(np.int32)


@pytest.mark.parametrize("shape", [(5, 7), (90, 120), (120, 150)])  # distances 1, 3 and 4
def test_boundary_iou_equals_the_paper(tmp_path, shape):
    truth, predicted = blobs(shape, 5, 1), blobs(shape, 5, 2)
    predicted[: shape[0] // 2] = truth[: shape[0] // 2]
    truth[:, : shape[1] // 4] = 5  # ignored
    truth[truth == 4] = 3
    edges = literal_boundary_confusion(truth, predicted, 5)
    Image.fromarray(np.where(truth == 5, 255, truth).astype(np.uint8)).save(tmp_path / "0.png")
    register(tmp_path, 1, stuff_classes=list("abcde"), label_ids=None, label_ignored=None)
    try:
        results = evaluate(tmp_path, [0], [torch.from_numpy(predicted)], key="labels",
                           boundary_iou=True)["sem_seg"]  # fmt: skip
    finally:
        unregister()
    expected = 100 * edges[:, 0] / np.maximum(edges[:, 1], 1)
    present = [k for k in range(5) if (truth == k).any()]
    for k in range(5):
        value = results[f"BoundaryIoU-{'abcde'[k]}"]
        assert (value == pytest.approx(expected[k], rel=1e-12)) if k in present else np.isnan(value)
    assert results["mBoundaryIoU"] == pytest.approx(expected[present].mean(), rel=1e-12)


def test_boundary_of_one_square():
    labels = torch.zeros(100, 100, dtype=torch.int32)
    labels[20:60, 30:70] = 1
    kept = boundaries(labels, 2)  # 0.02 of the diagonal: 3 pixels
    assert (kept == 1).sum() == 40 * 40 - 34 * 34
    assert (kept == 0).sum() == (100 * 100 - 94 * 94) + (46 * 46 - 40 * 40)
    assert (kept[25:55, 35:65] == 2).all()


# --- Bad input.


def test_wrong_labels_name_the_file(dataset):
    Image.fromarray(np.full((6, 8), 40, np.uint8)).save(dataset / "0.png")
    with pytest.raises(InputError, match=r"0\.png: label 40 .* 0\.\.30 and ignores 99"):
        evaluate(dataset, [0], predictions())


def test_prediction_of_another_size_names_the_file(dataset):
    with pytest.raises(InputError, match=r"0\.png: labels of 6 x 8.* has 7 x 8"):
        evaluate(dataset, [0], [predictions()[1]])


def wrong_value(folder):
    Image.fromarray(np.full((10, 8), 40, np.uint8)).save(folder / "4.png")


def colours(folder):
    Image.fromarray(np.zeros((10, 8, 3), np.uint8)).save(folder / "4.png")


def other_size(folder):
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(folder / "4.png")


def no_file(folder):
    (folder / "4.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (wrong_value, r"^[^;]*4\.png: label 40 .* values 0\.\.30"),
        (colours, r"4\.png: an image of shape \(10, 8, 3\)"),
        (other_size, r"4\.png: labels of 8 x 10 .* has 10 x 8"),
        (no_file, r"4\.png: cannot be read as a label image"),
    ],
)
def test_the_last_image_does_not_lose_the_others(dataset, caplog, spoil, match):
    spoil(dataset)
    with (
        caplog.at_level(logging.INFO, "mcibi_d2"),
        pytest.raises(InputError, match=match) as raised,
    ):
        evaluate(dataset, range(5), predictions(), output_dir=str(dataset / "out"))
    assert "the 4 images that were counted" in str(raised.value)
    assert "\n" not in str(raised.value) and "more" not in str(raised.value)
    confusion = literal_confusion(dataset, predictions()[:4])
    expected = literal_measures(confusion)["mIoU"]
    assert f"4 images: mIoU {expected:.2f}" in caplog.text
    written = read_results(str(dataset / "out"))
    assert written.images == 4 and len(written.errors) == 1
    assert written.values["mIoU"] == pytest.approx(expected, rel=1e-12)


def test_many_faulty_images_are_counted_not_listed(dataset, caplog):
    unregister()
    register(dataset, 40)  # only five have labels
    with pytest.raises(InputError, match=r"5\.png: cannot be read .* \(and 34 more, see the log\)"):
        evaluate(dataset, range(40), predictions(40))
    assert caplog.text.count("going on with the other images") == 10


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ([0, 1, 2, 3, 4, 2], r"2\.jpg: was predicted twice, expected once"),
        ([0, 1, 3], r"2\.jpg: was not predicted, as were 2 of the 5 images of test_evaluator"),
        ([0, 1, 2, 3, 4, 5], r"5\.jpg: was predicted, but is not one of the 5 images"),
    ],
)
def test_each_image_is_predicted_once(dataset, caplog, numbers, match):
    with (
        caplog.at_level(logging.INFO, "mcibi_d2"),
        pytest.raises(InputError, match=match),
    ):
        evaluate(dataset, numbers, predictions(6))
    assert f"{min(len(numbers), 5)} images: mIoU" in caplog.text


def _fails_everywhere(rank, world_size, folder):
    register(folder)
    with pytest.raises(InputError, match=r"1\.jpg: was predicted by several processes"):
        evaluate(folder, [[0, 1, 2], [3, 4, 1]][rank], predictions(), distributed=True)


def test_two_processes_with_the_same_image(dataset, tmp_path):
    processes.run(_fails_everywhere, 2, tmp_path)


def _fails_after_the_report(rank, world_size, folder):
    register(folder)
    write = Results.write

    def slowly(self, path):
        time.sleep(1)
        write(self, path)

    Results.write = slowly
    shares, out = [[0, 1, 2], [3, 4]], folder + "/out"
    with pytest.raises(InputError, match=r"4\.png: label 40"):
        evaluate(folder, shares[rank], predictions(), distributed=True, output_dir=out)
    assert read_results(out).images == 4


def test_no_process_fails_before_the_report(dataset, tmp_path):
    wrong_value(dataset)
    processes.run(_fails_after_the_report, 2, tmp_path)


@pytest.mark.parametrize("key", ["sem_seg", "labels"])
def test_nan_logits_name_the_image(dataset, key):
    outputs = predictions()
    outputs[3][2, 4, 5] = float("nan")
    outputs[3][:, 4, 6] = float("nan")
    if key == "labels":
        nan = [x.isnan().any(0) for x in outputs]
        outputs = [x.argmax(0).masked_fill(m, 4) for x, m in zip(outputs, nan, strict=True)]
    with pytest.raises(InputError, match=r"3\.jpg: 2 pixels have no class \(NaN logits.*0\.\.3"):
        evaluate(dataset, range(5), outputs, output_dir=str(dataset / "out"), key=key)
    confusion = read_results(str(dataset / "out")).confusion
    assert confusion[4, :4].sum() == 2


@pytest.mark.parametrize(
    ("key", "output", "match"),
    [
        ("sem_seg", torch.zeros(3, 6, 8), r"0\.jpg: logits of shape \(3, 6, 8\).* 4 classes"),
        ("sem_seg", torch.zeros(6, 8), r"0\.jpg: logits of shape \(6, 8\)"),
        ("labels", torch.zeros(6, 8), r"0\.jpg: labels of shape \(6, 8\) and type torch.float32"),
    ],
)
def test_wrong_outputs_are_said(dataset, key, output, match):
    with pytest.raises(InputError, match=match):
        evaluate(dataset, [0], [output], key=key)


def test_a_single_class_is_warned_of(tmp_path, caplog):
    Image.fromarray(np.where(np.eye(9), 1, 255).astype(np.uint8)).save(tmp_path / "0.png")
    register(tmp_path, 1, label_ids=None, label_ignored=None)
    try:
        results = evaluate(tmp_path, [0], [torch.ones(9, 9, dtype=torch.uint8)], key="labels")
    finally:
        unregister()
    assert results["sem_seg"]["mIoU"] == 100
    assert "every pixel with ground truth is 'b', so these measures say nothing" in caplog.text


def test_incomplete_metadata_is_said(tmp_path):
    register(tmp_path, stuff_classes=None)
    try:
        with pytest.raises(InputError, match=f"{NAME} has no stuff_classes"):
            SemSegEvaluator(NAME)
    finally:
        unregister()


def test_data_set_without_labels_is_refused():
    DatasetCatalog.register("test_unlabelled", lambda: [{"file_name": "x.jpg"}])
    MetadataCatalog.get("test_unlabelled").set(stuff_classes=["a"], ignore_label=255)
    try:
        with pytest.raises(InputError, match=r"no labels for 1 images, such as x\.jpg"):
            SemSegEvaluator("test_unlabelled")
    finally:
        DatasetCatalog.remove("test_unlabelled")
        MetadataCatalog.remove("test_unlabelled")


class _Loader:
    """Fails after some images, as a loader whose next image cannot be read."""

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records) + 1

    def __iter__(self):
        yield from ([record] for record in self.records)
        raise InputError("5.jpg: cannot be read as an image")


def test_a_broken_image_does_not_lose_the_others(dataset, tiny_cfg, monkeypatch, caplog):
    tiny_cfg.DATASETS.TEST = (NAME,)
    records = DatasetCatalog.get(NAME)[:4]
    outputs = dict(zip([r["file_name"] for r in records], predictions(), strict=False))
    monkeypatch.setattr(Trainer, "build_test_loader", lambda *_: _Loader(records))
    model = torch.nn.Identity()
    model.forward = lambda inputs: [{"sem_seg": outputs[x["file_name"]]} for x in inputs]
    with (
        caplog.at_level(logging.INFO, "mcibi_d2"),
        pytest.raises(InputError, match=r"^5\.jpg: cannot be read"),
    ):
        Trainer.test(tiny_cfg, model)
    expected = literal_measures(literal_confusion(dataset, predictions()[:4]))["mIoU"]
    assert f"{NAME}, 4 images: mIoU {expected:.2f}" in caplog.text


def _one_is_broken_off(rank, world_size, folder):
    register(folder)
    share, out = [[0, 1, 2], [3, 4]][rank], folder + "/out"
    evaluator = SemSegEvaluator(NAME, output_dir=out)
    for i in share[: 3 - 2 * rank]:
        evaluator.process([{"file_name": f"{folder}/{i}.jpg"}], [{"sem_seg": predictions()[i]}])
    with pytest.raises(InputError, match=r"^4\.jpg: cannot be read; the 4 images that were"):
        if rank == 1:
            worker = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback\n"
            evaluator.break_off(InputError(f"{worker}{InputError.__module__}.InputError: 4.jpg: "
                                           "cannot be read\n"))  # fmt: skip
        else:
            evaluator.evaluate()
    if rank == 0:
        expected = literal_confusion(folder, predictions()[:4])
        assert np.array_equal(evaluator._conf_matrix[:-1, :-1], expected.T)
    evaluator.break_off(InputError("is not reported again"))


def test_one_process_broken_off_does_not_lose_the_counts_of_the_others(dataset, tmp_path):
    processes.run(_one_is_broken_off, 2, tmp_path)
    assert not (tmp_path / "out").exists()
