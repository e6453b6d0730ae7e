"""Certificates: what they measure, against closed forms and published figures."""

import pytest

from undiffuse import DDIM, VP, Adaptive, Discrete, DPMpp2M, Indexed, UniformLam, UniPC
from undiffuse.certify import certify, kept_std, tolerance_order


def test_the_std_that_2m_keeps_on_trailing_steps():
    """Ten trailing steps on DDPM's table: the known loss of .415 of a std of .25, and most of one of .05."""
    kept = kept_std(DPMpp2M(), Indexed("trailing")(Discrete.linear(), 10), (1.0, 0.25, 0.05))
    assert kept == pytest.approx([0.948, 0.585, 0.145], abs=5e-3)


def test_one_ddim_step_by_hand():
    """x0 = alpha v / (alpha^2 v + sigma^2) x with x of std sigma."""
    level, v = VP().level(1.0), 0.09
    expected = float(level.alpha * v / (level.alpha**2 * v + level.sigma**2) * level.sigma) / 0.3
    assert kept_std(DDIM(), UniformLam()(VP(), 1), (0.3,)) == pytest.approx([expected])


def test_a_certificate_tells_a_wrong_order_and_a_wrong_table_from_right_ones():
    levels = UniformLam()(VP(), 8)
    good = certify("unipc", UniPC(3), levels)
    assert good.holds
    assert not good._replace(order=4).holds
    assert not good._replace(measured=2.8).holds
    assert not good._replace(gap=1e-6).holds
    noisy = certify("ddim", DDIM(1.0), levels)
    assert noisy.noise
    assert noisy.holds
    assert noisy._replace(measured=2.0).holds, "with noise more than promised is fine"
    assert not noisy._replace(measured=0.5).holds


@pytest.mark.parametrize("method", ["heun", "bogacki-shampine", "dormand-prince"])
def test_a_controllers_error_follows_its_tolerance(method):
    """Digits gained per digit of tolerance, times the order, are about the order."""
    solver = Adaptive(method)
    assert tolerance_order(solver) == pytest.approx(solver.global_order, abs=1.0)
