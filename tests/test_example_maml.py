"""MAML learns curves from ten points where plain training on all curves does not."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, run


def test_one_inner_step_brings_the_error_down(tmp_path: Path) -> None:
    # The paper's figures take 12000 meta-steps; 700 show which way it goes.
    output = run(EXAMPLES / "maml.py", "--eager", "--meta-steps", "700", "--test-tasks", "200", cwd=tmp_path)
    found = {line[:18].strip(): [float(number) for number in line[18:].split()] for line in output.splitlines()[1:]}
    none, one, ten = found["MAML"]
    assert 2 < none < 5
    assert one < 0.88 * none
    assert ten < 0.92 * none
    # Fresh curves are, on average, as far from what all of them have in common whatever is learnt; and a step leads astray.
    assert found["plain training"][0] > none - 0.5 > one - 0.5
    assert found["plain training"][1] > 2 * one
