"""The ways to read the memory: the registry and its interface."""

import torch
from conftest import make_tiny_cfg
from torch import nn

from mcibi_d2.engine import Trainer
from mcibi_d2.engine.setup import check_config
from mcibi_d2.modeling import FeatureMemory
from mcibi_d2.modeling.memory import READERS, MemoryReader


class Mixture(MemoryReader):
    """The rows mixed by W, without attention: as a user would write it in a file of theirs."""

    mixes = True

    def __init__(self, channels, attention_dim, norm, slots=1, rows_bias=True):
        super().__init__()
        self.out = nn.Conv2d(channels, channels, 1)

    def read(self, pixels, coarse, memory):
        return self.out(memory.read(self.weights(coarse)).to(pixels.dtype))


def test_a_new_way_to_read_is_one_class_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, "mixture", Mixture)
    cfg = make_tiny_cfg(
        tmp_path,
        "MODEL.MCIBI.AGGREGATION", "mixture",
        "MODEL.MCIBI.HARD_AGGREGATION", "True",
    )  # fmt: skip
    check_config(cfg)
    trainer = Trainer(cfg)
    head = trainer.model.sem_seg_head
    before = head.attention.out.weight.detach().clone()
    trainer.train()
    assert isinstance(head.attention, Mixture) and head.attention.hard
    assert not torch.equal(head.attention.out.weight, before)
    assert head.memory.initialized.any()
    image = torch.randint(0, 256, (3, 65, 97), dtype=torch.uint8)
    (result,) = trainer.model.eval()([{"image": image}])
    assert result["sem_seg"].shape == (16, 65, 97)


def test_all_readers_give_a_map_of_the_pixels_that_h1_has_a_say_in():
    for name, reader in READERS.items():
        memory = FeatureMemory(5, 12, slots=2 if name == "slots" else 1)
        memory.draw(0)
        if reader is not None:
            made = reader(12, 8, nn.BatchNorm2d, slots=memory.slots, rows_bias=True)
            coarse = torch.randn(2, 5, 4, 6, requires_grad=True)
            read = made.read(torch.randn(2, 12, 4, 6), coarse, memory)
            assert read.shape == (2, 12, 4, 6)
            read.square().sum().backward()
            assert coarse.grad.abs().sum() > 0
