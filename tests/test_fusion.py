import pytest
import torch

from mcibi_d2.modeling.fusion import FUSIONS


@pytest.mark.parametrize("name", FUSIONS)
def test_keeps_the_shape_and_sends_gradients_to_both(name):
    pixels, context = (torch.randn(2, 6, 5, 7, requires_grad=True) for _ in range(2))
    fused = FUSIONS[name](6, 3)(pixels, context)
    assert fused.shape == pixels.shape
    fused.square().sum().backward()
    assert pixels.grad.abs().sum() > 0 and context.grad.abs().sum() > 0


def test_add_and_weighted_add_equal_their_formulas():
    pixels, context = torch.randn(2, 1, 4, 3, 3)
    torch.testing.assert_close(FUSIONS["add"](4, 1)(pixels, context), pixels + context)
    fuse = FUSIONS["weighted_add"](4, 1)
    matrix = fuse.weights.weight.flatten(1)
    for y in range(3):
        for x in range(3):
            both = torch.cat([pixels[0, :, y, x], context[0, :, y, x]])
            w = (matrix @ both + fuse.weights.bias).softmax(dim=0)
            expected = w[0] * pixels[0, :, y, x] + w[1] * context[0, :, y, x]
            torch.testing.assert_close(fuse(pixels, context)[0, :, y, x], expected)


@pytest.mark.parametrize("kernel", [1, 3])
def test_concat_has_one_convolution(kernel):
    conv = FUSIONS["concat"](8, kernel).conv[0]
    assert conv.weight.shape == (8, 16, kernel, kernel)
