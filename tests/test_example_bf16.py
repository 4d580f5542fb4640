"""The example of mixed precision, run as a user runs it, only shorter."""

from __future__ import annotations

from pathlib import Path

from test_examples import EXAMPLES, run


def test_bf16_learns_what_float32_does(tmp_path: Path) -> None:
    header, *rows = run(EXAMPLES / "bf16.py", "--epochs", "4", cwd=tmp_path).splitlines()
    assert header.split("  ")[0] == "computed in"
    found = {name: [float(number) for number in numbers] for name, *numbers in map(str.split, rows)}
    full, half = found["float32"], found["bfloat16"]
    assert full[0] != half[0]
    assert min(*full[1:], *half[1:]) > 0.95
    assert max(abs(a - b) for a, b in zip(full[1:], half[1:])) <= 0.02
