"""Editing against closed forms: what image to image, inpainting and inversion do to data whose answers are known."""

import contextlib
import math
import sys
from itertools import pairwise

import pytest
import torch

import undiffuse
from tests.cases import diagonal
from tests.test_nets import randomised
from undiffuse import (
    CFG,
    DDIM,
    DDPM,
    EDM,
    VP,
    Cond,
    Denoiser,
    DPMpp2M,
    EDMPrecond,
    Flow,
    Gaussian,
    InputError,
    Level,
    Mixture,
    Restart,
    Spectrum,
    UniformLam,
    sample,
)
from undiffuse.data import load_data
from undiffuse.nets import DiT, UNet, attention, transformer
from undiffuse.restore import (
    Returning,
    check_aligned,
    flowedit,
    img2img,
    injected,
    inpaint,
    invert,
    levels_from,
    paired,
    prompt_to_prompt,
    reconstruct,
)
from undiffuse.restore.strength import lam_of, strength_of

V, MEAN = torch.tensor([1.0, 0.25, 0.01]).double(), torch.tensor([0.5, 0.0, -1.0]).double()
MODEL = Gaussian(Spectrum(MEAN, V))
SCHEDULES = {"vp": VP(), "flow": Flow(), "edm": EDM()}
FINE = UniformLam(-5.0, 8.0)


class Basis:
    """Noise whose k-th draw is basis vector j in row 1 + k d + j, and zero elsewhere: an affine chain run with it has
    its mean in row 0 and a column of the factor of its covariance in every other row."""

    drawn = 0

    def __init__(self, shape, *_):
        self.shape = shape
        Basis.drawn = 0

    def __call__(self):
        z, d, k = torch.zeros(self.shape).double(), self.shape[1], Basis.drawn
        if len(z) > 1:
            z[1 + k * d : 1 + (k + 1) * d] = torch.eye(d).double()
        Basis.drawn += 1
        return z


def moments_of(monkeypatch, name, call, x0):
    """Exact mean (d,) and covariance of what call(rows of x0) gives, whatever noise it draws."""
    monkeypatch.setattr(sys.modules[f"undiffuse.restore.{name}"], "Noise", Basis)
    call(x0[None])
    draws = Basis.drawn
    out = call(x0.expand(1 + draws * len(x0), -1))
    factor = out[1:] - out[0]
    return out[0], factor.T @ factor


def test_strength_is_the_same_on_every_schedule_and_grid():
    for s in (0.01, 0.3, 0.5, 0.9):
        for schedule in SCHEDULES.values():
            for grid in (UniformLam(), FINE, None):
                first = levels_from(s, schedule, 20, grid)[0]
                assert float(strength_of(first)) == pytest.approx(s)
                assert float(first.lam) == pytest.approx(lam_of(s))
    assert levels_from(1.0, VP(), 7) == levels_from(0.999, VP(), 7) or len(levels_from(1.0, VP(), 7)) == 8


def test_less_strength_leaves_fewer_levels_and_none_twice():
    counts = [len(levels_from(s, VP(), 20)) for s in (1.0, 0.8, 0.5, 0.2, 0.001)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == 2
    whole = UniformLam()(VP(), 20)
    here = float(strength_of(whole[5]))
    assert [float(v.lam) for v in levels_from(here, VP(), 20)[1:]] == [float(v.lam) for v in whole[6:]]


def test_a_grid_that_rises_rises_no_further_than_the_strength():
    levels = levels_from(0.15, EDM(), 20, Restart(low=0.06, high=0.3))
    assert max(float(strength_of(v)) for v in levels) == pytest.approx(0.15)
    assert sum(bool(b.lam < a.lam) for a, b in pairwise(levels)) == 2


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, math.nan])
def test_strengths_out_of_range_are_refused(strength):
    with pytest.raises(InputError, match="strength must be above 0"):
        img2img(MODEL, torch.zeros(1, 3), VP(), strength)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
def test_image_to_image_of_a_gaussian_has_its_closed_form(schedule, strength, monkeypatch):
    schedule, x0 = SCHEDULES[schedule], torch.tensor([2.0, -0.5, -0.9]).double()
    a, s = (float(c) for c in (lambda v: (v.alpha, v.sigma))(Level.at(lam_of(strength), schedule.space)))

    def call(x, **kw):
        return img2img(MODEL, x, schedule, strength, steps=400, grid=FINE, **kw)

    mean, cov = moments_of(monkeypatch, "img2img", call, x0)
    gain = (V / (a**2 * V + s**2)).sqrt()  # of the flow from this level to data
    assert torch.allclose(mean, MEAN + gain * a * (x0 - MEAN), atol=2e-3)
    assert torch.allclose(cov, torch.diag(gain**2 * s**2), atol=2e-3)
    mean, cov = moments_of(monkeypatch, "img2img", lambda x: call(x, solver=DPMpp2M(eta=1.0)), x0)
    gain = a * V / (a**2 * V + s**2)  # of the posterior mean, which a chain with noise draws around
    assert torch.allclose(mean, MEAN + gain * a * (x0 - MEAN), atol=3e-3)
    assert torch.allclose(cov, torch.diag(V * s**2 / (a**2 * V + s**2) + gain**2 * s**2), atol=3e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_full_strength_is_sampling_and_none_is_the_picture(schedule):
    schedule, x0 = SCHEDULES[schedule], torch.randn(5, 3)
    assert torch.equal(img2img(MODEL, x0, schedule, 1.0, seed=3), sample(MODEL, (5, 3), schedule, seed=3))
    near = [float((img2img(MODEL, x0, schedule, s) - x0).abs().max()) for s in (0.1, 0.01, 1e-3, 1e-5)]
    assert near == sorted(near, reverse=True)
    assert near[-1] < 1e-4


def test_a_row_depends_on_its_number_and_picture_alone():
    x0, known = torch.randn(6, 3), torch.tensor([1.0, 0.5, 0.0])
    for call in (
        lambda x, **kw: img2img(MODEL, x, VP(), 0.5, solver=DDPM(), seed=1, **kw),
        lambda x, **kw: inpaint(MODEL, x, known, VP(), solver=DDPM(), grid=Returning(jump=3, times=2), seed=1, **kw),
        lambda x, **kw: flowedit(MODEL, MODEL, x, VP(), 0.5, seed=1, average=2, **kw),
    ):
        whole = call(x0)
        assert torch.equal(call(x0[4:], first=4), whole[4:])


# inpainting: x1 is known, x2 given x1 is N(rho x1, 1 - rho^2)
RHO, X1 = 0.9, 1.5
PAIR = Gaussian(Spectrum(torch.zeros(2), torch.tensor([1 + RHO, 1 - RHO]), torch.tensor([[1.0, 1], [1, -1]]) / 2**0.5))


def inpainted(monkeypatch, schedule, jump=1, times=1, steps=40, solver=None):
    """The exact mean and variance of x2 that inpainting gives where x1 is known."""
    grid, known = Returning(FINE, jump, times), torch.tensor([1.0, 0.0])

    def call(x):
        return inpaint(PAIR, x, known, schedule, steps=steps, grid=grid, solver=solver or DDPM())

    mean, cov = moments_of(monkeypatch, "inpaint", call, torch.tensor([X1, 7.0]).double())
    assert float(mean[0]) == X1
    assert not cov[0].any()
    return float(mean[1]), float(cov[1, 1])


def distance(found):
    """2-Wasserstein, of two Gaussians of one element, to the exact conditional."""
    mean, variance = found
    return math.hypot(mean - RHO * X1, variance**0.5 - (1 - RHO**2) ** 0.5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_returns_bring_inpainting_to_the_exact_conditional(schedule, monkeypatch):
    off = [distance(inpainted(monkeypatch, SCHEDULES[schedule], 5, n, steps=160)) for n in (1, 3, 10)]
    assert off[0] > 0.4
    assert off[1] < 0.16
    assert off[2] < 0.045
    assert all(more < less / 2.5 for less, more in pairwise(off))


def test_replacement_alone_does_not_get_there(monkeypatch):
    off = [distance(inpainted(monkeypatch, VP(), steps=n)) for n in (40, 160, 640)]
    assert min(off) > 0.4
    assert distance(inpainted(monkeypatch, VP(), steps=160, solver=DDIM())) > 0.7


def test_where_nothing_or_everything_is_known():
    x0 = torch.randn(4, 2)
    assert torch.equal(inpaint(PAIR, x0, torch.ones(2), VP(), seed=1), x0)
    found = inpaint(PAIR, x0, torch.zeros(2), Flow(), solver=DDIM(), seed=1)
    assert torch.equal(found, inpaint(PAIR, 0 * x0, torch.zeros(2), Flow(), solver=DDIM(), seed=1))


@pytest.mark.parametrize("solver", [DPMpp2M(), DDPM(), DDIM()])
def test_known_pixels_come_back_bit_for_bit(solver):
    x0, known = torch.rand(3, 2) * 2 - 1, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    found = inpaint(PAIR, x0, known, VP(), steps=5, solver=solver, grid=Returning(jump=2, times=3))
    assert torch.equal(found[known == 1], x0[known == 1])
    assert bool((found[known == 0] != x0[known == 0]).all())


def test_a_pixel_that_is_half_known_is_edited_with_half_the_strength(monkeypatch):
    """Its distribution is that of image to image with strength 1 - known, where pixels are independent."""
    x0, schedule, known = torch.tensor([2.0, -0.5, -0.9]).double(), Flow(), torch.tensor([0.5, 0.2, 1.0]).double()
    how = {"steps": 500, "grid": FINE, "solver": DDIM()}
    mean, cov = moments_of(monkeypatch, "inpaint", lambda x: inpaint(MODEL, x, known, schedule, **how), x0)
    for i, k in enumerate(known.tolist()[:2]):
        there = lambda x, s=1 - k: img2img(MODEL, x, schedule, s, **how)  # noqa: E731
        alike = moments_of(monkeypatch, "img2img", there, x0)
        assert float(mean[i]) == pytest.approx(float(alike[0][i]), abs=0.02)
        assert float(cov[i, i]) == pytest.approx(float(alike[1][i, i]), abs=0.02)
    assert mean[2] == x0[2]


@pytest.mark.parametrize("known", [torch.zeros(3), torch.zeros(4, 1), torch.tensor([1.1, 0]), torch.tensor([-0.1, 0])])
def test_masks_that_do_not_fit_are_refused(known):
    with pytest.raises(InputError, match="known must be"):
        inpaint(PAIR, torch.zeros(2, 2), known, VP())


def test_returning_takes_repaints_steps():
    """Lugmayr et al. 2022, their `get_schedule_jump` of T = 6, jump_length = 2, jump_n_sample = 3."""
    steps, jump, times, t, order = 6, 2, 3, 6, []
    left = dict.fromkeys(range(0, steps - jump, jump), times - 1)
    while t >= 1:
        t -= 1
        order.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            for _ in range(jump):
                t += 1
            order.append(t)
    lams = [float(v.lam) for v in UniformLam()(VP(), steps)]
    visited = [float(v.lam) for v in Returning(UniformLam(), jump, times)(VP(), steps)]
    assert visited == [*(lams[steps - 1 - t] for t in order), math.inf]
    plain = [[float(v.lam) for v in grid(VP(), 20)] for grid in (Returning(times=1), UniformLam())]
    assert plain[0] == plain[1]
    for wrong in ({"jump": 0}, {"times": 0}):
        with pytest.raises(InputError, match=">= 1"):
            Returning(**wrong)


# inversion
MIXED = Mixture([diagonal(0.1, 0.3, mean=m) for m in (-1.0, 0.0, 2.0)], labels=[0, 1, 2])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("solver", [None, DPMpp2M()])
def test_inversion_goes_there_and_back(schedule, strength, solver):
    x0 = torch.tensor([[2.2, 1.8], [-1.0, -0.4], [0.7, 0.9]]).double()
    how = {"schedule": SCHEDULES[schedule], "strength": strength, "steps": 60, "solver": solver}
    noise = invert(MIXED, x0, **how)
    assert float((noise - x0).abs().min()) > 0.01
    assert float((reconstruct(MIXED, noise, **how) - x0).abs().max()) < 1e-6


def test_the_single_pass_of_inversion_errs_by_its_steps():
    x0 = torch.tensor([[2.2, 1.8], [-1.0, -0.4]]).double()
    off = []
    for steps in (20, 40, 80, 160, 320):
        noise = invert(MIXED, x0, VP(), steps=steps, exact=False)
        off.append(float((reconstruct(MIXED, noise, VP(), steps=steps) - x0).abs().max()))
    assert off[0] > 0.02
    assert off[-2] / off[-1] == pytest.approx(2, rel=0.2)


def test_inversion_of_a_gaussian_is_its_flow_backwards():
    x0, levels = torch.tensor([[2.0, -0.5, -0.9]]).double(), levels_from(1.0, VP(), 1500)
    noise = invert(MODEL, x0, VP(), steps=1500, exact=False)
    last, first = levels[-2], levels[0]

    def std(level):
        return (level.alpha**2 * V + level.sigma**2).sqrt()

    expected = first.alpha * MEAN + std(first) / std(last) * (last.alpha * x0 - last.alpha * MEAN)
    assert torch.allclose(noise, expected, atol=0.02)


def test_another_condition_moves_the_inverted_picture_to_it():
    x0 = torch.tensor([[2.0, 2.0]]).double()
    one, two = (CFG()(MIXED, Cond(vector=torch.eye(3)[[k]])) for k in (2, 0))
    noise = invert(one, x0, VP(), steps=60)
    assert torch.allclose(reconstruct(two, noise, VP(), steps=60), x0 - 3, atol=0.05)  # the same place in its class
    little = reconstruct(two, invert(one, x0, VP(), steps=60, strength=0.3), VP(), steps=60, strength=0.3)
    assert bool((little > -0.9).all() & (little < 2.0).all())


def test_what_cannot_be_inverted_is_refused():
    x0 = torch.zeros(1, 2).double()
    with pytest.raises(InputError, match="fewer than two levels"):
        invert(MIXED, x0, VP(), steps=2, strength=0.004)
    with pytest.raises(InputError, match="only deterministic"):
        invert(MIXED, x0, VP(), solver=DDPM())


def test_inversion_of_a_trained_net_is_exact_to_a_thousandth():
    model = undiffuse.load("digits")
    x0, how = load_data("digits").x[:4], {"schedule": model.schedule, "grid": model.config.build("grid")}
    denoise = model.bind(None, 4)
    off = (reconstruct(denoise, invert(denoise, x0, **how), **how) - x0).square().mean().sqrt()
    assert float(off) < 1e-3
    single = reconstruct(denoise, invert(denoise, x0, **how, exact=False), **how)
    assert float((single - x0).square().mean().sqrt()) > 5 * float(off)


# FlowEdit
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flowedit_moves_one_gaussian_to_another(schedule):
    one, two = (Gaussian(diagonal(0.5, 0.5, mean=m)) for m in (0.0, 3.0))
    x0 = torch.randn(6, 2).double()
    found = flowedit(one, two, x0, SCHEDULES[schedule], 1.0, steps=800, grid=FINE)
    assert torch.allclose(found, x0 + 3, atol=0.03)
    assert torch.equal(flowedit(one, one, x0, SCHEDULES[schedule], 0.9), x0)


def test_flowedit_of_little_strength_changes_little():
    one, two = (Gaussian(diagonal(0.5, 0.5, mean=m)) for m in (0.0, 3.0))
    moved = [float(flowedit(one, two, torch.zeros(1, 2), Flow(), s, steps=200).mean()) for s in (0.1, 0.5, 1.0)]
    assert 0 < moved[0] < 0.2 < moved[1] < moved[2]


# prompt-to-prompt
NETS = {
    "unet": lambda: UNet(2, width=32, mults=(1, 2), attention=(0,), cross=(0, 1), tokens=8, transformer=1),
    "dit": lambda: DiT(2, width=32, depth=2, patch=2, tokens=8),
    "mmdit": lambda: DiT(2, width=32, depth=2, patch=2, tokens=8, tokens_by="joint"),
}


def told(rows, seed, words=4):
    g = torch.Generator().manual_seed(seed)
    return Cond(tokens=torch.randn(rows, words, 8, generator=g), tokens_mask=torch.ones(rows, words, dtype=torch.bool))


class Maps:
    """Collects the attention maps of every call: softmax of queries and keys, of attention to tokens and to itself."""

    def __init__(self, monkeypatch):
        self.cross, self.own, real = [], [], attention.mixed

        def mixed(q, k, v, mask=None):
            (self.own if q.shape[2] == k.shape[2] else self.cross).append(
                (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            )
            return real(q, k, v, mask)

        for module in (attention, transformer):
            monkeypatch.setattr(module, "mixed", mixed)


def alike(maps, pairs=2):
    """Whether targets have their sources' maps, in each batch of every call."""
    return [torch.equal(*m.unflatten(0, (-1, 2, pairs)).unbind(1)) for m in maps]


@pytest.mark.parametrize("net", NETS)
def test_maps_within_are_the_sources_and_hooks_are_gone_after(net, monkeypatch):
    name, net = net, randomised(NETS[net]())
    x, time = torch.randn(8, 2, 8, 8), torch.zeros(8)
    cond = Cond.cat([told(4, 1), told(4, 2)])
    before = net(x, time, cond)
    maps = Maps(monkeypatch)
    net(x, time, cond)
    assert not any(alike(maps.cross + maps.own))
    for cross, own in ((True, True), (True, False), (False, True)):
        maps.cross.clear()
        maps.own.clear()
        with injected(net, 2, cross, own):
            after = net(x, time, cond)
        if name == "mmdit":  # one attention to all: it is that to tokens
            assert set(alike(maps.cross + maps.own)) == {cross}
        else:
            assert set(alike(maps.cross)) == {cross}
            assert set(alike(maps.own)) == {own}
        sources = [rows.unflatten(0, (2, 2, 2))[:, 0] for rows in (before, after)]
        assert torch.equal(*sources)
        assert not torch.equal(before, after) or name == "mmdit"
    assert torch.equal(net(x, time, cond), before)
    with pytest.raises(RuntimeError, match="stop"), injected(net, 2):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("w", [1.0, 2.0])
def test_a_prompt_that_stays_gives_the_source_itself(net, w):
    net = randomised(NETS[net]())
    model, noise, cond = Denoiser(net, EDMPrecond()), torch.randn(2, 2, 8, 8), told(2, 1)

    def edited(target, **shares):
        denoise = CFG(w)(model, Cond.cat([cond, target]))
        return prompt_to_prompt(denoise, net, noise, VP(), steps=5, **shares)

    source, target = edited(cond)
    assert torch.equal(source, target)
    alone = reconstruct(CFG(w)(model, cond), noise, VP(), steps=5)
    assert torch.allclose(source, alone, atol=1e-4)
    pairs = [edited(told(2, 2), cross=share, own=share) for share in (1.0, 0.0)]
    near, far = (float((target - source).square().mean()) for source, target in pairs)
    assert 0 < near < far


def test_shares_are_of_the_steps_from_the_noisiest_on(monkeypatch):
    net = randomised(NETS["dit"]())
    levels, seen = UniformLam()(VP(), 10)[:-1], []
    model = Denoiser(net, EDMPrecond())

    def watched(net, pairs, cross, own):
        seen.append((cross, own))
        return contextlib.nullcontext()

    monkeypatch.setattr(sys.modules["undiffuse.restore.prompt"], "injected", watched)
    denoise = paired(lambda x, level: model(x, level, told(2, 1)), net, 1, levels, cross=2 / 3, own=1 / 3)
    for level in levels[:-1]:
        denoise(torch.zeros(2, 2, 8, 8), level)
    assert [cross for cross, _ in seen] == [True] * 6 + [False] * 3
    assert [own for _, own in seen] == [True] * 3 + [False] * 6


def test_prompts_that_cannot_be_aligned_are_refused():
    short, mask = told(1, 2), torch.tensor([[True, True, True, False]])
    with pytest.raises(InputError, match="same number of tokens, got 4 and 3"):
        check_aligned(Cond.cat([told(1, 1), Cond(tokens=short.tokens, tokens_mask=mask)]))
    check_aligned(None)
    check_aligned(told(2, 1))
    with pytest.raises(InputError, match="no attention"):
        paired(MODEL, MODEL, 1, UniformLam()(VP(), 4))
    with pytest.raises(InputError, match="cross must be"):
        paired(MODEL, NETS["dit"](), 1, UniformLam()(VP(), 4), cross=1.2)
