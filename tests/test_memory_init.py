import itertools
import logging
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import make_head, make_tiny_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList

from mcibi_d2 import InputError
from mcibi_d2.data import SemSegMapper
from mcibi_d2.engine import MemoryInitHook, Trainer, memory_init
from mcibi_d2.engine.memory_init import cluster_pixels, read_rows
from mcibi_d2.modeling import FeatureMemory


class TinyModel(torch.nn.Module):
    """A segmentor whose projected features are the image itself."""

    def __init__(self, classes, divisibility=0, slots=1):
        super().__init__()
        shape = {"res5": ShapeSpec(channels=3, stride=1)}
        self.head = make_head(
            shape, num_classes=classes, channels=3, attention_dim=2, memory_slots=slots
        )
        self.head.project = torch.nn.Identity()
        self.backbone = torch.nn.Module()
        self.backbone.size_divisibility = divisibility

    def forward(self, batch):
        images = ImageList.from_tensors(
            [x["image"] for x in batch], self.backbone.size_divisibility
        )
        return self.head({"res5": images.tensor})

    @property
    def memory(self):
        return self.head.memory


def draw(model, batches, seed, max_images, init="random_pixel", pixels=100):
    """What the hook does before training."""
    hook = MemoryInitHook(init, seed, max_images, pixels)
    hook.trainer = SimpleNamespace(start_iter=0, model=model, data_loader=batches)
    hook.before_train()


def stream(count, size=(4, 5), classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for position in range(count):
        labels = torch.randint(0, classes + 1, size, generator=generator)
        labels[labels == classes] = 255
        image = torch.rand(3, *size, generator=generator)
        samples.append({"image": image, "sem_seg": labels, "position": position})
    return samples


def batched(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def upsampled_pixels(samples, k):
    """All pixels of class k, (n, 3)."""
    found = []
    for x in samples:
        size = x["sem_seg"].shape
        up = F.interpolate(x["image"][None], size, mode="bilinear", align_corners=False)[0]
        found.append(up[:, x["sem_seg"] == k].t())
    return torch.cat(found)


@pytest.mark.parametrize("slots", [1, 3])
def test_rows_are_different_pixels_of_their_class(slots):
    samples = stream(3, size=(9, 7))
    for sample in samples:  # features smaller than the labels
        sample["image"] = torch.rand(3, 4, 3)
    model = TinyModel(3, slots=slots)
    draw(model, batched(samples, 1), seed=0, max_images=100)
    for k, rows in enumerate(model.memory.rows.view(3, slots, 3)):
        pixels = upsampled_pixels(samples, k)
        exact = "donot_use_mm_for_euclid_dist"
        nearest = torch.cdist(rows, pixels, compute_mode=exact).min(dim=1)
        assert nearest.values.max() < 1e-6
        assert len(nearest.indices.unique()) == slots


@pytest.mark.parametrize("slots", [1, 2])
def test_draw_is_uniform_over_the_pixels_of_all_images(slots):
    # Class 0 has 2 pixels in the first image and 4 in the second; class 1 comes last, so that
    # both are seen.
    first, second = torch.full((3, 3), 255), torch.full((3, 3), 255)
    first[0, :2], second[1:, 1:], second[0] = 0, 0, 1
    images = torch.arange(18.0).view(2, 1, 3, 3).expand(2, 3, 3, 3)
    samples = [
        {"image": image, "sem_seg": labels, "position": p}
        for p, (image, labels) in enumerate(zip(images, (first, second), strict=True))
    ]
    draws = 1500
    counts = torch.zeros(slots, 18)
    pairs = torch.zeros(18, 18)
    model = TinyModel(2, slots=slots)
    for seed in range(draws):
        model.memory.initialized.zero_()
        draw(model, batched(samples, 1), seed, max_images=100)
        values = model.memory.rows[:slots, 0].long()
        counts[torch.arange(slots), values] += 1
        pairs[values[0], values[-1]] += 1
    for count in counts:
        taken = count[count > 0]
        assert len(taken) == 6
        chi_square = ((taken - draws / 6) ** 2 / (draws / 6)).sum()
        assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001
    if slots == 2:  # and over pairs of different pixels
        taken = pairs[pairs > 0]
        assert len(taken) == 30
        chi_square = ((taken - draws / 30) ** 2 / (draws / 30)).sum()
        assert chi_square < 58.3  # 29 degrees of freedom, p = 0.001


def test_classes_not_found_stay_uninitialised_and_the_limit_holds():
    samples = stream(5)
    for sample in samples:
        sample["sem_seg"][sample["sem_seg"] == 2] = 255
    used = []

    def loader():
        for batch in batched(samples, 1):
            used.append(len(batch))
            yield batch

    model = TinyModel(3)
    draw(model, loader(), seed=0, max_images=4)
    assert model.memory.initialized.tolist() == [True, True, False]
    assert sum(used) == 4


def _draw(rank, world_size, folder, init, slots):
    model = TinyModel(13, slots=slots)  # of which one has no pixel
    mine = [x for x in stream(12, classes=12) if x["position"] % world_size == rank]
    batches = batched(mine, 6 // world_size)
    draw(model, batches, seed=3, max_images=12, init=init, pixels=4)
    torch.save(model.memory.state_dict(), f"{folder}/{world_size}-{rank}.pth")


@pytest.mark.parametrize(
    "world_size, init, slots",
    [
        (2, "random_pixel", 1),
        pytest.param(3, "random_pixel", 2, marks=pytest.mark.slow),
        (3, "clustering", 2),
    ],
)
def test_draw_is_the_same_on_every_number_of_processes(tmp_path, world_size, init, slots):
    if init == "clustering":
        pytest.importorskip("sklearn")
    alone = TinyModel(13, slots=slots)
    batches = batched(stream(12, classes=12), 6)
    draw(alone, batches, seed=3, max_images=12, init=init, pixels=4)
    assert alone.memory.initialized.sum() == 12 * slots
    processes.run(_draw, world_size, tmp_path, init, slots)
    for rank in range(world_size):
        state = torch.load(tmp_path / f"{world_size}-{rank}.pth")
        torch.testing.assert_close(state["rows"], alone.memory.rows)
        assert torch.equal(state["initialized"], alone.memory.initialized)


def watched(model):
    """The images that the network runs on, each as its first value; grows as it does."""
    images = []
    model.register_forward_pre_hook(
        lambda _, args: images.extend(x["image"][0, 0, 0].item() for x in args[0])
    )
    return images


@pytest.fixture
def scenes_with_absent_classes(tmp_path):
    """The config of five images whose class list has two names more than the labels."""
    records = DatasetCatalog.get("scenes_train")[:5]
    metadata = MetadataCatalog.get("scenes_train").as_dict()
    metadata.pop("name")
    metadata["stuff_classes"] = [*metadata["stuff_classes"], "unicorn", "griffin"]
    DatasetCatalog.register("test_absent", lambda: records)
    MetadataCatalog.get("test_absent").set(**metadata)
    yield make_tiny_cfg(
        tmp_path, "DATASETS.TRAIN", "('test_absent',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "18"
    )
    DatasetCatalog.remove("test_absent")
    MetadataCatalog.remove("test_absent")


def test_a_class_that_never_occurs_costs_one_look_at_each_image(
    scenes_with_absent_classes, monkeypatch
):
    trainer = Trainer(scenes_with_absent_classes)
    events, looked = [], []
    model, memory = trainer.model, trainer.model.sem_seg_head.memory
    logger = logging.getLogger("mcibi_d2.engine.memory_init")
    monkeypatch.setattr(logger, "warning", events.append)
    preprocess, mapped = model.preprocess, SemSegMapper.__call__
    monkeypatch.setattr(model, "preprocess", lambda x: (events.append(len(x)), preprocess(x))[1])
    monkeypatch.setattr(
        SemSegMapper,
        "__call__",
        lambda self, x: (looked.append(x["file_name"]), mapped(self, x))[1],
    )
    hook = next(hook for hook in trainer._hooks if isinstance(hook, MemoryInitHook))
    hook.trainer = trainer
    hook.before_train()
    # Batches of two, so that the last one has an image of the next pass.
    assert len(set(looked[:5])) == 5 and len(looked) == 6
    message, *batches = events  # what is missing is said before the network runs
    assert "16 (unicorn): 0, 17 (griffin): 0" in message
    assert 0 < sum(batches) <= 5
    assert not memory.initialized[16:].any() and memory.initialized.sum() > 8


@pytest.mark.parametrize("named", ["file_name", "position"])
def test_an_endless_loader_of_another_make_ends_with_its_set(named):
    samples = stream(7)
    for number, sample in enumerate(samples):
        sample["image"][0, 0, 0] = number
        sample["file_name"] = f"{number}.png"
        del sample[{"file_name": "position", "position": "file_name"}[named]]
    batches = itertools.cycle(batched(samples, 2))
    model = TinyModel(4)  # of which the last one never occurs
    images = watched(model)
    draw(model, batches, seed=0, max_images=10**9)
    assert model.memory.initialized.tolist() == [True, True, True, False]
    assert 0 < len(images) == len(set(images)) <= 3


def test_the_network_runs_on_the_images_of_the_drawn_pixels_alone():
    samples = stream(40)
    for number, sample in enumerate(samples):
        sample["image"][0, 0, 0] = number
        sample["sem_seg"][:] = torch.where(sample["sem_seg"] == 2, 255, sample["sem_seg"])
    samples[-1]["sem_seg"][0, 0] = 2
    model = TinyModel(3)
    images = watched(model)
    draw(model, batched(samples, 4), seed=0, max_images=100)
    assert model.memory.initialized.all()
    assert 39 in images and len(images) <= 3


@pytest.mark.parametrize("init", ["random_pixel", "clustering"])
def test_no_more_than_some_images_wait_for_the_network(monkeypatch, init):
    if init == "clustering":
        pytest.importorskip("sklearn")
    rows = []
    for held in (2**28, 0):
        monkeypatch.setattr(memory_init, "HELD_BYTES", held)
        model = TinyModel(4, slots=2)
        draw(model, batched(stream(9), 2), seed=1, max_images=100, init=init, pixels=7)
        rows.append(model.memory.rows)
    assert torch.equal(*rows) and rows[0].any()


def test_windows_at_test_time_have_no_part_in_the_draw(tmp_path):
    rows = []
    for inference in ("whole", "slide"):
        torch.manual_seed(0)
        options = ["TEST.INFERENCE", inference, "TEST.SLIDE.WINDOW", "[33, 33]"]
        cfg = make_tiny_cfg(tmp_path, *options, "TEST.SLIDE.STRIDE", "[33, 33]")
        trainer = Trainer(cfg)
        draw(trainer.model, trainer.data_loader, seed=0, max_images=4)
        rows.append(trainer.model.sem_seg_head.memory.rows)
    assert torch.equal(*rows) and rows[0].any()


def test_clustering_with_one_slot_is_the_centre_of_the_directions():
    pytest.importorskip("sklearn")
    samples = stream(2, size=(6, 6))
    model = TinyModel(3)
    draw(model, batched(samples, 1), seed=0, max_images=2, init="clustering", pixels=1000)
    for k, row in enumerate(model.memory.rows):
        pixels = upsampled_pixels(samples, k)
        centre = F.normalize(pixels, dim=1).mean(dim=0)
        torch.testing.assert_close(row, F.normalize(centre, dim=0) * pixels.norm(dim=1).mean())


def test_clustering_finds_the_clusters_of_a_class():
    pytest.importorskip("sklearn")
    axes = torch.eye(4)[:3]
    # Three directions, of different lengths, with a little noise; the last pixels are padding.
    lengths = torch.linspace(1, 3, 60)[:, None]
    pixels = axes[torch.arange(60) % 3] * lengths + 0.01 * torch.rand(60, 4)
    pixels = torch.stack([torch.cat([pixels, torch.zeros(10, 4)]), torch.zeros(70, 4)])
    rows, found = cluster_pixels(pixels, torch.tensor([60, 0]), 3, seed=0)
    assert found.tolist() == [True] * 3 + [False] * 3
    cosines = F.normalize(rows[:3], dim=1) @ axes.t()
    assert (cosines.max(dim=1).values > 0.999).all()
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2]
    assert ((rows[:3].norm(dim=1) - 2).abs() < 0.1).all()
    # Fewer directions than slots; a pixel without a direction is none.
    few = torch.tensor([[[1.0, 0, 0, 0], [2.0, 0, 0, 0], [0.0, 0, 0, 0]]])
    rows, found = cluster_pixels(few, torch.tensor([3]), 2, seed=0)
    assert found.tolist() == [True, False]
    torch.testing.assert_close(rows[0], torch.tensor([1.5, 0, 0, 0]))


def memory_file(tmp_path, kind, rows):
    if kind == "npy":
        path = tmp_path / "rows.npy"
        np.save(path, rows.numpy())
    else:
        path = tmp_path / "rows.pth"
        known = torch.tensor([True] * (len(rows) - 1) + [False])
        state = {"head.memory.rows": rows, "head.memory.initialized": known}
        torch.save({"tensor": rows, "checkpoint": {"model": state}, "state": state}[kind], path)
    return str(path)


@pytest.mark.parametrize("kind", ["npy", "tensor", "checkpoint", "state"])
def test_rows_from_a_file(tmp_path, kind):
    rows = torch.rand(3, 3)
    rows[2] = 0
    path = memory_file(tmp_path, kind, rows)
    model = TinyModel(3)
    hook = MemoryInitHook("file", file=path)
    hook.trainer = SimpleNamespace(start_iter=0, model=model)
    hook.before_train()
    assert torch.equal(model.memory.rows, rows)
    assert model.memory.initialized.tolist() == [True, True, False]


def test_rows_of_a_file_win_over_those_of_the_weights(tmp_path):
    rows = torch.rand(3, 3)
    model = TinyModel(3)
    model.memory.initialize(torch.rand(3, 3), torch.ones(3, dtype=torch.bool))
    hook = MemoryInitHook("file", file=memory_file(tmp_path, "npy", rows))
    hook.trainer = SimpleNamespace(start_iter=0, model=model)
    hook.before_train()
    assert torch.equal(model.memory.rows, rows)


@pytest.mark.parametrize("init", ["random_pixel", "clustering"])
def test_pixels_that_are_not_finite_stop_the_run(init):
    samples = stream(3)
    samples[0]["image"][:] = float("inf")
    samples[0]["sem_seg"][:] = 1
    with pytest.raises(InputError, match=r"features of classes \[1\] are not finite"):
        draw(TinyModel(3), [samples], seed=0, max_images=3, init=init)


def test_rows_by_class_and_slot_from_a_file(tmp_path):
    rows = torch.rand(4, 2, 5)
    np.save(tmp_path / "rows.npy", rows.numpy())
    read, found = read_rows(str(tmp_path / "rows.npy"), FeatureMemory(4, 5, slots=2))
    assert torch.equal(read, rows.flatten(0, 1)) and found.all()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"not a file of torch", "cannot be read"),
        (torch.rand(3, 4), r"\(3, 4\), expected rows of shape \(3, 3\)"),
        (torch.full((3, 3), float("nan")), "rows \\[0, 1, 2\\] are not finite"),
        ({"model": {"weight": torch.rand(3)}}, "has 0 tensors called memory.rows"),
        ([1, 2], "list, expected rows of shape"),
        ({"model": 5}, "has 0 tensors called memory.rows"),
        ({"memory.rows": torch.rand(3, 3), "memory.initialized": torch.ones(2).bool()}, "3 bools"),
        ({"memory.rows": torch.rand(3, 3), "memory.initialized": torch.ones(3)}, "3 bools"),
        (torch.ones(3, 3, dtype=torch.long), "torch.int64, expected floating point"),
    ],
    ids=[
        "missing",
        "garbage",
        "shape",
        "nan",
        "no memory",
        "list",
        "no state",
        "few flags",
        "float flags",
        "integers",
    ],
)
def test_files_without_fitting_rows_are_refused(tmp_path, content, message):
    path = tmp_path / "rows.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=f"INIT_FILE: .*rows.pth: .*{message}"):
        read_rows(str(path), FeatureMemory(3, 3))


def test_a_memory_that_came_with_the_weights_is_kept():
    model = TinyModel(3)
    rows = torch.rand(3, 3)
    model.memory.initialize(rows, torch.tensor([True, True, False]))
    draw(model, batched(stream(3), 1), seed=0, max_images=100)
    assert model.memory.initialized.tolist() == [True, True, False]


def test_random_rows_follow_the_seed_and_not_the_weights(tmp_path):
    options = ["MODEL.MCIBI.MEMORY.UPDATE", "random"]
    drawn = []
    for seed in ("1", "2", "1"):
        torch.manual_seed(len(drawn))
        trainer = Trainer(make_tiny_cfg(tmp_path, *options, "SEED", seed))
        memory = trainer.model.sem_seg_head.memory
        memory.rows.fill_(3.0)  # as loaded
        trainer.train()
        drawn.append(memory.rows.clone())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    resumed = Trainer(make_tiny_cfg(tmp_path, *options, "SEED", "2", "SOLVER.MAX_ITER", "5"))
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert torch.equal(resumed.model.sem_seg_head.memory.rows, drawn[2])


@pytest.mark.parametrize("init", memory_init.INITS)
@pytest.mark.parametrize("update", ["cosine", "learned"])
def test_training_from_every_start(tmp_path, init, update):
    if init == "clustering":
        pytest.importorskip("sklearn")
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).random((16, 16), np.float32))
    cfg = make_tiny_cfg(
        tmp_path,
        "MODEL.MCIBI.MEMORY.INIT", init,
        "MODEL.MCIBI.MEMORY.INIT_PIXELS", "5",
        "MODEL.MCIBI.MEMORY.INIT_FILE", str(tmp_path / "rows.npy"),
        "MODEL.MCIBI.MEMORY.UPDATE", update,
    )  # fmt: skip
    trainer = Trainer(cfg)
    trainer.train()
    memory = trainer.model.sem_seg_head.memory
    assert memory.initialized.sum() > 8 and memory.rows.isfinite().all()


def test_memory_is_initialised_before_training_and_not_again(tmp_path, monkeypatch):
    calls = []
    original = memory_init.draw_random_pixels
    monkeypatch.setattr(
        memory_init, "draw_random_pixels", lambda *args: (calls.append(1), original(*args))[1]
    )
    cfg = make_tiny_cfg(tmp_path / "output", "SOLVER.CHECKPOINT_PERIOD", "2")
    Trainer(cfg).train()
    assert calls == [1]
    cfg.SOLVER.MAX_ITER = 6
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert calls == [1]


def test_first_batch_mean_has_no_initial_pass():
    model = TinyModel(3)
    draw(model, batched(stream(3), 1), seed=0, max_images=100, init="first_batch_mean")
    assert not model.memory.initialized.any()


@pytest.mark.parametrize("divisibility", [0, 32])
def test_padding_of_a_batch_is_never_drawn(divisibility):
    small = {"image": torch.ones(3, 5, 5), "sem_seg": torch.zeros(5, 5).long(), "position": 0}
    large = {"image": torch.ones(3, 9, 9), "sem_seg": torch.ones(9, 9).long(), "position": 1}
    for seed in range(10):
        model = TinyModel(2, divisibility)
        draw(model, [[small, large]], seed, max_images=10)
        assert torch.equal(model.memory.rows, torch.ones(2, 3))
