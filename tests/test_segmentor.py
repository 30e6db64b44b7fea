import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny_cfg
from detectron2.modeling import build_model

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
