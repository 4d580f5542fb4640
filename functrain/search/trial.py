"""One trial: a config given to the user's function, its answer held to a contract, its failure caught."""

from __future__ import annotations

import copy
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from functrain.core.errors import ArgumentError
from functrain.core.step import Step
from functrain.core.tree import Tree, quoted
from functrain.data.prefetch import prefetch
from functrain.engine.experiment import Experiment
from functrain.engine.fold import fold
from functrain.search.grid import Config
from functrain.search.keep import kept
from functrain.search.measures import measured, number

Function = Callable[[Config], Any]
Measures = dict[str, float]


@dataclass(frozen=True)
class Scored:
    """What a trial may return in full; a bare number is short for `Scored(number)`.

    - `score`: the number that counts;
    - `state`: a tree of tensors worth keeping if this is the best trial (params, a whole state), or None;
    - `measures`: further numbers for the record, by name.

    >>> Scored(0.9, measures={"loss": 0.3}).score
    0.9
    """

    score: float
    state: Tree = None
    measures: Mapping[str, float] = field(default_factory=dict)


class Trial(NamedTuple):
    """A finished trial, as the record has it.

    - `config`; `score` (nan when it failed); `measures` of its end; `seconds` (members of a population
      share theirs);
    - `status`: "done" or "failed"; `error`: the traceback's text when it failed;
    - `how`: "alone", or "population of K"; `history`: the measures after each epoch (of experiments);
    - `place`: its position in the grid, which decides between equal scores.
    """

    config: Config
    score: float
    measures: Measures
    seconds: float
    status: str
    error: str | None = None
    how: str = "alone"
    history: tuple[Measures, ...] = ()
    place: int = 0


class Member(NamedTuple):
    """A config, and its position in the grid."""

    place: int
    config: Config


class Outcome(NamedTuple):
    """A finished trial with what is not on its record: the state, and whether the experiment is maximised."""

    trial: Trial
    state: Any = None
    maximize: bool | None = None


class Stopped(Exception):  # noqa: N818 (it is no error)
    """The search was interrupted: a running experiment ends at its next step."""


Halt = Callable[[], None]


def halted_by(stop: threading.Event | None) -> Halt:
    """A function to call between steps, which raises `Stopped` once the event is set."""

    def check() -> None:
        if stop is not None and stop.is_set():
            raise Stopped

    return check


def called(function: Function, member: Member) -> Any:
    """What the trial returns for a member's config, of which it gets a copy of its own."""
    return function(copy.deepcopy(member.config))


def scored(result: Any) -> Scored:
    """What a trial returned, in full; raises `ArgumentError` when it is neither a number nor `Scored`."""
    given = result if isinstance(result, Scored) else Scored(result)
    advice = "a trial returns a number, Scored(score, state, measures), or an Experiment"
    score = number(given.score, "the score", advice)
    measures = {str(name): number(value, f"measure {name!r}", advice) for name, value in given.measures.items()}
    return Scored(score, kept(given.state), measures)


def done(member: Member, result: Scored, seconds: float, how: str = "alone", history: Any = ()) -> Trial:
    """The record of a trial that came to its end."""
    return Trial(
        member.config,
        result.score,
        dict(result.measures),
        seconds,
        "done",
        None,
        how,
        tuple(history),
        member.place,
    )


def failed(member: Member, seconds: float, how: str = "alone") -> Outcome:
    """The record of a trial that raised the exception which is being handled."""
    error = traceback.format_exc()
    return Outcome(Trial(member.config, float("nan"), {}, seconds, "failed", error, how, (), member.place))


def run_alone(function: Function, member: Member, halt: Halt) -> Outcome:
    """Run one trial; whatever it raises (but for an interruption) becomes its record."""
    begun = time.perf_counter()
    try:
        result = called(function, member)
        if not isinstance(result, Experiment):
            found = scored(result)
            return Outcome(done(member, found, time.perf_counter() - begun), found.state)
        state, history = _run(result, halt)
        found = judged(result, state, history[-1])
        return Outcome(
            done(member, found, time.perf_counter() - begun, "alone", history[: result.epochs]),
            found.state,
            result.maximize,
        )
    except Stopped:
        raise
    except Exception:
        return failed(member, time.perf_counter() - begun)


# --- experiments ---


@contextmanager
def batches(experiment: Experiment) -> Iterator[Any]:
    """The experiment's batches, prefetched as it asks for."""
    source = experiment.train
    with prefetch(source, experiment.depth) if experiment.depth else nullcontext(source) as ready:
        yield ready


def epoch(step: Step, state: Any, ready: Any, halt: Halt) -> Any:
    """The state after one pass over the batches, with an ear for `halt` after every step."""
    for reached, _ in fold(step, state, ready):
        state = reached
        halt()
    return state


def _run(experiment: Experiment, halt: Halt) -> tuple[Any, list[Measures]]:
    state = experiment.initial()
    history: list[Measures] = []
    with batches(experiment) as ready:
        for _ in range(experiment.epochs):
            state = epoch(experiment.step, state, ready, halt)
            history.append(evaluated(experiment, state))
    return state, history or [evaluated(experiment, state)]


def evaluated(experiment: Experiment, state: Any) -> Measures:
    """What the experiment measures of a state; raises `ArgumentError` where it measures nothing."""
    if experiment.evaluate is None:
        raise ArgumentError("a search scores an experiment by its evaluate(state): give one, and score=…")
    return measured(experiment.evaluate, state)


def judged(experiment: Experiment, state: Any, measures: Measures) -> Scored:
    """The measure that the experiment names as its score, with its state; an only measure needs no naming."""
    name = experiment.score
    if name is None and len(measures) == 1:
        name = next(iter(measures))
    if name is None or name not in measures:
        asked = "names no score" if name is None else f"has score={name!r}"
        raise ArgumentError(f"the experiment {asked}, and evaluate gives {', '.join(quoted(measures)) or 'nothing'}: name one")
    return Scored(measures[name], kept(state), measures)
