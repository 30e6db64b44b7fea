import numpy as np
import pytest
from conftest import make_tiny_cfg
from PIL import Image

from mcibi_d2 import InputError
from mcibi_d2.data import build_train_loader
from mcibi_d2.data.loader import MAX_SKIPPED, TrainingStream, move_to_iteration

BAD = {3, 4, 8}


def mapper(record):
    if record["number"] in BAD:
        raise InputError(f"{record['number']}.png: bad")
    return {"number": record["number"], "draw": np.random.randint(10**9)}


def stream(records=10, skip_bad=True, seed=5):
    return TrainingStream([{"number": i} for i in range(records)], mapper, seed, skip_bad)


def test_bad_sample_stops_by_default():
    with pytest.raises(InputError, match=r"\.png: bad$"):
        [stream(skip_bad=False)[p] for p in range(10)]


def test_bad_samples_are_replaced_by_the_next_good_ones():
    whole = stream()
    for epoch in range(3):
        order = np.random.default_rng([5, epoch]).permutation(10)
        for place in range(10):
            sample = whole[epoch * 10 + place]
            following = [int(order[(place + k) % 10]) for k in range(10)]
            good = next(number for number in following if number not in BAD)
            assert sample["number"] == good and sample["position"] == epoch * 10 + place
            left_out = following[: following.index(good)]
            assert sample.get("skipped", []) == [f"{number}.png: bad" for number in left_out]


def test_replacements_are_a_function_of_seed_and_position():
    one, other = stream(), stream()
    backwards = {p: other[p] for p in reversed(range(30))}
    assert all(one[p] == backwards[p] for p in range(30))
    # A record that stands in for another is augmented in another way.
    draws = [one[p]["draw"] for p in range(30)]
    assert len(set(draws)) == 30


def test_good_samples_are_as_without_skipping():
    order = np.random.default_rng([5, 0]).permutation(10)
    place = next(p for p in range(10) if order[p] not in BAD)
    assert stream()[place] == stream(skip_bad=False)[place]


@pytest.mark.parametrize("count", [3, 300])
def test_nothing_but_bad_samples_is_an_error(count):
    calls = []

    def refuse(record):
        calls.append(record)
        raise InputError("x.png: bad")

    with pytest.raises(InputError, match=rf"^x\.png: bad; the {min(count, MAX_SKIPPED) - 1} "):
        TrainingStream([{}] * count, refuse, 0, skip_bad=True)[1]
    assert len(calls) == min(count, MAX_SKIPPED)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_with_bad_files(tmp_path, monkeypatch, workers):
    """The same for any number of workers, each saying what it left out."""
    folder = tmp_path / "CamVid"
    (folder / "train").mkdir(parents=True)
    (folder / "trainannot").mkdir()
    lines = []
    for i in range(6):
        Image.new("RGB", (40, 30), (i, i, i)).save(folder / f"train/{i}.png")
        # A value that the table has not, and a label of another size.
        Image.new("L", (40, 31 if i == 4 else 30), 99 if i == 2 else 1).save(
            folder / f"trainannot/{i}.png"
        )
        lines.append(f"/x/train/{i}.png /x/trainannot/{i}.png")
    (folder / "train.txt").write_text("\n".join(lines))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = make_tiny_cfg(
        tmp_path / "output", "DATASETS.TRAIN", "('camvid_11_train',)", "SEED", "3",
        "DATALOADER.SKIP_BAD", "True", "DATALOADER.NUM_WORKERS", str(workers),
    )  # fmt: skip
    loader = build_train_loader(cfg)
    move_to_iteration(loader, cfg, 3, 0)
    samples = [x for batch, _ in zip(loader, range(6), strict=False) for x in batch]
    assert [x["position"] for x in samples] == list(range(12))
    used = {x["file_name"].rsplit("/")[-1] for x in samples}
    assert used == {"0.png", "1.png", "3.png", "5.png"}
    reasons = [reason for x in samples for reason in x.get("skipped", ())]
    assert len(reasons) >= 4
    assert {"2.png: label 99" in r or "4.png: labels of 31 x 40" in r for r in reasons} == {True}
    order = [int(n) for e in range(2) for n in np.random.default_rng([3, e]).permutation(6)]
    for place, (number, x) in enumerate(zip(order, samples, strict=True)):
        if number not in (2, 4):
            assert x["file_name"].endswith(f"/{number}.png") and "skipped" not in x, place
