"""Networks: blocks against their written-out formulas; invariances, precision, gradients and refusals of all."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from undiffuse import Cond, InputError, Label
from undiffuse.nets import NETS, DiT, UNet, attention
from undiffuse.nets.attention import attend
from undiffuse.nets.blocks import Attention, Down, ResBlock, Up, cropped, group_norm, padded, shuffle, unshuffle
from undiffuse.nets.embed import TimeEmbedding, sines
from undiffuse.nets.transformer import Block

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
SIZES = {1: [(16,), (1,), (13,)], 2: [(8, 8), (7, 9), (1, 6)], 3: [(4, 4, 4), (3, 5, 6)]}
SHAPES = [(dims, size) for dims, sizes in SIZES.items() for size in sizes]
# of each kind: settings of a small one, those that give it all its parts, and its first layer that reads the embedding
SMALL = {"unet": {}, "dit": {"depth": 2, "patch": 2}}
WHOLE = {
    "unet": {"width": 32, "mults": (1, 2), "attention": (0,), "patch": 2},
    "dit": {"width": 24, "heads": 2, "depth": 2, "patch": 2},
}
FIRST = {"unet": lambda net: net.down[0].block.modulate, "dit": lambda net: net.blocks[0].modulate}


def randomised(module, seed=0):
    """The module with random parameters, the zero-initialised ones too: variance 1 / fan-in, gains around 1."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / math.sqrt(p[0].numel() if p.ndim > 1 else 10))
            p += p.ndim == 1 and name.endswith("weight")
    return module.eval()


def unet(channels=2, dims=2, width=16, seed=0, **kw):
    """A small randomised network."""
    return randomised(UNet(channels, dims, width, **kw), seed)


def network(kind, channels=2, dims=2, width=16, seed=0, **kw):
    """A small randomised network of a kind; `kw` wins over its settings in SMALL."""
    return randomised(NETS[kind](channels, dims, **{"width": width, **SMALL[kind], **kw}), seed)


def inputs(*shape, seed=1, dtype=torch.float32):
    """x and times, different in every row."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    return x.to(dtype), torch.linspace(-2.5, 2.5, shape[0])


def relative(a, b):
    """|a - b| / |b|."""
    return float(((a - b).norm() / b.norm()).detach())


def captured(module, run):
    """All first inputs of a module while `run()` runs."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen


def test_group_norm_takes_the_most_groups_of_at_least_16_channels():
    for channels in range(1, 1100):
        norm = group_norm(channels)
        allowed = [g for g in range(1, 33) if channels % g == 0 and channels >= 16 * g]
        assert norm.num_groups == max(allowed, default=1)
        assert norm.num_channels == channels


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("patch", [1, 2, 3])
def test_unshuffle_is_its_index_formula_and_shuffle_its_inverse(dims, patch):
    size = [2, 3, 1][:dims]
    x = torch.arange(2 * 3 * math.prod(n * patch for n in size)).reshape(2, 3, *(n * patch for n in size))
    y = unshuffle(x, patch)
    for c in range(3):
        for k, offset in enumerate(itertools.product(range(patch), repeat=dims)):
            expected = x[(slice(None), c, *(slice(o, None, patch) for o in offset))]
            assert torch.equal(y[:, c * patch**dims + k], expected)
    assert torch.equal(shuffle(y, patch), x)
    assert torch.equal(unshuffle(shuffle(y, patch), patch), y)


def test_unshuffle_is_pixel_unshuffle_in_2d():
    x, _ = inputs(2, 3, 8, 12)
    assert torch.equal(unshuffle(x, 4), F.pixel_unshuffle(x, 4))
    assert torch.equal(shuffle(x[:, :1].expand(2, 16, 8, 12), 4), F.pixel_shuffle(x[:, :1].expand(2, 16, 8, 12), 4))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_down_averages_and_up_repeats(dims):
    down, up, (x, _) = Down(dims, 3), Up(dims, 3), inputs(2, 3, *[4] * dims)
    with torch.no_grad():
        for layer in (down.conv, up.conv):
            torch.nn.init.dirac_(layer.weight)
            layer.bias.zero_()
    half = torch.stack(
        [x[(..., *(slice(o, None, 2) for o in offset))] for offset in itertools.product((0, 1), repeat=dims)]
    )
    assert torch.allclose(down(x, None), half.mean(0), atol=1e-6)
    double = x
    for axis in range(2, 2 + dims):
        double = double.repeat_interleave(2, axis)
    assert torch.allclose(up(x, None), double, atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("channels", "out"), [(32, 32), (48, 32), (8, 24)])
def test_res_block_is_its_formula(dims, channels, out):
    block = randomised(ResBlock(dims, channels, out, embedding=12, dropout=0.5).double())
    (x, _), (emb, _) = (inputs(*shape, dtype=torch.float64) for shape in ((2, channels, *[4] * dims), (2, 12)))
    p, conv = dict(block.named_parameters()), CONV[dims]

    def norm(name, h):
        groups = h.unflatten(1, (max(1, h.shape[1] // 16) if h.shape[1] % 16 == 0 else 1, -1)).flatten(2)
        h = ((groups - groups.mean(2, True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()).reshape(
            h.shape
        )
        shape = (-1, *[1] * dims)
        return p[f"{name}.weight"].reshape(shape) * h + p[f"{name}.bias"].reshape(shape)

    def silu(h):
        return h / (1 + torch.exp(-h))

    h = conv(silu(norm("norm1", x)), p["conv1.weight"], p["conv1.bias"], padding=1)
    emb_out = (emb @ p["modulate.weight"].T + p["modulate.bias"]).reshape(2, 2 * out, *[1] * dims)
    h = norm("norm2", h) * (1 + emb_out[:, :out]) + emb_out[:, out:]
    h = conv(silu(h), p["conv2.weight"], p["conv2.bias"], padding=1)
    skip = x if channels == out else conv(x, p["skip.weight"], p["skip.bias"])
    assert torch.allclose(block(x, emb), skip + h, atol=1e-10)


def test_res_block_starts_as_its_skip_and_without_modulation():
    block, (x, emb) = ResBlock(2, 16, 16, embedding=4), (inputs(2, 16, 4, 4)[0], inputs(2, 4)[0])
    assert torch.equal(block(x, emb), x)
    torch.nn.init.dirac_(block.conv2.weight)
    assert torch.equal(block(x, emb), block(x, 0 * emb))
    assert relative(block(x, emb), x) > 0.1


@pytest.mark.parametrize(("dims", "channels", "heads"), [(1, 16, 1), (1, 64, 2), (2, 96, 3), (3, 48, 1)])
def test_attention_is_softmax_of_normalised_queries_and_keys(dims, channels, heads):
    block = randomised(Attention(dims, channels).double())
    x, _ = inputs(2, channels, *[3] * dims, dtype=torch.float64)
    p, width = dict(block.named_parameters()), channels // heads
    flat = block.norm(x).flatten(2)
    qkv = torch.einsum("oc,bcn->bon", p["qkv.weight"].flatten(1), flat) + p["qkv.bias"][:, None]

    def rms(h, weight):
        return h / (h.square().mean(0, keepdim=True) + torch.finfo(h.dtype).eps).sqrt() * weight[:, None]

    mixed = torch.empty_like(flat)
    for b, head in itertools.product(range(2), range(heads)):
        q, k, v = (qkv[b, part * channels + head * width :][:width] for part in range(3))
        q, k = rms(q, p["q_norm.weight"]), rms(k, p["k_norm.weight"])
        weights = torch.exp(q.T @ k / math.sqrt(width))
        mixed[b, head * width : (head + 1) * width] = v @ (weights / weights.sum(1, keepdim=True)).T
    out = torch.einsum("oc,bcn->bon", p["proj.weight"].flatten(1), mixed) + p["proj.bias"][:, None]
    assert torch.allclose(block(x), x + out.reshape(x.shape), atol=1e-10)


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (2, 512), (2, 513)])
def test_attend_is_softmax_of_normalised_queries_and_keys_by_either_way(queries, keys, learns):
    """Products of matrices, which training takes for few tokens on CPUs, and the fused kernel: values and gradients."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64) for n in (queries, keys, keys))
    norms = [randomised(torch.nn.RMSNorm(8, dtype=torch.float64), seed) for seed in (1, 2)]
    slope = torch.randn(q.shape, generator=g, dtype=torch.float64)
    leaves = [a.requires_grad_(learns) for a in (q, k, v, *(n.weight for n in norms))]

    def normed(a, n):
        return a / (a.square().mean(-1, keepdim=True) + torch.finfo(a.dtype).eps).sqrt() * n.weight

    logits = torch.einsum("bhqw,bhkw->bhqk", normed(q, norms[0]), normed(k, norms[1])) / math.sqrt(8)
    expected, out = torch.einsum("bhqk,bhkw->bhqw", logits.softmax(-1), v), attend(q, k, v, *norms)
    assert torch.allclose(out, expected, atol=1e-12)
    if learns:
        for mine, theirs in zip(*(torch.autograd.grad(y, leaves, slope) for y in (out, expected)), strict=True):
            assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("queries", "keys", "learns", "fused"),
    [(512, 512, True, 0), (513, 513, True, 1), (1, 513, True, 1), (9, 9, False, 1)],
)
def test_the_fused_kernel_serves_sampling_and_many_tokens(queries, keys, learns, fused, monkeypatch):
    calls, kernel = [], F.scaled_dot_product_attention
    q, k = (torch.zeros(1, 1, n, 2, requires_grad=learns) for n in (queries, keys))
    norms = torch.nn.ModuleList(torch.nn.RMSNorm(2) for _ in range(2)).requires_grad_(learns)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", lambda *a: calls.append(a) or kernel(*a))
    attend(q, k, k, *norms)
    assert len(calls) == fused


@pytest.mark.parametrize("learns", [True, False])
def test_attention_keeps_bfloat16_under_autocast(learns):
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(learns).unbind()
    norms = torch.nn.RMSNorm(8), torch.nn.RMSNorm(8)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), *norms)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), attend(q, k, v, *norms)) < 0.02


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("multiple", [1, 2, 3, 4, 5])
def test_padded_takes_the_least_multiple_and_cropped_is_its_inverse(multiple, dims):
    for size in itertools.product((1, 4, 7), repeat=dims):
        x, _ = inputs(1, 2, *size)
        wide = padded(x, multiple)
        assert wide.shape[2:] == tuple(math.ceil(side / multiple) * multiple for side in size)
        assert torch.equal(cropped(wide, size), x)
        assert set(wide.flatten().tolist()) == set(x.flatten().tolist())


@pytest.mark.parametrize(("count", "periods"), [(1, (0.5, 8.0)), (4, (0.5, 4.0)), (3, (2 * math.pi, 2e4 * math.pi))])
def test_sines_are_cosines_and_sines_of_periods_in_geometric_steps(count, periods):
    values = torch.tensor([-3.0, 0.0, 0.4, 7.0])
    ratio = (periods[1] / periods[0]) ** (1 / max(1, count - 1))
    angle = 2 * math.pi * values.double()[:, None] / (periods[0] * ratio ** torch.arange(count).double())
    seen = sines(values, count, periods)
    assert seen.dtype == torch.float32
    assert torch.allclose(seen.double(), torch.cat([angle.cos(), angle.sin()], 1), atol=1e-5)


@pytest.mark.parametrize(("heads", "expand"), [(1, 4), (3, 2)])
def test_transformer_block_is_its_formula(heads, expand):
    """Peebles and Xie 2023, figure 3, adaLN-zero: x += gate f(norm(x) (1 + scale) + shift), for both parts f."""
    block = randomised(Block(12, heads, expand, 6, dropout=0.5).double())
    (x, _), (emb, _) = inputs(2, 5, 12, dtype=torch.float64), inputs(2, 6, seed=2, dtype=torch.float64)
    p = dict(block.named_parameters())

    def linear(name, h):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()

    def rms(name, h):
        return h / (h.square().mean(-1, True) + torch.finfo(h.dtype).eps).sqrt() * p[f"{name}.weight"]

    shift1, scale1, gate1, shift2, scale2, gate2 = linear("modulate", emb)[:, None].split(12, -1)
    qkv, width = linear("qkv", norm(x) * (1 + scale1) + shift1), 12 // heads
    mixed = torch.empty_like(x)
    for head in range(heads):
        q, k, v = (qkv[..., part * 12 + head * width :][..., :width] for part in range(3))
        weights = torch.exp(rms("q_norm", q) @ rms("k_norm", k).transpose(1, 2) / math.sqrt(width))
        mixed[..., head * width : (head + 1) * width] = weights / weights.sum(-1, keepdim=True) @ v
    h = x + gate1 * linear("proj", mixed)
    inner = linear("up", norm(h) * (1 + scale2) + shift2)
    inner = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    assert torch.allclose(block(x, emb), h + gate2 * linear("down", inner), atol=1e-10)


def test_time_embedding_is_cosines_and_sines_of_geometric_periods():
    embed, t = TimeEmbedding(12, 8), torch.tensor([-3.0, 0.0, 0.4, 2.9])
    periods = 0.1 * (40 / 0.1) ** (torch.arange(6).double() / 5)
    angle = 2 * math.pi * t.double()[:, None] / periods
    features = torch.cat([angle.cos(), angle.sin()], 1)
    (seen,) = captured(embed.mlp, lambda: embed(t))
    assert torch.allclose(seen.double(), features, atol=1e-4)
    (later,) = captured(embed.mlp, lambda: embed(t + 0.1))
    assert torch.allclose(later[:, [0, 6]], seen[:, [0, 6]], atol=1e-3)


def test_integer_timesteps_are_told_apart():
    embed = TimeEmbedding(16, 8, (6, 6e4))
    (features,) = captured(embed.mlp, lambda: embed(torch.arange(1000)))
    distance = torch.cdist(features.double(), features.double()).fill_diagonal_(math.inf)
    assert float(distance.min()) > 0.05


def test_time_features_keep_float32_under_bfloat16_autocast():
    embed, t = randomised(TimeEmbedding(32, 32)), torch.tensor([2.5, 2.501])
    with torch.autocast("cpu", torch.bfloat16):
        (seen,) = captured(embed.mlp, lambda: embed(t))
        near = embed(t).float()
    (exact,) = captured(embed.mlp, lambda: embed(t))
    assert seen.dtype == torch.float32
    assert torch.equal(seen, exact)
    assert relative(near[1] - near[0], embed(t)[1] - embed(t)[0]) < 0.2
    assert t.bfloat16().unique().numel() == 1


def test_time_features_keep_float32_in_a_bfloat16_network():
    embed, t = TimeEmbedding(32, 32), torch.linspace(-3, 3, 13)
    (exact,) = captured(embed.mlp, lambda: embed(t))
    half = copy.deepcopy(embed).bfloat16()
    (seen,) = captured(half.mlp, lambda: half(t))
    assert float((seen.float() - exact).abs().max()) < 2**-8


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("channels", [1, 2, 5])
@pytest.mark.parametrize(("dims", "size"), SHAPES)
def test_any_shape_comes_back_and_starts_at_zero(dims, size, channels, kind):
    x, t = inputs(2, channels, *size)
    net = NETS[kind](channels, dims, width=16)
    assert net(x, t).shape == x.shape
    assert not net(x, t).any()
    out = randomised(net)(x, t)
    assert out.shape == x.shape
    assert torch.isfinite(out).all()
    assert float(out.detach().abs().mean()) > 0.05


@pytest.mark.parametrize(
    ("kind", "kw"),
    [
        *(("unet", kw) for kw in ({"mults": (1, 2, 2)}, {"mults": (1,)}, {"patch": 2}, {"patch": 3, "depth": 2})),
        *(("dit", kw) for kw in ({"patch": 1}, {"patch": 3, "depth": 2})),
    ],
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_learned_variance_doubles_the_channels(dims, kind, kw):
    x, t = inputs(2, 3, *[7, 5, 6][:dims])
    net = NETS[kind](3, dims, 16, learned_variance=True, **kw)
    assert net(x, t).shape == (2, 6, *x.shape[2:])
    assert not net(x, t).any()
    mean, variance = randomised(net)(x, t).chunk(2, 1)
    assert relative(mean, variance) > 0.1


@pytest.mark.parametrize(("kind", "kw"), [("unet", {"mults": (1, 1, 1)}), ("dit", {"patch": 4})])
@pytest.mark.parametrize(("dims", "size"), SHAPES)
def test_sizes_are_padded_with_the_edge_inside_and_cropped_outside(dims, size, kind, kw):
    net, (x, t) = network(kind, 2, dims, **kw), inputs(2, 2, *size)
    wide, inner = x, []
    for axis, side in enumerate(size, 2):
        margin = math.ceil(side / 4) * 4 - side
        place = torch.arange(side + margin) - margin // 2
        wide = wide.index_select(axis, place.clamp(0, side - 1))
        inner.append(slice(margin // 2, margin // 2 + side))
    assert torch.allclose(net(x, t), net(wide, t)[(..., *inner)], atol=1e-5)
    assert captured(net.stem, lambda: net(x, t))[0].numel() == wide.numel()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patch_network_is_the_plain_network_on_unshuffled_data(dims):
    net = unet(2, dims, patch=2)
    plain = UNet(2 * 2**dims, dims, 16)
    plain.load_state_dict(net.state_dict())
    x, t = inputs(2, 2, *[8] * dims)
    assert torch.allclose(net(x, t), shuffle(plain(unshuffle(x, 2), t), 2), atol=1e-5)


def test_attention_acts_at_the_levels_named_and_in_the_bottleneck():
    net, (x, t), sides = unet(1, mults=(1, 2, 3), depth=2, attention=(0,)), inputs(1, 1, 8, 8), []
    for module in net.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda _, args: sides.append(args[0].shape[-1]))
    net(x, t)
    assert sides == [8, 8, 2, 8, 8, 8]


def test_the_trunk_starts_affine_in_x_and_blind_to_time():
    """Zero-initialised branches leave convolutions, pooling and skip connections alone."""
    net = UNet(2, width=16, mults=(1, 2, 2), attention=(0, 1)).double()
    x, t = inputs(4, 2, 8, 8, dtype=torch.float64)
    x[3], x[0] = x[1] + x[2], 0
    (h,) = captured(net.norm, lambda: net(x, t))
    assert torch.allclose(h[3] - h[0], h[1] + h[2] - 2 * h[0], atol=1e-12)
    (again,) = captured(net.norm, lambda: net(x, t.flip(0)))
    assert torch.equal(h, again)
    assert float((h[1] - h[0]).detach().std()) > 1e-2


def test_the_transformer_starts_as_its_patches_and_positions():
    """Gates that start shut leave tokens alone, whatever the time."""
    net, (x, t) = DiT(2, width=16, patch=2, depth=3), inputs(2, 2, 6, 4)
    tokens = net.stem(unshuffle(x, 2).flatten(2).transpose(1, 2)) + net._positions((3, 2), x)
    for block in net.blocks:
        assert torch.equal(block(tokens, net.embed(t, None)), tokens)
    assert torch.equal(captured(net.blocks[0], lambda: net(x, t))[0], tokens)


def test_the_transformer_ends_in_a_modulated_norm_and_a_linear_layer():
    net, (x, t) = network("dit"), inputs(2, 2, 6, 4)
    (h,), emb = captured(net.blocks[0], lambda: net(x, t)), net.embed(t, None)
    for block in net.blocks:
        h = block(h, emb)
    h = (h - h.mean(-1, True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    shift, scale = (emb @ net.modulate.weight.T + net.modulate.bias)[:, None].split(16, -1)
    out = (h * (1 + scale) + shift) @ net.head.weight.T + net.head.bias
    assert torch.allclose(net(x, t), shuffle(out.transpose(1, 2).reshape(2, 8, 3, 2), 2), atol=1e-5)


@pytest.mark.parametrize(("dims", "width"), [(1, 16), (2, 16), (3, 16), (3, 8)])
def test_positions_are_sines_of_each_sides_coordinate(dims, width):
    """Vaswani et al. 2017, section 3.5, with frequencies 1 ... 1e-4 of an equal part of the width for each side."""
    net, size = DiT(1, dims, width), (3, 2, 4)[:dims]
    count, seen = width // (2 * dims), net._positions(size, torch.zeros(1))
    assert seen.shape == (math.prod(size), width)
    for row, place in zip(seen.double(), itertools.product(*map(range, size)), strict=True):
        for axis, n in enumerate(place):
            angle = n * 1e4 ** (-torch.arange(count).double() / max(1, count - 1))
            part = row[2 * count * axis :][: 2 * count]
            assert torch.allclose(part, torch.cat([angle.cos(), angle.sin()]), atol=1e-6)
        assert not row[2 * count * dims :].any()
    assert len(seen.unique(dim=0)) == len(seen)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_transformer_tells_patches_apart_by_their_positions_alone(dims, monkeypatch):
    net, (x, t) = network("dit", 1, dims), inputs(2, 1, *[4] * dims)
    order = torch.arange(2**dims).roll(1)

    def mixed(x):
        patches = unshuffle(x, 2)
        return shuffle(patches.flatten(2)[..., order].reshape(patches.shape), 2)

    assert relative(net(mixed(x), t), mixed(net(x, t))) > 0.05
    monkeypatch.setattr(DiT, "_positions", lambda self, size, x: torch.zeros(()))
    assert relative(net(mixed(x), t), mixed(net(x, t))) < 1e-5


@pytest.mark.parametrize(("width", "heads"), [(8, 1), (64, 1), (192, 3), (160, 2), (130, 2), (1152, 18)])
def test_the_transformer_takes_the_most_heads_of_at_least_64_features(width, heads):
    with torch.device("meta"):
        net = DiT(1, width=width, depth=1)
        assert [block.heads for block in net.blocks] == [heads]
        assert [block.heads for block in DiT(1, width=width, depth=2, heads=2).blocks] == [2, 2]


def test_a_transformer_block_has_18_width_squared_weights_and_linear_terms():
    """Attention 4, the two-layer network 8, its modulation 6 (Peebles and Xie 2023)."""
    width, depth = 192, 5

    def count(depth):
        with torch.device("meta"):
            return sum(p.numel() for p in DiT(4, width=width, depth=depth, patch=2).parameters())

    block = (count(1 + depth) - count(1)) / depth
    assert block == pytest.approx(18 * width**2 + 15 * width, abs=2 * 64)


@pytest.mark.parametrize(("kind", "kw"), [("unet", {"attention": (0,)}), ("dit", {"heads": 2})])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rows_are_independent_and_batches_permute(dims, kind, kw):
    net, (x, t) = network(kind, 2, dims, width=32, vector=4, **kw), inputs(4, 2, *[5, 6, 7][:dims])
    cond, order = Cond(vector=inputs(4, 4, seed=2)[0]), torch.tensor([2, 0, 3, 1])
    whole = net(x, t, cond)
    for k in range(4):
        alone = net(x[k : k + 1], t[k : k + 1], cond[k : k + 1])
        assert torch.allclose(alone[0], whole[k], atol=1e-5)
        assert relative(whole[k], whole[k - 1]) > 0.1
    assert torch.allclose(net(x[order], t[order], cond[order]), whole[order], atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_time_and_condition_matter(kind):
    net = randomised(NETS[kind](2, width=16, vector=3))
    x, t = inputs(2, 2, 6, 6)
    out = net(x, t, Label(3)([0, 1]))
    assert relative(net(x, t + 0.5, Label(3)([0, 1])), out) > 1e-2
    changed = net(x, t, Label(3)([0, 2]))
    assert relative(changed[1], out[1]) > 1e-2
    assert torch.allclose(changed[0], out[0], atol=1e-6)
    assert relative(net(x.flip(-1), t, Label(3)([0, 1])), out) > 1e-2


@pytest.mark.parametrize("kind", NETS)
def test_null_condition_is_no_condition(kind):
    net, (x, t) = network(kind, vector=3), inputs(2, 2, 6, 6)
    cond = Label(3)([0, 1])
    without = net(x, t)
    assert torch.equal(net(x, t, cond.null()), without)
    assert torch.equal(net(x, t, Cond()), without)
    half = net(x, t, cond.drop(torch.tensor([True, False])))
    assert torch.allclose(half[0], without[0], atol=1e-6)
    assert torch.allclose(half[1], net(x, t, cond)[1], atol=1e-6)
    assert relative(half[1], without[1]) > 1e-2


@pytest.mark.parametrize("kind", NETS)
def test_conditions_add_in_the_embedding(kind):
    """Two labels at once are the sum of both one-hot vectors, so their embeddings add."""
    net, t = network(kind, vector=3), torch.tensor([0.7])
    none, a, b, both = (
        captured(FIRST[kind](net), lambda c=c: net(torch.zeros(1, 2, 4, 4), t, Cond(vector=torch.tensor([c]))))[0]
        for c in ([0.0, 0, 0], [1.0, 0, 0], [0, 0, 1.0], [1.0, 0, 1.0])
    )
    raw = net.embed.time(t)
    parts = net.embed.vector.weight[:, 0], net.embed.vector.weight[:, 2]
    for seen, expected in ((none, raw), (a, raw + parts[0]), (b, raw + parts[1]), (both, raw + parts[0] + parts[1])):
        assert torch.allclose(seen, F.silu(expected), atol=1e-6)


@pytest.mark.parametrize("kind", NETS)
def test_dropout_acts_in_training_only(kind):
    net, (x, t) = network(kind, dropout=0.5), inputs(2, 2, 6, 6)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert relative(net(x, t), net(x, t)) > 1e-2
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    assert torch.equal(network(kind, dropout=0.0).train()(x, t), net.eval()(x, t))


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_gradient_reaches_every_parameter_and_the_input(dims, kind):
    net = network(kind, 2, dims, **WHOLE[kind], vector=3, augment=2, learned_variance=True)
    x, t = inputs(2, 2, *[7, 6, 5][:dims])
    out = net(x.requires_grad_(), t, replace(Label(3)([0, 1]), augment=torch.ones(2, 2)))
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    live = {name: p.grad is not None and float(p.grad.abs().max()) > 1e-7 for name, p in net.named_parameters()}
    live["embed.vector.weight"] &= not net.embed.vector.weight.grad[:, 2].any() and bool(
        net.embed.vector.weight.grad[:, :2].all(1).any()
    )
    assert [name for name, alive in live.items() if not alive] == []
    assert x.grad.ne(0).all()


@pytest.mark.parametrize("kind", NETS)
def test_steps_from_the_start_open_every_part(kind):
    """Behind layers that are zero at first a gradient arrives as soon as they have moved."""
    net, (x, t) = NETS[kind](2, **WHOLE[kind], vector=2), inputs(2, 2, 8, 8)
    optimiser, before = torch.optim.Adam(net.parameters(), 1e-2), copy.deepcopy(net.state_dict())
    for _ in range(4):
        optimiser.zero_grad()
        (net(x, t, Label(2)([0, 1])) - x.flip(0)).square().mean().backward()
        optimiser.step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("kind", NETS)
def test_gradient_is_the_finite_difference(kind):
    net = network(kind, 1, **WHOLE[kind], vector=2).double()
    x, t = inputs(1, 1, 5, 6, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, t, Label(2)([1])), x, fast_mode=True)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.5)])
def test_networks_compute_in_their_own_dtype(dtype, tolerance, kind):
    net, (x, t) = network(kind, **WHOLE[kind], vector=3), inputs(2, 2, 7, 6)
    cond, other = Label(3)([0, 1]), copy.deepcopy(net).to(dtype)
    out = other(x.to(dtype), t, cond)
    assert out.dtype == dtype
    assert relative(out.float(), net(x, t, cond)) < tolerance


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", NETS)
def test_bfloat16_autocast_stays_near_float32(kind, learns):
    net, (x, t) = network(kind, **WHOLE[kind], vector=3).requires_grad_(learns), inputs(2, 2, 8, 8)
    exact = net(x, t, Label(3)([0, 1]))
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, Label(3)([0, 1]))
    assert relative(out.float(), exact) < 0.05


@pytest.mark.parametrize(("kind", "kw"), [("unet", {"mults": (1,), "patch": 2}), ("dit", {"heads": 2, "depth": 1})])
def test_compiles_as_one_graph_for_every_size_and_condition(kind, kw):
    net, (x, t) = network(kind, **kw, vector=3, learned_variance=True), inputs(2, 2, 7, 5)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for part, cond in ((x, Label(3)([0, 1])), (x, None), (x[..., :4], None)):
        assert torch.allclose(compiled(part, t, cond), net(part, t, cond), atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_state_dict_holds_all_that_a_network_needs(kind):
    net, (x, t) = network(kind, **WHOLE[kind], vector=3), inputs(2, 2, 6, 6)
    other = NETS[kind](2, **WHOLE[kind], vector=3).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x, t, Label(3)([0, 1])), net(x, t, Label(3)([0, 1])))


@pytest.mark.parametrize(
    ("kw", "why"),
    [
        ({"dims": 4}, "dims=4"),
        ({"dims": 0}, "dims=0"),
        ({"channels": 0}, "channels=0"),
        ({"depth": 0}, "depth=0"),
        ({"patch": 0}, "patch=0"),
        ({"mults": ()}, r"mults=\(\)"),
        ({"mults": (1, 0)}, r"mults=\(1, 0\)"),
        ({"width": 7}, "width=7"),
        ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"\[0, 1\), got -0.1"),
        ({"attention": (2,)}, r"levels \(2,\); there are 0 ... 1"),
        ({"attention": (0, -1)}, r"levels \(0, -1\)"),
        pytest.param({"vector": -1}, "vector"),
        pytest.param({"mults": (1, 1.5)}, "mults"),
    ],
)
def test_impossible_networks_are_refused(kw, why):
    with pytest.raises(InputError, match=why):
        UNet(**{"channels": 1, "width": 16, **kw})


@pytest.mark.parametrize(
    ("kw", "why"),
    [
        ({"dims": 4}, "dims=4"),
        ({"channels": 0}, "channels=0"),
        ({"depth": 0}, "depth=0"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"patch": 0}, "patch=0"),
        ({"expand": 0}, "expand=0"),
        ({"width": 6}, "an even width >= 8 .* width=6"),
        ({"width": 17}, "width=17"),
        ({"heads": 3}, "heads divide.* heads=3"),
        ({"heads": -1}, "heads=-1"),
        ({"vector": -1}, "vector=-1"),
        ({"augment": -1}, "augment=-1"),
        ({"dropout": 1.0}, r"\[0, 1\), got 1.0"),
    ],
)
def test_impossible_transformers_are_refused(kw, why):
    with pytest.raises(InputError, match=why):
        DiT(**{"channels": 1, "width": 16, **kw})


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    ("shape", "times", "vector", "why"),
    [
        ((2, 1, 4), 2, None, r"takes \(batch, 1, side, side\), got \(2, 1, 4\)"),
        ((2, 1, 4, 4, 4), 2, None, r"got \(2, 1, 4, 4, 4\)"),
        ((2, 3, 4, 4), 2, None, r"got \(2, 3, 4, 4\)"),
        ((2, 1, 4, 4), 2, (2, 4), r"shape \(2, 4\): expected \(2, 3\)"),
        ((2, 1, 4, 4), 2, (1, 3), r"shape \(1, 3\): expected \(2, 3\)"),
        ((2, 1, 4, 4), 2, (2, 3, 1), r"shape \(2, 3, 1\)"),
        pytest.param((2, 1, 4, 4), 3, None, "time"),
        pytest.param((2, 1, 4, 4), (), None, "time"),
        pytest.param((2, 1, 4, 4), (2, 1, 1, 1), None, "time"),
        pytest.param((2, 1, 0, 4), 2, None, "side|size"),
    ],
)
def test_wrong_shapes_are_refused(shape, times, vector, why, kind):
    cond = None if vector is None else Cond(vector=torch.zeros(vector))
    with pytest.raises(InputError, match=why):
        network(kind, 1, vector=3)(torch.zeros(shape), torch.zeros(times), cond)


@pytest.mark.parametrize("kind", NETS)
def test_a_condition_that_the_network_cannot_read_is_refused(kind):
    x, t = inputs(2, 1, 4, 4)
    with pytest.raises(InputError, match=r"without a condition .vector=0. and was given some: build it with vector=3"):
        network(kind, 1)(x, t, Label(3)([0, 1]))


@pytest.mark.parametrize("part", ["tokens", "spatial"])
@pytest.mark.parametrize("kind", NETS)
def test_parts_of_a_condition_that_the_network_cannot_read_are_refused(kind, part):
    x, t = inputs(2, 1, 4, 4)
    with pytest.raises(InputError, match=part):
        network(kind, 1, vector=3)(x, t, Cond(vector=torch.zeros(2, 3), **{part: torch.ones(2, 4, 3)}))


@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("kind", NETS)
def test_an_empty_batch_gives_an_empty_batch(kind, side):
    assert network(kind, 1)(torch.zeros(0, 1, 4, side), torch.zeros(0)).shape == (0, 1, 4, side)
