"""The context modules of OCRNet, ACFNet, EncNet, EMANet, OCNet (interlaced), DMNet and PSANet."""

import copy
import math

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from literal import up
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mcibi_d2.modeling.context import CONTEXTS, ContextModule
from mcibi_d2.modeling.context.acf import ClassCenterContext
from mcibi_d2.modeling.context.dm import DynamicFilterContext
from mcibi_d2.modeling.context.ema import EMContext
from mcibi_d2.modeling.context.enc import ContextEncoding
from mcibi_d2.modeling.context.isa import InterlacedContext
from mcibi_d2.modeling.context.ocr import ObjectContext
from mcibi_d2.modeling.context.psa import PointwiseContext

# Each with what makes it small: windows and blocks that the tiny maps exceed.
OPTIONS = {
    ObjectContext: {"key_channels": 4},
    ClassCenterContext: {},
    ContextEncoding: {"codewords": 3},
    EMContext: {"bases": 4},
    InterlacedContext: {"key_channels": 4, "division": 3},
    DynamicFilterContext: {},
    PointwiseContext: {"mask_size": 5},
}
ALL = pytest.mark.parametrize("module", OPTIONS, ids=lambda module: module.__name__)
CLASSES = 3


def make(module, norm=nn.BatchNorm2d, in_channels=5, channels=6, num_classes=CLASSES, **options):
    made = module(
        in_channels, channels, norm, lower_channels=4, num_classes=num_classes, output_stride=8,
        **{**OPTIONS[module], **options},
    ).double()  # fmt: skip
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after some training
            nn.init.normal_(layer.weight, 1.0, 0.2)
            nn.init.normal_(layer.bias, 0.0, 0.2)
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
        elif isinstance(layer, (nn.Dropout, nn.Dropout2d)):
            layer.p = 0.0
    return made


def make_input(batch=2, size=(5, 4), coarse_size=(3, 4), num_classes=CLASSES):
    features = torch.randn(batch, 5, *size, dtype=torch.float64, requires_grad=True)
    coarse = torch.randn(batch, num_classes, *coarse_size, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, num_classes + 1, (batch, 9, 8))
    targets[targets == num_classes] = 255
    return features, None, coarse, targets


def positions(features):
    return [(y, x) for y in range(features.shape[-2]) for x in range(features.shape[-1])]


def softmax(values):
    """Of a list of 0-d tensors, written out."""
    exponentials = [torch.exp(v - max(values)) for v in values]
    return [e / sum(exponentials) for e in exponentials]


# --- the formulas, pixel by pixel


def literal_attention(queries, keys, values):
    """Each query's average of the values, by the softmax of its scaled products with the keys."""
    result = []
    for q in queries:
        weights = softmax([q @ k / math.sqrt(len(q)) for k in keys])
        result.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    return result


def literal_ocr(module, features, _, coarse, __):
    pixels = module.pixels(features)
    coarse = up(coarse, features.shape[-2:])
    where = positions(features)
    regions = torch.zeros(len(features), pixels.shape[1], coarse.shape[1], 1, dtype=torch.float64)
    for n in range(len(features)):
        for k in range(coarse.shape[1]):
            weights = softmax([coarse[n, k, y, x] for y, x in where])
            regions[n, :, k, 0] = sum(
                w * pixels[n, :, y, x] for w, (y, x) in zip(weights, where, strict=True)
            )
    queries = module.attention.query(pixels)
    keys, values = module.attention.key(regions), module.attention.value(regions)
    mixed = torch.zeros_like(queries)
    for n in range(len(features)):
        rows = literal_attention(
            [queries[n, :, y, x] for y, x in where],
            [keys[n, :, k, 0] for k in range(keys.shape[2])],
            [values[n, :, k, 0] for k in range(keys.shape[2])],
        )
        for (y, x), row in zip(where, rows, strict=True):
            mixed[n, :, y, x] = row
    return module.join(torch.cat([module.attention.out(mixed), pixels], dim=1))


def literal_acf(module, features, _, coarse, __):
    pixels = module.reduce(features)
    coarse = up(coarse, features.shape[-2:])
    where = positions(features)
    mixed = torch.zeros_like(pixels)
    for n in range(len(features)):
        shares = {(y, x): softmax(list(coarse[n, :, y, x])) for y, x in where}
        centers = [
            sum(shares[y, x][k] * pixels[n, :, y, x] for y, x in where)
            / sum(shares[y, x][k] for y, x in where)
            for k in range(coarse.shape[1])
        ]
        for y, x in where:
            mixed[n, :, y, x] = sum(s * c for s, c in zip(shares[y, x], centers, strict=True))
    return module.join(torch.cat([module.refine(mixed), features], dim=1))


def literal_encoding(module, features):
    """The image's vector e of EncNet, (N, C)."""
    pixels = module.project(module.pixels(features))
    words, smoothing = module.encode.codewords, module.encode.smoothing
    encoded = torch.zeros(len(features), *words.shape, dtype=torch.float64)
    for n in range(len(features)):
        for y, x in positions(features):
            residuals = [pixels[n, :, y, x] - word for word in words]
            shares = softmax([-s * r @ r for s, r in zip(smoothing, residuals, strict=True)])
            for k, (share, residual) in enumerate(zip(shares, residuals, strict=True)):
                encoded[n, k] = encoded[n, k] + share * residual
    normed = module.norm(encoded[..., None])[..., 0]
    return sum(F.relu(normed[:, k]) for k in range(len(words))) / len(words)


def literal_enc(module, features, *_):
    pixels = module.pixels(features)
    encoded = literal_encoding(module, features)
    result = torch.zeros_like(pixels)
    for n in range(len(features)):
        gate = torch.sigmoid(module.gate.weight @ encoded[n] + module.gate.bias)
        for y, x in positions(features):
            result[n, :, y, x] = F.relu(pixels[n, :, y, x] + pixels[n, :, y, x] * gate)
    return result


def literal_fit(module, projected):
    """EM of one image's pixels (a list of vectors): rebuilt pixels and bases."""
    bases = list(module.bases.clone().t())
    for _ in range(module.iterations):
        shares = [softmax([x @ base for base in bases]) for x in projected]
        for k in range(len(bases)):
            total = sum(share[k] for share in shares)
            base = sum(s[k] * x for s, x in zip(shares, projected, strict=True)) / total
            bases[k] = base / base.norm()
    rebuilt = [sum(s * b for s, b in zip(share, bases, strict=True)) for share in shares]
    return rebuilt, torch.stack(bases, dim=1)


def literal_projected(module, features):
    weight = module.projection.flatten(1)
    pixels = module.pixels(features)
    return [
        [weight @ pixels[n, :, y, x] + module.projection_bias for y, x in positions(features)]
        for n in range(len(features))
    ]


def literal_ema(module, features, *_):
    pixels = module.pixels(features)
    rebuilt = torch.zeros_like(pixels)
    for n, projected in enumerate(literal_projected(module, features)):
        for (y, x), row in zip(positions(features), literal_fit(module, projected)[0], strict=True):
            rebuilt[n, :, y, x] = F.relu(row).detach()
    return module.out(F.relu(pixels + module.rebuild(rebuilt)))


def literal_grouped(attention, pixels):
    side = attention.division
    height, width = pixels.shape[-2:]
    above, left = (-height % side) // 2, (-width % side) // 2
    groups = {}
    for y, x in positions(pixels):
        block, place = zip(divmod(y + above, side), divmod(x + left, side), strict=True)
        groups.setdefault(place if attention.far else block, []).append((y, x))
    queries, keys, values = attention.query(pixels), attention.key(pixels), attention.value(pixels)
    mixed = torch.zeros_like(values)
    for n in range(len(pixels)):
        for group in groups.values():
            rows = literal_attention(
                [queries[n, :, y, x] for y, x in group],
                [keys[n, :, y, x] for y, x in group],
                [values[n, :, y, x] for y, x in group],
            )
            for (y, x), row in zip(group, rows, strict=True):
                mixed[n, :, y, x] = row
    return attention.out(mixed)


def literal_isa(module, features, *_):
    pixels = module.pixels(features)
    context = literal_grouped(module.near, literal_grouped(module.far, pixels))
    return module.join(torch.cat([pixels, context], dim=1))


def literal_dm(module, features, *_):
    height, width = features.shape[-2:]
    parts = [features]
    for branch, k in zip(module.branches, (1, 3, 5, 7), strict=True):
        pixels = branch.reduce(features)
        pooled = torch.zeros(len(features), features.shape[1], k, k, dtype=torch.float64)
        for i in range(k):
            for j in range(k):
                rows = slice(i * height // k, -(-(i + 1) * height // k))
                columns = slice(j * width // k, -(-(j + 1) * width // k))
                pooled[:, :, i, j] = features[:, :, rows, columns].mean(dim=(2, 3))
        filters = branch.filters(pooled)
        filtered = torch.zeros_like(pixels)
        for y, x in positions(features):
            for i in range(k):
                for j in range(k):
                    v, u = y + i - k // 2, x + j - k // 2
                    if 0 <= v < height and 0 <= u < width:
                        filtered[:, :, y, x] += filters[:, :, i, j] * pixels[:, :, v, u]
        parts.append(F.relu(branch.norm(filtered)))
    return module.join(torch.cat(parts, dim=1))


def literal_pointwise(attention, features):
    pixels = attention.reduce(features)
    size = [max(-(-side // 2), min(side, 2)) for side in features.shape[-2:]]
    pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=True)
    maps = attention.offsets(attention.hidden(pixels))  # over-completed, (N, mask_size^2, h, w)
    half = attention.mask_size // 2
    where = positions(pixels)

    def says(n, i, j):
        down, across = j[0] - i[0] + half, j[1] - i[1] + half
        if not (0 <= down < attention.mask_size and 0 <= across < attention.mask_size):
            return torch.zeros((), dtype=torch.float64)
        return maps[n, down * attention.mask_size + across, i[0], i[1]]

    result = torch.zeros_like(pixels)
    for n in range(len(features)):
        for here in where:
            weights = softmax(
                [says(n, here, p) if attention.collect else says(n, p, here) for p in where]
            )
            result[n, :, here[0], here[1]] = sum(
                w * pixels[n, :, p[0], p[1]] for w, p in zip(weights, where, strict=True)
            )
    return result


def literal_psa(module, features, *_):
    both = [literal_pointwise(d, features) for d in (module.collect, module.distribute)]
    context = F.interpolate(
        module.project(torch.cat(both, dim=1)),
        size=features.shape[-2:], mode="bilinear", align_corners=True,
    )  # fmt: skip
    return module.join(torch.cat([features, context], dim=1))


LITERAL = {
    ObjectContext: literal_ocr,
    ClassCenterContext: literal_acf,
    ContextEncoding: literal_enc,
    EMContext: literal_ema,
    InterlacedContext: literal_isa,
    DynamicFilterContext: literal_dm,
    PointwiseContext: literal_psa,
}


@ALL
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(5, 4), (9, 13)])
def test_equals_the_written_out_formula(module, training, size):
    context = make(module).train(training)
    inputs = make_input(batch=2 if size == (5, 4) else 1, size=size)
    found, _ = context(*inputs)
    expected = LITERAL[module](context, *inputs)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)
    # and so do the gradients, of the coarse logits among them.
    wanted = [p for p in (inputs[0], inputs[2], *context.parameters()) if p.requires_grad]
    weights = torch.randn_like(found)
    for f, e in zip(
        torch.autograd.grad((found * weights).sum(), wanted, allow_unused=True),
        torch.autograd.grad((expected * weights).sum(), wanted, allow_unused=True),
        strict=True,
    ):
        assert (f is None) == (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("mask_size", [1, 3, 9, 15])
def test_pointwise_with_masks_smaller_and_larger_than_the_map(mask_size):
    context = make(PointwiseContext, mask_size=mask_size).eval()
    inputs = make_input(size=(7, 12))
    torch.testing.assert_close(context(*inputs)[0], literal_psa(context, *inputs))


@pytest.mark.parametrize("size", [(6, 9), (2, 1), (7, 3)])
def test_interlaced_with_whole_blocks_and_less_than_one(size):
    context = make(InterlacedContext).eval()
    inputs = make_input(size=size)
    torch.testing.assert_close(context(*inputs)[0], literal_isa(context, *inputs))


# --- what all promise


@ALL
@pytest.mark.parametrize("batch, size", [(1, (5, 4)), (1, (9, 13)), (1, (2, 2)), (3, (1, 7))])
@pytest.mark.parametrize("num_classes", [1, 3])
def test_any_size_any_batch_and_a_gradient_for_every_parameter(module, batch, size, num_classes):
    context = make(module, num_classes=num_classes)
    inputs = make_input(batch, size, num_classes=num_classes)
    found, losses = context(*inputs)
    assert found.shape == (batch, 6, *size)
    assert set(losses) == ({"loss_se"} if module is ContextEncoding else set())
    (found.square().sum() + sum(losses.values())).backward()
    for name, parameter in context.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert inputs[0].grad.abs().sum() > 0
    if context.needs_coarse:
        assert inputs[2].grad.isfinite().all()
    context.eval()
    found, losses = context(*inputs)
    assert found.shape == (batch, 6, *size) and losses == {}
    assert found.isfinite().all()


@ALL
def test_losses_in_training_with_targets_only(module):
    context = make(module)
    inputs = make_input()
    assert context(*inputs[:3])[1] == {}
    assert context.eval()(*inputs)[1] == {}


@ALL
def test_in_evaluation_an_image_does_not_depend_on_its_batch(module):
    context = make(module).eval()
    features, _, coarse, _ = make_input(batch=3)
    together, _ = context(features, None, coarse)
    other = torch.cat([features[:1] * 9 - 5, features[1:2], features[:1] + 7])
    among_others, _ = context(other, None, torch.cat([coarse[2:], coarse[1:2], coarse[:1]]))
    alone, _ = context(features[1:2], None, coarse[1:2])
    torch.testing.assert_close(together[1:2], alone)
    torch.testing.assert_close(among_others[1:2], alone)


@ALL
def test_bfloat16_autocast_is_near(module):
    context = make(module, in_channels=16, channels=32).float()
    features, coarse = torch.randn(2, 16, 9, 13), torch.randn(2, CLASSES, 9, 13)
    targets = torch.randint(0, CLASSES, (2, 9, 13))
    exact, _ = context.eval()(features, None, coarse)
    with torch.autocast("cpu", torch.bfloat16):
        near, _ = context(features, None, coarse)
        assert (near.float() - exact).abs().max() < 0.1 * exact.abs().max()
        context.train()
        found, losses = context(features, None, coarse.bfloat16(), targets)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    (found.float().sum() + sum(losses.values())).backward()
    assert all(p.grad.isfinite().all() for p in context.parameters())


@ALL
def test_norm_may_be_absent(module):
    found, _ = make(module, norm=lambda channels: nn.Identity())(*make_input())
    assert found.isfinite().all()


@ALL
def test_says_what_inputs_it_needs(module):
    assert not module.needs_lower
    assert module.needs_coarse == (module in (ObjectContext, ClassCenterContext))
    if module.needs_coarse:
        with pytest.raises(ValueError, match=f"{module.__name__} found no coarse logits"):
            make(module)(make_input()[0])


@pytest.mark.parametrize("name", CONTEXTS)
def test_every_module_takes_the_same_arguments_and_no_others(name):
    options = {"lower_channels": 4, "num_classes": 3, "output_stride": 16, "dilations": (1, 2, 3)}
    assert isinstance(CONTEXTS[name](8, 8, **options), ContextModule)
    with pytest.raises(TypeError, match="'dilation'"):
        CONTEXTS[name](8, 8, **options, dilation=(1, 2, 3))


@pytest.mark.parametrize(
    "module, options",
    [
        (ContextEncoding, {"num_classes": 0}),
        (EMContext, {"iterations": 0}),
        (DynamicFilterContext, {"sizes": (1, 2)}),
        (PointwiseContext, {"mask_size": 4}),
    ],
)
def test_wrong_options_are_refused(module, options):
    with pytest.raises(ValueError, match=f"{module.__name__} found .*, expected"):
        make(module, **options)


def test_channels_are_those_of_the_papers():
    # 2048 -> 512; each conv-BN-ReLU without bias has two parameters more per channel.
    def cbr(inputs, outputs, kernel=1):
        return inputs * outputs * kernel**2 + 2 * outputs

    bottleneck = cbr(2048, 512, 3)
    attention = 2 * (cbr(512, 256) + cbr(256, 256)) + cbr(512, 256) + cbr(256, 512)
    grouped = 2 * (cbr(512, 256) + cbr(256, 256)) + 512 * 512 + cbr(512, 512)
    direction = cbr(2048, 512) + cbr(512, 512) + 512 * 97 * 97
    expected = {
        ObjectContext: bottleneck + attention + cbr(1024, 512),
        ClassCenterContext: cbr(2048, 512) + cbr(512, 512) + cbr(2560, 512, 3),
        ContextEncoding: bottleneck + cbr(512, 512) + 32 * 513 + 64 + 512 * 513 + 19 * 513,
        EMContext: bottleneck + cbr(512, 512) + cbr(512, 512, 3),
        InterlacedContext: bottleneck + 2 * grouped + cbr(1024, 512),
        DynamicFilterContext: 4 * (2049 * 512 + cbr(2048, 512) + 1024) + cbr(4096, 512, 3),
        PointwiseContext: 2 * direction + cbr(1024, 2048) + cbr(4096, 512, 3),
    }
    with torch.device("meta"):
        for module, count in expected.items():
            made = module(2048, 512, num_classes=19)
            assert sum(p.numel() for p in made.parameters()) == count, module.__name__


# --- EncNet's loss


@pytest.mark.parametrize("invalid", [(), (1,), (0, 1, 2)])
def test_presence_loss_equals_the_written_out_one(invalid):
    context = make(ContextEncoding)
    features, _, _, targets = make_input(batch=3)
    targets[0, :2], targets[1, 3] = -1, 100  # outside 0 .. 2, as 255 is
    targets[2][targets[2] == 1] = 0  # a class that is not there
    for n in invalid:
        targets[n] = 255
    _, losses = context(features, targets=targets)
    encoded = literal_encoding(context, features)
    terms = []
    for n in range(3):
        if n in invalid:
            continue
        for k in range(CLASSES):
            share = torch.sigmoid(
                context.presence.weight[k] @ encoded[n] + context.presence.bias[k]
            )
            there = any(label == k for label in targets[n].flatten().tolist())
            terms.append(-torch.log(share if there else 1 - share))
    expected = 0.2 * sum(terms) / max(len(terms), 1)
    # The loss is in float32.
    torch.testing.assert_close(
        losses["loss_se"].item(), float(torch.as_tensor(expected).detach()), atol=1e-6, rtol=1e-6
    )
    losses["loss_se"].backward()
    grad = context.presence.weight.grad
    assert (grad == 0).all() if len(invalid) == 3 else grad.abs().sum() > 0


# --- EMANet's running bases


def fitted_bases(context, batches):
    """Of each image of the batches."""
    return [
        literal_fit(context, projected)[1]
        for features in batches
        for projected in literal_projected(context, features)
    ]


def test_bases_move_by_the_mean_of_a_steps_images():
    context = make(EMContext, norm=lambda channels: nn.Identity())
    for batch in (1, 2):
        before = context.bases.clone()
        inputs = [make_input(batch)[0] for _ in range(2)]
        with torch.no_grad():
            fitted = torch.stack(fitted_bases(context, inputs)).mean(dim=0)
        sum(context(features)[0].sum() for features in inputs).backward()
        assert torch.equal(context.bases, before)
        context.commit()
        moved = context.bases.clone()
        torch.testing.assert_close(moved, 0.9 * before + 0.1 * fitted)
        context.commit()  # of nothing
        assert torch.equal(context.bases, moved)


def test_bases_stay_in_evaluation_and_without_gradients():
    context = make(EMContext)
    before = context.bases.clone()
    features = make_input()[0]
    context.eval()(features)[0].sum().backward()
    context.train()
    with torch.no_grad():
        context(features)
    context.commit()
    assert torch.equal(context.bases, before)
    context(features)
    context.commit()
    assert not torch.equal(context.bases, before)


def test_an_image_that_overflowed_does_not_enter_the_bases():
    context = make(EMContext, norm=lambda channels: nn.Identity())
    twin = copy.deepcopy(context)
    features = make_input()[0].detach()
    bad = torch.cat([features, torch.full_like(features[:1], math.inf)])
    context(bad)[0].sum().backward()
    twin(features)[0].sum().backward()
    for module in (context, twin):
        module.commit()
    torch.testing.assert_close(context.bases, twin.bases)
    before = context.bases.clone()
    context(bad[2:])
    context.commit()
    assert torch.equal(context.bases, before)


@ALL
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_forward_passes_before_one_backward_pass_and_checkpoint(module, use_reentrant):
    plain = make(module, norm=lambda channels: nn.Identity())
    saving = copy.deepcopy(plain)

    def run(features, coarse):
        return saving(features, None, coarse)[0]

    for _ in range(3):
        inputs = [make_input(size=(5, 4)) for _ in range(2)]
        for context in (plain, saving):
            context.zero_grad()
        sum(plain(*i[:3])[0].square().sum() for i in inputs).backward()
        sum(
            checkpoint(run, i[0], i[2], use_reentrant=use_reentrant).square().sum() for i in inputs
        ).backward()
        for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
            if a.grad is None:  # of the loss that is not here
                assert b.grad is None
                continue
            torch.testing.assert_close(a.grad, b.grad)
            with torch.no_grad():
                a -= 0.01 * a.grad
                b.copy_(a)
        if module is EMContext:
            plain.commit()
            saving.commit()
        for a, b in zip(plain.buffers(), saving.buffers(), strict=True):
            torch.testing.assert_close(a, b)


def _bases_of_a_process(rank, world_size, folder, batches):
    torch.manual_seed(rank)  # as Detectron2 seeds them
    context = make(EMContext, norm=lambda channels: nn.Identity())
    model = DistributedDataParallel(context, broadcast_buffers=False)
    start = copy.deepcopy(context.state_dict())  # weights as those of process 0, by now
    for features in batches:
        # Uneven shares: process 0 has one image, process 1 the others.
        share = features[:1] if rank == 0 else features[1:]
        sum(model(share)[0].sum() for _ in range(2)).backward()
        context.commit()
    assert dist.get_world_size() == world_size
    torch.save((start, context.state_dict()), f"{folder}/{rank}.pth")


def test_processes_have_the_bases_of_one_process(tmp_path):
    batches = [torch.randn(3, 5, 4, 5, dtype=torch.float64) for _ in range(3)]
    processes.run(_bases_of_a_process, 2, tmp_path, batches)
    (start, one), (_, two) = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert torch.equal(one["bases"], two["bases"])
    alone = make(EMContext, norm=lambda channels: nn.Identity())
    alone.load_state_dict(start)
    for features in batches:
        alone(features)
        alone.commit()
    torch.testing.assert_close(one["bases"], alone.bases)
    assert not torch.equal(one["bases"], start["bases"])
