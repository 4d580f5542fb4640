"""Stories of the command line, with the real command in real processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import functrain as ft
from functrain.cli import load_program, main
from functrain.core.errors import ConfigError
from functrain.runs.directory import Run
from functrain.runs.store import load_named

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "examples" / "digits.py"
# Eager, so that no test waits for a compiler.
QUICK = ["--no-compiled", "--epochs", "8", "--rate", "0.002"]

PROGRAM = '''
from dataclasses import dataclass
import torch
import functrain as ft


@dataclass(frozen=True)
class Config:
    """A line through points."""

    rate: float = 0.1
    """The learning rate."""
    epochs: int = 2


def experiment(config: Config) -> ft.Experiment:
    source = ft.arrays(torch.arange(8.0)).batch(4)
    step = ft.step(ft.grad(lambda params, batch: (params - batch) ** 2), ft.optim.sgd(config.rate))
    measure = lambda state: {"test/loss": float(state.params)}
    return ft.Experiment(step, torch.tensor(0.0), source, config.epochs, measure)
'''


def functrain(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "functrain.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small program in it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "line.py").write_text(PROGRAM)
    return folder


def test_train_makes_a_run_and_says_where(room: Path) -> None:
    done = functrain("train", "line.py", "--rate", "0.25", cwd=room)
    assert done.returncode == 0, done.stderr
    assert "test/loss: 3." in done.stdout
    assert "run: runs/line-001" in done.stdout
    run = room / "runs" / "line-001"
    assert json.loads((run / "config.json").read_text()) == {"epochs": 2, "rate": 0.25}
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch" in done.stdout
    assert "train/loss" in done.stdout


def test_wrong_use_is_told_without_a_traceback(room: Path) -> None:
    functrain("train", "line.py", "--run", "taken", cwd=room)
    cases = {
        ("train", "absent.py"): (1, "no program at absent.py"),
        ("train", "line.py", "--speed", "3"): (2, "--speed"),
        ("train", "line.py", "--run", "taken"): (1, "taken"),
        ("resume", "nowhere"): (1, "no run at nowhere"),
        ("train", "line.py", "--epochs", "-1"): (1, "epochs must be"),
    }
    for arguments, (status, text) in cases.items():
        done = functrain(*arguments, cwd=room)
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        assert text in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("every", ["0", "-3", "1.5", "often"])
def test_a_wrong_number_of_steps_makes_no_run(room: Path, every: str) -> None:
    done = functrain("train", "line.py", "--run", f"every{every}", "--every", every, cwd=room)
    assert done.returncode == 2
    assert "expected a number of steps of at least 1" in done.stderr
    assert not (room / f"every{every}").exists()


def test_a_run_made_in_python_is_not_resumed_by_the_command_line(room: Path) -> None:
    Run.create(room / "mine", {}, {})
    done = functrain("resume", "mine", cwd=room)
    assert done.returncode == 1
    assert "mine was not made by the command line" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["run", "overwrite", "every", "quiet", "help"])
def test_a_field_named_like_a_flag_of_functrain_is_refused(room: Path, name: str) -> None:
    (room / f"{name}.py").write_text(PROGRAM.replace("rate", name))
    with pytest.raises(ConfigError, match=f"Config has the field '{name}', and --{name} is a flag of functrain itself"):
        load_program(room / f"{name}.py")


def test_a_field_may_be_the_beginning_of_a_flag_of_functrain(room: Path) -> None:
    (room / "short.py").write_text(PROGRAM.replace("rate", "ever"))
    done = functrain("train", "short.py", "--run", "short", "--ever", "0.25", cwd=room)
    assert done.returncode == 0, done.stderr
    assert json.loads((room / "short" / "config.json").read_text()) == {"epochs": 2, "ever": 0.25}


def test_help_for_a_file_has_the_flags_of_its_config(room: Path) -> None:
    done = functrain("train", "line.py", "--help", cwd=room)
    assert done.returncode == 0
    assert "--rate" in done.stdout
    assert "The learning rate" in done.stdout


def test_explain_tells_the_plan_and_runs_nothing(room: Path) -> None:
    done = functrain("explain", "line.py", cwd=room)
    assert done.returncode == 0
    assert "experiment" in done.stdout
    assert "sgd" in done.stdout


def test_a_run_begun_with_other_keys_is_not_resumed_by_guessing(room: Path) -> None:
    functrain("train", "line.py", "--run", "odd", cwd=room)
    config = room / "odd" / "config.json"
    config.write_text(json.dumps({"rate": 0.1, "epochs": 2, "colour": "red"}))
    done = functrain("resume", "odd", cwd=room)
    assert done.returncode == 1
    assert "colour" in done.stderr


@pytest.fixture(scope="module")
def shelf(room: Path) -> Path:
    """An HDF5 file whose images lie badly."""
    with h5py.File(room / "shelf.h5", "w") as file:
        images = np.random.default_rng(0).integers(0, 9, (32, 96, 96, 3), "u1")
        file.create_dataset("train/images", data=images, chunks=(8, 12, 12, 1), compression="gzip", shuffle=True)
        file["train/labels"] = np.arange(32)
        file["train/\x1b[31mred\nline"] = np.arange(32)
        file["test/scale"] = 3.0
        file["test/lost"] = h5py.SoftLink("/nowhere")
    return room / "shelf.h5"


def test_data_inspect_shows_what_a_file_holds(room: Path, shelf: Path) -> None:
    done = functrain("data", "inspect", shelf.name, cwd=room)
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("train/images"))
    for cell in ("32×96×96×3", "uint8", "chunks 8×12×12×1", "shuffle+gzip", "864.0 KiB", "direct"):
        assert cell in row
    for text in ("one sample touches 192 chunks", "test/lost: 'test/lost' in 'shelf.h5' leads nowhere", "test/scale", "scalar"):
        assert text in done.stdout
    assert "\x1b" not in done.stdout
    assert r"train/\x1b[31mred\nline" in done.stdout
    for name in ("train/images", "train/labels", "test/scale"):
        assert f"{ft.content_hash(shelf, name)}  {name}" in done.stdout


def test_data_inspect_of_a_group_without_speed(room: Path, shelf: Path) -> None:
    done = functrain("data", "inspect", shelf.name, "--group", "test", "--no-speed", "--hashes", cwd=room)
    assert done.returncode == 0, done.stderr
    assert "test/scale" in done.stdout
    assert "train" not in done.stdout


def test_data_inspect_told_wrong_says_so_without_a_traceback(
    room: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(room)
    (room / "text.h5").write_text("no HDF5")
    os.mkfifo(room / "fifo.h5")
    cases = {
        ("absent.h5",): "no file 'absent.h5'",
        ("text.h5",): "'text.h5' is not an HDF5 file",
        ("fifo.h5",): "'fifo.h5' is a FIFO",
        (".",): "'.' is a directory",
        ("shelf.h5", "--group", "nowhere"): "'shelf.h5' has no 'nowhere'",
        ("shelf.h5", "--fast"): "unknown arguments: --fast",
        ("nosuch://a.h5",): "nosuch://a.h5",
    }
    for arguments, text in cases.items():
        assert main(["data", "inspect", *arguments]) == 1
        assert text in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["data", "inspect"])


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"))
    return load_named(newest / "state.safetensors")


def train_disturbed(room: Path, number: int, kind: signal.Signals, moments: random.Random) -> Path:
    """Start the digits run, stop it at random moments, resume it each time, until it ends by itself."""
    run = room / "runs" / f"disturbed-{kind.name}-{number}"
    start = ["train", str(DIGITS), "--run", str(run), "--every", "10", *QUICK]
    command = start
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "functrain.cli", *command], cwd=room, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            # Not synchronisation: the moment of the disturbance, which may fall anywhere, before and after the run too.
            process.communicate(timeout=moments.uniform(1.5, 5.0))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, kind)
            process.communicate(timeout=60)
        begun = (run / "run.json").exists() and any((run / "checkpoints").glob("step-*"))
        command = ["resume", str(run)] if begun else [*start, "--overwrite"]
        if process.returncode == 0:
            return run
    done = functrain(*command, cwd=room)
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_disturbed_at_random_moments_the_digits_run_ends_with_the_same_bits(tmp_path: Path, kind: signal.Signals) -> None:
    undisturbed = functrain("train", DIGITS, "--run", "runs/undisturbed", *QUICK, cwd=tmp_path)
    assert undisturbed.returncode == 0, undisturbed.stderr
    expected = final_state(tmp_path / "runs" / "undisturbed")
    seed = random.SystemRandom().randrange(10**6)
    run = train_disturbed(tmp_path, 0, kind, random.Random(seed))
    found = final_state(run)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected), f"seed of the moments: {seed}"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(1, 9))


def test_a_run_is_resumed_in_the_folder_that_it_began_in(tmp_path: Path) -> None:
    begun, elsewhere = tmp_path / "begun", tmp_path / "elsewhere"
    begun.mkdir()
    elsewhere.mkdir()
    assert functrain("train", DIGITS, "--run", "run", *QUICK, "--epochs", "1", cwd=begun).returncode == 0
    done = functrain("resume", begun / "run", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert "test/accuracy" in done.stdout
    assert list(elsewhere.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error_to_tell(room: Path) -> None:
    command = f"{sys.executable} -m functrain.cli explain line.py | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=room, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "experiment\n"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
