"""Schedule-free AdamW: an average of the iterates in place of a schedule of the rate.

    γ = lr · min(1, t / warmup_steps)                      the rate of update t
    w = tʳ · (largest γ so far)^weight_lr_power,    c = w / (sum of all w)
    v ← β₂ v + (1 − β₂) g²                                 g: the gradient at y
    u = g / (√(v / (1 − β₂ᵗ)) + ε) + weight_decay · y
    z ← z − γ u
    x ← (1 − c) x + c z                                    the average
    y ← (1 − β₁) z + β₁ x                                  the params of the step

The params that a step trains are y. z is kept in the state, x follows from both: `schedule_free_params`.

Source: Defazio et al., "The road less scheduled", NeurIPS 2024; in the form of the authors' AdamWScheduleFree.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.optim.arithmetic import Arithmetic, Leaf, Number, choose, larger
from functrain.core.optim.base import Hyper, Optimizer, Schedule, checked
from functrain.core.optim.leafwise import Numbers, leafwise
from functrain.core.optim.moments import moment_numbers, moment_settings
from functrain.core.optim.weight_decay import decay_settings, decayed
from functrain.core.tree import Tree


class ScheduleFreeState(NamedTuple):
    """The number of updates taken t, the largest rate so far, the sum of all weights, v, z, the hyperparameters."""

    steps: Tensor
    largest: Tensor
    weight: Tensor
    second: Tree
    z: Tree
    hyper: dict[str, Any]


def schedule_free(
    lr: Hyper = 2.5e-3,
    *,
    b1: float = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    warmup_steps: Hyper = 0.0,
    r: Hyper = 0.0,
    weight_lr_power: Hyper = 2.0,
) -> Optimizer:
    """Schedule-free AdamW: train as with AdamW at a constant rate, evaluate at `schedule_free_params(state, params)`.

    - `b1`: how much of the average x is in y, above 0;
    - `warmup_steps`: the rate rises over so many updates;
    - `r`: update t counts in the average with tʳ;
    - `weight_lr_power`: and with this power of the largest rate so far.

    All but `b1` are numbers or schedules. Batch norm's running statistics are those of y: run a few
    batches through the model at x before evaluating it.
    Raises `ArgumentError` for a negative number, a β outside [0, 1), and `b1` of 0, from which x would not follow.

    >>> optimizer = schedule_free(0.1)
    >>> params = {"w": torch.ones(1)}
    >>> updates, state = optimizer.update({"w": torch.ones(1)}, optimizer.init(params), params)
    >>> updates, schedule_free_params(state, {"w": params["w"] + updates["w"]})
    ({'w': tensor([-0.1000])}, {'w': tensor([0.9000])})
    """
    if isinstance(b1, Schedule) or b1 == 0:
        raise ArgumentError(f"b1 must be a number above 0, for the average to follow from the params, got {b1!r}")
    settings = {
        **moment_settings(lr, b1, b2, eps),
        **decay_settings(weight_decay),
        "warmup_steps": checked("warmup_steps", warmup_steps),
        "r": checked("r", r),
        "weight_lr_power": checked("weight_lr_power", weight_lr_power),
    }
    buffers = {"second": torch.zeros_like, "z": torch.clone}
    scalars = {"largest": 0.0, "weight": 0.0}
    return leafwise("schedule_free", ScheduleFreeState, settings, _numbers, _rule, buffers=buffers, scalars=scalars)


def _numbers(now: Numbers, count: Number, past: Numbers) -> tuple[Numbers, Numbers]:
    risen = count / larger(now["warmup_steps"], 1.0)
    rate = now["lr"] * choose(risen < 1, risen, 1.0)
    largest = larger(rate, past["largest"])
    own = count ** now["r"] * largest ** now["weight_lr_power"]
    total = past["weight"] + own
    share = own / choose(total > 0, total, 1.0)
    sizes = {"rate": rate, "share": share, "ahead": rate * (1 - now["b1"] * (1 - share))}
    return moment_numbers(now, count) | sizes, {"largest": largest, "weight": total}


def _rule(do: Arithmetic, y: Leaf, g: Leaf, v: Leaf, z: Leaf, n: Numbers) -> tuple[Leaf, Leaf]:
    v = do.addcmul_(do.mul_(v, n["b2"]), g, g, n["fresh2"])
    u = do.div(g, do.shift_(do.div_(do.sqrt(v), n["root"]), n["eps"]))
    u = decayed(do, y, u, n)
    # What y's rule comes to without x: y ← y + c (z − y) − γ (1 − β₁ (1 − c)) u.
    do.descend(do.add(y, z, -1), n["share"])
    do.descend(u, n["ahead"])
    return v, do.add_(z, u, -n["rate"])


def schedule_free_params(state: Any, params: Tree) -> Tree:
    """The average x of schedule-free training, at which a model is evaluated: x = z + (y − z) / β₁.

    `state` is a step's or an optimizer's, in which `schedule_free` may be one of several: leaves that none has (see
    `partition`) stay as they are. `params` are y, those that the step trains. Works on the state of a population as well.
    Raises `ArgumentError` for a state in which there is no `schedule_free`, and `TreeError` for params that are not like
    its own.

    >>> params = {"w": torch.ones(2)}
    >>> schedule_free_params(schedule_free(0.1).init(params), params)
    {'w': tensor([1., 1.])}
    """
    found = list(_states(state))
    if not found:
        raise ArgumentError(f"expected the state of an ft.optim.schedule_free, found none in {type(state).__name__}")
    for one in found:
        params = _averaged(one, params)
    return params


def _averaged(state: ScheduleFreeState, params: Tree) -> Tree:
    b1 = state.hyper["b1"]

    def average(y: Tensor, z: Tensor) -> Tensor:
        own = b1.reshape(b1.shape + (1,) * (z.ndim - b1.ndim)).to(z.dtype)
        return (z + (y - z) / own).to(y.dtype)

    places = {path: place for place, path in enumerate(tree.paths(params))}
    if tree.same_structure(params, state.z) or not isinstance(state.z, dict) or not places.keys() >= state.z.keys():
        return tree.map(average, params, state.z)
    # A share of the leaves, by path.
    flat, spec = tree.flatten(params)
    for path, z in state.z.items():
        flat[places[path]] = average(flat[places[path]], z)
    return tree.unflatten(spec, flat)


def _states(state: Any) -> Iterator[ScheduleFreeState]:
    if isinstance(state, ScheduleFreeState):
        yield state
    elif hasattr(state, "opt"):
        yield from _states(state.opt)
    else:
        inner = getattr(state, "inner", None)
        for one in inner.values() if isinstance(inner, dict) else [inner] if inner is not None else []:
            yield from _states(one)
