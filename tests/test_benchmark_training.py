import argparse

import numpy as np
import pytest
import torch

from mcibi_d2 import InputError
from mcibi_d2.tools.benchmark import inference, training
from mcibi_d2.tools.benchmark.__main__ import make_parser
from mcibi_d2.tools.benchmark.measure import take_turns


def test_sides_take_turns_in_processes_of_their_own():
    sides = {"ours": training.make_our_loss, "plain": training.make_plain_loss}
    found = take_turns(sides, (1, 150, 256), "cpu", 2)
    assert list(found) == ["ours", "plain"]
    for side in found.values():
        assert len(side.seconds) == 2 and min(side.seconds) > 0
    (loss, gradient), (exact, expected) = found["ours"].result, found["plain"].result
    assert loss == pytest.approx(exact)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    if found["plain"].peak_mib is not None:
        # Logits at the size of the labels are 38 MiB.
        assert found["plain"].peak_mib > max(38, 2 * found["ours"].peak_mib)


def make_dead(device):
    raise SystemExit(3)


@pytest.mark.slow
def test_a_side_that_dies_is_named():
    with pytest.raises(RuntimeError, match="measures 'dead' ended"):
        take_turns({"dead": make_dead}, (), "cpu", 1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_of_both_sides_and_of_the_literal_loss_train(precision, monkeypatch):
    plain = []
    monkeypatch.setattr(
        training,
        "plain_cross_entropy",
        lambda *args, function=training.plain_cross_entropy: plain.append(1) or function(*args),
    )
    ours = training.make_our_step(2, 5, 64, precision, [], "cpu")
    literal = training.make_literal_step(2, 5, 64, precision, [], "cpu")
    torch.manual_seed(1)
    first = ours()
    assert not plain
    torch.manual_seed(1)
    # From the same weights and random numbers, by either loss.
    assert literal() == pytest.approx(first, rel=1e-4)
    assert len(plain) == 3  # H1, H2 and the auxiliary head
    assert ours() != first


def test_a_step_of_the_released_network_trains():
    pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    step = training.make_released_step(2, 5, 64, "float32", [], "cpu")
    assert step() != step()


def test_impossible_sizes_are_refused():
    args = argparse.Namespace(batch=2, classes=1, size=64, repeats=1)
    with pytest.raises(InputError, match="--classes is 1, expected a whole number from 2 on"):
        training.benchmark_loss(args)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["loss", "step"])
def test_the_command_measures(part, monkeypatch, capsys):
    arguments = [part, "--classes", "5", "--size", "64", "--repeats", "1", "--json", "x.json"]
    if part == "step":
        arguments += ["--precision", "float32"]
    monkeypatch.setattr(training, "has_released", lambda: False)
    args = make_parser().parse_args(arguments)
    results = args.run(args)
    sides = results["sides"] if part == "loss" else results["steps"][0]["sides"]
    assert all(side["seconds"] > 0 for side in sides.values())
    assert "faster by" in capsys.readouterr().out


def test_both_networks_segment_an_image():
    options = ["MODEL.TIMM.NAME", "resnet18"]
    for precision, folded in (("float32", False), ("bfloat16", True)):
        ours = inference.make_ours((64, 96), 5, options, "cpu", precision, folded)
        assert ours() == (64, 96)


def test_the_released_network_segments_an_image():
    pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    assert inference.make_released((64, 96), 5, [], "cpu")() == (64, 96)


def test_impossible_images_are_refused():
    args = make_parser().parse_args(["inference", "--size", "16", "64"])
    with pytest.raises(InputError, match=r"--size is \(16, 64\), expected at least 32 pixels"):
        args.run(args)


@pytest.mark.slow
@pytest.mark.parametrize("released", [False, True])
def test_images_are_measured(released, monkeypatch, capsys):
    if released:
        pytest.importorskip("ssseg", reason="the extra `parity` is not installed: no reference")
    monkeypatch.setattr(inference, "has_released", lambda: released)
    arguments = ["inference", "--size", "64", "96", "--classes", "5", "--rounds", "1"]
    args = make_parser().parse_args(arguments)
    results = args.run(args)
    assert len(results["sides"]) == 3
    assert all(len(x["all_seconds"]) == 1 and x["seconds"] > 0 for x in results["sides"].values())
    assert "ours, bfloat16" in capsys.readouterr().out
