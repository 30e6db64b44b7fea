"""The names of a checkpoint and the numbers of a network stay, whatever becomes of the code.

``python tests/test_head_numbers.py`` writes the file of what they are.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_cfg
from detectron2.layers import ShapeSpec

from mcibi_d2.modeling import MCIBIHead
from mcibi_d2.modeling.context import CONTEXTS, EMContext

FILE = Path(__file__).parent / "data" / "heads.json"
SHAPES = {"res4": ShapeSpec(channels=10, stride=8), "res5": ShapeSpec(channels=20, stride=8)}
AUX = "MODEL.SEM_SEG_HEAD.AUX_FEATURES ['res4']"
BASELINE = "MODEL.MCIBI.ENABLED False"
CASES = [
    *(f"MODEL.MCIBI.CONTEXT {name} {AUX}" for name in ("none", *CONTEXTS)),
    *(f"{BASELINE} MODEL.MCIBI.CONTEXT {name} {AUX}" for name in ("none", *CONTEXTS)),
    "MODEL.MCIBI.AGGREGATION rows",
    "MODEL.MCIBI.AGGREGATION rows MODEL.MCIBI.ROWS_BIAS False MODEL.MCIBI.CONTEXT ppm",
    "MODEL.MCIBI.AGGREGATION rows MODEL.MCIBI.MEMORY.SLOTS 2",
    "MODEL.MCIBI.AGGREGATION none",
    "MODEL.MCIBI.AGGREGATION none MODEL.MCIBI.CONTEXT aspp MODEL.MCIBI.ASPP_DILATIONS (1,2,3)",
    "MODEL.MCIBI.MEMORY.SLOTS 3 MODEL.MCIBI.RCL_BN batch",
    "MODEL.MCIBI.HARD_AGGREGATION True MODEL.MCIBI.FUSION add",
    "MODEL.MCIBI.FUSION weighted_add MODEL.MCIBI.MEMORY.RENORMALIZE False",
    "MODEL.MCIBI.MEMORY.UPDATE mean MODEL.MCIBI.RCL_BN batch MODEL.SEM_SEG_HEAD.LOSS ohem "
    "MODEL.SEM_SEG_HEAD.OHEM.MIN_KEPT 10",
    "MODEL.MCIBI.MEMORY.UPDATE zero MODEL.SEM_SEG_HEAD.ACTIVATION leaky_relu",
    "MODEL.MCIBI.MEMORY.UPDATE random MODEL.MCIBI.PROJECT_KERNEL 1 MODEL.MCIBI.FUSE_KERNEL 1",
    f"MODEL.MCIBI.MEMORY.UPDATE learned MODEL.SEM_SEG_HEAD.NORM LN {AUX} "
    "MODEL.SEM_SEG_HEAD.AUX_CONVS 2 MODEL.SEM_SEG_HEAD.AUX_UPSAMPLING 2",
]  # fmt: skip


def measure(case, folder):
    """Of a head from a seed: its tensors' names and shapes, and numbers of a training step."""
    options = ["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']", *case.split()]
    cfg = make_tiny_cfg(folder, *options)
    torch.manual_seed(0)
    head = MCIBIHead(cfg, SHAPES)
    tensors = [f"{name} {tuple(value.shape)}" for name, value in head.state_dict().items()]
    first = sum(p.detach().double().abs().sum() for p in head.parameters())
    generator = torch.Generator().manual_seed(1)
    features = {
        name: torch.randn(2, shape.channels, 9, 13, generator=generator)
        for name, shape in SHAPES.items()
    }
    targets = torch.randint(0, 16, (2, 65, 97), generator=generator)
    targets[:, :10] = 255
    if head.enabled:
        rows = torch.rand(head.memory.rows.shape, generator=generator)
        head.memory.initialize(rows, torch.arange(len(rows)) % 5 != 2)
    _, losses = head(features, targets)
    sum(losses.values()).backward()
    numbers = {name: loss.detach() for name, loss in losses.items()}
    numbers["gradients"] = sum(p.grad.double().abs().sum() for p in head.parameters())
    if isinstance(head.context, EMContext):
        head.context.commit()
    if head.enabled:
        head.memory.commit(0.5)
        numbers["rows"] = head.memory.rows.detach().abs().sum()
    logits, _ = head.eval()(features)
    numbers |= {
        "parameters": first,
        "logits": logits.detach().abs().mean(),
        "one": logits[1, 3, 4, 5].detach(),
    }
    digest = hashlib.sha256("\n".join(tensors).encode()).hexdigest()[:16]
    return digest, {name: float(value) for name, value in sorted(numbers.items())}


@pytest.mark.parametrize("case", CASES)
def test_names_and_numbers_stay(case, tmp_path):
    names, numbers = json.loads(FILE.read_text())[case]
    found_names, found = measure(case, tmp_path)
    assert found_names == names
    assert found == pytest.approx(numbers, rel=2e-3, abs=1e-5)


if __name__ == "__main__":
    lines = [f"{json.dumps(case)}: {json.dumps(measure(case, '/tmp'))}" for case in CASES]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
