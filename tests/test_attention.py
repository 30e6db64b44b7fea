import gc

import literal
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcibi_d2.modeling import Attention, attention
from mcibi_d2.modeling.memory import READERS


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


@pytest.mark.parametrize("depth, masked", [(8, False), (4, True), (8, "each")])
def test_bands_of_queries_are_the_whole_attention(monkeypatch, depth, masked):
    monkeypatch.setattr(attention, "_BAND", 3)
    query, key = torch.randn(2, 2, depth, 13).bfloat16()
    value = torch.randn(2, 8, 13).bfloat16()
    mask = torch.randn(2, 1, 13 if masked == "each" else 1, 13).bfloat16() if masked else None
    kernel = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    by_bands = attention.attend(query, key, value, mask=mask)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    exact = mask if mask is None else mask.float()
    expected = attention.attend(query.float(), key.float(), value.float(), mask=exact)
    torch.testing.assert_close(by_bands.float(), expected, atol=0.03, rtol=0.03)
    # Where a gradient is wanted, the kernel that has one is taken.
    attention.attend(query.requires_grad_(), key, value).sum().backward()
    assert query.grad.isfinite().all()


def test_layers_are_those_of_the_paper():
    count = sum(p.numel() for p in Attention(512, 256).parameters())
    # query and key 512->256->256, value 512->256, out 256->512, each with a batch norm.
    convolutions = 2 * (512 * 256 + 256 * 256) + 512 * 256 + 256 * 512
    assert count == convolutions + 2 * (4 * 256 + 256 + 512)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 2),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rows=st.integers(1, 7),
    biased=st.booleans(),
    any_row=st.booleans(),
)
def test_row_attention_is_a_softmax_over_the_initialised_rows(
    seed, batch, grid, rows, biased, any_row
):
    generator = torch.Generator().manual_seed(seed)
    attention = READERS["rows"](12, 8, rows_bias=biased).double().eval()
    pixels = torch.randn(batch, 12, *grid, generator=generator, dtype=torch.float64)
    memory = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    known = torch.rand(rows, generator=generator) < 0.6
    known[0] = any_row
    if not any_row:
        known[:] = False
    log_weights = torch.randn(batch, rows, *grid, generator=generator).double().log_softmax(1)
    query = attention.query(pixels)
    units = (memory - memory.mean(1, keepdim=True)) / (
        memory.var(1, unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    key = units @ attention.key.weight.t() + attention.key.bias
    value = units @ attention.value.weight.t() + attention.value.bias
    gathered = torch.zeros(batch, 8, *grid, dtype=torch.float64)
    for n in range(batch):
        for y in range(grid[0]):
            for x in range(grid[1]):
                logits = torch.stack([query[n, :, y, x] @ k for k in key]) / 8**0.5
                if biased:
                    logits = logits + log_weights[n, :, y, x]
                if any_row:
                    gathered[n, :, y, x] = logits[known].softmax(0) @ value[known]
    result = attention(pixels, memory, known, log_weights)
    torch.testing.assert_close(result, attention.out(gathered))


def test_slot_attention_joins_one_attention_per_slot():
    attention = READERS["slots"](12, 8, slots=3).eval()
    pixels, context = torch.randn(2, 12, 4, 5), torch.randn(2, 36, 4, 5)
    refined = [of(pixels, c) for of, c in zip(attention.of_slot, context.split(12, 1), strict=True)]
    torch.testing.assert_close(attention(pixels, context), attention.join(torch.cat(refined, 1)))


def test_query_key_and_value_are_gone_before_the_last_layers():
    """They are a third of the peak memory on a large image."""
    attention = Attention(12, 8)
    alive = []

    def count(*_):
        found = (x for x in gc.get_objects() if isinstance(x, torch.Tensor))
        alive.append(sum(x.shape == (2, 1, 35, 8) for x in found))

    attention.out.register_forward_pre_hook(count)
    with torch.inference_mode():  # elsewhere a view keeps the tensor that it is of
        attention(torch.randn(2, 12, 5, 7), torch.randn(2, 12, 5, 7))
    assert alive == [0]
