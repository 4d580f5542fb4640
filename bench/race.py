"""A race: contestants take turns in one process, so that whatever slows the machine slows them all."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bench.bounds import Bound

Contestant = Callable[[], object]
NO_BFLOAT16 = "not run: this CPU has no bfloat16 arithmetic"


class Result(NamedTuple):
    """One line of RESULTS.md: ours against a peer's, as the ratio of times on the same work (below 1 ours is faster).

    `bound` is what ours cannot be faster than; `note` says why there are no numbers where a row was not run (`ratio` None).
    """

    bench: str
    work: str
    peer: str
    ratio: float | None
    low: float | None
    high: float | None
    ours_us: float | None
    goal: float | None = None
    bound: Bound | None = None
    note: str = ""

    @property
    def met(self) -> str:
        """Whether the goal was reached, in a word."""
        if self.ratio is None:
            return self.note
        return "" if self.goal is None else "yes" if self.ratio <= self.goal else "**no**"


class _Mode:
    smoke = False


def smoke() -> bool:
    """Whether this run only checks that all contestants run: a call or two each, and nothing is written."""
    return _Mode.smoke


def only_check() -> None:
    """Make this run one that only checks: its times mean nothing."""
    _Mode.smoke = True


def race(
    contestants: Mapping[str, Contestant], rounds: int = 21, turn: float = 0.05, before: Contestant | None = None
) -> dict[str, list[float]]:
    """Seconds a call of each contestant, one figure a round; in each round all take a turn of about `turn` seconds.

    With `before`, which is called before each turn and not timed, a turn is one call.
    """
    if smoke():
        rounds, turn = 2, 0.0
    calls = dict.fromkeys(contestants, 1) if before else {name: _calls(run, turn) for name, run in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            # The order turns with the round: nobody always runs after the same one.
            names = list(contestants)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if before:
                    before()
                start = time.perf_counter()
                for _ in range(calls[name]):
                    contestants[name]()
                times[name].append((time.perf_counter() - start) / calls[name])
    finally:
        gc.enable()
    return times


def _calls(run: Contestant, turn: float) -> int:
    for _ in range(1 if smoke() else 5):
        run()
    start = time.perf_counter()
    for _ in range(3):
        run()
    return max(1, round(turn / ((time.perf_counter() - start) / 3)))


def compare(
    bench: str,
    work: str,
    times: Mapping[str, list[float]],
    ours: str,
    goals: Mapping[str, float | None],
    bound: Bound | None = None,
) -> list[Result]:
    """A result for each peer in `goals`: the median of the rounds' ratios, with the quartiles."""
    results = []
    for peer, goal in goals.items():
        if peer not in times:
            continue
        ratios = [mine / theirs for mine, theirs in zip(times[ours], times[peer])]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results.append(Result(bench, work, peer, middle, low, high, statistics.median(times[ours]) * 1e6, goal, bound))
    return results
