"""What differentially private training spends: ε and δ for noise, sampling rate and steps, and the noise that a budget needs.

A run of `steps` updates by `ft.reduce.private(norm, noise)` on batches of `source.poisson(rate, seed)` is
(ε, δ)-differentially private: whether any one row was in the training data changes the probability of any outcome by a
factor of at most e^ε, but for a chance of δ. The numbers are those of Opacus's accountants:

- `"prv"`: numerical composition of privacy loss random variables, the tightest, an upper bound up to its own error of
  0.01 (Gopi, Lee, Wutschitz, "Numerical composition of differential privacy", NeurIPS 2021);
- `"rdp"`: Rényi differential privacy, an upper bound that is some 10 % looser, and a hundred times as fast (Mironov,
  Talwar, Zhang, "Rényi differential privacy of the sampled Gaussian mechanism", 2019);
- `"gdp"`: the central limit of Gaussian differential privacy: an estimate that can be *below* the true ε, of which Opacus
  warns (Bu, Dong, Long, Su, "Deep learning with Gaussian differential privacy", 2020).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

from functrain.core.errors import ArgumentError, MissingExtraError

Accountant = Literal["prv", "rdp", "gdp"]

# Opacus's PRV grid grows with ε √steps: at ε = 139 and a million steps it took 344 s, at ε = 9400 and a thousand more than
# 12 GB, and past 700 its exponentials overflow, to an ε that is too small.
_PRV_LIMIT = 100.0
_LEAST_NOISE, _MOST_NOISE = 1e-3, 1e6


def epsilon(*, noise: float, rate: float, steps: int, delta: float, accountant: Accountant = "prv") -> float:
    """The ε that `steps` private updates spend at a given δ.

    - `noise`: the noise multiplier, as in `ft.reduce.private(norm, noise)`;
    - `rate`: the probability with which each row is in a batch, in (0, 1], as in `source.poisson(rate, seed)`;
    - `steps`: the number of updates, at least 1: `int(state.position)` tells how many there were;
    - `delta`: in (0, 1); well below 1 / n for n rows;
    - `accountant`: `"prv"`, `"rdp"` or `"gdp"`, see the module. Where the RDP bound is above 100, which protects next to
      nothing, `"prv"` gives that bound: PRV's own computation needs gigabytes there, and overflows.

    Raises `ArgumentError` for arguments outside these ranges, or of which the accountant can say nothing, and
    `MissingExtraError` without Opacus.

    >>> round(epsilon(noise=1.1, rate=256 / 60_000, steps=14_062, delta=1e-5, accountant="rdp"), 2)
    2.6
    """
    _check(rate=rate, steps=steps, delta=delta, accountant=accountant)
    _above_zero("noise", noise, "the noise multiplier; without noise there is no privacy, and no ε")
    return _spent(accountant, noise, rate, steps, delta)


def noise_for(*, epsilon: float, rate: float, steps: int, delta: float, accountant: Accountant = "prv") -> float:
    """The least noise multiplier, within 0.1 %, with which `steps` private updates spend at most `epsilon`.

    The others are as in `epsilon`, whose value for the noise given back is at most the budget.

    Raises `ArgumentError` as `epsilon` does, and for a budget that no noise up to 10⁶ keeps (PRV resolves 0.01, RDP
    log(1/δ) / 62), `MissingExtraError` without Opacus. The search ends at a noise of about 10⁻³ for budgets beyond all use.

    >>> round(noise_for(epsilon=3.0, rate=256 / 60_000, steps=14_062, delta=1e-5, accountant="rdp"), 2)
    1.01
    """
    _check(rate=rate, steps=steps, delta=delta, accountant=accountant)
    _above_zero("epsilon", epsilon, "the privacy budget ε")

    start, factor = 1.0, 2.0
    if accountant == "prv":
        # PRV takes half a second where RDP, whose answer is a little larger, takes 20 ms: begin where that one ends.
        found = _least("rdp", epsilon, rate, steps, delta, start, factor)
        start, factor = (found, 1.1) if found <= _MOST_NOISE else (start, factor)
    noise = _least(accountant, epsilon, rate, steps, delta, start, factor)
    if noise > _MOST_NOISE:
        raise ArgumentError(
            f"no noise up to {_MOST_NOISE:g} spends at most epsilon={epsilon!r} by the accountant {accountant!r} "
            f"(rate={rate!r}, steps={steps!r}, delta={delta!r}): it does not resolve budgets as small as that"
        )
    return noise


def _least(accountant: str, budget: float, rate: float, steps: int, delta: float, start: float, factor: float) -> float:
    """The least noise that keeps the budget, searched for from `start` on in both directions; inf beyond `_MOST_NOISE`."""

    def keeps(noise: float) -> bool:
        return _spent(accountant, noise, rate, steps, delta) <= budget

    high = start
    while not keeps(high):
        high *= factor
        if high > _MOST_NOISE:
            return math.inf
    low = high / factor
    while low > _LEAST_NOISE and keeps(low):
        high, low = low, low / factor
    while high / low > 1.001:
        middle = math.sqrt(high * low)
        high, low = (middle, low) if keeps(middle) else (high, middle)
    return high


def _spent(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    if accountant == "prv":
        bound = _counted("rdp", noise, rate, steps, delta)
        if bound > _PRV_LIMIT:
            return bound
    return _counted(accountant, noise, rate, steps, delta)


def _counted(accountant: str, noise: float, rate: float, steps: int, delta: float) -> float:
    """What Opacus's accountant says."""
    try:
        from opacus.accountants import create_accountant
    except ImportError as error:
        raise MissingExtraError.of("opacus", "privacy", "accounting for privacy") from error
    counter = create_accountant(accountant)
    counter.history = [(float(noise), float(rate), steps)]
    with warnings.catch_warnings():
        # A bound is valid at any order; at rate 1, PRV takes log(0) in branches that are not used.
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"opacus\.accountants")
        try:
            value = float(counter.get_epsilon(delta=float(delta)))
        except (ValueError, RuntimeError) as error:
            raise _unknown(accountant, noise, rate, steps, delta) from error
    if math.isnan(value):
        raise _unknown(accountant, noise, rate, steps, delta)
    # Where δ alone would do, the bounds are negative.
    return max(0.0, value)


def _unknown(accountant: str, noise: float, rate: float, steps: int, delta: float) -> ArgumentError:
    return ArgumentError(
        f"the accountant {accountant!r} finds no ε for noise={noise!r}, rate={rate!r}, steps={steps!r}, delta={delta!r}: "
        "outside of what it computes; accountant='rdp' gives a bound"
    )


def _check(rate: Any, steps: Any, delta: Any, accountant: Any) -> None:
    if accountant not in get_args(Accountant):
        raise ArgumentError(f"accountant must be one of {', '.join(get_args(Accountant))}, got {accountant!r}")
    if not _number(rate) or not 0 < rate <= 1:
        raise ArgumentError(f"rate must be in (0, 1], got {rate!r}: the probability with which a row is in a batch")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ArgumentError(f"steps must be an int of at least 1, got {steps!r}: how many updates are taken")
    if not _number(delta) or not 0 < delta < 1:
        raise ArgumentError(f"delta must be in (0, 1), got {delta!r}: a chance well below 1 / (number of rows)")


def _above_zero(name: str, value: Any, meaning: str) -> None:
    if not _number(value) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} must be a finite number above 0, got {value!r}: it is {meaning}")


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
