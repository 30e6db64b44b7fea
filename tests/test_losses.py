import contextlib
from functools import partial

import conftest
import processes
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_d2.modeling import losses as losses_module
from mcibi_d2.modeling.losses import (
    hard_pixels_cross_entropy,
    resized_cross_entropy,
    resized_pixel_losses,
)

# So few pixels are kept that it goes through them twice.
FUNCTIONS = [resized_cross_entropy, partial(hard_pixels_cross_entropy, min_kept=5)]
SIDES = st.integers(1, 12)


def plain_losses(logits, labels, ignore_value):
    """Of each pixel, and which are valid, with everything at full size."""
    classes = logits.shape[1]
    valid = (labels >= 0) & (labels < classes) & (labels != ignore_value)
    logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(logits, labels.long().where(valid, 0), reduction="none"), valid


def plain(logits, labels, weight=None, ignore_value=255, keep=None):
    losses, valid = plain_losses(logits, labels, ignore_value)
    weights = valid.to(logits.dtype)
    if keep is not None:
        weights = weights * keep
    if weight is not None:
        weights = weights * weight[labels.long().where(valid, 0)]
    return (losses * weights).sum() / weights.sum().clamp_min(1e-300)


def gradient_of(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    classes=st.integers(1, 7),
    grid=st.tuples(SIDES, SIDES),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    weighted=st.booleans(),
    channels_last=st.booleans(),
    ignore_value=st.sampled_from([255, -1, 0]),
    kind=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8]),
    precision=st.sampled_from([(torch.float64, 1e-12), (torch.float32, 3e-6)]),
    scale=st.sampled_from([1.0, 30.0, 1000.0]),
    # In bytes and pixels; small ones make many tiles.
    tile=st.sampled_from([(1, 1), (400, 5), (2000, 16), losses_module.HOST_TILE]),
    on_host=st.booleans(),
)
def test_loss_and_gradient_are_those_of_the_resized_logits(
    seed, batch, classes, grid, size, weighted, channels_last, ignore_value, kind, precision,
    scale, tile, on_host,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    exact = scale * torch.randn(batch, classes, *grid, generator=generator, dtype=torch.float64)
    dtype, tolerance = precision
    # What float32 cannot hold is not its fault.
    exact = exact.to(dtype).double().requires_grad_()
    labels = torch.randint(-1, classes + 2, (batch, *size), generator=generator).to(kind)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64) if weighted else None
    expected = plain(exact, labels, weight, ignore_value)
    logits = exact.detach().to(dtype)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    logits.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses_module, "HOST_TILE", tile)
        patch.setattr(losses_module, "DEVICE_TILE", tile)
        patch.setattr(losses_module, "_on_host", lambda tensor: on_host)
        weight = None if weight is None else weight.to(dtype)
        loss = resized_cross_entropy(logits, labels, weight, ignore_value)
        with torch.no_grad():
            torch.testing.assert_close(
                loss.detach(), resized_cross_entropy(logits, labels, weight, ignore_value)
            )
        pixels = resized_pixel_losses(logits, labels, ignore_value)
    assert loss.dtype == dtype and loss.dim() == 0
    bound = tolerance * max(1, scale)
    torch.testing.assert_close(loss.double(), expected, atol=bound, rtol=bound)
    torch.testing.assert_close(
        gradient_of(loss, logits).double(), gradient_of(expected, exact), atol=bound, rtol=bound
    )
    of_each, valid = plain_losses(exact.detach(), labels, ignore_value)
    torch.testing.assert_close(pixels.double(), of_each * valid, atol=bound, rtol=bound)


@pytest.mark.parametrize("size", [(7, 11), (2, 1)])
def test_gradcheck(size):
    logits = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(-1, 4, (2, *size))
    weight = torch.tensor([1.0, 0.2, 3.0])
    assert torch.autograd.gradcheck(lambda x: resized_cross_entropy(x, labels, weight), logits)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_second_derivative_is_refused(function):
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = function(logits, torch.zeros(1, 4, 4, dtype=torch.long))
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


class _Memory(TorchDispatchMode):
    """The largest tensor that an operation gives, in elements."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("grid", [(32, 32), (2, 100)])
def test_no_tensor_is_larger_than_a_tile_or_the_logits(function, grid, monkeypatch):
    monkeypatch.setattr(losses_module, "HOST_TILE", (2**17, 64))
    logits = torch.randn(2, 60, *grid, requires_grad=True)
    labels = torch.randint(0, 60, (2, 128, 200))
    with _Memory() as memory:
        function(logits, labels).backward()
    assert memory.largest <= max(logits.numel(), labels.numel(), 2**17 // 4) < 60 * 128 * 200 / 8


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nothing_asks_the_device_for_a_value(function, monkeypatch):
    # Tensors on "meta" have no values: whatever needs one fails. There is no autocast for them.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
    logits = torch.randn(2, 5, 4, 4, device="meta", requires_grad=True)
    labels = torch.zeros(2, 400, 400, dtype=torch.long, device="meta")
    function(logits, labels, torch.ones(5, device="meta")).backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("label", [255, -3, 5, 10**12])
def test_without_valid_pixels_loss_and_gradient_are_zero(function, label):
    logits = torch.randn(2, 5, 3, 3, requires_grad=True)
    loss = function(logits, torch.full((2, 9, 9), label), torch.rand(5))
    assert loss == 0
    assert torch.equal(gradient_of(loss, logits), torch.zeros_like(logits))
    assert function(logits, torch.zeros(2, 9, 9, dtype=torch.uint8), torch.zeros(5)) == 0


@pytest.mark.parametrize("on_host", [True, False])
def test_a_class_that_is_as_good_as_impossible_keeps_its_loss(on_host, monkeypatch):
    monkeypatch.setattr(losses_module, "_on_host", lambda tensor: on_host)
    logits = torch.tensor([0.0, 5000.0]).view(1, 2, 1, 1)
    labels = torch.zeros(1, 3, 3, dtype=torch.long)
    assert resized_cross_entropy(logits, labels).item() == pytest.approx(5000)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_logits_that_are_no_numbers_are_seen_in_the_loss(function):
    logits = torch.randn(1, 3, 4, 4)
    logits[0, 1, 2, 2] = torch.nan
    assert function(logits, torch.zeros(1, 9, 9, dtype=torch.long)).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32_and_scaled_before_rounding(dtype):
    logits = torch.randn(1, 20, 32, 32).to(dtype)
    labels = torch.randint(0, 20, (1, 64, 64))
    exact = logits.float().requires_grad_()
    logits.requires_grad_()
    expected = resized_cross_entropy(exact, labels)
    with torch.autocast("cpu", dtype=dtype):
        loss = resized_cross_entropy(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    # As a gradient scaler does. In float16 the smallest gradients would be zero without it.
    gradient = gradient_of(2**16 * loss, logits)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, gradient_of(2**16 * expected, exact).to(dtype))
    assert gradient.count_nonzero() == gradient.numel()


def test_the_backward_pass_can_be_repeated():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = resized_cross_entropy(logits, torch.zeros(1, 4, 4, dtype=torch.long))
    first = torch.autograd.grad(loss, logits, 2 * torch.ones(()), retain_graph=True)[0]
    torch.testing.assert_close(first, 2 * gradient_of(loss, logits))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    threshold=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    min_kept=st.sampled_from([1, 5, 50, 10**6]),
    weighted=st.booleans(),
)
def test_hard_pixels_are_the_improbable_and_at_least_so_many(
    seed, size, threshold, min_kept, weighted
):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 5, (2, *size), generator=generator)
    weight = torch.rand(4, generator=generator, dtype=torch.float64) if weighted else None
    losses, valid = plain_losses(logits, labels, 255)
    kept = valid & (torch.exp(-losses) < threshold)
    if kept.sum() < min_kept:
        hardest = torch.where(valid, losses, -1.0).flatten().sort(descending=True).indices
        kept.flatten()[hardest[:min_kept]] = True
    logits.requires_grad_()
    expected = plain(logits, labels, weight, keep=kept)
    loss = hard_pixels_cross_entropy(logits, labels, weight, 255, threshold, min_kept)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient_of(loss, logits), gradient_of(expected, logits))


@pytest.mark.parametrize(
    "logits, labels, weight, message",
    [
        ((2, 3, 4), (2, 8, 8), None, r"logits are torch.float32 of shape \(2, 3, 4\)"),
        ((2, 0, 4, 4), (2, 8, 8), None, "logits are"),
        ((2, 3, 4, 4), (3, 8, 8), None, r"labels are torch.int64 of shape \(3, 8, 8\)"),
        ((2, 3, 4, 4), (2, 8), None, "labels are"),
        ((2, 3, 4, 4), (2, 8, 8), (2,), r"weight has shape \(2,\)"),
    ],
)
def test_wrong_shapes_are_refused(logits, labels, weight, message):
    weight = None if weight is None else torch.ones(weight)
    with pytest.raises(ValueError, match=message):
        resized_cross_entropy(torch.zeros(logits), torch.zeros(labels).long(), weight)
    with pytest.raises(ValueError, match="labels are torch.float32"):
        resized_cross_entropy(torch.zeros(1, 2, 3, 3), torch.zeros(1, 4, 4))


def make_head(**changes):
    shapes = {"res4": ShapeSpec(channels=4, stride=8), "res5": ShapeSpec(channels=6, stride=8)}
    arguments = {"num_classes": 5, "channels": 8, "attention_dim": 4}
    arguments |= {"aux_features": ["res4"], "dropout": 0.0, **changes}
    return conftest.make_head(shapes, **arguments)


def make_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    features = {
        "res4": torch.randn(2, 4, 6, 6, generator=generator),
        "res5": torch.randn(2, 6, 6, 6, generator=generator),
    }
    return features, torch.randint(0, 5, (2, 48, 48), generator=generator)


def test_all_losses_of_the_head_over_pixels_can_be_over_hard_ones():
    head = make_head(loss="ohem", ohem_threshold=0.2, ohem_min_kept=30)
    caught = {}
    for name, module in (("w", head.h1), ("o", head.h2), ("aux", head.aux["res4"])):
        module.register_forward_hook(
            lambda _, __, out, name=name: caught.update({name: out.detach()})
        )
    features, targets = make_batch(0)
    _, losses = head(features, targets)
    for name, weight in (("o", 1.0), ("w", 0.4), ("aux", 0.4)):
        of_each, _ = plain_losses(caught[name], targets, 255)
        hard = torch.exp(-of_each) < 0.2
        assert 30 < hard.sum() < targets.numel()
        torch.testing.assert_close(losses[f"loss_{name}"], weight * of_each[hard].mean())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_the_head_makes_no_logits_at_the_size_of_the_targets():
    head = make_head(num_classes=150)
    features, _ = make_batch(0)
    targets = torch.randint(0, 150, (2, 192, 192))
    with _Memory() as memory:
        sum(head(features, targets)[1].values()).backward()
    assert memory.largest < 150 * 192 * 192 / 2


def _data_parallel(rank, world_size, folder):
    torch.manual_seed(0)
    model = DistributedDataParallel(make_head(), broadcast_buffers=False)
    features, targets = make_batch(rank)
    if rank == 1:  # this one has no ground truth at all
        targets.fill_(255)
    sum(model(features, targets)[1].values()).backward()
    torch.save([p.grad for p in model.parameters()], f"{folder}/{rank}.pth")


@pytest.mark.slow
def test_processes_have_one_gradient_though_one_has_no_valid_pixel(tmp_path):
    processes.run(_data_parallel, 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert any(gradient.abs().max() > 0 for gradient in one)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
