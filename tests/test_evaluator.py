import numpy as np
import processes
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.evaluation import SemSegEvaluator

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


@pytest.fixture
def dataset(tmp_path):
    make_labels(tmp_path)
    register(tmp_path)
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def predictions(count=5):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(CLASSES, 6 + i, 8, generator=generator) for i in range(count)]


def literal_results(folder, outputs):
    """Confusion counted pixel by pixel, and the measures from their definitions."""
    confusion = np.zeros((CLASSES, CLASSES))
    for i, output in enumerate(outputs):
        values = np.asarray(Image.open(f"{folder}/{i}.png"))
        predicted = output.argmax(0).numpy()
        for y, x in np.ndindex(values.shape):
            if values[y, x] != 99:
                confusion[values[y, x] // 10, predicted[y, x]] += 1
    truth, hits = confusion.sum(1), confusion.diagonal()
    present = truth > 0
    iou = hits / (truth + confusion.sum(0) - hits)
    return {
        "mIoU": 100 * iou[present].mean(),
        "fwIoU": 100 * (iou * truth / truth.sum())[present].sum(),
        "mACC": 100 * (hits[present] / truth[present]).mean(),
        "pACC": 100 * hits.sum() / truth.sum(),
        "IoU-a": 100 * iou[0],
    }


def evaluate(folder, numbers, outputs, distributed=False):
    evaluator = SemSegEvaluator(NAME, distributed=distributed)
    evaluator.reset()
    for i in numbers:
        evaluator.process([{"file_name": f"{folder}/{i}.jpg"}], [{"sem_seg": outputs[i]}])
    return evaluator.evaluate()


def test_equals_a_literal_count(dataset):
    outputs = predictions()
    results = evaluate(dataset, range(5), outputs)["sem_seg"]
    for key, value in literal_results(dataset, outputs).items():
        assert results[key] == pytest.approx(value, rel=1e-12)
    assert np.isnan(results["IoU-d"])
    assert not any("Boundary" in key for key in results)


def test_nothing_is_kept_per_image(dataset):
    evaluator = SemSegEvaluator(NAME, distributed=False)
    evaluator.reset()
    evaluator.process([{"file_name": f"{dataset}/0.jpg"}], [{"sem_seg": predictions()[0]}])
    assert evaluator._predictions == []


def _share(rank, world_size, folder):
    register(folder)
    results = evaluate(folder, [[0, 1, 2], [3], [4]][rank], predictions(), distributed=True)
    assert (results is not None) == (rank == 0)
    if rank == 0:
        torch.save(dict(results["sem_seg"]), f"{folder}/results.pth")


def test_three_processes_with_uneven_shares_equal_one(dataset, tmp_path):
    expected = evaluate(dataset, range(5), predictions())["sem_seg"]
    processes.run(_share, 3, tmp_path)
    results = torch.load(tmp_path / "results.pth", weights_only=False)
    assert results["mIoU"] == expected["mIoU"]


def test_wrong_labels_name_the_file(dataset):
    Image.fromarray(np.full((6, 8), 40, np.uint8)).save(dataset / "0.png")
    with pytest.raises(InputError, match=r"0\.png: label 40 .* 0\.\.30 and ignores 99"):
        evaluate(dataset, [0], predictions())


def test_prediction_of_another_size_names_the_file(dataset):
    with pytest.raises(InputError, match=r"0\.png: labels of 6 x 8.* has 7 x 8"):
        evaluate(dataset, [0], [predictions()[1]])


@pytest.mark.parametrize("key", ["stuff_classes", "ignore_label"])
def test_incomplete_metadata_is_said(tmp_path, key):
    register(tmp_path, **{key: None})
    try:
        with pytest.raises(InputError, match=f"{NAME} has no {key}"):
            SemSegEvaluator(NAME)
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


def test_data_set_without_labels_is_refused():
    DatasetCatalog.register("test_unlabelled", lambda: [{"file_name": "x.jpg"}])
    MetadataCatalog.get("test_unlabelled").set(stuff_classes=["a"], ignore_label=255)
    try:
        with pytest.raises(InputError, match=r"no labels for 1 images, such as x\.jpg"):
            SemSegEvaluator("test_unlabelled")
    finally:
        DatasetCatalog.remove("test_unlabelled")
        MetadataCatalog.remove("test_unlabelled")
