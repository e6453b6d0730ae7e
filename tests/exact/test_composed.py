"""Guidance by several conditions, in closed form on Gaussian mixtures whose classes are told by two conditions."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from tests.cases import at, diagonal
from undiffuse import CFG, Composed, Cond, Counter, InputError, Level, Mixture, Spectrum
from undiffuse.cond import Encoders, Label

# components by (row, column): of four classes, a row and a column of a two by two table each
MEANS = torch.tensor([[-1.0, -0.8], [-0.7, 1.2], [1.1, -0.9], [0.6, 1.4]]).double()
SPREAD = torch.tensor([[0.05, 0.3], [0.2, 0.1], [0.1, 0.2], [0.3, 0.05]]).double()
WEIGHTS = torch.tensor([0.1, 0.4, 0.3, 0.2]).double()
ROW, COLUMN = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
MIXTURE = Mixture([Spectrum(m, v) for m, v in zip(MEANS, SPREAD, strict=True)], WEIGHTS, labels=range(4))
ENCODERS = Encoders({"row": Label(2), "column": Label(2)})


def allowed(row, column):
    """The components of a row and of a column, None for any, as (4,) True and False."""
    every = torch.ones(4, dtype=torch.bool)
    return (every if row is None else row == ROW) & (every if column is None else column == COLUMN)


def exact(x, level, given):
    """E[x0 | x, row, column] for a `Given` of a row and a column, any of them null."""
    told = ENCODERS.encoded(given, ()).vector
    picks = [
        (None if not any(v) else v.index(1.0) for v in (told[k, :2].tolist(), told[k, 2:].tolist()))
        for k in range(len(x))
    ]
    return MIXTURE(x, level, Cond(vector=torch.stack([allowed(*pick) for pick in picks]).float()))


def log_density(x, level, row, column):
    """log p(x_t | row, column) up to no constant, written out."""
    pick = allowed(row, column)
    var = level.alpha**2 * SPREAD[pick] + level.sigma**2
    each = -0.5 * ((x[:, None] - level.alpha * MEANS[pick]) ** 2 / var + (2 * math.pi * var).log()).sum(-1)
    return ((WEIGHTS[pick] / WEIGHTS[pick].sum()).log() + each).logsumexp(1)


def tweedie(log_p, x, level):
    """(x + sigma^2 grad log p) / alpha (Robbins 1956)."""
    x = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(log_p(x).sum(), x)
    return (x.detach() + level.sigma**2 * score) / level.alpha


POINTS = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
GIVEN = ENCODERS(row=[0] * 6, column=[1] * 6)
LEVELS = at([-1.5, 0.0, 1.5])


def test_the_closed_form_is_the_mixture():
    for level in LEVELS:
        expected = tweedie(lambda x, at=level: log_density(x, at, 0, 1), POINTS, level)
        assert torch.allclose(exact(POINTS, level, GIVEN), expected, atol=1e-10)


@pytest.mark.parametrize("w", [(2.0, 3.0), (0.5, -1.0), (1.0, 4.0), (0.0, 2.0)])
def test_nested_guidance_tilts_by_each_condition_given_those_before(w):
    """p(x) p(row | x)^w1 p(column | x, row)^w2 at every level, by the densities written out."""
    for level in LEVELS:

        def log_p(x, at=level):
            none, row, both = (log_density(x, at, *pick) for pick in ((None, None), (0, None), (0, 1)))
            return none + w[0] * (row - none) + w[1] * (both - row)

        guided = Composed(("row", "column"), w)(exact, GIVEN)(POINTS, level)
        assert torch.allclose(guided, tweedie(log_p, POINTS, level), atol=1e-10)


@pytest.mark.parametrize("w", [(2.0, 3.0), (0.5, -1.0), (1.0, 1.0)])
def test_summed_guidance_tilts_by_each_condition_alone(w):
    """p(x) p(row | x)^w1 p(column | x)^w2 at every level."""
    for level in LEVELS:

        def log_p(x, at=level):
            none, row, column = (log_density(x, at, *pick) for pick in ((None, None), (0, None), (None, 1)))
            return none + w[0] * (row - none) + w[1] * (column - none)

        guided = Composed(("row", "column"), w, "sum")(exact, GIVEN)(POINTS, level)
        assert torch.allclose(guided, tweedie(log_p, POINTS, level), atol=1e-10)


def test_the_two_forms_agree_where_conditions_are_independent_given_x():
    """Independent elements, of which a row tells the first and a column the second."""
    apart = Mixture(
        [diagonal(0.1, 0.2, mean=0.0), *(diagonal(0.1, 0.2) for _ in range(3))], [0.06, 0.24, 0.14, 0.56], range(4)
    )
    apart.means.copy_(torch.tensor([[a, b] for a, b in itertools.product((-1.0, 1.0), (-0.5, 0.9))]))

    def model(x, level, given):
        told = ENCODERS.encoded(given, ()).vector
        rows, columns = (
            told[:, part] if told[:, part].any() else torch.ones(len(x), 2) for part in (slice(2), slice(2, 4))
        )
        return apart(x, level, Cond(vector=(rows[:, :, None] * columns[:, None]).flatten(1)))

    def separately(x, level, given):
        return torch.cat([model(x[k : k + 1], level, given[k : k + 1]) for k in range(len(x))])

    for level in LEVELS:
        nested, summed = (
            Composed(("row", "column"), (2.0, 3.0), f)(separately, GIVEN)(POINTS, level) for f in ("nested", "sum")
        )
        assert torch.allclose(nested, summed, atol=1e-10)
    a, b = (Composed(("row", "column"), (2.0, 3.0), f)(exact, GIVEN)(POINTS, LEVELS[1]) for f in ("nested", "sum"))
    assert not torch.allclose(a, b, atol=1e-2)


def test_weights_of_one_are_off_and_cost_a_row_and_equal_ones_are_cfg():
    level, count = LEVELS[1], Counter(exact)
    off = Composed(("row", "column"), (1.0, 1.0))(count, GIVEN)(POINTS, level)
    assert torch.equal(off, exact(POINTS, level, GIVEN))
    assert (count.calls, count.rows) == (1, 6)
    equal = Composed(("row", "column"), (2.5, 2.5))(count, GIVEN)(POINTS, level)
    assert torch.allclose(equal, CFG(2.5)(exact, GIVEN)(POINTS, level), atol=1e-12)
    assert (count.calls, count.rows) == (2, 18)
    Composed(("row", "column"), (2.0, 3.0))(count, GIVEN)(POINTS, level)
    assert (count.calls, count.rows) == (3, 36)
    dropped = Composed(("row", "column"), (2.0, 0.0))(exact, GIVEN)(POINTS, level)
    assert torch.allclose(dropped, CFG(2.0)(exact, GIVEN.only(["row"]))(POINTS, level), atol=1e-12)


def test_without_names_there_is_no_guidance():
    for form in ("nested", "sum"):
        assert Composed(form=form).terms() == {(): 1.0}
        assert torch.equal(Composed(form=form)(exact, GIVEN)(POINTS, LEVELS[1]), exact(POINTS, LEVELS[1], GIVEN))


def test_conditions_without_a_weight_are_always_there():
    level = LEVELS[1]
    guided = Composed(("column",), (3.0,))(exact, GIVEN)(POINTS, level)
    base = exact(POINTS, level, GIVEN.only(["row"]))
    assert torch.allclose(guided, base + 3 * (exact(POINTS, level, GIVEN) - base), atol=1e-12)
    assert torch.allclose(guided, Composed(("row", "column"), (1.0, 3.0))(exact, GIVEN)(POINTS, level), atol=1e-12)


def test_what_stands_instead_of_null_is_what_guidance_leads_away_from():
    level, other = LEVELS[1], ENCODERS(row=[1])
    guided = Composed(("row", "column"), (2.0, 3.0))(exact, GIVEN.against(other))(POINTS, level)
    none, row, both = (exact(POINTS, level, g) for g in (ENCODERS(row=[1] * 6), GIVEN.only(["row"]), GIVEN))
    assert torch.allclose(guided, none + 2 * (row - none) + 3 * (both - row), atol=1e-10)


def test_an_interval_and_levels_of_their_own_and_a_learned_variance():
    guide = Composed(("row", "column"), (2.0, 3.0), lam_min=-1.0, lam_max=1.0)
    count = Counter(exact)
    assert torch.equal(guide(count, GIVEN)(POINTS, LEVELS[2]), exact(POINTS, LEVELS[2], GIVEN))
    assert count.rows == 6
    free = replace(guide, lam_min=-math.inf, lam_max=math.inf)
    assert torch.equal(guide(exact, GIVEN)(POINTS, LEVELS[1]), free(exact, GIVEN)(POINTS, LEVELS[1]))
    each = Level.at(torch.linspace(-1, 1, 6).double()).reshape(-1, 1)
    rows = [
        free(exact, GIVEN[k : k + 1])(POINTS[k : k + 1], each_) for k, each_ in enumerate(at(torch.linspace(-1, 1, 6)))
    ]
    assert torch.allclose(free(exact, GIVEN)(POINTS, each), torch.cat(rows), atol=1e-10)

    class Learned:
        def __call__(self, x, level, cond):
            return exact(x, level, cond)

        def reverse(self, x, now, then, cond):
            return exact(x, now, cond), torch.full_like(x, 0.3)

    now, then = at([0.0, 0.5])
    mean, variance = free(Learned(), GIVEN).reverse(POINTS, now, then)
    assert torch.equal(mean, free(exact, GIVEN)(POINTS, now))
    assert (variance == 0.3).all()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Composed(("row",), (1.0, 2.0)), "as many weights"),
        (lambda: Composed(("row", "row"), (1.0, 2.0)), "each once"),
        (lambda: Composed(("row",), (math.inf,)), "finite"),
        (lambda: Composed(("row",), (2.0,), "product"), "nested or sum"),
        (lambda: Composed(("row",), (2.0,), lam_min=1, lam_max=0), "interval"),
        (lambda: Composed(("text",), (2.0,))(exact, GIVEN), "no condition 'text' was given"),
        (lambda: Composed(("row",), (2.0,))(exact, Cond(vector=torch.zeros(1, 2))), "conditions by name"),
    ],
)
def test_mistakes_are_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()
