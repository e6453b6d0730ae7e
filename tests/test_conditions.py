"""Networks and their conditions: every part of a `Cond` reaches x by its mechanism, and what is masked out does not."""

import contextlib
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from tests.test_attention import MASK
from tests.test_nets import captured, inputs, randomised, relative
from undiffuse import CFG, Cond, Denoiser, InputError, Level, V
from undiffuse.nets import NETS, DiT, UNet
from undiffuse.nets.attention import Context, CrossAttention, mixed, rotary
from undiffuse.nets.blocks import POOL, Attention, ResBlock, Stage, padded, shuffle, unshuffle
from undiffuse.nets.transformer import Block, JointBlock
from undiffuse.train.gradient import recomputed

WIDTHS = {"vector": 3, "augment": 2, "tokens": 6, "spatial": 2}
LIGHT = {"positions": "rope", "norm": "rms", "gated": True, "registers": 2}
# name -> kind and settings
KINDS = {
    "unet": ("unet", {"mults": (1, 2), "attention": (1,), "cross": (0, 1)}),
    "unet-transformer": ("unet", {"mults": (1, 2), "patch": 2, "transformer": 2, "resample": "residual"}),
    "dit": ("dit", {}),
    "dit-light": ("dit", LIGHT),
    "dit-context": ("dit", {**LIGHT, "tokens_by": "context"}),
    "dit-joint": ("dit", {**LIGHT, "tokens_by": "joint"}),
    "dit-joint-sines": ("dit", {"tokens_by": "joint"}),
}
EXACT = ["unet", "unet-transformer", "dit", "dit-light"]  # tokens are heard by cross-attention alone


def build(name, channels=2, dims=2, start=False, **kw):
    """A small network of a kind, randomised, or as it starts."""
    kind, settings = KINDS[name]
    small = {"width": 24, "depth": 2, "patch": 2, "heads": 2} if kind == "dit" else {"width": 16}
    net = NETS[kind](channels, dims, **{**small, **settings, **WIDTHS, **kw})
    return net if start else randomised(net)


def told(*size, b=4, seed=5):
    """A condition with all parts, with rows of all, some and no tokens."""
    make = {"vector": (3,), "augment": (2,), "tokens": (5, 6), "spatial": (2, *size)}
    parts = {name: inputs(b, *shape, seed=seed + i)[0] for i, (name, shape) in enumerate(make.items())}
    return Cond(**parts, tokens_mask=MASK[:b])


def given(*size, b=4):
    """x, times and a condition."""
    return *inputs(b, 2, *size), told(*size, b=b)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("part", WIDTHS)
def test_every_part_of_a_condition_matters_in_its_own_row_alone(name, part):
    net, (x, t, cond) = build(name), given(6, 7)
    whole, changed = net(x, t, cond), getattr(cond, part).clone()
    changed[1] = changed[1].flip(-1)
    out = net(x, t, replace(cond, **{part: changed}))
    assert relative(out[1], whole[1]) > 1e-2
    others = torch.tensor([0, 2, 3])
    assert torch.allclose(out[others], whole[others], atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_every_token_that_is_there_matters_and_no_other(name):
    net, (x, t, cond) = build(name), given(6, 7)
    whole = net(x, t, cond)
    for token in range(5):
        tokens = cond.tokens.clone()
        tokens[:, token] = 2 - tokens[:, token]
        out = net(x, t, replace(cond, tokens=tokens))
        for row in range(4):
            assert torch.equal(out[row], whole[row]) != bool(MASK[row, token])
            assert not MASK[row, token] or relative(out[row], whole[row]) > 1e-4


@pytest.mark.parametrize("junk", [1e3, torch.nan])
@pytest.mark.parametrize("name", KINDS)
def test_what_is_masked_out_has_no_effect_exactly(name, junk):
    net, (x, t, cond) = build(name), given(6, 7)
    spoilt = replace(cond, tokens=torch.where(MASK[..., None], cond.tokens, junk))
    assert torch.equal(net(x, t, spoilt), net(x, t, cond))


@pytest.mark.parametrize("name", KINDS)
def test_padding_of_tokens_is_no_token(name):
    net, (x, t, cond) = build(name), given(6, 7)
    longer = replace(cond, tokens=F.pad(cond.tokens, (0, 0, 0, 3)), tokens_mask=F.pad(MASK, (0, 3)))
    assert torch.allclose(net(x, t, longer), net(x, t, cond), atol=1e-5)
    none = replace(cond, tokens=cond.tokens[:, :0], tokens_mask=MASK[:, :0])
    assert torch.equal(net(x, t, none), net(x, t, replace(cond, tokens=None, tokens_mask=None)))


@pytest.mark.parametrize("name", KINDS)
def test_the_null_condition_is_no_condition(name):
    net, (x, t, cond) = build(name), given(6, 7)
    without, null = net(x, t), net(x, t, replace(cond, augment=None).null())
    if name in EXACT:
        assert torch.equal(null, without)
    assert torch.allclose(null, without, atol=1e-5)
    half = net(x, t, replace(cond, augment=None).drop(torch.tensor([True, False, False, True])))
    assert torch.allclose(half[::3], without[::3], atol=1e-5)
    assert torch.allclose(half[1:3], net(x, t, replace(cond, augment=None))[1:3], atol=1e-5)
    assert relative(half[1:3], without[1:3]) > 1e-2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rows_are_independent_and_batches_permute(name, dims):
    size = (5, 4, 6)[:dims]
    net, (x, t, cond), order = build(name, dims=dims), given(*size), torch.tensor([2, 0, 3, 1])
    whole = net(x, t, cond)
    assert whole.shape == x.shape
    for k in range(4):
        assert torch.allclose(net(x[k : k + 1], t[k : k + 1], cond[k : k + 1])[0], whole[k], atol=1e-5)
    assert torch.allclose(net(x[order], t[order], cond[order]), whole[order], atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_evaluation_is_deterministic_and_dropout_acts_in_training_only(name):
    net, (x, t, cond) = build(name, dropout=0.5), given(6, 7)
    assert torch.equal(net(x, t, cond), net(x, t, cond))
    assert torch.equal(net(x, t, cond), build(name)(x, t, cond))
    assert relative(net.train()(x, t, cond), net(x, t, cond)) > 1e-2


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_networks_start_at_zero_and_gradient_reaches_every_parameter(name, dims):
    x, t, cond = given(*(5, 4, 6)[:dims], b=2)
    net = build(name, dims=dims, learned_variance=True, start=True)
    assert not net(x, t, cond).any()
    out = randomised(net)(x, t, cond)
    assert out.shape == (2, 4, *x.shape[2:])
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    live = {name: p.grad is not None and float(p.grad.abs().max()) > 1e-7 for name, p in net.named_parameters()}
    assert [name for name, alive in live.items() if not alive] == []


@pytest.mark.parametrize("name", KINDS)
def test_steps_from_the_start_open_every_part(name):
    net, (x, t, cond) = build(name, start=True), given(8, 8)
    optimiser, before = torch.optim.Adam(net.parameters(), 1e-2), copy.deepcopy(net.state_dict())
    for _ in range(4):
        optimiser.zero_grad()
        (net(x, t, cond) - x.flip(0)).square().mean().backward()
        optimiser.step()
    assert [name for name, p in net.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("name", KINDS)
def test_gradient_is_the_finite_difference(name):
    net, (x, t, cond) = build(name).double(), given(5, 6, b=1)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: net(x, t, cond), x.double(), fast_mode=True)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.5)])
def test_networks_compute_in_their_own_dtype(name, dtype, tolerance):
    net, (x, t, cond) = build(name), given(7, 6)
    out = copy.deepcopy(net).to(dtype)(x.to(dtype), t, cond)
    assert out.dtype == dtype
    assert relative(out.float(), net(x, t, cond)) < tolerance


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_bfloat16_autocast_stays_near_float32(name, learns):
    net, (x, t, cond) = build(name).requires_grad_(learns), given(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, t, cond)
    assert relative(out.float(), net(x, t, cond)) < 0.05


@pytest.mark.parametrize("name", KINDS)
def test_compiles_without_a_graph_break(name):
    net, (x, t, cond) = build(name), given(6, 7)
    torch._dynamo.reset()
    for parts in (cond, Cond(vector=cond.vector), None):
        found = torch._dynamo.explain(net)(x, t, parts)
        assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for part, parts in ((x, cond), (x, None), (x[..., :4], None)):
        assert torch.allclose(compiled(part, t, parts), net(part, t, parts), atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_parts_computed_again_give_the_same_gradient(name):
    """engine.recompute calls parts by position alone."""
    net, (x, t, cond), found = build(name), given(6, 7), []
    for around in (contextlib.nullcontext(), recomputed(net)):
        with around:
            out = net(x, t, cond).square().sum()
            found.append(torch.autograd.grad(out, list(net.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(4, 4), (10, 6), (3, 17)])
def test_one_network_takes_any_size(name, size):
    """Trained or not: nothing in the state says a size, and none of it depends on one."""
    net, (x, t, cond) = build(name), given(*size)
    out = net(x, t, cond)
    assert out.shape == x.shape
    assert out.isfinite().all()
    net(*given(8, 8))
    assert torch.equal(net(x, t, cond), out)  # nothing of another size is remembered
    moved = x.clone()
    moved[:, :, -1, -1] += 1
    assert (net(moved, t, cond) - out)[:, :, -1, -1].abs().max() > 1e-3  # and the far corner is seen


# the mechanisms, each by its formula


@pytest.mark.parametrize("name", ["unet", "unet-transformer", "dit", "dit-joint"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_spatial_map_is_concatenated_to_x(name, dims):
    net, (x, t, cond) = build(name, dims=dims), given(*(5, 4, 6)[:dims])
    plain = build(name, channels=4, dims=dims, spatial=0)
    state = net.state_dict()
    state["stem.weight"] = torch.cat([state["stem.weight"], state.pop("spatial.weight")], 1)
    kept = {key: value for key, value in state.items() if not key.startswith("head")}
    assert plain.load_state_dict(kept, strict=False).missing_keys == ["head.weight", "head.bias"]
    last = (lambda net: net.norm) if isinstance(net, UNet) else (lambda net: net.head)
    (mine,) = captured(last(net), lambda: net(x, t, cond))
    (theirs,) = captured(last(plain), lambda: plain(torch.cat([x, cond.spatial], 1), t, replace(cond, spatial=None)))
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_levels_ask_the_tokens_where_they_are_told_to_and_the_bottleneck_does():
    net, asked = build("unet", mults=(1, 2, 3), cross=(1,), transformer=1), []
    x, t, cond = given(8, 8)
    for module in net.modules():
        if isinstance(module, CrossAttention):
            module.register_forward_pre_hook(lambda _, args: asked.append(args[0].shape[1]))
    net(x, t, cond)
    assert asked == [16, 4, 4, 16, 16]  # down, the middle, its transformer, twice up
    assert {module.q.in_features for module in net.modules() if isinstance(module, CrossAttention)} == {32, 48}


def test_transformer_blocks_act_on_the_positions_of_the_bottleneck():
    net, (x, t, cond) = build("unet-transformer"), given(8, 12)
    entered = captured(net.transformer[0], lambda: net(x, t, cond))[0]
    left = captured(net.middle[1], lambda: net(x, t, cond))[0]
    emb, context = net.told(x, t, cond)
    before = net.encoded(net.entered(net.stem, x) + net.entered(net.spatial, cond.spatial), emb, context)
    assert before[-2].shape == (4, 32, 2, 3)
    h = net.middle[0](before[-2], emb, context).flatten(2).transpose(1, 2)
    assert torch.allclose(entered, h, atol=1e-6)
    for block in net.transformer:
        h = block(h, emb, context, rotary((2, 3), 32, 0, h))
    assert torch.allclose(left, h.transpose(1, 2).reshape(4, 32, 2, 3), atol=1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_residual_block_resamples_inside_and_beside(dims):
    x, emb = inputs(2, 16, *[4] * dims)[0], inputs(2, 8)[0]
    for resample in (POOL[dims](2), torch.nn.Upsample(scale_factor=2.0)):
        block = ResBlock(dims, 16, 16, 8, resample=resample)
        assert torch.equal(block(x, emb), resample(x))
        randomised(block)
        h = block.conv1(resample(F.silu(block.norm1(x))))
        scale, shift = (a.reshape(2, 16, *[1] * dims) for a in block.modulate(emb).chunk(2, 1))
        h = block.conv2(F.silu(block.norm2(h) * (1 + scale) + shift))
        assert torch.allclose(block(x, emb), resample(x) + h, atol=1e-5)


def test_levels_are_halved_and_doubled_by_residual_blocks():
    net, seen = build("unet-transformer", patch=1, mults=(1, 2, 2)), []
    x, t, _ = given(8, 12)
    for layer in [*net.down, *net.up]:
        if not isinstance(layer, Stage):
            assert isinstance(layer, ResBlock)
            layer.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[2:], out.shape[2:])))
    net(x, t)
    assert seen == [((8, 12), (4, 6)), ((4, 6), (2, 3)), ((2, 3), (4, 6)), ((4, 6), (8, 12))]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_block_asks_the_tokens_after_it_has_looked_at_itself(norm):
    """Chen et al. 2023, figure 4: by normalised features, without modulation or gate."""
    block, plain = randomised(Block(24, 2, 3, 8, norm=norm, tokens=6).double()), Block(24, 2, 3, 8, norm=norm).double()
    assert not plain.load_state_dict(block.state_dict(), strict=False).missing_keys
    x, tokens, emb = (inputs(4, *n, seed=s, dtype=torch.float64)[0] for s, n in enumerate(((3, 24), (5, 6), (8,))))
    context = Context.of(tokens, MASK)
    (q, k, v), rest = plain.asked(x, emb, None)
    h = plain.heard(x, mixed(q, k, v), rest)
    off = h - h.mean(-1, True) if norm == "layer" else h
    eps = 1e-5 if norm == "layer" else torch.finfo(h.dtype).eps
    h = h + block.cross(off / (off.square().mean(-1, True) + eps).sqrt(), context)
    assert torch.allclose(block(x, emb, context), plain.fed(h, rest), atol=1e-10)
    assert torch.equal(block(x, emb), plain(x, emb))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_joint_attention_with_equal_weights_is_one_sequence(gated, masked):
    joint, block = JointBlock(24, 2, 3, 8, norm="rms", gated=gated), Block(24, 2, 3, 8, norm="rms", gated=gated)
    randomised(block)
    for stream in (joint.image, joint.text):
        stream.load_state_dict(block.state_dict())
    x, text, emb = (inputs(4, *shape, seed=s)[0] for s, shape in enumerate(((3, 24), (5, 24), (8,))))
    mask = F.pad(MASK, (0, 3), value=True)[:, None, None] if masked else None
    (image, words), whole = joint(x, text, emb, None, mask), block(torch.cat([text, x], 1), emb, mask=mask)
    assert torch.allclose(torch.cat([words, image], 1), whole, atol=1e-5)
    assert torch.allclose(joint(x, None, emb)[0], block(x, emb), atol=1e-6)
    assert relative(image, block(x, emb)) > 1e-2


def test_the_last_joint_block_hears_tokens_as_the_others_do():
    last, other = JointBlock(24, 2, 3, 8, last=True), randomised(JointBlock(24, 2, 3, 8))
    last.image.load_state_dict(other.image.state_dict())
    with torch.no_grad():
        for mine, theirs in ((last.text.kv, other.text.qkv), (last.text.modulate, other.text.modulate)):
            rows = slice(24, 72) if mine is last.text.kv else slice(0, 48)
            mine.weight.copy_(theirs.weight[rows])
            mine.bias.copy_(theirs.bias[rows])
        last.text.k_norm.load_state_dict(other.text.k_norm.state_dict())
    x, text, emb = (inputs(4, *shape, seed=s)[0] for s, shape in enumerate(((3, 24), (5, 24), (8,))))
    assert torch.allclose(last(x, text, emb)[0], other(x, text, emb)[0], atol=1e-5)


@pytest.mark.parametrize(("name", "along"), [("dit", 0), ("dit-light", 2), ("dit-context", 7), ("dit-joint", 2)])
def test_registers_and_context_go_along_with_the_patches_and_are_left_behind(name, along):
    net, (x, t, cond) = build(name), given(6, 8)
    (h,) = captured(net.blocks[0], lambda: net(x, t, cond))
    assert h.shape == (4, along + 12, 24)
    patches = net.stem(unshuffle(x, 2).flatten(2).mT) + net.spatial(unshuffle(cond.spatial, 2).flatten(2).mT)
    if name == "dit":
        patches = patches + net._positions((3, 4), patches)
    assert torch.allclose(h[:, along:], patches, atol=1e-6)
    if along:
        assert torch.equal(h[:, :2], net.registers.expand(4, 2, 24))
    if along == 7:
        words = cond.tokens.masked_fill(~MASK[..., None], 0) @ net.text.weight.T + net.text.bias
        assert torch.allclose(h[:, 2:7], words, atol=1e-6)
    assert captured(net.head, lambda: net(x, t, cond))[0].shape == (4, 12, 24)


@pytest.mark.parametrize("name", ["dit-light", "dit-context", "dit-joint"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rotary_positions_alone_tell_patches_apart(name, dims, monkeypatch):
    net, (x, t, cond) = build(name, dims=dims), given(*[4] * dims)
    order = torch.arange(2**dims).roll(1)

    def moving(x):
        patches = unshuffle(x, 2)
        return shuffle(patches.flatten(2)[..., order].reshape(patches.shape), 2)

    moved = replace(cond, spatial=moving(cond.spatial))
    assert relative(net(moving(x), t, moved), moving(net(x, t, cond))) > 0.02

    def still(size, width, extra, like):
        n = extra + math.prod(size)
        return torch.ones(n, width // 2), torch.zeros(n, width // 2)

    monkeypatch.setattr("undiffuse.nets.dit.rotary", still)
    assert relative(net(moving(x), t, moved), moving(net(x, t, cond))) < 1e-5


def test_swiglu_is_its_formula_and_has_as_many_weights():
    block = randomised(Block(24, 2, 3, 8, norm="rms", gated=True).double())
    x, emb = inputs(2, 5, 24, dtype=torch.float64)[0], inputs(2, 8, dtype=torch.float64)[0]
    _, _, _, shift, scale, gate = block.modulate(emb)[:, None].split(24, -1)
    rest = [torch.zeros_like(gate), shift, scale, gate]
    h = x / (x.square().mean(-1, True) + torch.finfo(x.dtype).eps).sqrt() * (1 + scale) + shift
    h = h @ block.up.weight.T + block.up.bias
    h = h[..., :48] * h[..., 48:] / (1 + torch.exp(-h[..., 48:]))
    expected = x + gate * (h @ block.down.weight.T + block.down.bias)
    assert torch.allclose(block.fed(x, rest), expected, atol=1e-10)
    plain = Block(24, 2, 3, 8)
    assert block.up.weight.numel() + block.down.weight.numel() == plain.up.weight.numel() + plain.down.weight.numel()


def test_the_settings_of_lightning_dit_are_used():
    net, (x, t, cond) = build("dit-light"), given(6, 7)
    whole = net(x, t, cond)
    for name, value in (("positions", "sines"), ("norm", "layer")):
        other = build("dit-light", **{name: value})
        other.load_state_dict(net.state_dict())
        assert relative(other(x, t, cond), whole) > 1e-2


def test_guidance_asks_the_null_condition_of_tokens():
    net, (x, _, cond) = build("unet"), given(6, 7)
    model, level = Denoiser(net, V()), Level(0.8, 0.6)
    cond = replace(cond, tokens_mask=None)
    assert cond.tokens_mask.all()
    null = model(x, level, cond.null())
    expected = null + 3 * (model(x, level, cond) - null)
    assert torch.allclose(CFG(3.0)(model, cond)(x, level), expected, atol=1e-4)
    assert torch.equal(null, model(x, level, Cond(augment=cond.augment)))


# diffusers on the same weights


def named(name, state):
    """The state of a module, as part of one that calls it by this name."""
    return {f"{name}.{key}": value for key, value in state.items()}


def rows(layer, part, parts):
    """One of several equal parts of a linear layer's outputs, as state."""
    return {"weight": layer.weight.chunk(parts)[part], "bias": layer.bias.chunk(parts)[part]}


@pytest.mark.parametrize("way", [None, "up", "down"])
@pytest.mark.parametrize(("channels", "out"), [(32, 32), (48, 32)])
def test_res_block_is_diffusers(channels, out, way):
    resnet = pytest.importorskip("diffusers.models.resnet")
    resample = {"up": torch.nn.Upsample(scale_factor=2.0), "down": torch.nn.AvgPool2d(2)}.get(way)
    block = randomised(ResBlock(2, channels, out, 8, resample=resample))
    theirs = resnet.ResnetBlock2D(
        in_channels=channels, out_channels=out, temb_channels=8, groups=channels // 16, groups_out=out // 16, eps=1e-5,
        time_embedding_norm="scale_shift", skip_time_act=True, **({way: True} if way else {}),
    ).eval()  # fmt: skip
    names = {"modulate": "time_emb_proj", "skip": "conv_shortcut"}
    state = {key.replace(n := key.split(".")[0], names.get(n, n)): value for key, value in block.state_dict().items()}
    theirs.load_state_dict(state)
    x, emb = inputs(2, channels, 4, 6)[0], inputs(2, 8)[0]
    assert torch.allclose(block(x, emb), theirs(x, emb), atol=1e-5)


def test_self_attention_is_diffusers():
    peer = pytest.importorskip("diffusers.models.attention_processor")
    block = randomised(Attention(2, 64))
    theirs = peer.Attention(
        64, heads=2, dim_head=32, bias=True, qk_norm="rms_norm", eps=1e-5, norm_num_groups=4, residual_connection=True
    ).eval()
    for norm in (theirs.norm_q, theirs.norm_k):
        norm.eps = torch.finfo(torch.float32).eps
    state = named("group_norm", block.norm.state_dict())
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        state |= named(name, {k: v.squeeze() for k, v in rows(block.qkv, i, 3).items()})
    state |= named("to_out.0", {k: v.squeeze() for k, v in block.proj.state_dict().items()})
    state |= named("norm_q", block.q_norm.state_dict()) | named("norm_k", block.k_norm.state_dict())
    theirs.load_state_dict(state)
    x = inputs(2, 64, 4, 6)[0]
    assert torch.allclose(block(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("last", [True, False])
def test_the_joint_block_is_diffusers(last):
    """Stable Diffusion 3's block; its norms' epsilons are set to ours."""
    peer = pytest.importorskip("diffusers.models.attention")
    block = randomised(JointBlock(32, 2, 4, 32, last=last))
    theirs = peer.JointTransformerBlock(32, 2, 16, context_pre_only=last, qk_norm="rms_norm").eval()
    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
        elif name.split(".")[-1].startswith("norm_"):
            module.eps = torch.finfo(torch.float32).eps
    image, text = block.image, block.text
    state = {}
    for stream, suffix, keys, out, norms in (
        (image, "", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
        (text, "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", ("norm_added_q", "norm_added_k")),
    ):
        told = last and stream is text
        modulate = stream.modulate.state_dict()
        if told:  # diffusers' order is scale, shift
            modulate = {key: torch.cat(value.chunk(2)[::-1]) for key, value in modulate.items()}
        state |= named(f"norm1{suffix}.linear", modulate)
        layer, n = (stream.kv, 2) if told else (stream.qkv, 3)
        for i, name in enumerate(keys[3 - n :]):
            state |= named(f"attn.{name}", rows(layer, i, n))
        state |= named(f"attn.{norms[1]}", stream.k_norm.state_dict())
        if told:
            continue
        state |= named(f"attn.{norms[0]}", stream.q_norm.state_dict())
        state |= named(f"attn.{out}", stream.proj.state_dict())
        state |= named(f"ff{suffix}.net.0.proj", stream.up.state_dict())
        state |= named(f"ff{suffix}.net.2", stream.down.state_dict())
    found = theirs.load_state_dict(state, strict=False)
    unused = {"attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight"}  # answers that are dropped
    assert not found.unexpected_keys
    assert set(found.missing_keys) == (unused if last else set())
    x, words, time = (inputs(2, *shape, seed=s)[0] for s, shape in enumerate(((6, 32), (5, 32), (32,))))
    mine, theirs_ = block(x, words, F.silu(time)), theirs(x, words, time)
    assert torch.allclose(mine[0], theirs_[1], atol=1e-5)
    if not last:
        assert torch.allclose(mine[1], theirs_[0], atol=1e-5)


# refusals


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"tokens": torch.zeros(2, 4, 5)}, r"tokens of shape \(2, 4, 5\): expected \(2, any number, 6\)"),
        ({"tokens": torch.zeros(1, 4, 6)}, r"expected \(2, any number, 6\)"),
        ({"tokens": torch.zeros(2, 6)}, r"tokens of shape \(2, 6\)"),
        ({"tokens": torch.zeros(2, 4, 6), "tokens_mask": torch.ones(2, 3).bool()}, r"tokens_mask of shape \(2, 3\)"),
        ({"tokens": torch.zeros(2, 4, 6), "tokens_mask": torch.ones(2, 4)}, r"torch.float32: .* torch.bool"),
        ({"spatial": torch.zeros(2, 2, 6, 6)}, r"spatial of shape \(2, 2, 6, 6\): expected \(2, 2, 6, 7\)"),
        ({"spatial": torch.zeros(2, 1, 6, 7)}, r"spatial of shape \(2, 1, 6, 7\)"),
        ({"spatial": torch.zeros(1, 2, 6, 7)}, r"spatial of shape \(1, 2, 6, 7\)"),
    ],
)
def test_wrong_conditions_are_refused(name, parts, why):
    x, t = inputs(2, 2, 6, 7)
    with pytest.raises(InputError, match=why):
        build(name)(x, t, Cond(**parts))


@pytest.mark.parametrize(
    ("kind", "kw", "why"),
    [
        (UNet, {"tokens": -1}, "tokens=-1"),
        (UNet, {"spatial": -1}, "spatial=-1"),
        (UNet, {"transformer": -1}, "transformer=-1"),
        (UNet, {"cross": (2,)}, r"cross names levels \(2,\); there are 0 ... 1"),
        (UNet, {"resample": "fir"}, "resample must be conv or residual, got 'fir'"),
        (UNet, {"transformer": 1, "width": 9, "mults": (1,)}, "even width"),
        (DiT, {"registers": -1}, "registers=-1"),
        (DiT, {"positions": "none"}, "positions must be one of sines, rope, got 'none'"),
        (DiT, {"norm": "batch"}, "norm must be one of layer, rms"),
        (DiT, {"tokens_by": "sum"}, "tokens_by must be one of cross, context, joint"),
        (DiT, {"positions": "rope", "width": 18, "heads": 6}, "rope needs heads of an even width of at least 4"),
        (DiT, {"positions": "rope", "width": 16, "heads": 4, "dims": 3}, "at least 6"),
    ],
)
def test_impossible_settings_are_refused(kind, kw, why):
    with pytest.raises(InputError, match=why):
        kind(**{"channels": 1, "width": 16, **kw})


def test_sizes_of_a_padded_map_follow_x():
    net, (x, t, cond) = build("unet", mults=(1, 1, 1)), given(5, 7)
    wide = replace(cond, spatial=padded(cond.spatial, 4))
    out = net(padded(x, 4), t, wide)[:, :, 1:6, :7]
    assert torch.allclose(net(x, t, cond), out, atol=1e-5)


def test_all_pairs_of_settings_of_a_transformer_work():
    x, t, cond = given(4, 6, b=2)
    choices = {"positions": ("sines", "rope"), "norm": ("layer", "rms"), "registers": (0, 1), "gated": (False, True)}
    for by, values in itertools.product(("cross", "context", "joint"), itertools.product(*choices.values())):
        net = build("dit", tokens_by=by, **dict(zip(choices, values, strict=True)))
        assert relative(net(x, t, replace(cond, tokens=2 - cond.tokens)), net(x, t, cond)) > 1e-3
