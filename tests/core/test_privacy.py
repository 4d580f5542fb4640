"""The accountant: Opacus's numbers, held against published ones, an independent formula, and an exact one."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import gammaln, logsumexp
from scipy.stats import norm

import functrain as ft

MNIST = {"rate": 256 / 60_000, "delta": 1e-5}


def steps_of(epochs):
    return math.ceil(epochs * 60_000 / 256)


def renyi(rate, noise, order):
    """The Rényi divergence of the sampled Gaussian mechanism at an integer order (Mironov, Talwar, Zhang 2019, 3.3)."""
    k = np.arange(order + 1)
    binomial = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    terms = binomial + k * np.log(rate) + (order - k) * np.log1p(-rate) + (k * k - k) / (2 * noise**2)
    return logsumexp(terms) / (order - 1)


def converted(rate, noise, steps, delta, conversion):
    return min(steps * renyi(rate, noise, order) + conversion(order, delta) for order in range(2, 64))


def first(order, delta):
    """Mironov 2017, proposition 3."""
    return -math.log(delta) / (order - 1)


def later(order, delta):
    """Balle, Barthe, Gaboardi, Hsu, Sato 2020, theorem 21."""
    return -(math.log(delta) + math.log(order)) / (order - 1) + math.log((order - 1) / order)


# What the MNIST tutorial of TensorFlow Privacy (2019) published for three settings: noise, epochs, ε at δ = 1e-5.
PUBLISHED = [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)]


@pytest.mark.parametrize(("noise", "epochs", "published"), PUBLISHED)
def test_renyi_accounting_is_the_published_one_but_for_a_tighter_conversion(noise, epochs, published):
    setting = {"noise": noise, "steps": steps_of(epochs), **MNIST}
    # The formula here, with the conversion of its time, is what was published; Opacus converts by a later theorem.
    assert converted(conversion=first, **setting) == pytest.approx(published, abs=0.025)
    expected = converted(conversion=later, **setting)
    got = ft.privacy.epsilon(accountant="rdp", **setting)
    # Opacus takes fractional orders too: at most the same.
    assert got == pytest.approx(expected, rel=0.01)
    assert got <= expected + 1e-9


def test_the_numbers_of_the_published_setting():
    setting = {"noise": 1.1, "steps": steps_of(60), **MNIST}
    assert ft.privacy.epsilon(accountant="rdp", **setting) == pytest.approx(2.597, abs=1e-3)
    assert ft.privacy.epsilon(**setting) == pytest.approx(2.392, abs=1e-3)
    with pytest.warns(UserWarning, match="can underestimate"):
        assert ft.privacy.epsilon(accountant="gdp", **setting) < 2.392


def gaussian(noise, steps, delta):
    """The exact ε of composed Gaussian mechanisms without sampling (Balle, Wang 2018, theorem 8)."""
    mu = math.sqrt(steps) / noise
    return brentq(lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 80)


@pytest.mark.parametrize(("noise", "steps"), [(5.0, 1), (5.0, 100), (20.0, 300)])
def test_at_rate_one_prv_is_exact_up_to_its_error_and_renyi_is_above(noise, steps):
    exact = gaussian(noise, steps, 1e-5)
    setting = {"noise": noise, "rate": 1.0, "steps": steps, "delta": 1e-5}
    assert exact <= ft.privacy.epsilon(**setting) <= exact + 0.03
    assert exact <= ft.privacy.epsilon(accountant="rdp", **setting) <= 1.2 * exact


@settings(max_examples=6)
@given(
    noise=st.floats(0.5, 20),
    rate=st.floats(0.001, 0.3),
    steps=st.integers(1, 10_000),
    delta=st.floats(1e-8, 0.1),
    more=st.floats(1.05, 4.0),
)
def test_more_noise_spends_less_and_more_steps_rate_or_certainty_more(noise, rate, steps, delta, more):
    setting = {"noise": noise, "rate": rate, "steps": steps, "delta": delta, "accountant": "rdp"}
    here = ft.privacy.epsilon(**setting)
    assert here >= 0
    assert ft.privacy.epsilon(**{**setting, "noise": noise * more}) <= here
    assert ft.privacy.epsilon(**{**setting, "steps": math.ceil(steps * more)}) >= here
    assert ft.privacy.epsilon(**{**setting, "rate": min(1.0, rate * more)}) >= here - 1e-9
    assert ft.privacy.epsilon(**{**setting, "delta": delta / more}) >= here


def test_prv_falls_with_noise_and_rises_with_steps_and_is_below_renyi():
    setting = {"rate": 0.01, "delta": 1e-5}
    by_noise = [ft.privacy.epsilon(noise=noise, steps=500, **setting) for noise in (0.6, 1.0, 3.0)]
    by_steps = [ft.privacy.epsilon(noise=1.0, steps=steps, **setting) for steps in (1, 100, 500, 2000)]
    assert by_noise == sorted(by_noise, reverse=True)
    assert by_steps == sorted(by_steps)
    assert by_noise[1] == by_steps[2] < ft.privacy.epsilon(noise=1.0, steps=500, accountant="rdp", **setting)


@settings(max_examples=3)
@given(budget=st.floats(0.5, 10), rate=st.floats(0.001, 0.1), steps=st.integers(10, 10_000))
def test_the_noise_for_a_budget_keeps_it_and_hardly_less_does_not(budget, rate, steps):
    setting = {"rate": rate, "steps": steps, "delta": 1e-5, "accountant": "rdp"}
    noise = ft.privacy.noise_for(epsilon=budget, **setting)
    assert ft.privacy.epsilon(noise=noise, **setting) <= budget < ft.privacy.epsilon(noise=noise / 1.0011, **setting)


def test_the_noise_for_a_budget_by_prv_is_less_than_by_renyi():
    setting = {"rate": 0.05, "steps": 20, "delta": 1e-5}
    noise = ft.privacy.noise_for(epsilon=2.0, **setting)
    assert ft.privacy.epsilon(noise=noise, **setting) <= 2.0 < ft.privacy.epsilon(noise=noise / 1.002, **setting)
    assert noise < ft.privacy.noise_for(epsilon=2.0, accountant="rdp", **setting)


def test_where_nothing_is_protected_prv_gives_the_bound_of_renyi_at_once():
    # By PRV itself: gigabytes at the first, and 705 at the second, which is too small.
    for noise, rate, steps in ((0.05, 1.0, 1000), (0.01, 0.01, 1), (0.1, 0.01, 1000)):
        setting = {"noise": noise, "rate": rate, "steps": steps, "delta": 1e-5}
        bound = ft.privacy.epsilon(**setting)
        assert bound == ft.privacy.epsilon(accountant="rdp", **setting) > 1000
    # Where δ alone would do, there is nothing to spend.
    assert ft.privacy.epsilon(noise=50.0, rate=0.001, steps=1, delta=0.9) == 0.0


@pytest.mark.filterwarnings("ignore:GDP accounting")
def test_refusals():
    right = {"noise": 1.0, "rate": 0.1, "steps": 10, "delta": 1e-5}
    wrong = {
        "noise": (0, -1.0, float("inf"), float("nan"), True, "1"),
        "rate": (0, 1.01, -0.1, float("nan"), None, True),
        "steps": (0, -1, 1.5, True),
        "delta": (0, 1, 1.5, float("nan"), "0"),
        "accountant": ("moments", None),
    }
    budget = {"epsilon": 1.0, **{name: value for name, value in right.items() if name != "noise"}}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ft.ArgumentError, match=f"{name} must be"):
                ft.privacy.epsilon(**{**right, name: value})
            if name != "noise":
                with pytest.raises(ft.ArgumentError, match=f"{name} must be"):
                    ft.privacy.noise_for(**{**budget, name: value})
    for value in (0, -1.0, float("inf"), None):
        with pytest.raises(ft.ArgumentError, match="epsilon must be a finite number above 0"):
            ft.privacy.noise_for(**{**budget, "epsilon": value})
    with pytest.raises(ft.ArgumentError, match="no noise up to 1e\\+06 spends at most epsilon=1e-09"):
        ft.privacy.noise_for(**{**budget, "epsilon": 1e-9})
    with pytest.raises(ft.ArgumentError, match=r"'gdp' finds no ε for noise=100.0.* accountant='rdp' gives a bound"):
        ft.privacy.epsilon(noise=100.0, rate=0.001, steps=1, delta=1e-5, accountant="gdp")


def test_without_opacus_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    with pytest.raises(ft.MissingExtraError, match=r"'opacus'.*functrain\[privacy\]"):
        ft.privacy.epsilon(noise=1.0, rate=0.1, steps=10, delta=1e-5)
