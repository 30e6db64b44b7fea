import copy

import pytest
import torch
from conftest import make_tiny_cfg
from torch import nn

from mcibi_d2 import InputError
from mcibi_d2.modeling import MCIBISegmentor, TimmBackbone
from mcibi_d2.modeling.checkpointing import checkpoint_blocks


def run(backbone, dtype=None):
    """Gradients, and the bytes that the forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        features = backbone(images)
    sum(x.float().square().mean() for x in features.values()).backward()
    return {name: p.grad for name, p in backbone.named_parameters()}, sum(kept.values())


@pytest.mark.parametrize(
    "name, options, blocks",
    [
        ("resnet18", {"drop_path": 0.3}, 8),
        ("convnext_atto", {"output_stride": 0, "out_indices": (1, 3)}, 12),
        ("vit_tiny_patch16_384", {"output_stride": 0, "out_indices": (2, 11)}, 12),
        ("hrnet_w18_small", {"output_stride": 0, "out_indices": (1, 2, 3, 4)}, None),
    ],
)
def test_checkpointed_backbone_has_the_same_gradients_and_statistics(name, options, blocks):
    torch.manual_seed(0)
    plain = TimmBackbone(name, **options).train()
    checkpointed = copy.deepcopy(plain)
    count = checkpoint_blocks(checkpointed)
    assert count == blocks or blocks is None and count > 8
    assert list(checkpointed.state_dict()) == list(plain.state_dict())
    expected, before = run(plain)
    gradients, after = run(checkpointed)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient)
    for buffer, value in plain.named_buffers():
        assert torch.equal(dict(checkpointed.named_buffers())[buffer], value), buffer
    assert after < 0.8 * before
    # And again, in the copy of a copy, as a moving average of weights makes them.
    again = copy.deepcopy(checkpointed).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for feature, value in plain.eval()(images).items():
            torch.testing.assert_close(again(images)[feature], value)


def test_mixed_precision_is_repeated_as_it_was():
    torch.manual_seed(0)
    plain = TimmBackbone("resnet18").train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_blocks(checkpointed)
    expected, _ = run(plain, torch.bfloat16)
    gradients, _ = run(checkpointed, torch.bfloat16)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(gradients[parameter], gradient)


class _Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), norm

    def forward(self, x):
        return x + self.norm(self.conv(x))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_updated_once(momentum):
    block = _Block(nn.BatchNorm2d(3, momentum=momentum))
    network = nn.Sequential(block, _Block(nn.BatchNorm2d(3))).train()
    assert checkpoint_blocks(network) == 2
    images = torch.randn(2, 3, 5, 5)
    network(images).sum().backward()
    expected = copy.deepcopy(block.norm)
    expected.reset_running_stats()
    expected(block.conv(images))
    assert torch.equal(block.norm.running_var, expected.running_var)
    assert block.norm.num_batches_tracked == 1 and block.norm.momentum == momentum


def test_a_network_without_blocks_is_refused():
    with pytest.raises(InputError, match=r"BACKBONE\.CHECKPOINTING is True, but Sequential has no"):
        checkpoint_blocks(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))


@pytest.mark.parametrize(
    "config", ["scenes/mcibi_tiny.yaml", "ade20k/mcibi_R50.yaml", "ade20k/mcibi_R50_d2.yaml"]
)
def test_the_key_is_for_every_backbone(config, tmp_path):
    options = ["MODEL.BACKBONE.CHECKPOINTING", "True", "MODEL.DEVICE", "cpu",
               "MODEL.TIMM.PRETRAINED", "False", "MODEL.WEIGHTS", ""]  # fmt: skip
    model = MCIBISegmentor(make_tiny_cfg(tmp_path, *options, config=config))
    assert sum("forward" in vars(m) for m in model.backbone.modules()) >= 4
    assert not any("forward" in vars(m) for m in model.sem_seg_head.modules())
