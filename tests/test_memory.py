import contextlib
import copy

import literal
import processes
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_d2.modeling import FeatureMemory
from mcibi_d2.modeling.memory import class_sums, interpolate_pixels

SIZES = st.integers(1, 9)


def random_case(seed, batch, classes, channels, grid, size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    memory = FeatureMemory(classes, channels).to(dtype)
    memory.rows.copy_(torch.randn(classes, channels, generator=generator, dtype=dtype))
    memory.initialized.copy_(torch.rand(classes, generator=generator) < 0.7)
    memory.rows[~memory.initialized] = 0
    features = torch.randn(batch, channels, *grid, generator=generator, dtype=dtype)
    labels = torch.randint(-1, classes + 2, (batch, *size), generator=generator)
    labels[labels == classes + 1] = 255
    return memory, features, labels


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    classes=st.integers(1, 6),
    channels=st.integers(1, 8),
    grid=st.tuples(SIZES, SIZES),
    size=st.tuples(st.integers(1, 21), st.integers(1, 21)),
    momentum=st.floats(0, 1),
    update=st.sampled_from(["cosine", "mean"]),
    precision=st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-4)]),
    # An accelerator takes all classes, where the CPU takes those that occur.
    on_host=st.booleans(),
)
def test_update_equals_the_equations(
    seed, batch, classes, channels, grid, size, momentum, update, precision, on_host
):
    dtype, tolerance = precision
    if dtype == torch.float32:
        # With one channel the cosine is 1 or -1, and rounding decides what Eq. 10 weighs.
        channels = max(channels, 2)
    memory, features, labels = random_case(seed, batch, classes, channels, grid, size)
    memory.update = update
    rows, initialized = literal.step(
        memory.rows.clone(), memory.initialized.clone(), features, labels, classes, momentum,
        update == "cosine",
    )  # fmt: skip
    memory.to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_sums, "_on_host", lambda tensor: on_host)
        memory.observe(features.to(dtype), labels)
    memory.commit(momentum)
    assert torch.equal(memory.initialized, initialized)
    torch.testing.assert_close(memory.rows.double(), rows, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(1, 4),
    slots=st.integers(2, 4),
    channels=st.integers(2, 6),
    grid=st.tuples(SIZES, SIZES),
    size=st.tuples(st.integers(1, 15), st.integers(1, 15)),
    update=st.sampled_from(["cosine", "mean"]),
    on_host=st.booleans(),
)
def test_update_with_slots_equals_the_equations(
    seed, classes, slots, channels, grid, size, update, on_host
):
    _, features, labels = random_case(seed, 2, classes, channels, grid, size)
    memory = FeatureMemory(classes, channels, update, slots).double()
    rows = torch.randn(classes, slots, channels, dtype=torch.float64)
    # Of each class the first few slots are filled.
    known = torch.rand(classes, slots) < 0.8
    known = known.cumprod(dim=1).bool()
    memory.initialize(rows.flatten(0, 1), known.flatten())
    rows = memory.rows.view_as(rows)
    expected, initialized = literal.step_slots(
        rows.clone(), known, features, labels, 0.4, update == "cosine"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(class_sums, "_on_host", lambda tensor: on_host)
        memory.observe(features, labels)
    memory.commit(0.4)
    assert torch.equal(memory.initialized, initialized.flatten())
    torch.testing.assert_close(memory.rows, expected.flatten(0, 1), atol=1e-9, rtol=1e-9)


def test_empty_slots_are_filled_one_per_commit():
    memory = FeatureMemory(2, 3, slots=3)
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    for filled in (1, 2, 3, 3):
        features = torch.rand(1, 3, 4, 4)
        memory.observe(features, labels)
        memory.commit(0.5)
        assert memory.initialized.view(2, 3).sum(dim=1).tolist() == [filled, 0]
        if filled == 1:
            torch.testing.assert_close(memory.rows[0], features.mean(dim=(0, 2, 3)))


def test_a_slot_without_pixels_keeps_its_row():
    memory = FeatureMemory(1, 2, slots=2)
    memory.initialize(torch.eye(2), torch.ones(2, dtype=torch.bool))
    features = torch.tensor([2.0, 1.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    for _ in range(5):
        memory.observe(features, torch.zeros(1, 2, 2, dtype=torch.long))
        memory.commit(0.9)
    assert torch.equal(memory.rows[1], torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(memory.rows[0], torch.tensor([2.0, 1.0]), atol=1e-3, rtol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(2, 4), st.integers(1, 5))
def test_read_with_slots_is_one_map_per_slot(seed, classes, slots, channels):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(classes, slots, channels, generator=generator)
    known = torch.rand(classes, slots, generator=generator) < 0.6
    memory = FeatureMemory(classes, channels, slots=slots)
    memory.initialize(rows.flatten(0, 1), known.flatten())
    probabilities = torch.rand(2, classes, 3, 2, generator=generator).softmax(dim=1)
    contexts = memory.read(probabilities).chunk(slots, dim=1)
    for slot, context in enumerate(contexts):
        single = FeatureMemory(classes, channels)
        single.initialize(rows[:, slot], known[:, slot])
        torch.testing.assert_close(context, single.read(probabilities))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.tuples(SIZES, SIZES), st.integers(1, 20), st.integers(1, 20))
def test_single_pixels_are_those_of_the_upsampled_map(seed, grid, height, width):
    features = torch.randn(3, *grid, generator=torch.Generator().manual_seed(seed))
    every = torch.arange(height * width)
    expected = literal.up(features[None], (height, width))[0].flatten(1).t()
    pixels = interpolate_pixels(features, (height, width), every)
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=1e-5)


class _Largest(TorchDispatchMode):
    """Remembers the largest number of elements that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("update, slots", [("cosine", 1), ("mean", 1), ("cosine", 2)])
def test_nothing_of_the_upsampled_size_is_made(update, slots):
    memory = FeatureMemory(5, 64, update, slots)
    features, labels = torch.randn(2, 64, 16, 16), torch.randint(0, 5, (2, 128, 128))
    with _Largest() as largest:
        memory.observe(features, labels)
        memory.commit(0.5)
    # The features themselves, or one number per pixel and operation.
    assert largest.elements <= max(features.numel(), 4 * 128 * 128) < 64 * 128 * 128 / 8


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("update", ["cosine", "mean", "learned"])
def test_nothing_asks_the_device_for_a_value(update, slots, monkeypatch):
    # Tensors on "meta" have no values: whatever needs one fails. There is no autocast for them.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    memory = FeatureMemory(5, 8, update, slots).to("meta")
    features, labels = torch.randn(2, 8, 4, 4), torch.randint(0, 5, (2, 16, 16))
    memory.observe(features.to("meta"), labels.to("meta"))
    memory.commit(0.5)
    memory.read(torch.rand(2, 5, 4, 4, device="meta"))
    memory.health()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 3))
def test_health_is_what_it_says(seed, classes, slots):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(classes, slots, 4, generator=generator)
    known = torch.rand(classes, slots, generator=generator) < 0.6
    memory = FeatureMemory(classes, 4, slots=slots)
    memory.initialize(rows.flatten(0, 1), known.flatten())
    health = {name: value.item() for name, value in memory.health().items()}
    assert health["initialized"] == pytest.approx(known.float().mean().item())
    norms = rows[known].norm(dim=1)
    assert health["row_norm"] == pytest.approx(norms.mean().item() if len(norms) else 0.0)
    cosines = [
        F.cosine_similarity(rows[a, s], rows[b, t], dim=0).item()
        for a, s in known.nonzero().tolist()
        for b, t in known.nonzero().tolist()
        if a != b
    ]
    expected = sum(cosines) / max(len(cosines), 1)
    assert health["cosine"] == pytest.approx(expected, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5))
def test_read_gathers_the_initialised_rows(seed, classes, channels):
    memory, features, _ = random_case(seed, 2, classes, channels, (3, 4), (3, 4))
    probabilities = torch.rand(2, classes, 3, 4, dtype=torch.float64).softmax(dim=1)
    context = memory.read(probabilities)
    for n in range(2):
        for y in range(3):
            for x in range(4):
                weights = probabilities[n, :, y, x] * memory.initialized
                expected = torch.zeros(channels, dtype=torch.float64)
                if weights.sum() > 0:
                    expected = (weights / weights.sum()) @ memory.rows
                torch.testing.assert_close(context[n, :, y, x], expected)


def test_read_of_an_empty_memory_is_zero_and_has_a_gradient():
    memory = FeatureMemory(4, 3)
    probabilities = torch.rand(1, 4, 2, 2, requires_grad=True)
    context = memory.read(probabilities)
    assert torch.equal(context, torch.zeros(1, 3, 2, 2))
    context.sum().backward()
    assert torch.isfinite(probabilities.grad).all()


def test_several_observations_equal_one_of_the_joined_batch():
    memory, features, labels = random_case(1, 4, 5, 6, (4, 5), (17, 23))
    other = copy.deepcopy(memory)
    memory.observe(features, labels)
    other.observe(features[:1], labels[:1])
    other.observe(features[1:], labels[1:])
    for m in (memory, other):
        m.commit(0.3)
    torch.testing.assert_close(memory.rows, other.rows, atol=1e-12, rtol=1e-12)


def test_commit_clears_the_sums():
    memory, features, labels = random_case(2, 1, 3, 4, (4, 4), (8, 8))
    memory.observe(features, labels)
    memory.commit(0.5)
    rows = memory.rows.clone()
    memory.commit(0.5)
    assert torch.equal(memory.rows, rows)


@pytest.mark.parametrize("labels", [255, -1, 7])
def test_batch_without_a_valid_pixel_changes_nothing(labels):
    memory, features, _ = random_case(3, 2, 3, 4, (4, 4), (8, 8))
    before = copy.deepcopy(memory.state_dict())
    memory.observe(features, torch.full((2, 8, 8), labels))
    memory.commit(0.9)
    for name, value in memory.state_dict().items():
        assert torch.equal(value, before[name])


def test_ignored_class_id_is_left_out():
    memory, features, _ = random_case(4, 1, 3, 4, (4, 4), (8, 8))
    memory.initialized.fill_(True)
    before = memory.rows.clone()
    memory.observe(features, torch.ones(1, 8, 8, dtype=torch.long), ignore_value=1)
    memory.commit(0.9)
    assert torch.equal(memory.rows, before)


def test_constant_class_is_its_mean_and_not_nan():
    memory = FeatureMemory(2, 8)
    vector = torch.randn(8)
    memory.rows[0] = vector * 3
    memory.initialized[0] = True
    lengths = torch.tensor([1.0, 2.0, 4.0, 5.0]).view(1, 1, 2, 2)
    features = vector.view(1, 8, 1, 1) * lengths
    memory.observe(features, torch.zeros(1, 2, 2, dtype=torch.long))
    memory.commit(1.0)
    torch.testing.assert_close(memory.rows[0], vector * 3.0, rtol=1e-5, atol=1e-5)


def test_a_large_constant_class_is_its_mean_in_float32():
    # Half a million equal numbers: added one by one to one sum, they would lose a percent.
    memory = FeatureMemory(2, 16)
    vector = torch.rand(16) + 0.1
    memory.initialize(vector * torch.ones(2, 1), torch.ones(2, dtype=torch.bool))
    features = 3 * vector.view(1, 16, 1, 1).expand(1, 16, 64, 128)
    memory.observe(features, torch.zeros(1, 512, 1024, dtype=torch.long))
    torch.testing.assert_close(memory._sums[0, -2], torch.tensor(512.0 * 1024))
    memory.commit(1.0)
    torch.testing.assert_close(memory.rows[0], 3 * vector, rtol=1e-4, atol=0)


@pytest.mark.parametrize("factor", [-7.0, -0.6, -1.0])
def test_neighbours_that_cancel_do_not_outweigh_the_rest(factor):
    for seed in range(20):
        memory, features, labels = random_case(seed, 1, 3, 8, (4, 4), (16, 16))
        memory.initialized.fill_(True)
        memory.rows.copy_(torch.randn(3, 8, dtype=torch.float64))
        features[..., 1] = factor * features[..., 0]
        rows, _ = literal.step(memory.rows.clone(), memory.initialized, features, labels, 3, 0.7)
        memory.float()
        memory.observe(features.float(), labels)
        assert (memory._sums[:, -3] <= 2 * memory._sums[:, -2]).all()  # weights are 0..2
        memory.commit(0.7)
        torch.testing.assert_close(memory.rows.double(), rows, atol=1e-4, rtol=1e-4)


def test_zero_pixels_and_zero_rows_count_with_weight_one():
    memory = FeatureMemory(2, 2)
    memory.initialized.fill_(True)
    memory.rows[1] = torch.tensor([1.0, 0.0])
    # Class 0 has a zero row; class 1 one zero pixel and one orthogonal to its row.
    features = torch.tensor([[[[2.0, 4.0, 0.0, 0.0]], [[0.0, 0.0, 0.0, 6.0]]]])
    memory.observe(features, torch.tensor([[[0, 0, 1, 1]]]))
    memory.commit(1.0)
    torch.testing.assert_close(memory.rows, torch.tensor([[3.0, 0.0], [0.0, 3.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_never_reaches_the_rows(bad):
    memory, features, _ = random_case(5, 1, 3, 4, (4, 4), (4, 4), torch.float32)
    memory.initialized.fill_(True)
    before = memory.rows.clone()
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 2:] = 1
    features[0, 2, 0, 0] = bad
    memory.observe(features, labels)
    memory.commit(0.5)
    assert memory.rows.isfinite().all()
    assert memory.rejected.tolist() == [True, False, False]
    assert torch.equal(memory.rows[0], before[0])
    # The other classes do not notice.
    other = copy.deepcopy(memory)
    other.rows.copy_(before)
    other.observe(features.nan_to_num(0, 0, 0), labels)
    other.commit(0.5)
    torch.testing.assert_close(memory.rows[1:], other.rows[1:])
    assert not torch.equal(memory.rows[1], before[1])
    memory.observe(features.nan_to_num(0, 0, 0), labels)
    memory.commit(0.5)
    assert not memory.rejected.any()
    assert not torch.equal(memory.rows[0], before[0])


def test_a_value_that_is_not_finite_where_labels_are_ignored_does_nothing():
    memory, features, _ = random_case(5, 1, 3, 4, (4, 4), (8, 8), torch.float32)
    labels = torch.full((1, 8, 8), 255)
    labels[0, 4:] = 1
    clean = copy.deepcopy(memory)
    clean.observe(features, labels)
    features[0, 2, 0, 0] = float("nan")
    memory.observe(features, labels)
    for m in (memory, clean):
        m.commit(0.5)
    assert not memory.rejected.any()
    torch.testing.assert_close(memory.rows, clean.rows)


def test_rows_that_are_not_finite_do_not_initialise():
    memory = FeatureMemory(2, 3)
    rows = torch.ones(2, 3)
    rows[1, 2] = float("inf")
    memory.initialize(rows, torch.ones(2, dtype=torch.bool))
    assert memory.initialized.tolist() == [True, False]
    assert not memory.rows[1].any()


def test_zero_memory_stays_zero():
    memory = FeatureMemory(3, 4, update="zero")
    memory.observe(torch.randn(1, 4, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))
    memory.commit(0.9)
    memory.initialize(torch.ones(3, 4), torch.ones(3, dtype=torch.bool))
    assert not memory.rows.any() and not memory.initialized.any()


def test_random_rows_are_frozen():
    memory = FeatureMemory(3, 8, update="random", slots=2)
    assert memory.initialized.all() and not memory.rows.requires_grad
    assert (memory.rows >= 0).all() and memory.rows.any(dim=1).all()
    before = memory.rows.clone()
    memory.observe(torch.randn(1, 8, 4, 4), torch.zeros(1, 8, 8, dtype=torch.long))
    memory.commit(0.9)
    memory.initialize(torch.ones(6, 8), torch.ones(6, dtype=torch.bool))
    assert torch.equal(memory.rows, before)
    torch.manual_seed(99)  # as on another process
    again = FeatureMemory(3, 8, update="random", slots=2)
    assert torch.equal(again.rows, before)
    again.draw(1)
    assert not torch.equal(again.rows, before)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.rows, before)


def test_learned_rows_are_initialised_by_pixels_and_moved_by_gradients_alone():
    memory = FeatureMemory(3, 4, update="learned")
    assert [name for name, _ in memory.named_parameters()] == ["rows"]
    features, labels = torch.rand(1, 4, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, :2] = 1
    memory.observe(features, labels)
    memory.commit(0.9)
    assert memory.initialized.tolist() == [True, True, False]
    torch.testing.assert_close(memory.rows[1], features[0, :, :2].mean(dim=(1, 2)))
    before = memory.rows.detach().clone()
    memory.observe(torch.rand(1, 4, 4, 4), labels)
    memory.commit(0.9)
    assert torch.equal(memory.rows, before)
    memory.read(torch.rand(1, 3, 2, 2).softmax(dim=1)).sum().backward()
    assert memory.rows.grad[:2].ne(0).all() and memory.rows.grad[2].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_summed_in_float32(dtype):
    memory, features, labels = random_case(6, 2, 3, 16, (8, 8), (64, 64), torch.float32)
    other = copy.deepcopy(memory)
    with torch.autocast("cpu", dtype=dtype):
        memory.observe(features.to(dtype), labels)
    other.observe(features, labels)
    for m in (memory, other):
        m.commit(0.5)
    assert memory.rows.dtype == torch.float32
    torch.testing.assert_close(memory.rows, other.rows, rtol=1e-2, atol=1e-2)


def test_state_dict_holds_rows_and_flags_alone():
    assert set(FeatureMemory(3, 4).state_dict()) == {"rows", "initialized"}


@pytest.mark.parametrize(
    "arguments",
    [(0, 4), (4, 0), (4, 4, "median"), (4, 4, "cosine", 0)],
    ids=["no class", "no channel", "update", "no slot"],
)
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="FeatureMemory"):
        FeatureMemory(*arguments)


def test_wrong_shapes_are_refused():
    memory = FeatureMemory(3, 4)
    with pytest.raises(ValueError, match=r"expected \(N, 4, h, w\)"):
        memory.observe(torch.randn(1, 5, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected \(1, H, W\)"):
        memory.observe(torch.randn(1, 4, 2, 2), torch.zeros(2, 4, 4, dtype=torch.long))


def _uneven_parts(rank, world_size, folder, batches, slots):
    """Each process has some of the images, or none; class 0 is on one process alone."""
    memory = FeatureMemory(6, 5, slots=slots)
    for features, labels, owner in batches:
        for n in range(len(features)):
            if owner[n] % world_size == rank:
                memory.observe(features[n : n + 1], labels[n : n + 1])
        memory.commit(0.4)
    torch.save(memory.state_dict(), f"{folder}/{world_size}-{rank}.pth")


@pytest.mark.parametrize(
    "world_size, slots",
    [(2, 1), pytest.param(4, 1, marks=pytest.mark.slow), (3, 2)],
)
def test_processes_make_one_memory(tmp_path, world_size, slots):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for step in range(20):
        features = torch.randn(8, 5, 4, 4, generator=generator)
        labels = torch.randint(1, 8, (8, 15, 13), generator=generator)
        labels[labels >= 6] = 255
        labels[0, :5] = 0  # in one image only
        labels[labels == 5] = 4
        if step == 7:
            labels[2, 3:6] = 5  # seen once, by one process
        labels[3] = 255
        batches.append((features, labels, [0, 1, 1, 2, 0, 0, 0, 3]))
    alone = FeatureMemory(6, 5, slots=slots)
    for features, labels, _ in batches:
        alone.observe(features, labels)
        alone.commit(0.4)
    processes.run(_uneven_parts, world_size, tmp_path, batches, slots)
    for rank in range(world_size):
        state = torch.load(tmp_path / f"{world_size}-{rank}.pth")
        torch.testing.assert_close(state["rows"], alone.rows, atol=1e-5, rtol=1e-5)
        assert torch.equal(state["initialized"], alone.initialized)


def test_flags_without_rows_are_not_loaded():
    memory = FeatureMemory(3, 4)
    memory.load_state_dict({"initialized": torch.ones(3, dtype=torch.bool)}, strict=False)
    assert not memory.initialized.any()


def test_zero_memory_stays_zero_when_a_filled_one_is_loaded():
    filled = FeatureMemory(3, 4)
    filled.initialize(torch.ones(3, 4), torch.ones(3, dtype=torch.bool))
    memory = FeatureMemory(3, 4, update="zero")
    memory.load_state_dict(filled.state_dict())
    assert not memory.rows.any() and not memory.initialized.any()


def test_small_integer_labels():
    memory, features, labels = random_case(7, 1, 300, 4, (4, 4), (8, 8))
    other = copy.deepcopy(memory)
    labels = labels.clamp(0, 254)
    memory.observe(features, labels)
    other.observe(features, labels.to(torch.uint8))
    assert torch.equal(memory._sums, other._sums)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_half_precision_are_for_reading(dtype):
    memory = FeatureMemory(3, 4)
    memory.initialize(torch.rand(3, 4), torch.ones(3, dtype=torch.bool))
    probabilities = torch.rand(1, 3, 2, 2).softmax(dim=1)
    expected = memory.read(probabilities)
    memory.to(dtype)
    assert (memory.read(probabilities) - expected).abs().max() < 0.01
    with pytest.raises(ValueError, match=f"rows are {dtype}.*expected float32"):
        memory.observe(torch.rand(1, 4, 2, 2), torch.zeros(1, 2, 2).long())
