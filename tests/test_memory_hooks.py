import copy
import math
from types import SimpleNamespace

import processes
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_cfg
from detectron2.engine import hooks
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList
from hypothesis import given
from hypothesis import strategies as st

from mcibi_d2.engine import MemoryInitHook, MemoryUpdateHook, Trainer, memory_init
from mcibi_d2.engine.memory_hooks import poly_momentum
from mcibi_d2.modeling import MCIBIHead


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.floats(0.1, 2.0))
def test_momentum_is_equation_7(t, m0, p):
    expected = (1 - t / 1000) ** p * (m0 - m0 / 100) + m0 / 100
    assert math.isclose(poly_momentum(t, 1000, m0, p), expected, rel_tol=1e-12)


def test_update_hook_comes_before_the_learning_rate_and_the_checkpoint(tiny_cfg):
    order = [type(h) for h in Trainer(tiny_cfg)._hooks]
    update = order.index(MemoryUpdateHook)
    assert order.index(MemoryInitHook) < update < order.index(hooks.LRScheduler)
    assert update < order.index(hooks.PeriodicCheckpointer)


def test_baseline_has_no_memory_hooks(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "MODEL.MCIBI.ENABLED", "False")
    assert not {MemoryInitHook, MemoryUpdateHook} & {type(h) for h in Trainer(cfg)._hooks}


def test_memory_moves_once_per_step_by_what_the_step_observed(tmp_path, monkeypatch):
    trainer = Trainer(make_tiny_cfg(tmp_path / "output"))
    memory = trainer.model.sem_seg_head.memory
    commits = []

    def commit(momentum):
        before = copy.deepcopy(memory)
        type(memory).commit(memory, momentum)
        commits.append((momentum, before._sums[:, -2].sum().item()))
        assert not memory._sums.any()

    monkeypatch.setattr(memory, "commit", commit)
    trainer.train()
    assert [m for m, _ in commits] == [poly_momentum(t, 4, 0.9, 0.9) for t in range(4)]
    assert all(pixels > 1000 for _, pixels in commits)
    assert memory.initialized.sum() > 8 and memory.rows.isfinite().all()


# --- the initial pixels


class TinyModel(torch.nn.Module):
    """A segmentor whose projected features are the image itself."""

    def __init__(self, classes, divisibility=0):
        super().__init__()
        shape = {"res5": ShapeSpec(channels=3, stride=1)}
        self.head = MCIBIHead(
            shape, in_feature="res5", num_classes=classes, channels=3, attention_dim=2
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


def test_rows_are_pixels_of_their_class():
    samples = stream(3, size=(9, 7))
    for sample in samples:  # features smaller than the labels
        sample["image"] = torch.rand(3, 4, 3)
    model = TinyModel(3)
    draw(model, batched(samples, 1), seed=0, max_images=100)
    for k, row in enumerate(model.memory.rows):
        pixels = []
        for x in samples:
            up = F.interpolate(x["image"][None], (9, 7), mode="bilinear", align_corners=False)[0]
            pixels.append(up[:, x["sem_seg"] == k].t())
        assert (torch.cat(pixels) - row).abs().sum(dim=1).min() < 1e-6


def test_draw_is_uniform_over_the_pixels_of_all_images():
    # Class 0 has 2 pixels in the first image and 4 in the second; class 1 comes last, so that
    # both are seen.
    first, second = torch.full((2, 3), 255), torch.full((2, 3), 255)
    first[0, :2], second[:, 1:], second[0, 0] = 0, 0, 1
    images = torch.arange(12.0).view(2, 1, 2, 3).expand(2, 3, 2, 3)
    draws = 1500
    counts = torch.zeros(12)
    for seed in range(draws):
        model = TinyModel(2)
        samples = [
            {"image": image, "sem_seg": labels, "position": p}
            for p, (image, labels) in enumerate(zip(images, (first, second), strict=True))
        ]
        draw(model, batched(samples, 1), seed, max_images=100)
        counts[int(model.memory.rows[0, 0])] += 1
    taken = counts[counts > 0]
    assert len(taken) == 6
    chi_square = ((taken - draws / 6) ** 2 / (draws / 6)).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


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


def _draw(rank, world_size, folder):
    model = TinyModel(12)
    mine = [x for x in stream(12, classes=12) if x["position"] % world_size == rank]
    draw(model, batched(mine, 6 // world_size), seed=3, max_images=12)
    torch.save(model.memory.state_dict(), f"{folder}/{world_size}-{rank}.pth")


@pytest.mark.parametrize("world_size", [2, 3])
def test_draw_is_the_same_on_every_number_of_processes(tmp_path, world_size):
    alone = TinyModel(12)
    draw(alone, batched(stream(12, classes=12), 6), seed=3, max_images=12)
    processes.run(_draw, world_size, tmp_path)
    for rank in range(world_size):
        state = torch.load(tmp_path / f"{world_size}-{rank}.pth")
        torch.testing.assert_close(state["rows"], alone.memory.rows)


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


def test_trains_in_detectron2s_own_segmentor(tmp_path):
    cfg = make_tiny_cfg(tmp_path, "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    trainer = Trainer(cfg)
    trainer.train()
    assert trainer.model.sem_seg_head.memory.initialized.all()


def test_precise_bn_leaves_the_memory_alone(tmp_path):
    trainer = Trainer(make_tiny_cfg(tmp_path))
    batch = next(iter(trainer.data_loader))
    with torch.no_grad():
        trainer.model(batch)
    assert not trainer.model.sem_seg_head.memory._sums.any()
    trainer.model(batch)
    assert trainer.model.sem_seg_head.memory._sums.any()
