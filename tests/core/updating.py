"""Running an optimizer by hand: over gradients of any function of params and count, by `update` or by `fused`."""

from __future__ import annotations

import functrain as ft
from functrain.core.optim import apply_updates
from functrain.core.optim.base import updated


def bowl(params, count):
    """Gradients of a quadratic bowl, with noise of the count."""
    flat, spec = ft.tree.flatten(params)
    noise = [ft.random.normal(ft.random.key(1000 * count + n), p.shape, p.dtype) for n, p in enumerate(flat)]
    return ft.tree.map(lambda p, shift: p + shift, params, ft.tree.unflatten(spec, noise))


def run(optimizer, params, steps, slope=bowl, fused=False, extra=lambda count: {}):
    """The params after each of the steps, and the last state."""
    now, state, rows = ft.tree.map(lambda leaf: leaf.clone(), params), optimizer.init(params), []
    for count in range(steps):
        way = optimizer.fused if fused else optimizer.update
        found, state = updated(way, optimizer, slope(now, count), state, now, extra(count))
        now = found if fused else apply_updates(now, found)
        rows.append(ft.tree.map(lambda leaf: leaf.clone(), now))
    return rows, state


def run_torch(step, params, steps, slope=bowl):
    """The params after each of the steps that `step(leaves)(count)` takes in place, of torch's `grad`."""
    flat, spec = ft.tree.flatten(params)
    leaves, rows = [leaf.clone() for leaf in flat], []
    take = step(leaves)
    for count in range(steps):
        for leaf, grad in zip(leaves, ft.tree.leaves(slope(ft.tree.unflatten(spec, leaves), count))):
            leaf.grad = grad.detach().clone()
        take(count)
        rows.append(ft.tree.unflatten(spec, [leaf.detach().clone() for leaf in leaves]))
    return rows
