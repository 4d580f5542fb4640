"""Hypergradient descent finds a rate with which a short training ends better."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, run


def test_the_validation_loss_falls_over_meta_steps(tmp_path: Path) -> None:
    flags = ["--steps", "20", "--meta-steps", "10", "--rate", "0.02", "--batch", "16"]
    output = run(EXAMPLES / "hypergradient.py", *flags, cwd=tmp_path)
    found = [[float(number) for number in line.split()] for line in output.splitlines()[1:]]
    _, rates, momenta, losses = zip(*found)
    assert losses[0] > 2.2  # log(10) = 2.30: guessing
    assert losses[-1] < 1.5
    assert rates[-1] > 3 * rates[0]
    assert momenta[-1] > momenta[0]
