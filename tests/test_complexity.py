import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mcibi_d2.tools import complexity

# The last column of the table that accounts for the paper's Table 3.
PARAMETERS = {
    "DCA": 14_816_768, "ASPP": 42_211_328, "PPM": 23_073_792, "CCNet": 23_924_353,
    "DANet": 23_924_737, "ANN": 20_323_840, "DNL": 24_122_625, "APCNet": 30_455_858,
    "ASPP+DCA": 45_629_440,
}  # fmt: skip


def make(name, grid, device="cpu"):
    second = 1024 if name in complexity._WITHIN else 512
    with torch.device(device):
        module = complexity.make_module(name).eval()
        return module, (torch.empty(1, 2048, *grid), torch.empty(1, second, *grid))


def count_by_torch(module, inputs):
    """The paper's counting by torch's own counter, and by hooks for batch norms and ReLUs."""
    others = []
    for layer in module.modules():
        each = 2 if isinstance(layer, nn.BatchNorm2d) else isinstance(layer, nn.ReLU)
        layer.register_forward_hook(
            lambda _, __, out, each=each: others.append(each * out.numel()) if each else None
        )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(v for k, v in counts.items() if "convolution" in str(k)) // 2
    return convolutions + sum(others)


@pytest.mark.parametrize("name", complexity.PAPER)
def test_parameters_and_flops_are_table_3(name):
    module, inputs = make(name, (128, 128), "meta")
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[name]
    millions, billions, _ = complexity.PAPER[name]
    assert round(PARAMETERS[name] / 1e6, 2) == millions
    assert count_by_torch(module, inputs) / 1e9 == pytest.approx(billions, rel=1e-3)


@pytest.mark.parametrize("name", ["DCA", "PPM", "ANN"])
def test_the_tools_count_is_torchs(name):
    module, inputs = make(name, (8, 8))
    flops, with_attention = complexity.count_flops(module, inputs)
    assert flops == pytest.approx(count_by_torch(module, inputs), rel=1e-3)
    assert (with_attention > flops) == (name != "PPM")


def test_products_of_attention_are_counted():
    module, inputs = make("DCA", (8, 8))
    flops, with_attention = complexity.count_flops(module, inputs)
    assert with_attention - flops == 2 * 64 * 64 * 256


def test_a_whole_model_as_json():
    command = [sys.executable, "-m", "mcibi_d2.tools.complexity", "--json", "--repeats", "1",
               "--config-file", "configs/scenes/mcibi_tiny.yaml", "--size", "64", "96"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    (found,) = json.loads(run.stdout)
    assert set(found) == {"module", "parameters", "flops", "flops_with_attention", "milliseconds"}
    assert found["flops_with_attention"] > found["flops"] > 1e6 > found["parameters"] > 1e4
    assert found["milliseconds"] > 0
