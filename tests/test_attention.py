"""Attention: rotary positions, masks and cross-attention against their formulas, torch's and diffusers' modules."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.test_nets import inputs, randomised, relative
from undiffuse.nets.attention import Context, CrossAttention, attend, heads_of, mixed, normed, rotary, rotated

SIZES = [(5,), (3, 4), (2, 3, 4)]
MASK = torch.tensor([[True, True, False, True, False], [True] * 5, [False, False, True, False, False], [False] * 5])


def normal(*shape, seed=0, dtype=torch.float64):
    """Standard normal draws, in float32 equal to rounding with those in float64."""
    return inputs(*shape, seed=seed, dtype=dtype)[0]


def norms(width, seed=1):
    """Norms of queries and of keys, with gains around 1."""
    return [randomised(nn.RMSNorm(width).double(), seed + k) for k in range(2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("width", "extra"), [(12, 0), (14, 2), (8, 1)])
def test_rotary_turns_each_sides_pairs_by_its_coordinate(size, width, extra):
    """Su et al. 2021, equation 15, with pairs (i, i + width / 2) as complex numbers and frequencies 1 ... 1/100."""
    count = width // (2 * len(size))
    cos, sin = rotary(size, width, extra, torch.zeros(()))
    assert cos.shape == sin.shape == (extra + math.prod(size), width // 2)
    a = normal(1, 2, len(cos), width)
    pairs = torch.complex(a[..., : width // 2], a[..., width // 2 :])
    for row, place in enumerate([None] * extra + list(itertools.product(*map(range, size)))):
        angle = torch.zeros(width // 2, dtype=torch.float64)
        for axis, n in enumerate(place or ()):
            angle[axis * count :][:count] = n * 100 ** (-torch.arange(count).double() / max(1, count - 1))
        pairs[:, :, row] *= torch.polar(torch.ones(()).double(), angle)
    assert torch.allclose(rotated(a, (cos, sin)), torch.cat([pairs.real, pairs.imag], -1), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_rotated_attention_sees_differences_of_places_alone(size):
    """The same query and key at two places: their product depends on where they are from each other."""
    q, k = normal(1, 1, 1, 12, seed=1), normal(1, 1, 1, 12, seed=2)
    rotation = rotary([n + 2 for n in size], 12, 0, torch.zeros(()))
    n = len(rotation[0])
    products = (rotated(q.expand(1, 1, n, 12), rotation) @ rotated(k.expand(1, 1, n, 12), rotation).mT)[0, 0]
    places = torch.tensor(list(itertools.product(*(range(n + 2) for n in size))))
    apart = (places[:, None] - places[None]).flatten(0, 1)
    seen = {}
    for difference, product in zip(map(tuple, apart.tolist()), products.flatten().tolist(), strict=True):
        seen.setdefault(difference, []).append(product)
    assert all(max(values) - min(values) < 1e-4 for values in seen.values())
    assert len({round(values[0], 3) for values in seen.values()}) > len(seen) / 2


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("keys", [5, 600])
def test_masked_keys_have_no_weight(learns, keys):
    mask = MASK[:3].repeat(1, keys // 5)[:, None, None]
    q, k, v = (normal(3, 2, n, 8, seed=n + s).requires_grad_(learns) for s, n in enumerate((4, keys, keys)))
    out = attend(q, k, v, *norms(8), mask)
    for row in range(3):
        there = mask[row, 0, 0]
        alone = attend(q[row : row + 1], k[row : row + 1, :, there], v[row : row + 1, :, there], *norms(8))
        assert torch.allclose(out[row], alone[0], atol=1e-12)
    if learns:
        to_k, to_v = torch.autograd.grad(out.square().sum(), (k, v))
        hidden = ~mask[:, 0, 0, None, :, None].expand(to_k.shape)
        assert not to_k[hidden].any()
        assert torch.equal(to_v == 0, hidden)


@pytest.mark.parametrize("heads", [1, 3])
def test_cross_attention_is_its_formula(heads):
    block, width = randomised(CrossAttention(12, 7, heads).double()), 12 // heads
    x, tokens = normal(4, 3, 12, seed=1), normal(4, 5, 7, seed=2)
    out, p = block(x, Context.of(tokens, MASK)), dict(block.named_parameters())

    def rms(name, h):
        return h / (h.square().mean(-1, True) + torch.finfo(h.dtype).eps).sqrt() * p[f"{name}.weight"]

    for row in range(3):
        seen = tokens[row, MASK[row]]
        q, kv = x[row] @ p["q.weight"].T + p["q.bias"], seen @ p["kv.weight"].T + p["kv.bias"]
        heard = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            weights = (rms("q_norm", q[:, part]) @ rms("k_norm", kv[:, :12][:, part]).T / math.sqrt(width)).softmax(1)
            heard.append(weights @ kv[:, 12:][:, part])
        assert torch.allclose(out[row], torch.cat(heard, 1) @ p["proj.weight"].T + p["proj.bias"], atol=1e-12)
    assert not out[3].any()


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("junk", [1e3, torch.inf, torch.nan])
def test_masked_tokens_have_no_effect_exactly(junk, learns):
    block = randomised(CrossAttention(16, 6, 2)).requires_grad_(learns)
    x, tokens = normal(4, 3, 16, seed=1).float(), normal(4, 5, 6, seed=2).float()
    spoilt = torch.where(MASK[..., None], tokens, junk)
    out = block(x, Context.of(spoilt, MASK))
    assert torch.equal(out, block(x, Context.of(tokens, MASK)))
    assert not out[3].any()
    assert relative(block(x, Context.of(2 * tokens, MASK))[:3], out[:3]) > 0.1
    if learns:
        out.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())


def test_cross_attention_starts_as_silence():
    assert not CrossAttention(16, 6, 2)(normal(4, 3, 16).float(), Context.of(normal(4, 5, 6).float(), MASK)).any()


@pytest.mark.parametrize(
    ("width", "least", "heads"), [(64, 32, 2), (96, 32, 3), (16, 32, 1), (192, 64, 3), (130, 64, 2), (8, 64, 1)]
)
def test_heads_are_the_most_of_at_least_the_width_asked_for(width, least, heads):
    assert heads_of(width, least) == heads


# torch and diffusers on the same weights


@pytest.mark.parametrize("learns", [True, False])
def test_attention_is_torchs_multi_head_attention(learns):
    """Queries and keys normalised before it, which torch's module does not do; its own projections are identities."""
    q, k, v = (normal(4, n, 24, seed=s).float().requires_grad_(learns) for s, n in enumerate((3, 5, 5)))
    pair = [norm.float() for norm in norms(8)]
    mine = [a.unflatten(-1, (3, 8)).transpose(1, 2) for a in (q, k, v)]
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.eye(24).repeat(3, 1))
        theirs.out_proj.weight.copy_(torch.eye(24))
    mask = MASK[:3]
    context = [normed(a, n).transpose(1, 2).flatten(2)[:3] for a, n in zip(mine, pair, strict=False)]
    expected = theirs(*context, v[:3], key_padding_mask=~mask, need_weights=False)[0]
    out = attend(*(a[:3] for a in mine), *pair, mask[:, None, None]).transpose(1, 2).flatten(2)
    assert torch.allclose(out, expected, atol=1e-5)


def test_normed_is_torchs_rms_norm():
    a, (norm, _) = normal(2, 3, 5, 8), norms(8)
    assert torch.allclose(normed(a, norm), norm(a), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_rotated_is_diffusers(size):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    cos, sin = rotary(size, 12, 1, torch.zeros(()))
    a = normal(2, 2, len(cos), 12).float()
    expected = embeddings.apply_rotary_emb(a, (cos.repeat(1, 2), sin.repeat(1, 2)), use_real_unbind_dim=-2)
    assert torch.allclose(rotated(a, (cos, sin)), expected, atol=1e-6)


def test_cross_attention_is_diffusers():
    peer = pytest.importorskip("diffusers.models.attention_processor")
    block = randomised(CrossAttention(24, 10, 3))
    eps = torch.finfo(torch.float32).eps
    theirs = peer.Attention(24, 10, heads=3, dim_head=8, bias=True, qk_norm="rms_norm", eps=eps).eval()
    keys, values = block.kv.weight.chunk(2), block.kv.bias.chunk(2)
    state = {"to_q": block.q, "to_out.0": block.proj, "norm_q": block.q_norm, "norm_k": block.k_norm}
    state = {f"{name}.{k}": v for name, module in state.items() for k, v in module.state_dict().items()}
    for i, name in enumerate(("to_k", "to_v")):
        state |= {f"{name}.weight": keys[i], f"{name}.bias": values[i]}
    theirs.load_state_dict(state)
    x, tokens = normal(3, 4, 24, seed=1).float(), normal(3, 5, 10, seed=2).float()
    bias = torch.zeros(3, 1, 5).masked_fill(~MASK[:3, None], -torch.inf)
    expected = theirs(x, tokens, attention_mask=bias)
    assert torch.allclose(block(x, Context.of(tokens, MASK[:3])), expected, atol=1e-5)


def test_mixed_is_torchs_own_function():
    q, k, v = (normal(2, 3, n, 8, seed=s) for s, n in enumerate((4, 6, 6)))
    assert torch.allclose(mixed(q, k, v), F.scaled_dot_product_attention(q, k, v), atol=1e-12)
    learns = [a.clone().requires_grad_() for a in (q, k, v)]
    assert torch.allclose(mixed(*learns), F.scaled_dot_product_attention(q, k, v), atol=1e-12)
