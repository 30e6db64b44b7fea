"""The within-image context modules that the paper's Table 3 counts."""

import math

import processes
import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mcibi_d2.modeling.attention import attend
from mcibi_d2.modeling.blocks import apply_to_pooled, conv_norm_relu
from mcibi_d2.modeling.context.ann import AsymmetricNonLocal
from mcibi_d2.modeling.context.apc import AdaptivePyramid
from mcibi_d2.modeling.context.aspp import AtrousPyramid
from mcibi_d2.modeling.context.base import ContextModule
from mcibi_d2.modeling.context.cc import CrissCross
from mcibi_d2.modeling.context.da import ChannelAttention, DualAttention
from mcibi_d2.modeling.context.dnl import DisentangledNonLocal
from mcibi_d2.modeling.context.ppm import PyramidPooling

# The last column of Table 3, before its rounding to 0.01 M.
PARAMETERS = {
    AtrousPyramid: 42_211_328,
    PyramidPooling: 23_073_792,
    CrissCross: 23_924_353,
    DualAttention: 23_924_737,
    AsymmetricNonLocal: 20_323_840,
    DisentangledNonLocal: 24_122_625,
    AdaptivePyramid: 30_455_858,
}
MODULES = pytest.mark.parametrize("cls", PARAMETERS, ids=lambda cls: cls.__name__)
IN_CHANNELS, LOWER_CHANNELS, CHANNELS = 10, 6, 16


def build(cls, norm=nn.BatchNorm2d, **options):
    """A tiny one, as if in the middle of a training: no parameter or statistic is 0 or 1."""
    module = cls(
        IN_CHANNELS, CHANNELS, norm, lower_channels=LOWER_CHANNELS, num_classes=5, **options
    )
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.2, 1)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.4)
    return module


def features(batch, height, width, dtype=torch.float32):
    """R and the feature below it, which may be larger."""
    return (
        torch.randn(batch, IN_CHANNELS, height, width, dtype=dtype),
        torch.randn(batch, LOWER_CHANNELS, height + 1, 2 * width, dtype=dtype),
    )


# Equations, slowly. Maps are (N, C, h, w).


def positions(maps):
    """All (y, x) of a map."""
    return [(y, x) for y in range(maps.shape[2]) for x in range(maps.shape[3])]


def softmax(numbers):
    exponentials = [math.exp(number - max(numbers)) for number in numbers]
    return [exponential / sum(exponentials) for exponential in exponentials]


def dot(a, b):
    return float((a * b).sum())


def pool(maps, bins):
    """Means over bins x bins regions that cover the map, and overlap if it is not divisible."""
    height, width = maps.shape[2:]
    result = maps.new_zeros(*maps.shape[:2], bins, bins)
    for i, j in positions(result):
        top, bottom = i * height // bins, -(-(i + 1) * height // bins)
        left, right = j * width // bins, -(-(j + 1) * width // bins)
        for y in range(top, bottom):
            for x in range(left, right):
                result[:, :, i, j] += maps[:, :, y, x] / ((bottom - top) * (right - left))
    return result


def up(maps, height, width):
    """Bilinear, between the centres of pixels."""
    result = maps.new_zeros(*maps.shape[:2], height, width)
    for i, j in positions(result):
        y = min(max((i + 0.5) * maps.shape[2] / height - 0.5, 0), maps.shape[2] - 1)
        x = min(max((j + 0.5) * maps.shape[3] / width - 0.5, 0), maps.shape[3] - 1)
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                if share > 0:
                    result[:, :, i, j] += share * maps[:, :, row, column]
    return result


def literal_ppm(module, maps, lower):
    levels = [
        up(level(pool(maps, bins)), *maps.shape[2:])
        for bins, level in zip((1, 2, 3, 6), module.levels, strict=True)
    ]
    return module.fuse(torch.cat([maps, *levels], dim=1))


def dilated(block, dilation, maps):
    """A 3x3 convolution with holes, then the block's norm and ReLU."""
    weight = block[0].weight
    result = maps.new_zeros(len(maps), len(weight), *maps.shape[2:])
    for y, x in positions(maps):
        for i in range(3):
            for j in range(3):
                row, column = y + (i - 1) * dilation, x + (j - 1) * dilation
                if 0 <= row < maps.shape[2] and 0 <= column < maps.shape[3]:
                    result[:, :, y, x] += maps[:, :, row, column] @ weight[:, :, i, j].t()
    return block[2](block[1](result))


def literal_aspp(module, maps, lower, dilations=(12, 24, 36)):
    point, *holes = module.branches
    found = [point(maps)]
    found += [dilated(block, d, maps) for block, d in zip(holes, dilations, strict=True)]
    image = module.image(pool(maps, 1))
    found.append(torch.cat([image] * maps[0, 0].numel(), dim=3).reshape(found[0].shape))
    return module.fuse(torch.cat(found, dim=1))


def literal_criss_cross(attention, maps):
    query, key, value = attention.query(maps), attention.key(maps), attention.value(maps)
    result = maps.clone()
    for n in range(len(maps)):
        for y, x in positions(maps):
            cross = [(row, x) for row in range(maps.shape[2]) if row != y]
            cross += [(y, column) for column in range(maps.shape[3])]
            weights = softmax([dot(query[n, :, y, x], key[n, :, i, j]) for i, j in cross])
            for weight, (i, j) in zip(weights, cross, strict=True):
                result[n, :, y, x] += attention.gamma[0] * weight * value[n, :, i, j]
    return result


def literal_cc(module, maps, lower):
    own = module.before(maps)
    own = literal_criss_cross(module.attention, literal_criss_cross(module.attention, own))
    return module.fuse(torch.cat([maps, module.after(own)], dim=1))


def literal_attention(query, key, value, scale=1.0):
    """Of a query (N, D, h, w) to m keys (N, D, m) and values (N, V, m)."""
    result = query.new_zeros(len(query), value.shape[1], *query.shape[2:])
    for n in range(len(query)):
        for y, x in positions(query):
            products = [scale * dot(query[n, :, y, x], k) for k in key[n].t()]
            for weight, v in zip(softmax(products), value[n].t(), strict=True):
                result[n, :, y, x] += weight * v
    return result


def literal_channel_attention(attention, maps):
    result = maps.clone()
    for n, image in enumerate(maps):
        for j, own in enumerate(image):
            energies = [dot(own, other) for other in image]
            if not attention.as_printed:
                energies = [max(energies) - energy for energy in energies]
            for weight, other in zip(softmax(energies), image, strict=True):
                result[n, j] += attention.beta[0] * weight * other
    return result


def literal_da(module, maps, lower):
    before, attention, after = module.position
    own = before(maps)
    key, value = attention.key(own).flatten(2), attention.value(own).flatten(2)
    by_position = after(literal_attention(attention.query(own), key, value) + own)
    before, attention, after = module.channel
    return by_position + after(literal_channel_attention(attention, before(maps)))


def anchors(maps):
    return torch.cat([pool(maps, bins).flatten(2) for bins in (1, 3, 6, 8)], dim=2)


def literal_ann(module, maps, lower):
    scale = (CHANNELS // 2) ** -0.5
    block = module.fusion
    gathered = literal_attention(
        block.query(maps), anchors(block.key(lower)), anchors(block.value(lower)), scale
    )
    fused = module.project(module.join(torch.cat([block.out(gathered), maps], dim=1)))
    block = module.pyramid
    gathered = literal_attention(
        block.query(fused), anchors(block.query(fused)), anchors(block.value(fused)), scale
    )
    return module.fuse(torch.cat([block.out(gathered), fused], dim=1))


def literal_dnl(module, maps, lower):
    own = module.before(maps)
    block = module.block
    query, key, value = block.query(own), block.key(own), block.value(own)
    mask = block.mask(own)
    gathered = torch.zeros_like(value)
    for n in range(len(maps)):
        where = positions(maps)
        mean_query = sum(query[n, :, i, j] for i, j in where) / len(where)
        mean_key = sum(key[n, :, i, j] for i, j in where) / len(where)
        unary = softmax([float(mask[n, 0, i, j]) for i, j in where])
        for y, x in where:
            white = query[n, :, y, x] - mean_query
            products = [dot(white, key[n, :, i, j] - mean_key) for i, j in where]
            pairwise = softmax([p / 0.05 / math.sqrt(len(white)) for p in products])
            for p, u, (i, j) in zip(pairwise, unary, where, strict=True):
                gathered[n, :, y, x] += (p + u) * value[n, :, i, j]
    own = own + block.out[1](block.out[0](gathered))
    return module.fuse(torch.cat([maps, module.after(own)], dim=1))


def literal_apc(module, maps, lower):
    found = [maps]
    for scale, context in zip((1, 2, 3, 6), module.contexts, strict=True):
        local = context.local(maps)
        regions = context.regions(pool(maps, scale))
        image = context.image(pool(local, 1))
        summed = torch.zeros_like(local)
        for y, x in positions(local):
            joined = local[:, :, y, x] + image[:, :, 0, 0]
            logits = context.affinity(joined[:, :, None, None])
            for j, (row, column) in enumerate(positions(regions)):
                alpha = 1 / (1 + (-logits[:, j, 0, 0]).exp())
                summed[:, :, y, x] += alpha[:, None] * regions[:, :, row, column]
        found.append(context.out((context.residual(summed) + local).clamp_min(0)))
    return module.fuse(torch.cat(found, dim=1))


LITERAL = {
    AtrousPyramid: literal_aspp,
    PyramidPooling: literal_ppm,
    CrissCross: literal_cc,
    DualAttention: literal_da,
    AsymmetricNonLocal: literal_ann,
    DisentangledNonLocal: literal_dnl,
    AdaptivePyramid: literal_apc,
}


@MODULES
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_equals_the_written_out_formula(cls, training):
    module = build(cls).double().train(training)
    maps, lower = features(2, 4, 5, torch.float64)
    expected = LITERAL[cls](module, maps, lower)
    result, losses = module(maps, lower)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-8)
    assert losses == {}


@torch.no_grad()
def test_dilations_follow_the_output_stride():
    # Wide enough for the largest dilation to reach another pixel.
    maps, _ = features(1, 1, 40, torch.float64)
    for stride, dilations in ((8, (12, 24, 36)), (16, (6, 12, 18))):
        module = build(AtrousPyramid, output_stride=stride).double().eval()
        expected = literal_aspp(module, maps, None, dilations)
        torch.testing.assert_close(module(maps)[0], expected, rtol=1e-7, atol=1e-8)


@torch.no_grad()
def test_channel_attention_as_in_the_code_and_as_in_the_paper():
    maps = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    results = []
    for as_printed in (False, True):
        module = DualAttention(10, 16, as_printed=as_printed).channel[1].double()
        assert isinstance(module, ChannelAttention)
        module.beta.fill_(0.7)
        results.append(module(maps))
        torch.testing.assert_close(results[-1], literal_channel_attention(module, maps))
    assert not torch.allclose(*results, atol=1e-2)


@pytest.mark.parametrize("depth, value_depth", [(2, 6), (4, 4), (4, 6), (4, 2)])
def test_attend_equals_the_written_out_softmax(depth, value_depth):
    query = torch.randn(2, depth, 2, 3, dtype=torch.float64)
    key = torch.randn(2, depth, 7, dtype=torch.float64)
    value = torch.randn(2, value_depth, 7, dtype=torch.float64)
    for scale in (1.0, None):
        expected = literal_attention(query, key, value, scale or depth**-0.5)
        result = attend(query.flatten(2), key, value, scale)
        torch.testing.assert_close(result, expected.flatten(2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_attend_stores_no_matrix_whatever_the_layout(layout):
    query, key, value = (
        torch.randn(1, depth, 3, 4).contiguous(memory_format=layout).flatten(2)
        for depth in (2, 2, 6)
    )
    # The kernel that works block by block, or an error.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attend(query, key, value)


@MODULES
def test_parameters_are_those_of_table_3(cls):
    with torch.device("meta"):
        module = cls(2048, 512, lower_channels=1024, num_classes=19, output_stride=8)
        result, _ = module(torch.empty(1, 2048, 6, 7), torch.empty(1, 1024, 6, 7))
    assert sum(p.numel() for p in module.parameters()) == PARAMETERS[cls]
    assert result.shape == (1, 512, 6, 7)


@MODULES
@pytest.mark.parametrize("size", [(9, 13), (1, 3), (2, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_any_size_forward_and_backward(cls, size, training):
    module = build(cls).train(training)
    assert isinstance(module, ContextModule)
    maps, lower = features(2, *size)
    result, _ = module(maps.requires_grad_(), lower.requires_grad_() if cls.needs_lower else None)
    assert result.shape == (2, CHANNELS, *size)
    result.square().sum().backward()
    assert maps.grad.isfinite().all() and maps.grad.any()
    assert not cls.needs_lower or lower.grad.any()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@MODULES
def test_every_weight_takes_part(cls):
    module = build(cls)
    module(*features(2, 9, 13))[0].square().sum().backward()
    # A bias before a softmax or a norm changes nothing, so its gradient may be 0.
    for name, parameter in module.named_parameters():
        assert parameter.dim() == 1 or parameter.grad.any(), name


@MODULES
def test_before_the_first_step_every_parameter_has_a_gradient(cls):
    module = cls(IN_CHANNELS, CHANNELS, lower_channels=LOWER_CHANNELS)
    module(*features(2, 5, 6))[0].square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
    starts = {
        CrissCross: ("attention.gamma",),
        DualAttention: ("position.1.value.weight", "channel.1.beta"),
        DisentangledNonLocal: ("block.out.1.weight",),
    }
    for name in starts.get(cls, ()):
        assert not module.get_parameter(name).any(), name
        assert module.get_parameter(name).grad.any(), name


@MODULES
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_one_image_in_training(cls, norm):
    module = build(cls, norm)
    result, _ = module(*features(1, 4, 5))
    result.square().sum().backward()
    assert result.isfinite().all()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for name, buffer in module.named_buffers():
        assert buffer.isfinite().all(), name


@MODULES
@torch.no_grad()
def test_an_image_is_alone_in_evaluation(cls):
    module = build(cls).double().eval()
    maps, lower = features(3, 4, 5, torch.float64)
    together, _ = module(maps, lower)
    alone, _ = module(maps[1:2], lower[1:2])
    torch.testing.assert_close(together[1:2], alone)
    maps[0], maps[2] = 100 * maps[0], -maps[2]
    torch.testing.assert_close(module(maps, lower)[0][1:2], alone)


@MODULES
def test_bfloat16(cls):
    module = build(cls)
    maps, lower = features(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = module(maps, lower)
    result.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    with torch.no_grad():
        exact, _ = module(maps, lower)
    # DNL's temperature makes 20 times the rounding of its logits: hence no closer bound.
    assert (result - exact).norm() < 0.15 * exact.norm()


def test_channel_attention_is_precise_in_bfloat16():
    attention = ChannelAttention()
    attention.beta.data.fill_(1)
    # Products of channel 0 with the others are 3600, 3602, 3604, ..: one number in bfloat16.
    signs = torch.ones(5, 3600)
    for i, row in enumerate(signs):
        row[torch.randperm(3600)[: 1800 - i]] = -1
    maps = torch.cat([torch.ones(1, 3600), 1 + signs]).view(1, 6, 60, 60)
    with torch.autocast("cpu", torch.bfloat16):
        result = attention(maps.bfloat16())
    weights = torch.tensor(softmax([-2.0 * max(0, i - 1) for i in range(6)]))
    expected = torch.einsum("i,ihw->hw", weights, maps[0]) + maps[0, 0]
    torch.testing.assert_close(result[0, 0].float(), expected, rtol=0.02, atol=0.02)


def test_one_pooled_value_takes_the_running_statistics():
    block = conv_norm_relu(4, 3, 1)
    norm = block[1]
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            tensor.uniform_(0.5, 1)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    one, two = torch.randn(1, 4, 1, 1), torch.randn(2, 4, 1, 1)

    result = apply_to_pooled(block, one)
    convolved = block[0](one)[0, :, 0, 0]
    normed = (convolved - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    expected = (normed * norm.weight + norm.bias).relu()
    torch.testing.assert_close(result[0, :, 0, 0], expected)
    for name, value in norm.state_dict().items():
        torch.testing.assert_close(value, before[name])

    # Two values are a batch: own statistics, and the running ones follow.
    values = block[0](two)[:, :, 0, 0]
    normed = (values - values.mean(dim=0)) / (values.var(dim=0, correction=0) + norm.eps).sqrt()
    expected = (normed * norm.weight + norm.bias).relu()
    torch.testing.assert_close(apply_to_pooled(block, two)[:, :, 0, 0], expected)
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, before["running_mean"])


@pytest.mark.parametrize("norm", [lambda channels: nn.GroupNorm(1, channels), nn.Identity])
def test_other_norms_take_one_pooled_value_as_usual(norm):
    block = conv_norm_relu(4, 3, 1, norm)
    one = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(apply_to_pooled(block, one), block(one))


def test_one_image_per_process_is_a_batch_of_a_synchronised_norm(tmp_path):
    block, images = conv_norm_relu(4, 3, 1), torch.randn(2, 4, 1, 1)
    torch.save((block.state_dict(), images), tmp_path / "given.pt")
    processes.run(_pool_one_image, 2, tmp_path)
    expected = block(images)
    for rank in range(2):
        result, state = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(result, expected[rank : rank + 1], rtol=1e-4, atol=1e-5)
        assert state["1.running_mean"].any()


def _pool_one_image(rank, world_size, folder):
    state, images = torch.load(f"{folder}/given.pt")
    # torch's own synchronised norm wants GPUs; Detectron2's does without.
    block = conv_norm_relu(4, 3, 1, NaiveSyncBatchNorm)
    block.load_state_dict(state)
    result = apply_to_pooled(block, images[rank : rank + 1])
    torch.save((result.detach(), block.state_dict()), f"{folder}/{rank}.pt")


def test_ann_wants_the_lower_channels():
    with pytest.raises(ValueError, match="lower_channels of AsymmetricNonLocal is 0, expected"):
        AsymmetricNonLocal(IN_CHANNELS, CHANNELS)
    assert [cls for cls in PARAMETERS if cls.needs_lower] == [AsymmetricNonLocal]
