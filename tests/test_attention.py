import literal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcibi_d2.modeling import Attention


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7), st.booleans())
def test_equals_the_written_out_softmax(batch, height, width, training):
    attention = Attention(channels=12, attention_dim=8).double().train(training)
    if batch * height * width == 1:
        attention.eval()
    pixels, context = torch.randn(2, batch, 12, height, width, dtype=torch.float64)
    refined = literal.attention(
        attention.query(pixels), attention.key(context), attention.value(context)
    )
    expected = attention.out(refined.transpose(1, 2).reshape(batch, 8, height, width))
    torch.testing.assert_close(attention(pixels, context), expected)


def test_layers_are_those_of_the_paper():
    count = sum(p.numel() for p in Attention(512, 256).parameters())
    # query and key 512->256->256, value 512->256, out 256->512, each with a batch norm.
    convolutions = 2 * (512 * 256 + 256 * 256) + 512 * 256 + 256 * 512
    assert count == convolutions + 2 * (4 * 256 + 256 + 512)
