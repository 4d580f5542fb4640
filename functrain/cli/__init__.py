"""The command line: train a program's experiment, resume a run, explain what would run, look at data."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import inspect
import os
import platform
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

import functrain as ft
from functrain.cli.data import add_data_command
from functrain.cli.printing import printing, silence
from functrain.core.errors import ConfigError, FunctrainError, RunError
from functrain.engine.experiment import Experiment
from functrain.runs.config import config_from_dict, config_from_flags, config_to_dict
from functrain.runs.directory import Run
from functrain.runs.train import interruptible, train
from functrain.runs.watch import Watch

INTERRUPTED = 130
_KEPT = ("epoch", "position", "seconds")
OWN_FLAGS = ("run", "overwrite", "every", "quiet", "help")


class Program(NamedTuple):
    """What a program file offers: its typed config and the function from a config to an experiment."""

    path: Path
    config: type[Any]
    experiment: Callable[[Any], Experiment]


def load_program(path: str | Path) -> Program:
    """Import a program file: a dataclass `Config` and `experiment(config) -> ft.Experiment`.

    Raises `ConfigError` naming what the file lacks, and lets the file's own errors through.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no program at {file}: expected a Python file with a dataclass Config and experiment(config)")
    module = _imported(file.resolve())
    experiment = getattr(module, "experiment", None)
    if not callable(experiment):
        raise ConfigError(f"{file} has no function experiment(config): write one that returns an ft.Experiment")
    parameters = list(inspect.signature(experiment).parameters)
    hints = typing.get_type_hints(experiment)
    config = hints.get(parameters[0]) if parameters else None
    config = config or getattr(module, "Config", None)
    if not isinstance(config, type) or not dataclasses.is_dataclass(config):
        raise ConfigError(f"{file}: experiment's first argument needs a dataclass as its type: def experiment(config: Config)")
    taken = [field.name for field in dataclasses.fields(config) if field.name in OWN_FLAGS]
    if taken:
        raise ConfigError(
            f"{file}: {config.__name__} has the field {taken[0]!r}, and --{taken[0]} is a flag of functrain itself: rename it"
        )
    return Program(file, config, experiment)


def _imported(file: Path) -> ModuleType:
    name = f"functrain_program_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    # As when Python runs a file: what lies beside it can be imported.
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    return module


def _built(program: Program, config: Any) -> Experiment:
    made = program.experiment(config)
    if not isinstance(made, Experiment):
        raise ConfigError(f"{program.path}: experiment(config) returned {type(made).__name__}, expected an ft.Experiment")
    return made


def _facts(program: Program) -> dict[str, Any]:
    return {
        "program": str(program.path.resolve()),
        "program_sha256": hashlib.sha256(program.path.read_bytes()).hexdigest(),
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__), "functrain": ft.__version__},
        "machine": platform.machine(),
        "folder": os.getcwd(),
    }


def _free_directory(stem: str) -> Path:
    number = 1
    while (path := Path("runs") / f"{stem}-{number:03d}").exists():
        number += 1
    return path


def _train(options: argparse.Namespace, flags: Sequence[str]) -> int:
    program = load_program(options.file)
    config = config_from_flags(program.config, flags, f"functrain train {options.file}")
    experiment = _built(program, config)
    path = Path(options.run) if options.run else _free_directory(program.path.stem)
    facts = _facts(program) | {"every": options.every}
    run = Run.create(path, config_to_dict(config), facts, overwrite=options.overwrite)
    return _go(experiment, run, options.every, quiet=options.quiet)


def _resume(options: argparse.Namespace, flags: Sequence[str]) -> int:
    _none(flags)
    run = Run.open(_from_its_folder(Path(options.run)))
    if not {"program", "program_sha256"} <= run.facts.keys():
        raise RunError(
            f"{run.path} was not made by the command line, so there is no program to run: go on with it in Python, "
            f"ft.train(experiment, ft.Run.open({str(run.path)!r}))"
        )
    program = load_program(run.facts["program"])
    if _facts(program)["program_sha256"] != run.facts["program_sha256"]:
        print(f"note: {program.path} has changed since this run began; what follows may differ from an undisturbed run")
    experiment = _built(program, config_from_dict(program.config, run.config))
    return _go(experiment, run, run.facts.get("every"), quiet=options.quiet)


def _from_its_folder(path: Path) -> Path:
    """Go to the folder that the run began in, which paths in its config are relative to; gives the run's path from there."""
    folder = Run.open(path).facts.get("folder")
    if folder is None or Path(folder) == Path.cwd():
        return path
    if not Path(folder).is_dir():
        print(f"note: the folder that this run began in, {folder}, is gone; relative paths in its config are taken from here")
        return path
    whole = path.resolve()
    os.chdir(folder)
    return whole


def _explain(options: argparse.Namespace, flags: Sequence[str]) -> int:
    program = load_program(options.file)
    print(ft.explain(_built(program, config_from_flags(program.config, flags, f"functrain explain {options.file}"))))
    return 0


def _go(experiment: Experiment, run: Run, every: int | None, quiet: bool) -> int:
    from functrain.runs.curves import plot_curves

    with Watch(quiet) as watch, interruptible(watch.interrupting) as interrupted:
        watch.say(str(ft.explain(experiment)) + "\n")
        if ft.explain(experiment.step).title == "compiled":
            watch.say("the first step of each shape compiles, which takes a while\n")
        result = train(experiment, run, every=every, observers=[watch], interrupted=interrupted)
    if result.interrupted:
        print(f"interrupted at step {int(result.state.position)} of {experiment.steps}: functrain resume {run.path}")
        return INTERRUPTED
    if result.rows:
        last = result.rows[-1]
        for name in (name for name in last if name not in _KEPT and not name.startswith("train/")):
            print(f"{name}: {last[name]:.4f}")
        plot_curves(result.rows, run.path / "curves.png", run.path.name)
        print(f"curves: {run.path / 'curves.png'}")
    print(f"run: {run.path}")
    return 0


def _none(flags: Sequence[str]) -> None:
    if flags:
        raise ConfigError(f"unknown arguments: {' '.join(flags)}; a run is resumed with the config that it began with")


def _steps(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number of steps of at least 1, got {text!r}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("functrain", description="Training as a composition of pure functions.")
    parser.add_argument("--version", action="version", version=f"functrain {ft.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    # No abbreviations: --ever may be a field of a config.
    begin = commands.add_parser("train", allow_abbrev=False, help="train FILE's experiment; further flags: its config's")
    begin.add_argument("file", help="a Python file with a dataclass Config and experiment(config) -> ft.Experiment")
    begin.add_argument("--run", help="the run's directory (default: the next free runs/FILE-001, -002, …)")
    begin.add_argument("--overwrite", action="store_true", help="give up the run that is in that directory")
    begin.add_argument("--every", type=_steps, metavar="STEPS", help="checkpoint every so many steps, besides after each epoch")
    begin.set_defaults(go=_train)
    again = commands.add_parser("resume", allow_abbrev=False, help="go on with a run from its newest whole checkpoint")
    again.add_argument("run", help="the run's directory")
    again.set_defaults(go=_resume)
    for command in (begin, again):
        command.add_argument("--quiet", action="store_true", help="print only the result")
    tell = commands.add_parser("explain", allow_abbrev=False, help="say what FILE's experiment would run, where, and why")
    tell.add_argument("file")
    tell.set_defaults(go=_explain)
    add_data_command(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Help for a file is help with its config's flags too: that is for later, when the file has been read.
    about_file = any(word.endswith(".py") for word in given) and bool({"-h", "--help"} & set(given))
    options, flags = _parser().parse_known_args([word for word in given if not about_file or word not in ("-h", "--help")])
    flags += ["--help"] if about_file else []
    try:
        status = int(options.go(options, flags))
        with printing():
            return status
    except FunctrainError as error:
        print(f"functrain: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read along has gone (| head): nobody is left to tell. What is still to be flushed goes nowhere.
        silence()
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
