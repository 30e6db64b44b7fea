import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_cfg
from detectron2.modeling import build_model
from torch.utils._python_dispatch import TorchDispatchMode

from mcibi_d2.modeling import MCIBISegmentor
from mcibi_d2.modeling.resize import resize_logits


@pytest.fixture
def model(tiny_cfg):
    return build_model(tiny_cfg)


def images(*sizes):
    return [
        {"image": torch.randint(0, 256, (3, h, w), dtype=torch.uint8), "height": h, "width": w}
        for h, w in sizes
    ]


def test_is_built_by_name_from_a_config(model):
    assert isinstance(model, MCIBISegmentor)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("size", [(65, 97), (473, 473)])
def test_trains_on_any_size(tmp_path, enabled, size):
    cfg = make_tiny_cfg(tmp_path, "MODEL.MCIBI.ENABLED", str(enabled))
    model = build_model(cfg).train()
    batch = images(size, (64, 80))
    for x in batch:
        x["sem_seg"] = torch.randint(0, 16, x["image"].shape[1:])
    losses = model(batch)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


class _Copies(TorchDispatchMode):
    """The shapes of tensors that are copied into another layout or place."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.shapes.append(tuple(result.shape))
        return result


def test_a_training_step_copies_no_weight_gradient_and_no_map(tmp_path):
    model = build_model(make_tiny_cfg(tmp_path)).train()
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert any(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    memory = model.sem_seg_head.memory
    memory.initialize(torch.rand_like(memory.rows), torch.ones_like(memory.initialized))
    batch = images((64, 96), (64, 96))
    for x in batch:
        x["sem_seg"] = torch.randint(0, 16, x["image"].shape[1:])
    maps = []
    model.sem_seg_head.attention.register_forward_hook(lambda _, inputs, out: maps.extend(inputs))
    with _Copies() as copies:
        sum(model(batch).values()).backward()
    of_weights = {tuple(p.shape) for p in weights if p[0, 0].numel() > 1}
    assert not of_weights & set(copies.shapes)
    for map_ in maps:
        assert map_.is_contiguous(memory_format=torch.channels_last)
        n, _, h, w = map_.shape
        # Query, key and value: (N, 1, hw, 8).
        assert (n, 1, h * w, 8) not in copies.shapes


def test_result_has_the_asked_size(model):
    batch = images((65, 97))
    batch[0].update(height=130, width=201)
    (result,) = model.eval()(batch)
    assert result["sem_seg"].shape == (16, 130, 201)


def test_targets_are_ignored_in_evaluation(model):
    batch = images((65, 97))
    model.eval()
    plain = model(copy.deepcopy(batch))[0]["sem_seg"]
    batch[0]["sem_seg"] = torch.full((3, 3), 999)
    assert torch.equal(model(batch)[0]["sem_seg"], plain)


@pytest.mark.parametrize("grid", [(9, 13), (5, 7)])
def test_logits_are_resized_once_whatever_the_padding(grid):
    logits = torch.randn(4, *grid)
    padded, size, out = (72, 104), (65, 90), (131, 77)
    resized = resize_logits(logits, padded, size, out)
    assert resized.shape == (4, *out)
    # Sample the map where each pixel of the result falls.
    y = (torch.arange(out[0]) + 0.5) * size[0] / out[0] / padded[0] * 2 - 1
    x = (torch.arange(out[1]) + 0.5) * size[1] / out[1] / padded[1] * 2 - 1
    place = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)[None]
    expected = F.grid_sample(
        logits[None], place, mode="bilinear", padding_mode="border", align_corners=False
    )
    torch.testing.assert_close(resized, expected[0], atol=1e-4, rtol=1e-4)
    plain = resize_logits(logits, size, size, out)
    torch.testing.assert_close(
        plain, F.interpolate(logits[None], out, mode="bilinear", align_corners=False)[0]
    )


def test_images_of_a_batch_are_padded_alike(model):
    batch = images((65, 97), (80, 64))
    preprocessed = model.preprocess(batch)
    assert preprocessed.tensor.shape == (2, 3, 80, 97)
    expected = (batch[0]["image"] - model.pixel_mean) / model.pixel_std
    torch.testing.assert_close(preprocessed.tensor[0, :, :65, :97], expected)
    assert not preprocessed.tensor[0, :, 65:].any()
    assert [r["sem_seg"].shape[1:] for r in model.eval()(batch)] == [(65, 97), (80, 64)]


def test_targets_are_padded_as_the_images_are(model, monkeypatch):
    monkeypatch.setattr(type(model.backbone), "size_divisibility", 32, raising=False)
    sizes = (65, 97), (80, 64)
    padded = model.pad_targets([torch.full(size, k) for k, size in enumerate(sizes)])
    assert padded.shape == (2, 96, 128) == (2, *model.preprocess(images(*sizes)).tensor.shape[2:])
    for k, (height, width) in enumerate(sizes):
        assert (padded[k, :height, :width] == k).all()
        assert (padded[k] == 255).sum() == 96 * 128 - height * width
    assert model.eval().logits(torch.zeros(2, 3, 96, 128)).shape == (2, 16, 12, 16)
