"""The sampler that nobody has to choose: what it must find on data whose best sampler is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.cases import SCHEDULE_CASES, diagonal, drain
from undiffuse import (
    CFG,
    EDM,
    VP,
    Counter,
    Gaussian,
    InputError,
    Label,
    Level,
    Mixture,
    Modal,
    Noise,
    Spectrum,
    Tableau,
    UniformLam,
    UniPC,
    trajectory,
)
from undiffuse.modal import counted
from undiffuse.tune import auto
from undiffuse.tune.auto import CLASSIC, GRIDS, SHOWN, SPECTRAL, TIE, reference, rule, shortlist
from undiffuse.tune.gaussian import mismatch

DATA = diagonal(1.0, 0.25, 0.01, 0.0004, mean=0.2)
double = {"dtype": torch.float64}


def mixture() -> Mixture:
    """Ten well-separated classes in six dimensions."""
    g = torch.Generator().manual_seed(0)
    means = 0.8 * torch.randn(10, 6, generator=g, dtype=torch.float64)
    return Mixture([Spectrum(m, torch.full((6,), 0.02, dtype=torch.float64)) for m in means], labels=list(range(10)))


def overall(model: Mixture) -> Spectrum:
    """The spectrum of the whole mixture, in closed form."""
    mean = model.means.mean(0)
    cov = (model.means - mean).T @ (model.means - mean) / 10 + 0.02 * torch.eye(6, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(cov)
    return Spectrum(mean, values, vectors.T.contiguous())


MIXTURE = mixture()
SPECTRUM = overall(MIXTURE)


def exact(denoise, z, schedule):
    """The probability flow from these noises, by 300 small steps of third order."""
    levels = UniformLam(lam_max=9.0)(schedule, 300)
    return drain(trajectory(denoise, levels[0].sigma * z, levels, UniPC(3)))


def errors(plan, denoise, z, due):
    """Relative errors at the end, of each sample."""
    x = plan.run(denoise, plan.start[1] * z)
    return (x - due).flatten(1).norm(dim=1) / due.flatten(1).norm(dim=1)


@pytest.mark.parametrize("schedule", SCHEDULE_CASES)
def test_gaussian_data_are_sampled_exactly_on_every_schedule(schedule):
    schedule = SCHEDULE_CASES[schedule]
    found = auto(Gaussian(DATA), (4,), schedule, 4, spectrum=DATA, noises=9, **double)
    start = schedule.level(1.0)
    z = Noise((3, 4), 5, dtype=torch.float64)()
    # the flow keeps the distance from the marginal's mean in units of its std
    marginal = (start.alpha**2 * DATA.variances + start.sigma**2).sqrt()
    due = DATA.mean + DATA.variances.sqrt() * (start.sigma * z - start.alpha * DATA.mean) / marginal
    x = found.plan.run(Gaussian(DATA), start.sigma * z)
    assert torch.allclose(x, due, atol=1e-9)
    assert found.plan.nfe == 4
    assert found.trials[0].error < 1e-9


def test_the_closed_form_is_the_distance_that_samples_have():
    centred, std = replace_mean(DATA), DATA.variances.sqrt()
    plans, gaussian = shortlist(VP(), 5, centred)
    start = VP().level(1.0)
    # the exact flow of noise that lacks the little signal of the first level
    exact = std * start.sigma / (start.alpha**2 * DATA.variances + start.sigma**2).sqrt()
    for name, plan in plans.items():
        if "spectral-" in name:
            assert gaussian[name] == pytest.approx(float((exact - std).norm() / std.norm()), rel=1e-6), name
            continue
        # on centred data an output is a multiple of its noise: run it on one
        x = plan.run(Gaussian(centred), start.sigma * torch.ones(1, 4, dtype=torch.float64))[0]
        assert gaussian[name] == pytest.approx(float((x.abs() - std).norm() / std.norm()), rel=1e-9), name


def replace_mean(data: Spectrum) -> Spectrum:
    return replace(data, mean=torch.zeros_like(data.mean))


def test_directions_of_one_variance_count_as_many():
    wide = diagonal(1.0, 0.1, 0.1, 0.1, 0.1)
    low = Spectrum(torch.zeros(5), torch.tensor([1.0]), torch.eye(5)[:1].double(), rest=0.1)
    assert counted(low)[1].tolist() == [1, 4]
    for name, plan in shortlist(VP(), 4, None)[0].items():
        assert mismatch(plan, low) == pytest.approx(mismatch(plan, wide), rel=1e-9), name


@pytest.mark.parametrize("nfe", [5, 8])
def test_on_a_mixture_it_is_near_the_best_of_all_candidates_on_other_noises(nfe):
    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        return MIXTURE(x, level)

    found = auto(MIXTURE, (6,), VP(), nfe, spectrum=SPECTRUM, **double)
    z = Noise((64, 6), 99, dtype=torch.float64)()
    due, medians = exact(denoise, z, VP()), {}
    for name, plan in shortlist(VP(), nfe, SPECTRUM)[0].items():
        medians[name] = float(errors(plan, denoise, z, due).median())
    assert medians[found.plan.name] <= 1.3 * min(medians.values())
    assert max(medians.values()) > 3 * min(medians.values())  # there was something to choose
    # and what it said of itself holds there, too
    assert found.trials[0].error == pytest.approx(medians[found.trials[0].name], rel=0.5)


def test_the_reference_is_far_nearer_to_the_flow_than_the_plans():
    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        return MIXTURE(x, level)

    z = Noise((32, 6), 3, dtype=torch.float64)()
    due = exact(denoise, z, VP())
    for spectrum in (SPECTRUM, None):
        best = min(float(errors(p, denoise, z, due).median()) for p in shortlist(VP(), 8, spectrum)[0].values())
        assert float(errors(reference(VP(), 8, spectrum), denoise, z, due).median()) < 0.1 * best


def test_strong_guidance_at_five_evaluations_does_not_run_away():
    cond, z = Label(10)([k % 10 for k in range(32)]), Noise((32, 6), 98, dtype=torch.float64)()
    found = auto(MIXTURE, (6,), EDM(), 5, spectrum=SPECTRUM, cond=cond, guidance=7.5, **double)
    denoise = CFG(7.5)(MIXTURE, cond)
    due = exact(denoise, z, EDM())
    off = errors(found.plan, denoise, z, due)
    assert float(off.median()) < 0.15
    assert float((off > 1).double().mean()) < 0.3  # that end in another mode: the flow is nearly discontinuous there
    plans = shortlist(EDM(), 5, SPECTRUM)[0]
    assert float(errors(plans["spectral-3c on spectral"], denoise, z, due).median()) > 1  # as the unguided choice does
    by_rule = auto(MIXTURE, (6,), EDM(), 5, spectrum=SPECTRUM, guidance=7.5, noises=0).plan
    assert float(errors(by_rule, denoise, z, due).median()) < 0.15


def test_the_cost_is_what_it_says_and_guidance_counts_twice():
    for w, factor in ((1.0, 1), (3.0, 2)):
        counter, cond = Counter(MIXTURE), Label(10)([0] * 12)
        found = auto(counter, (6,), VP(), 3, spectrum=SPECTRUM, noises=12, cond=cond, guidance=w)
        tried = [t for t in found.trials if t.noises]
        assert len([t for t in tried if t.noises == 12]) == 16
        assert len(tried) == len(shortlist(VP(), 3, SPECTRUM)[0])
        # the reference from all noises, all plans from 4, the best 16 from the other 8
        assert found.rows == counter.rows == factor * (40 * 12 + 3 * (4 * len(tried) + 8 * 16))


def test_the_same_seed_gives_the_same_choice_and_a_batch_changes_nothing():
    first, again, batched = (
        auto(MIXTURE, (6,), VP(), 6, spectrum=SPECTRUM, noises=16, batch=batch, **double) for batch in (None, None, 5)
    )
    assert first.trials == again.trials
    assert first.plan.name == batched.plan.name
    assert [t.name for t in first.trials] == [t.name for t in batched.trials]
    assert first.trials[0].error == pytest.approx(batched.trials[0].error, rel=1e-9)
    other = auto(MIXTURE, (6,), VP(), 6, spectrum=SPECTRUM, noises=16, seed=1, **double)
    assert other.trials[0].error != first.trials[0].error


def test_ties_go_to_the_simpler_and_the_others_are_ranked():
    # one step to clean data is the same for every multistep solver on every grid
    found = auto(MIXTURE, (6,), VP(), 1, **double)
    assert found.plan.name.startswith(next(iter(CLASSIC)))
    found = auto(MIXTURE, (6,), VP(), 6, spectrum=SPECTRUM, **double)
    tried = [t for t in found.trials if t.noises == 32]
    assert [t.error for t in tried] == sorted(t.error for t in tried)
    chosen = next(t for t in tried if t.name == found.plan.name)
    assert chosen.error <= (1 + TIE) * tried[0].error


def test_by_rule_no_call_is_made():
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("the model was called")

    for nfe in (1, 5, 10):
        for w in (1.0, 7.5):
            for spectrum in (DATA, None):
                for schedule in SCHEDULE_CASES.values():
                    found = auto(never, (4,), schedule, nfe, spectrum=spectrum, guidance=w, noises=0)
                    assert (found.plan.nfe, found.rows, found.trials) == (nfe, 0, ())
                    assert isinstance(found.plan, Tableau if spectrum is None else Modal)
                    assert "by rule" in str(found)
                    assert found.plan.name == " on ".join(rule(nfe, spectrum, w))
    assert rule(5, DATA, 7.5)[0] == "spectral-1c"
    assert rule(5, DATA, 1.0) == rule(10, DATA, 7.5) == ("spectral-3c", "spectral")


@pytest.mark.parametrize("schedule", SCHEDULE_CASES)
def test_without_a_spectrum_it_works_on_every_schedule(schedule):
    found = auto(MIXTURE, (6,), SCHEDULE_CASES[schedule], 5, noises=9, **double)
    assert isinstance(found.plan, Tableau)
    assert found.plan.nfe == 5
    assert found.trials[0].error < 0.2


def test_a_report_names_what_was_tried():
    text = str(auto(MIXTURE, (6,), VP(), 4, spectrum=SPECTRUM, noises=8))
    assert "network rows" in text.splitlines()[0]
    assert f"of {len(shortlist(VP(), 4, SPECTRUM)[0])} of" in text.splitlines()[0]
    assert len(text.splitlines()) == 2 + SHOWN


def test_progress_reaches_its_end():
    seen: list[tuple[int, int]] = []
    auto(MIXTURE, (6,), VP(), 3, noises=10, progress=lambda done, n: seen.append((done, n)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == seen[0][1]


def test_a_model_that_runs_away_is_an_error_and_a_plan_that_does_is_passed_over():
    def nan(x: torch.Tensor, level: Level, cond: object = None) -> torch.Tensor:
        return x * math.nan

    with pytest.raises(InputError, match="NaN or infinite"):
        auto(nan, (4,), VP(), 3, spectrum=DATA, noises=2)

    calls: list[int] = []

    def sometimes(x: torch.Tensor, level: Level, cond: object = None) -> torch.Tensor:
        calls.append(len(x))
        return Gaussian(DATA)(x, level) * (math.nan if 41 <= len(calls) <= 43 else 1)  # in the first plan

    found = auto(sometimes, (4,), VP(), 3, spectrum=DATA, noises=9)
    assert next(iter(shortlist(VP(), 3, DATA)[0])) != found.plan.name
    assert sum(math.isinf(t.error) for t in found.trials) == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"nfe": 0}, "nfe must be a whole number >= 1"),
        ({"nfe": 2.5}, "nfe must be a whole number >= 1"),
        ({"nfe": True}, "nfe must be a whole number >= 1"),
        ({"noises": -1}, "noises must be a whole number >= 0"),
        ({"batch": 0}, "batch must be a whole number >= 1"),
        ({"shape": (3,)}, "a spectrum of samples of shape"),
        ({"cond": Label(10)([1, 2])}, "2 rows for 32 noises"),
    ],
)
def test_mistakes_are_named(wrong, says):
    given = {"shape": (6,), "schedule": VP(), "nfe": 4, "spectrum": SPECTRUM} | wrong
    with pytest.raises(InputError, match=says):
        auto(MIXTURE, **given)


def test_every_candidate_of_the_tables_can_be_made():
    plans, gaussian = shortlist(VP(), 6, DATA)
    assert {name.split(" on ")[0] for name in gaussian} == {*CLASSIC, *SPECTRAL}
    assert {name.split(" on ")[1] for name in gaussian} == set(GRIDS)
    assert len(plans) == len(gaussian) - len(gaussian) // 3
    assert max(gaussian[name] for name in plans) <= min(off for name, off in gaussian.items() if name not in plans)
