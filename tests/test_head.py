import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec

from mcibi_d2 import InputError
from mcibi_d2.modeling import MCIBIHead

SHAPES = {"res4": ShapeSpec(channels=10, stride=8), "res5": ShapeSpec(channels=20, stride=8)}


def make_head(**changes):
    arguments = {
        "in_feature": "res5", "num_classes": 5, "channels": 16, "attention_dim": 8,
        "aux_feature": "res4",
    }  # fmt: skip
    return MCIBIHead(SHAPES, **{**arguments, **changes})


def make_input(batch=2, grid=(9, 13), size=(65, 97), classes=5):
    features = {k: torch.randn(batch, s.channels, *grid) for k, s in SHAPES.items()}
    targets = torch.randint(0, classes, (batch, *size))
    targets[:, :10] = 255
    return features, targets


@pytest.mark.parametrize("filled", [True, False], ids=["memory filled", "memory empty"])
@pytest.mark.parametrize("update", ["cosine", "mean", "zero"])
@pytest.mark.parametrize("fusion", ["concat", "add", "weighted_add"])
def test_every_parameter_is_in_the_graph(filled, update, fusion):
    head = make_head(memory_update=update, fusion=fusion)
    if filled:
        head.memory.initialize(torch.randn(5, 16), torch.ones(5, dtype=torch.bool))
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
    head.aux.register_forward_hook(lambda _, __, out: caught.update(aux=out))
    _, losses = head(features, targets)
    weight = {"o": 1.0, "w": 0.4, "aux": 0.4}
    for name, logits in caught.items():
        logits = F.interpolate(logits, targets.shape[-2:], mode="bilinear", align_corners=False)
        total = share = 0.0
        for n, y, x in (targets != 255).nonzero().tolist():
            label = targets[n, y, x]
            total -= head.class_weights[label] * logits[n, :, y, x].log_softmax(0)[label]
            share += head.class_weights[label]
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
    head._memory_loss().backward()
    assert torch.equal(head.memory.rows, rows)
    assert torch.equal(head.h2[1].running_mean, mean)


def test_two_forward_passes_before_one_backward():
    head = make_head()
    head.memory.initialize(torch.randn(5, 16), torch.ones(5, dtype=torch.bool))
    total = sum(sum(head(*make_input())[1].values()) for _ in range(2))
    total.backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


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


def test_one_class_and_one_image():
    head = make_head(num_classes=1)
    _, losses = head(*make_input(batch=1, classes=1))
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_feature": "res9"}, "'res9'.*res4, res5"),
        ({"aux_feature": "res9"}, "'res9'"),
        ({"fusion": "multiply"}, "concat, add, weighted_add"),
        ({"class_weights": (1.0, 2.0)}, "has 2 values.*5 classes"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_head(**changes)


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match="needs targets"):
        make_head()(make_input()[0])
