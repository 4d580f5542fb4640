"""An experiment as a value: what is trained, on what, for how long, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from functrain.core.errors import ArgumentError
from functrain.core.explain import Stage, explain
from functrain.core.step import Step
from functrain.core.tree import Tree
from functrain.data.source import Source


@dataclass(frozen=True)
class Experiment:
    """All that a run is made of; nothing happens until something runs it.

    - `step`, `params`, `carry`, `seed`: what `step.init(params, carry=carry, seed=seed)` starts from;
    - `train`: a finite source of batches: one pass is an epoch;
    - `epochs`: how many passes;
    - `evaluate`: state → `{measure: float}`, called after each epoch (names such as `"test/accuracy"`);
    - `depth`: how many batches are prefetched (0: none);
    - `score`: the measure that counts, and whether it is to be maximised (used by searches and best-checkpoint keepers).

    Raises `ArgumentError` for epochs below 0, or a source without end.
    """

    step: Step
    params: Tree
    train: Source
    epochs: int
    evaluate: Callable[[Any], dict[str, float]] | None = None
    carry: Tree = None
    seed: int = 0
    depth: int = 2
    score: str | None = None
    maximize: bool = True
    facts: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.step, Step):
            raise ArgumentError(f"an experiment's step is what ft.step(…) gives, got {explain(self.step).title}")
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 0:
            raise ArgumentError(f"epochs must be an int of at least 0, got {self.epochs!r}")
        if not isinstance(self.train, Source) or self.train.length is None:
            raise ArgumentError("train must be a finite source of batches: leave .repeat() out, epochs do that")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise ArgumentError(f"depth must be a number of batches of at least 0, got {self.depth!r}")
        if self.train.deferring and self.depth:
            raise ArgumentError("train's batches are deferred, workers read them: give the experiment depth=0")
        if not self.train.length:
            raise ArgumentError("train has no batches: an epoch needs at least one")

    def initial(self) -> Any:
        """The state before the first step."""
        return self.step.init(self.params, carry=self.carry, seed=self.seed)

    @property
    def steps(self) -> int:
        """The number of steps in all."""
        return self.epochs * len(self.train) * self.step.takes

    def explain(self) -> Stage:
        """The step and the source, and how long they run."""
        facts = {"epochs": f"{self.epochs} of {len(self.train)} steps", "prefetch": f"{self.depth} batches ahead", **self.facts}
        return Stage("experiment", facts, [explain(self.step), explain(self.train)])
