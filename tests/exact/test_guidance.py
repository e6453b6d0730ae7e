"""Every kind of guidance: off at w = 1, its paper's formula, and any solver, schedule and tableau."""

import math
from itertools import pairwise

import pytest
import torch

from tests.cases import SOLVER_CASES, at, diagonal, drain
from undiffuse import (
    APG,
    CFG,
    DDIM,
    EDM,
    GUIDES,
    VP,
    Adaptive,
    Autoguidance,
    CFGpp,
    CFGZero,
    ClassifierGuidance,
    Composed,
    Cond,
    Counter,
    Flow,
    Heun,
    InputError,
    Label,
    Level,
    Mixture,
    Noise,
    PerLevel,
    Rescale,
    Thresholded,
    UniformLam,
    UniformT,
    effective_scale,
    sample,
    trace,
    trajectory,
)
from undiffuse.guide import prepared
from undiffuse.level import from_x0

SIZE = (2, 3)
CLASSES = Mixture([diagonal(*[0.3] * 6, mean=m) for m in (-1.0, 0.2, 1.5)], labels=[0, 1, 2])
WEAK = Mixture([diagonal(*[1.5] * 6, mean=m) for m in (-0.8, 0.1, 1.0)], labels=[0, 1, 2])
COND = Label(3)([0, 1, 2, 2])
LEVELS = [Level.at(lam, space) for lam in (-4.0, 0.3, 3.0) for space in ("vp", "flow", "ve")]


def model(x, level, cond=None):
    """The exact denoiser of 2 x 3 elements, with equal flattened ones."""
    return CLASSES(x, level, cond)


def reads(x, level, cond=None):
    """The logits of the exact classifier: log p(x | c) of equally likely classes of Gaussians."""
    means = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    off = x.double().flatten(1)[:, None] - level.alpha.reshape(-1, 1, 1) * means[:, None]
    return -(off.square().sum(-1)) / (2 * (0.3 * level.alpha**2 + level.sigma**2).reshape(-1, 1))


def noisy(n=4, seed=0):
    return torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name, w):
    """A kind of GUIDES at a weight, with what it needs besides; CFG++ has a scale for a weight."""
    kinds = {
        "per-level": lambda: PerLevel((-2.0, 2.0), (w, w)),
        "apg": lambda: APG(w, momentum=-0.5, norm=2.5),
        "autoguidance": lambda: Autoguidance(w, weak=WEAK),
        "classifier": lambda: ClassifierGuidance(w, classifier=reads),
        "composed": lambda: Composed(),
    }
    return kinds[name]() if name in kinds else GUIDES[name](w)


WEIGHTED = sorted(GUIDES.keys() - {"cfg++", "composed"})


@pytest.mark.parametrize("name", WEIGHTED)
def test_a_weight_of_one_is_bit_equal_to_no_guidance_at_one_row(name):
    levels = UniformLam()(VP(), 6)
    for solver in (DDIM(), Heun()):
        count, x = Counter(model), levels[0].sigma * noisy()
        guide = prepared(made(name, 1.0), levels)
        got = drain(trajectory(guide(count, COND), x, levels, solver))
        plain = Counter(model)
        due = drain(trajectory(CFG()(plain, COND), x, levels, solver))
        assert torch.equal(got, due)
        assert (count.calls, count.rows) == (plain.calls, plain.rows)


@pytest.mark.parametrize("name", [*WEIGHTED, "cfg++"])
@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_a_weight_of_zero_is_what_guidance_leads_away_from(name, level):
    x, level = noisy(), LEVELS[level]
    guide = prepared(made(name, 0.0), [level, Level(1.0, 0.0)])
    away = WEAK(x, level, COND) if name == "autoguidance" else model(x, level)
    assert torch.allclose(guide(model, COND)(x, level), away, atol=1e-9)


@pytest.mark.parametrize("name", [*WEIGHTED, "cfg++"])
def test_samples_do_not_depend_on_their_batch(name):
    x, level = noisy(), Level.at(0.4)
    walk = [Level.at(-5.0), level, Level.at(2.0)]
    whole = prepared(made(name, 0.7), walk)(model, COND)(x, level)
    for k in range(len(x)):
        one = prepared(made(name, 0.7), walk)(model, COND[slice(k, k + 1)])(x[k : k + 1], level)
        assert torch.allclose(one[0], whole[k], atol=1e-12)


@pytest.mark.parametrize("name", ["cfg", "rescale", "threshold", "autoguidance", "classifier"])
def test_levels_of_samples_are_those_of_a_loop(name):
    x, lams = noisy(), torch.tensor([-2.0, 0.0, 1.0, 3.0])
    got = made(name, 3.0)(model, COND)(x, Level.at(lams).reshape(-1, 1, 1))
    for k, lam in enumerate(lams):
        one = made(name, 3.0)(model, COND[slice(k, k + 1)])(x[k : k + 1], Level.at(lam))
        assert torch.allclose(got[k], one[0], atol=1e-10)


@pytest.mark.parametrize("name", ["per-level", "apg", "cfg++", "cfg-zero"])
def test_what_goes_by_one_level_says_so(name):
    guide = prepared(made(name, 0.7), at([-2.0, 0.0, 3.0]))
    with pytest.raises(InputError, match="needs one level for the batch"):
        guide(model, COND)(noisy(), Level.at(torch.tensor([-1.0, 0.0, 1.0, 2.0])).reshape(-1, 1, 1))


@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()])
@pytest.mark.parametrize("name", [*WEIGHTED, "cfg++"])
def test_any_solver_schedule_and_tableau(name, schedule):
    grid = UniformLam(lam_min=-3.0, lam_max=3.0)
    for case in ("ddim", "dpmpp-2m", "heun", "ddpm", "unipc", "dpm-solver-3"):
        solver = SOLVER_CASES[case]
        x = sample(model, (4, *SIZE), schedule, steps=5, solver=solver, grid=grid, cond=COND, guidance=made(name, 0.9))
        plain = sample(model, (4, *SIZE), schedule, steps=5, solver=solver, grid=grid, cond=COND)
        assert torch.isfinite(x).all(), case
        assert 0 < float((x - plain).abs().max()) < 3, case  # w = 0.9 is near no guidance
        levels = grid(schedule, 5)
        plan = trace(solver, levels)
        if name in ("cfg++", "cfg-zero") and solver.calls > 1:
            continue  # they go by steps, and each evaluation of a plan is one
        y = sample(model, (4, *SIZE), schedule, plan=plan, cond=COND, guidance=made(name, 0.9))
        assert torch.allclose(x, y, atol=1e-4), case


@pytest.mark.parametrize("name", [*WEIGHTED, "cfg++"])
def test_samples_are_bit_equal_for_every_batch_with_rows(name):
    def draw(**more):
        return sample(model, (4, *SIZE), VP(), steps=4, cond=COND, guidance=made(name, 0.9), rows=8, **more)

    assert torch.equal(draw(), draw(batch=3))


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "per-level"])
def test_the_interval_costs_nothing_outside(name):
    guide = made(name, 3.0)
    guide = type(guide)(**{**vars(guide), "lam_min": -1.0, "lam_max": 1.0})
    x, outside = noisy(), Level.at(2.0)
    count = Counter(model)
    assert torch.equal(guide(count, COND)(x, outside), model(x, outside, COND))
    assert count.rows == 4


def test_weights_per_level_are_linear_in_lam():
    guide = PerLevel((-2.0, 0.0, 4.0), (1.0, 3.0, 7.0))
    for lam, w in ((-9.0, 1.0), (-2.0, 1.0), (-1.0, 2.0), (0.0, 3.0), (1.0, 4.0), (4.0, 7.0), (9.0, 7.0)):
        assert guide.weight_at(Level.at(lam)) == pytest.approx(w)
    assert guide.weight_at(Level(0.0, 1.0)) == 1.0
    x, level = noisy(), Level.at(1.0)
    assert torch.allclose(guide(model, COND)(x, level), CFG(4.0)(model, COND)(x, level))


@pytest.mark.parametrize("space", ["x0", "eps", "v", "u", "score"])
@pytest.mark.parametrize("phi", [0.0, 0.4, 1.0])
def test_rescaling_has_the_std_it_promises_in_its_space(space, phi):
    x, level = noisy(), Level.at(0.2)
    got = from_x0(space, Rescale(5.0, phi=phi, space=space)(model, COND)(x, level), x, level)
    cfg = from_x0(space, CFG(5.0)(model, COND)(x, level), x, level)
    cond = from_x0(space, model(x, level, COND), x, level)
    for k in range(4):
        due = phi * cond[k].std(correction=0) + (1 - phi) * cfg[k].std(correction=0)
        assert float(got[k].std(correction=0)) == pytest.approx(float(due), rel=1e-9)
        assert torch.allclose(got[k] / got[k].flatten()[0], cfg[k] / cfg[k].flatten()[0], rtol=1e-8)


def test_rescaling_what_has_no_std_leaves_it():
    def flat(x, level, cond):
        return torch.ones_like(x) * (2.0 + cond.vector.sum(1)).reshape(-1, 1, 1)

    found = Rescale(2.0)(flat, COND[slice(0, 1)])(noisy(1), Level.at(0.0))
    assert torch.equal(found, torch.full((1, *SIZE), 4.0).double())  # CFG's 2 + 2 (3 - 2)


def test_dynamic_thresholding_is_its_paper():
    x, level, q = noisy(), Level.at(2.0), 0.8
    got, cfg = Thresholded(6.0, quantile=q)(model, COND)(x, level), CFG(6.0)(model, COND)(x, level)
    assert float(cfg.abs().max()) > 1.5
    for k in range(4):
        s = max(1.0, float(torch.quantile(cfg[k].abs().flatten().float(), q)))
        assert torch.allclose(got[k], cfg[k].clamp(-s, s) / s, atol=1e-6)
    assert float(got.abs().max()) <= 1


def test_projected_guidance_is_orthogonal_and_bounded():
    x, level = noisy(), Level.at(0.0)
    cond, uncond = model(x, level, COND), model(x, level)
    moved = APG(4.0)(model, COND)(x, level) - cond
    assert torch.allclose((moved * cond).flatten(1).sum(1), torch.zeros(4).double(), atol=1e-9)
    assert torch.allclose(APG(4.0, eta=1.0)(model, COND)(x, level), CFG(4.0)(model, COND)(x, level), atol=1e-12)
    d = cond - uncond
    short = APG(4.0, eta=1.0, norm=0.1)(model, COND)(x, level) - cond
    assert torch.allclose(short.flatten(1).norm(dim=1), 3 * d.flatten(1).norm(dim=1).clamp(max=0.1), atol=1e-9)
    assert float(d.flatten(1).norm(dim=1).max()) > 0.1


def test_momentum_is_a_running_sum_that_begins_anew():
    guide = APG(3.0, eta=1.0, momentum=-0.5)
    levels, xs = at([-1.0, 0.0, 1.0]), [noisy(seed=k) for k in range(3)]
    d = [model(x, level, COND) - model(x, level) for x, level in zip(xs, levels, strict=True)]
    sums = [d[0], d[1] - 0.5 * d[0], d[2] - 0.5 * d[1] + 0.25 * d[0]]
    bound = guide(model, COND)
    for _ in range(2):  # a second walk with the same binding starts at noise again
        for x, level, total in zip(xs, levels, sums, strict=True):
            assert torch.allclose(bound(x, level), model(x, level, COND) + 2 * total, atol=1e-12)


@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_cfgpp_with_ddim_is_the_algorithm_of_its_paper(schedule, scale):
    levels = UniformT()(schedule, 7)
    x = start = levels[0].sigma * noisy()
    for now, then in pairwise(levels):
        cond, uncond = model(x, now, COND), model(x, now)
        guided = uncond + scale * (cond - uncond)
        x = then.alpha * guided + then.sigma * (x - now.alpha * uncond) / now.sigma
    guide = CFGpp(scale).prepared(levels)
    assert torch.allclose(drain(trajectory(guide(model, COND), start, levels, DDIM())), x, atol=1e-10)


def test_cfgpp_is_cfg_with_one_weight_on_equal_steps_of_lam():
    levels = at([-2.0, -1.5, -1.0, -0.5])
    guide = CFGpp(0.5).prepared(levels)
    for level in levels[:-1]:
        assert guide.weight_at(level) == pytest.approx(0.5 / (1 - math.exp(-0.5)))
    assert guide.weight_at(Level.at(-1.2)) == pytest.approx(guide.weight_at(levels[1]))
    with pytest.raises(InputError, match="prepared"):
        CFGpp(0.5)(model, COND)(noisy(), levels[0])


def test_cfg_zero_is_the_algorithm_of_its_paper():
    levels, w, zero = UniformT()(Flow(), 6), 4.0, 2
    x = start = levels[0].sigma * noisy()
    for i, (now, then) in enumerate(pairwise(levels)):
        u_c, u_u = (from_x0("u", x0, x, now) for x0 in (model(x, now, COND), model(x, now)))
        s = (u_c * u_u).sum((1, 2), keepdim=True) / u_u.square().sum((1, 2), keepdim=True)
        u = torch.zeros_like(x) if i < zero else (1 - w) * s * u_u + w * u_c
        x = x + (then.sigma - now.sigma) * u
    got = [state.x for state in trajectory(CFGZero(w, zero=zero).prepared(levels)(model, COND), start, levels, DDIM())]
    assert torch.allclose(got[-1], x, atol=1e-10)
    assert torch.allclose(got[1], start, atol=1e-12)


def test_autoguidance_leads_away_from_the_weak_model():
    x, level = noisy(), Level.at(0.5)
    strong, weak = model(x, level, COND), WEAK(x, level, COND)
    assert torch.allclose(Autoguidance(2.5, weak=WEAK)(model, COND)(x, level), weak + 2.5 * (strong - weak), atol=1e-12)
    alone = Autoguidance(2.0, weak=WEAK)(model, None)(x, level)
    assert torch.allclose(alone, 2 * model(x, level) - WEAK(x, level), atol=1e-12)
    with pytest.raises(InputError, match="weak"):
        Autoguidance(2.0)(model, COND)(x, level)


@pytest.mark.parametrize("w", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("base", ["conditional", "unconditional"])
def test_the_exact_classifier_guides_as_the_exact_conditional_does(w, base):
    for level in [*LEVELS, Level.at(torch.tensor([-1.0, 0.0, 1.0, 2.0])).reshape(-1, 1, 1)]:
        x = noisy()
        got = ClassifierGuidance(w, classifier=reads, base=base)(model, COND)(x, level)
        assert torch.allclose(got, CFG(w)(model, COND)(x, level), atol=1e-8)


def test_the_gradient_is_taken_where_sampling_takes_none():
    guide = ClassifierGuidance(2.0, classifier=reads)
    x = sample(model, (4, *SIZE), VP(), steps=3, cond=COND, guidance=guide)
    assert torch.allclose(x, sample(model, (4, *SIZE), VP(), steps=3, cond=COND, guidance=2.0), atol=1e-4)
    assert not x.requires_grad


def test_at_pure_noise_a_classifier_reads_nothing():
    x, level = noisy(), Level(0.0, 1.0)
    got = ClassifierGuidance(3.0, classifier=reads)(model, COND)(x, level)
    assert torch.equal(got, model(x, level, COND))


def test_learned_variance_is_that_of_the_base():
    now, then = at([-0.5, 0.5])
    for name in WEIGHTED:
        bound = (CFGZero(2.0, zero=0) if name == "cfg-zero" else made(name, 2.0))(CLASSES, COND)
        x0, variance = bound.reverse(noisy(), now, then)
        assert torch.equal(variance, CLASSES.reverse(noisy(), now, then, COND)[1]), name
        assert torch.equal(x0, bound(noisy(), now)), name
        assert not torch.allclose(x0, CLASSES(noisy(), now, COND), atol=1e-3), name


def test_the_effective_scale_of_cfg_is_its_weight():
    x, level = noisy(), Level.at(0.0)
    cond, uncond = model(x, level, COND), model(x, level)
    for w in (0.0, 1.0, 4.0):
        guided = CFG(w)(model, COND)(x, level)
        assert torch.allclose(effective_scale(guided, cond, uncond), torch.full((4,), w).double(), atol=1e-9)
    assert float(effective_scale(APG(4.0)(model, COND)(x, level), cond, uncond).max()) < 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PerLevel((), ()), "rise"),
        (lambda: PerLevel((1.0, 0.0), (1.0, 2.0)), "rise"),
        (lambda: PerLevel((0.0, 1.0), (1.0,)), "as many"),
        (lambda: PerLevel((0.0,), (math.nan,)), "finite"),
        (lambda: Rescale(2.0, phi=1.5), "guidance.phi"),
        (lambda: Rescale(2.0, space="velocity"), "guidance.space"),
        (lambda: Thresholded(2.0, quantile=0.0), "guidance.quantile"),
        (lambda: APG(2.0, momentum=0.5), "guidance.momentum"),
        (lambda: APG(2.0, norm=-1.0), "guidance.norm"),
        (lambda: APG(2.0, eta=math.inf), "guidance.eta"),
        (lambda: CFGpp(1.5), "guidance.scale"),
        (lambda: CFGZero(2.0, zero=-1), "guidance.zero"),
        (lambda: Autoguidance(2.0, until=0.0), "guidance.until"),
        (lambda: Autoguidance(2.0, ema=0.5), "guidance.ema"),
        (lambda: ClassifierGuidance(2.0, base="none"), "guidance.base"),
        (lambda: ClassifierGuidance(2.0)(model, COND), "guidance.run"),
        (lambda: ClassifierGuidance(2.0, classifier=reads)(model, Cond(tokens=torch.zeros(4, 1, 2))), "needs classes"),
        (lambda: ClassifierGuidance(2.0, classifier=lambda x, level: reads(x, level)[:, :2])(model, COND)(
            noisy(), Level.at(0.0)), "knows 2 classes, the model 3"),
        (lambda: drain(trajectory(APG(2.0, momentum=-0.5)(model, COND), noisy(), UniformLam()(VP(), 3), Adaptive(),
                                  Noise((4, *SIZE)))), "one level"),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, says):
    with pytest.raises(InputError, match=says):
        make()
