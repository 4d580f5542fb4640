"""Bench `optim`: an optimizer's update alone, on few big leaves and on many small ones, against torch.optim's kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import functrain as ft
from bench import bounds, networks
from bench.networks import RATE, Given, Ours
from bench.race import NO_BFLOAT16, Result, compare, race

Leaves = dict[str, Tensor]
COMPILED, UNCOMPILED = "compiled", "uncompiled, in place"
FOREACH, FUSED, LOOP = "torch.optim, foreach", "torch.optim, fused", "torch.optim, leaf by leaf"


class Case(NamedTuple):
    """An optimizer of ours and its like in torch.optim, with the settings of each."""

    ours: str
    theirs: str
    settings: dict[str, Any]
    options: dict[str, Any]


CASES = (
    Case("adam", "Adam", {}, {}),
    Case("adamw", "AdamW", {}, {}),
    Case("amsgrad", "Adam", {}, {"amsgrad": True}),
    Case("sgd", "SGD", {"momentum": 0.9}, {"momentum": 0.9}),
    Case("nadam", "NAdam", {}, {}),
    Case("radam", "RAdam", {}, {}),
    Case("rmsprop", "RMSprop", {}, {}),
    Case("adagrad", "Adagrad", {}, {}),
    Case("adadelta", "Adadelta", {}, {}),
    Case("adafactor", "Adafactor", {}, {}),
    Case("adamax", "Adamax", {}, {}),
    Case("muon", "Muon", {"ns_dtype": torch.bfloat16}, {}),
)

# Inductor (torch 2.13) takes about half a second a leaf: compiled are those that have a fused kernel to beat, and of the
# updates of many leaves only these.
MANY_COMPILED = ("adamw", "sgd")


def run() -> list[Result]:
    """Race every optimizer that both have, on both trees."""
    trees = {"MLP 784-1024-1024-10": _big(), "150 leaves of 64 to 4096 numbers": _many()}
    cases = [case for case in CASES if hasattr(ft.optim, case.ours)]
    missing = [case.ours for case in CASES if case not in cases]
    if missing:
        print(f"  functrain has no {', '.join(missing)}", flush=True)
    return [result for case in cases for name, params in trees.items() for result in _updates(case, name, params)]


def _big() -> Leaves:
    return {name: value.detach() for name, value in networks.big().module().named_parameters()}


def _many() -> Leaves:
    """Leaves as a transformer of twelve layers and width 64 has them."""
    torch.manual_seed(0)
    shapes = [(64, 64), (64,)] * 3 + [(64, 64), (64,), (64,), (64,), (64,), (64,)]
    shapes = shapes * 12 + [(64, 64)] * 4 + [(64,)] * 2
    # As small as such params are: of larger ones, rounding takes away what tells updates apart.
    return {f"{place:03d}": 0.03 * torch.randn(shape) for place, shape in enumerate(shapes)}


def _updates(case: Case, name: str, params: Leaves) -> list[Result]:
    work, kind = f"{case.ours}, {name}; update alone, {{}}", torch.float32
    if case.ours == "muon":
        # For matrices alone, and in bfloat16 on both sides.
        params, kind = {path: leaf for path, leaf in params.items() if leaf.ndim == 2}, torch.bfloat16
        if not bounds.has_bfloat16() and len(params) < 10:
            return [Result("optim", work.format(UNCOMPILED), LOOP, None, None, None, None, note=NO_BFLOAT16)]
    generator = torch.Generator().manual_seed(3)
    grads = {path: 0.01 * torch.randn(leaf.shape, generator=generator) for path, leaf in params.items()}
    optimizer = getattr(ft.optim, case.ours)(RATE, **case.settings)
    kernels = _kernels(getattr(torch.optim, case.theirs))
    contestants: dict[str, Any] = {UNCOMPILED: Update(optimizer, params, grads)}
    if FUSED in kernels and (len(params) < 100 or case.ours in MANY_COMPILED):
        contestants[COMPILED] = Compiled(optimizer, params, grads)
    contestants |= {peer: Theirs(case, option, params, grads) for peer, option in kernels.items()}
    _check_same_updates(case, params, contestants)
    times = race(contestants, rounds=9 if case.ours == "muon" else 15, turn=0.03)
    with FlopCounterMode(display=False) as counter:
        contestants[UNCOMPILED]()
    needs = bounds.update_needs(params, contestants[UNCOMPILED].state, counter.get_total_flops())
    operators = {COMPILED: None, UNCOMPILED: bounds.operators(contestants[UNCOMPILED])}
    goals: dict[str, dict[str, float | None]] = {UNCOMPILED: {FOREACH: 1.1, LOOP: 1.1, FUSED: None}}
    if COMPILED in contestants:
        goals[COMPILED] = {FUSED: 1.0, FOREACH: None}
    return [
        result
        for mode, against in goals.items()
        for result in compare("optim", work.format(mode), times, mode, against, bounds.bound(needs, operators[mode], kind))
    ]


def _kernels(kind: type[torch.optim.Optimizer]) -> dict[str, dict[str, bool]]:
    """The ways in which torch.optim computes an update, or its only one."""
    options = inspect.signature(kind).parameters
    found = {peer: {option: True} for peer, option in ((FOREACH, "foreach"), (FUSED, "fused")) if option in options}
    return found or {LOOP: {}}


class Update:
    """Our update, uncompiled: in place where the optimizer can, as a donating step takes it."""

    def __init__(self, optimizer: ft.optim.Optimizer, params: Leaves, grads: Leaves) -> None:
        self.optimizer, self.grads, self.params = optimizer, grads, ft.tree.map(torch.clone, params)
        self.state = optimizer.init(self.params)

    def __call__(self) -> None:
        with torch.no_grad():
            if self.optimizer.fused is not None:
                self.params, self.state = self.optimizer.fused(self.grads, self.state, self.params)
            else:
                updates, self.state = self.optimizer.update(self.grads, self.state, self.params)
                self.params = ft.optim.apply_updates(self.params, updates)


class Compiled:
    """Our update, compiled: a step whose gradient is its batch."""

    def __init__(self, optimizer: ft.optim.Optimizer, params: Leaves, grads: Leaves) -> None:
        self.run = Ours(ft.compiled(ft.step(Given(), optimizer)), params, grads)

    def __call__(self) -> None:
        self.run()

    @property
    def params(self) -> Leaves:
        """The params as they are now."""
        return self.run.state.params


class Theirs:
    """torch.optim's update of params that have their gradients."""

    def __init__(self, case: Case, option: dict[str, bool], params: Leaves, grads: Leaves) -> None:
        self.params = {path: nn.Parameter(leaf.clone()) for path, leaf in params.items()}
        for path, leaf in self.params.items():
            leaf.grad = grads[path].clone()
        self.step: Callable[[], Any] = getattr(torch.optim, case.theirs)(
            self.params.values(), lr=RATE, **case.options, **option
        ).step

    def __call__(self) -> None:
        self.step()


def _check_same_updates(case: Case, start: Leaves, contestants: dict[str, Any], steps: int = 5) -> None:
    """Raise where contestants have not moved the params alike, to a part in a thousand of the way."""
    for run in contestants.values():
        for _ in range(steps):
            run()
    ends = {name: torch.cat([(run.params[path] - leaf).detach().reshape(-1) for path, leaf in start.items()])
            for name, run in contestants.items()}  # fmt: skip
    ours = ends[UNCOMPILED]
    for name, moved in ends.items():
        if not (moved - ours).norm() <= 1e-3 * ours.norm():
            apart = float((moved - ours).norm() / ours.norm())
            raise RuntimeError(f"{case.ours}: {name} moves the params elsewhere, {apart:.1e} of the way apart")
