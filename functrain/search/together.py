"""Configs that differ only in numbers of the state, run as one population where that gives the same."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.tree import quoted
from functrain.engine.experiment import Experiment
from functrain.engine.population import population
from functrain.search.alike import difference, strays
from functrain.search.canonical import canonical
from functrain.search.grid import Config
from functrain.search.trial import (
    Function,
    Halt,
    Measures,
    Member,
    Outcome,
    Stopped,
    batches,
    called,
    done,
    epoch,
    evaluated,
    failed,
    judged,
    scored,
)


class Report(NamedTuple):
    """What came of a group: finished trials, and members that have to run alone, each with the reason."""

    outcomes: list[Outcome]
    apart: list[tuple[Member, str]]


def groups(members: Sequence[Member], names: Sequence[str]) -> list[list[Member]]:
    """Members by what their configs have beside `names`, in order of first appearance.

    Names are dotted inside nested configs: `optimizer.lr`.
    """
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(canonical(_without(member.config, names)), []).append(member)
    return list(found.values())


def check_names(members: Sequence[Member], names: Sequence[str]) -> None:
    """Raise `ArgumentError` for a name that no config has."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        example = (names,) if isinstance(names, str) else ("lr",)
        raise ArgumentError(f"together takes a tuple of names, such as together={example!r}; got {names!r}")
    for name in names:
        if not any(_without(member.config, [name]) != member.config for member in members):
            known = dict.fromkeys(key for member in members for key in member.config)
            raise ArgumentError(f"together names {name!r}, and no config has it: expected some of {', '.join(quoted(known))}")


def _without(config: Config, names: Sequence[str]) -> Config:
    rest = copy.deepcopy(config)
    for name in names:
        *path, last = name.split(".")
        inner: Any = rest
        for key in path:
            inner = inner.get(key) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return rest


class _Lane:
    """One member of a population, on its way."""

    def __init__(self, member: Member, experiment: Experiment) -> None:
        self.member, self.experiment = member, experiment
        self.state = experiment.initial()
        self.history: list[Measures] = []
        self.outcome: Outcome | None = None


def run_together(function: Function, members: Sequence[Member], halt: Halt) -> Report:
    """Run a group as one population as far as its members agree: `functrain.search.alike` checks that."""
    lanes, report = _built(function, members)
    # Who cannot take a step by itself leads nobody, and would keep all others apart.
    while lanes and (reason := _stuck(lanes[0])):
        report.apart.append((lanes.pop(0).member, reason))
    if not lanes:
        return report
    first, alike = lanes[0], lanes[:1]
    for lane in lanes[1:]:
        reason = _why_apart(first, lane)
        if reason:
            report.apart.append((lane.member, reason))
        else:
            alike.append(lane)
    reason = "no other config goes with it" if len(alike) == 1 else _train(alike, halt)
    if reason:
        report.apart.extend((lane.member, reason) for lane in alike)
    else:
        report.outcomes.extend(lane.outcome for lane in alike if lane.outcome is not None)
    return report


def _stuck(lane: _Lane) -> str:
    experiment = lane.experiment
    try:
        if experiment.steps and not experiment.step.donates:
            experiment.step(lane.state, experiment.train(0))
    except Exception as error:
        return f"its first step raised {_told(error)}"
    return ""


def _why_apart(first: _Lane, lane: _Lane) -> str:
    try:
        return difference(first.experiment, first.state, lane.experiment, lane.state)
    except Exception as error:
        # It fails, with its traceback, when it runs alone.
        return f"comparing it with the first one raised {_told(error)}"


def _told(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _built(function: Function, members: Sequence[Member]) -> tuple[list[_Lane], Report]:
    lanes: list[_Lane] = []
    report = Report([], [])
    for number, member in enumerate(members):
        begun = time.perf_counter()
        try:
            result = called(function, member)
            if isinstance(result, Experiment):
                lanes.append(_Lane(member, result))
                continue
            found = scored(result)
        except Exception:
            report.outcomes.append(failed(member, time.perf_counter() - begun))
            continue
        # The trial has done its work by itself: the others' work is not to be done in a row here.
        report.outcomes.append(Outcome(done(member, found, time.perf_counter() - begun), found.state))
        rest = [lane.member for lane in lanes] + list(members[number + 1 :])
        report.apart.extend((other, "the trial returns a score, not an Experiment") for other in rest)
        return [], report
    return lanes, report


def _train(lanes: list[_Lane], halt: Halt) -> str:
    """Train the lanes as one population; the reason, in words, where that does not work."""
    begun = time.perf_counter()
    how = f"population of {len(lanes)}"
    try:
        reason = strays([lane.experiment for lane in lanes], [lane.state for lane in lanes])
        if reason:
            return reason
        state = _epochs(lanes, halt, how, begun)
    except Stopped:
        raise
    except Exception as error:
        return f"the population raised {_told(error)}"
    seconds = (time.perf_counter() - begun) / len(lanes)
    for lane, own in zip(lanes, tree.unstack(state)):
        if lane.outcome is None:
            lane.outcome = _finished(lane, own, seconds, how)
    return ""


def _epochs(lanes: list[_Lane], halt: Halt, how: str, begun: float) -> Any:
    first = lanes[0].experiment
    step = population(first.step)
    state = step.init([lane.state for lane in lanes])
    with batches(first) as ready:
        for _ in range(first.epochs):
            state = epoch(step, state, ready, halt)
            for lane, own in zip(lanes, tree.unstack(state)):
                _measure(lane, own, how, begun)
    return state


def _measure(lane: _Lane, state: Any, how: str, begun: float) -> None:
    if lane.outcome is None:
        try:
            lane.history.append(evaluated(lane.experiment, state))
        except Exception:
            lane.outcome = failed(lane.member, time.perf_counter() - begun, how)


def _finished(lane: _Lane, state: Any, seconds: float, how: str) -> Outcome:
    try:
        found = judged(lane.experiment, state, lane.history[-1])
    except Exception:
        return failed(lane.member, seconds, how)
    return Outcome(done(lane.member, found, seconds, how, lane.history), found.state, lane.experiment.maximize)
