import copy

import conftest
import processes
import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mcibi_d2 import InputError
from mcibi_d2.modeling import FeatureMemory, MCIBIHead
from mcibi_d2.modeling.fusion import FUSIONS
from mcibi_d2.modeling.losses import PixelLoss
from mcibi_d2.modeling.memory import READERS, ConsistencyLoss

SHAPES = {"res4": ShapeSpec(channels=10, stride=8), "res5": ShapeSpec(channels=20, stride=8)}


def make_head(**changes):
    arguments = {"num_classes": 5, "channels": 16, "attention_dim": 8, "aux_features": ["res4"]}
    return conftest.make_head(SHAPES, **{**arguments, **changes})


def make_input(batch=2, grid=(9, 13), size=(65, 97), classes=5):
    features = {k: torch.randn(batch, s.channels, *grid) for k, s in SHAPES.items()}
    targets = torch.randint(0, classes, (batch, *size))
    targets[:, :10] = 255
    return features, targets


@pytest.mark.parametrize("filled", [True, False], ids=["memory filled", "memory empty"])
@pytest.mark.parametrize("update", ["cosine", "mean", "zero", "random", "learned"])
@pytest.mark.parametrize(
    "fusion, slots", [("concat", 1), ("concat", 3), ("add", 1), ("weighted_add", 1)]
)
def test_every_parameter_is_in_the_graph(filled, update, fusion, slots):
    head = make_head(memory_update=update, fusion=fusion, memory_slots=slots)
    if filled:
        head.memory.initialize(torch.randn(5 * slots, 16), torch.ones(5 * slots, dtype=torch.bool))
    _, losses = head(*make_input())
    expected = {"loss_o", "loss_w", "loss_m", "loss_aux"} - (
        {"loss_m"} if update == "zero" else set()
    )
    assert set(losses) == expected
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_baseline_is_plain_fcn():
    head = make_head(enabled=False)
    names = {name.split(".")[0] for name, _ in head.named_parameters()}
    assert names == {"project", "classify", "aux"}
    _, losses = head(*make_input())
    assert set(losses) == {"loss_o", "loss_aux"}


def test_is_made_of_parts_without_a_config():
    head = MCIBIHead(
        in_feature="res5",
        num_classes=5,
        project=nn.Conv2d(20, 16, 1),
        memory=FeatureMemory(5, 16),
        memory_loss=ConsistencyLoss(0.5),
        coarse_classifier=nn.Conv2d(16, 5, 1),
        reader=READERS["rows"](16, 8),
        fuse=FUSIONS["add"](16, 1),
        classifier=nn.Sequential(nn.Conv2d(16, 5, 1)),
        pixel_loss=PixelLoss(),
    )
    features, targets = make_input()
    _, losses = head(features, targets)
    assert set(losses) == {"loss_o", "loss_w", "loss_m"}
    head.memory.commit(0.5)
    assert head.memory.initialized.all()
    assert head.eval()(features)[0].shape == (2, 5, 9, 13)


@pytest.mark.parametrize("enabled", [True, False])
def test_describes_what_it_makes(enabled):
    head = make_head(enabled=enabled, context="ocr").eval()
    features, _ = make_input()
    maps = head.describe(features)
    assert torch.equal(head(features)[0], maps.logits)
    last = head.h2 if enabled else head.classify
    assert torch.equal(last(maps.augmented), maps.logits)
    assert list(maps.aux) == ["res4"] and maps.losses == {}
    if enabled:
        assert torch.equal(head.project(features["res5"]), maps.pixels)
        assert torch.equal(head.h1(maps.pixels), maps.coarse)
    else:
        assert maps.pixels is maps.coarse is None


@pytest.mark.parametrize("enabled", [True, False])
def test_evaluation_ignores_targets_and_returns_logits_at_the_stride(enabled):
    head = make_head(enabled=enabled).eval()
    features, targets = make_input()
    logits, losses = head(features)
    assert logits.shape == (2, 5, 9, 13) and losses == {}
    torch.testing.assert_close(head(features, targets)[0], logits)
    torch.testing.assert_close(head({k: v[:1] for k, v in features.items()})[0], logits[:1])


def test_losses_are_averages_over_valid_pixels():
    head = make_head(dropout=0.0, class_weights=(1.0, 2.0, 0.5, 3.0, 1.0))
    head.memory.initialize(torch.randn(5, 16), torch.tensor([1, 1, 0, 1, 0]).bool())
    features, targets = make_input()
    caught = {}
    head.h1.register_forward_hook(lambda _, __, out: caught.update(w=out))
    head.h2.register_forward_hook(lambda _, __, out: caught.update(o=out))
    head.aux["res4"].register_forward_hook(lambda _, __, out: caught.update(aux=out))
    _, losses = head(features, targets)
    weight = {"o": 1.0, "w": 0.4, "aux": 0.4}
    for name, logits in caught.items():
        logits = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)
        total = share = 0.0
        for n, y, x in (targets != 255).nonzero().tolist():
            label = targets[n, y, x]
            total -= head.pixel_loss.class_weights[label] * logits[n, :, y, x].log_softmax(0)[label]
            share += head.pixel_loss.class_weights[label]
        torch.testing.assert_close(losses[f"loss_{name}"], weight[name] * total / share)


def test_memory_loss_equals_its_equation_over_initialised_rows():
    head = make_head(dropout=0.0)
    rows = torch.randn(5, 16)
    known = torch.tensor([1, 0, 1, 1, 0]).bool()
    head.memory.initialize(rows, known)
    features, targets = make_input()
    _, losses = head(features, targets)
    head.eval()  # Eq. 15 with the running statistics, which the forward pass has just moved
    logits = head.h2(rows[:, :, None, None]).flatten(1)
    expected = sum(-logits[k].log_softmax(0)[k] for k in known.nonzero().flatten()) / 3
    torch.testing.assert_close(losses["loss_m"], expected)


def test_memory_loss_leaves_the_statistics_and_the_rows_alone():
    head = make_head()
    head.memory.initialize(torch.randn(5, 16), torch.ones(5, dtype=torch.bool))
    rows, mean = head.memory.rows.clone(), head.h2[1].running_mean.clone()
    head.memory_loss(head.h2, head.memory).backward()
    assert torch.equal(head.memory.rows, rows)
    assert torch.equal(head.h2[1].running_mean, mean)


@pytest.mark.parametrize("slots", [1, 2])
def test_memory_loss_with_batch_statistics_is_a_training_pass_of_the_initialised_rows(slots):
    head = make_head(dropout=0.0, rcl_bn="batch", memory_slots=slots)
    rows = torch.randn(5 * slots, 16)
    known = torch.tensor([1, 0, 1, 1, 0] * slots).bool()
    head.memory.initialize(rows, known)
    plain = copy.deepcopy(head.h2)
    classes = torch.arange(5).repeat_interleave(slots)
    expected = F.cross_entropy(plain(rows[known][:, :, None, None]).flatten(1), classes[known])
    expected.backward()
    loss = head.memory_loss(head.h2, head.memory)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for ours, its in zip(head.h2.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad, atol=1e-5, rtol=1e-5)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(head.h2[1], name), getattr(plain[1], name))


@pytest.mark.parametrize("known", [0, 1])
@pytest.mark.parametrize("classes", [1, 5])
def test_batch_statistics_of_less_than_two_rows_are_the_running_ones(known, classes):
    head = make_head(num_classes=classes, dropout=0.0, rcl_bn="batch")
    running = copy.deepcopy(head)
    running.memory_loss.batch_norm = "running"
    for h in (head, running):
        generator = torch.Generator().manual_seed(0)
        h.memory.initialize(
            torch.randn(classes, 16, generator=generator), torch.arange(classes) < known
        )
    loss = head.memory_loss(head.h2, head.memory)
    torch.testing.assert_close(loss, running.memory_loss(running.h2, running.memory))
    assert torch.equal(head.h2[1].running_var, torch.ones(16))


def test_inactive_memory_loss_is_zero_and_changes_no_statistics():
    head = make_head(rcl_bn="batch")
    head.memory.initialize(torch.randn(5, 16), torch.ones(5, dtype=torch.bool))
    head.memory_loss.active = False
    mean = head.h2[1].running_mean.clone()
    head.memory_loss(head.h2, head.memory)
    assert torch.equal(head.h2[1].running_mean, mean)
    _, losses = head(*make_input())
    assert losses["loss_m"] == 0
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("norm", ["BN", "LN", ""])
def test_accuracy_of_the_rows(norm):
    head = make_head(norm=norm, memory_slots=2).train()
    rows = torch.randn(10, 16)
    known = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1, 1]).bool()
    head.memory.initialize(rows, known)
    accuracy = head.rows_accuracy()
    assert head.h2.training
    answers = head.h2.eval()(rows[:, :, None, None]).flatten(1).argmax(dim=1).tolist()
    right = [answers[row] == row // 2 for row in known.nonzero().flatten().tolist()]
    assert accuracy.item() == pytest.approx(sum(right) / 8)


@pytest.mark.parametrize("changes", [{}, {"rcl_bn": "batch"}, {"memory_update": "learned"}])
def test_two_forward_passes_before_one_backward(changes):
    head = make_head(**changes)
    head.memory.initialize(torch.randn(5, 16), torch.ones(5, dtype=torch.bool))
    total = sum(sum(head(*make_input())[1].values()) for _ in range(2))
    total.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("rcl_bn", ["running", "batch"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_forward_gives_the_same_gradients_and_memory(reentrant, rcl_bn):
    head = make_head(dropout=0.0, rcl_bn=rcl_bn)
    head.memory.initialize(torch.randn(5, 16), torch.tensor([1, 1, 1, 0, 1]).bool())
    # A checkpointed batch norm updates its running statistics twice, in any network; here they
    # stand still, so that the passes can be compared.
    for layer in head.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 0.0
    other = copy.deepcopy(head)
    features, targets = make_input()
    features = {name: value.requires_grad_() for name, value in features.items()}
    sum(head(features, targets)[1].values()).backward()

    def forward(res4, res5):
        return sum(other({"res4": res4, "res5": res5}, targets)[1].values())

    checkpoint(forward, *features.values(), use_reentrant=reentrant).backward()
    for h in (head, other):
        h.memory.commit(0.5)
    # The same pixels once more, seen when the pass is repeated, do not change an average.
    torch.testing.assert_close(head.memory.rows, other.memory.rows)
    for ours, its in zip(head.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, its.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_gives_the_memory_of_float32(dtype):
    head = make_head(dropout=0.0)
    head.memory.initialize(torch.rand(5, 16), torch.tensor([1, 1, 1, 0, 1]).bool())
    other = copy.deepcopy(head)
    features, targets = make_input()
    head(features, targets)
    with torch.autocast("cpu", dtype=dtype):
        other(features, targets)
    assert other.memory._sums.dtype == torch.float32
    for h in (head, other):
        h.memory.commit(0.5)
    assert other.memory.rows.dtype == torch.float32
    difference = (other.memory.rows - head.memory.rows).norm(dim=1)
    assert (difference <= 1e-2 * head.memory.rows.norm(dim=1)).all()


def _data_parallel(rank, world_size, folder, changes):
    torch.manual_seed(0)
    head = make_head(dropout=0.0, **changes)
    model = DistributedDataParallel(head, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for _ in range(3):
        optimizer.zero_grad()
        # Two forward passes before each backward.
        total = sum(sum(model(*make_input())[1].values()) for _ in range(2))
        total.backward()
        optimizer.step()
        head.memory.commit(0.5)
    torch.save((head.memory.state_dict(), dict(head.named_parameters())), f"{folder}/{rank}.pth")


@pytest.mark.parametrize(
    "changes", [{"rcl_bn": "batch", "memory_slots": 2}, {"memory_update": "learned"}]
)
def test_data_parallel_with_two_forward_passes(tmp_path, changes):
    processes.run(_data_parallel, 2, tmp_path, changes)
    one, two = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    for a, b in zip(one, two, strict=True):
        for name, value in a.items():
            assert torch.equal(value, b[name]), name
    assert one[0]["initialized"].all()


def test_batch_without_valid_pixels_has_losses_of_zero():
    head = make_head(memory_update="zero")
    features, targets = make_input()
    _, losses = head(features, torch.full_like(targets, 255))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize("size", [(65, 97), (72, 104), (12, 7)])
def test_any_target_size(size):
    head = make_head()
    _, losses = head(*make_input(size=size))
    assert all(loss.isfinite() for loss in losses.values())


def test_norm_may_be_absent_and_weights_integers():
    head = make_head(norm="", class_weights=(1, 2, 3, 4, 5))
    _, losses = head(*make_input())
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize("rcl_bn", ["running", "batch"])
def test_one_class_and_one_image(rcl_bn):
    head = make_head(num_classes=1, rcl_bn=rcl_bn)
    for _ in range(2):  # with the memory empty, then filled
        _, losses = head(*make_input(batch=1, classes=1))
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
        head.memory.commit(0.9)
    assert head.memory.initialized.all()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_features": ["res9"]}, "'res9'.*res4, res5"),
        ({"aux_features": ["res9"]}, "'res9'"),
        ({"fusion": "multiply"}, "concat, add, weighted_add"),
        ({"rcl_bn": "frozen"}, "running, batch"),
        ({"class_weights": (1.0, 2.0)}, "has 2 values.*5 classes"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_head(**changes)


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="needs targets"):
        make_head()(make_input()[0])
