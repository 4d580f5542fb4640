"""The program of README and its variations: what may be swapped without changing a result."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import functrain as ft

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)


def test_readmes_program_runs_as_it_stands(tmp_path: Path) -> None:
    program = python_blocks()[0].replace("2_000", "200") + "print(int(state.position), float(metrics['loss']))\n"
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.strip().splitlines()
    position, loss = last.split()
    assert position == "200"
    assert float(loss) < 1.0  # log(10) = 2.30 is guessing
    assert "plan: fused" in done.stdout
    assert "compiled" in done.stdout.splitlines()[0]


def test_readmes_blocks_on_losses_reducers_and_health_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("BatchNorm1d", "reduce.median", "def private_loss", "def larger", "ft.guard")
    everything, reducers, private, own, health = (block for block in python_blocks() if any(part in block for part in parts))
    names: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "ft": ft}
    exec(everything, names)
    assert "'accuracy'" in capsys.readouterr().out
    assert int(names["state"].position) == 20
    exec(reducers + own, names)
    for grad in ("robust", "agreed", "watched"):
        step = ft.step(names[grad], ft.optim.adamw(1e-3))
        _, metrics = step(step.init(names["params"], carry=names["apply"].buffers), names["train"].batch(64)(0))
        assert ("noise_scale" in metrics) == (grad == "watched")
    exec(health, names)
    capsys.readouterr()
    exec(private, names)
    assert 0.5 < float(capsys.readouterr().out) < 20
    assert names["best"].value == max(row["accuracy"] for row in names["history"].rows)
    assert len(names["history"].rows) == 4


def test_readmes_blocks_on_optimizers_and_unrolling_run_as_they_stand(capsys: pytest.CaptureFixture[str]) -> None:
    parts = ("BatchNorm1d", "optim.partition", "ft.unroll")
    everything, optimizers, unrolling = (block for block in python_blocks() if any(part in block for part in parts))
    names: dict[str, Any] = {"torch": torch, "F": F, "nn": nn, "ft": ft}
    exec(everything, names)
    capsys.readouterr()
    exec(optimizers, names)
    shown = capsys.readouterr().out
    assert "clip_by_norm" in shown
    assert "decayed.lr" in shown
    assert "'accuracy'" in shown
    assert int(names["state"].position) == 20
    exec(unrolling, names)
    assert capsys.readouterr().out.startswith("tensor(")
    rates = [torch.tensor(0.1 + shift, dtype=torch.float64) for shift in (-1e-3, 1e-3)]
    low, high = (names["outcome"](rate) for rate in rates)
    slope = torch.func.grad(names["outcome"])(torch.tensor(0.1, dtype=torch.float64))
    ft.testing.equal("hypergradient", slope, ((high - low) / 2e-3).to(slope.dtype), 0.1)


def test_readmes_block_on_data_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data,) = (block for block in python_blocks() if "h5py.File" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(data, names)
    shown = capsys.readouterr().out
    assert "direct" in shown
    assert "items" in shown.splitlines()[-1]
    source, train = names["source"], names["train"]
    assert len(source) == sum(3_000 + year % 9 for year in (2022, 2023, 2024))
    assert names["batch"]["x"].shape[1:] == (64,)
    assert len(names["batches"]) == -(-len(train) // 128)
    assert names["budget"].peak <= names["budget"].limit
    source.close()


def test_readmes_program_file_trains(tmp_path: Path) -> None:
    (program,) = (block for block in python_blocks() if "class Config" in block)
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "functrain.cli", "train", "program.py", "--rate", "0.2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "test/params: 3." in done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ft.Source:
    """Rows of an HDF5 file, memory-mapped, shuffled, in ragged batches."""
    path = tmp_path_factory.mktemp("program") / "rows.h5"
    x = ft.random.normal(ft.random.key(0), (150, 12))
    ft.h5write(path, {"train": {"x": x, "y": (x.sum(1) > 0).long()}})
    return ft.hdf5(path, group="train").shuffle(seed=0).batch(32)


def trained(source: ft.Source, depth: int | None = 4, **plan: Any) -> dict[str, torch.Tensor]:
    """The program's params after 20 steps, four epochs of five ragged batches."""
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2)))

    def loss(params, batch, *, key):
        return F.cross_entropy(apply(params, batch["x"], key=key), batch["y"], reduction="none")

    grad = ft.parallel(ft.grad(loss), **plan) if plan else ft.grad(loss)
    step = ft.step(grad, ft.optim.adamw(ft.optim.cosine(1e-2, 20)))
    state = step.init(params)
    if depth is None:
        for state, _ in ft.fold(step, state, source, steps=20):
            pass
        return state.params
    with ft.prefetch(source, depth=depth) as batches:
        for state, _ in ft.fold(step, state, batches, steps=20):
            pass
    return state.params


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("parts", [1, 2, 5, 8, 64])
def test_the_number_of_parts_changes_nothing_but_rounding(source: ft.Source, parts: int) -> None:
    assert_close(trained(source), trained(source, parts=parts))


@pytest.mark.parametrize("how", ["fused", "vmap", "threads", "loop"])
def test_the_plan_changes_nothing_but_rounding(source: ft.Source, how: str) -> None:
    assert_close(trained(source), trained(source, parts=8, how=how))


@pytest.mark.parametrize("depth", [None, 1, 2, 9])
def test_prefetching_changes_not_a_bit(source: ft.Source, depth: int | None) -> None:
    expected, found = trained(source, depth=4, parts=8), trained(source, depth=depth, parts=8)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_exact_has_the_same_bits_for_any_number_of_workers(source: ft.Source, workers: int) -> None:
    expected = trained(source, parts=8, exact=True, how="loop")
    found = trained(source, parts=8, exact=True, how="threads", workers=workers)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_sum_is_the_mean_times_the_examples(source: ft.Source) -> None:
    grad = ft.grad(lambda params, batch: (batch["x"] @ params) ** 2)
    params, batch = torch.ones(12), source(4)
    total = ft.parallel(grad, 4, reduce=ft.reduce.sum).finished(params, batch)
    mean = ft.parallel(grad, 4, reduce=ft.reduce.mean).finished(params, batch)
    torch.testing.assert_close(total.grads, mean.grads * len(batch["y"]))
