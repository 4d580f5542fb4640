"""Plans: the ways in which the parts of a batch can become one gradient, and the choice between them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from functrain.core import tree
from functrain.core.errors import ArgumentError
from functrain.core.explain import times_params
from functrain.core.reduce.base import Reducer

How = Literal["auto", "fused", "vmap", "threads", "loop"]


class Plan(NamedTuple):
    """A way to compute a gradient and the reason why it was taken."""

    how: str
    reason: str


def choose(grad: Any, how: str, parts: int, workers: int, reduce: Reducer, exact: bool) -> Plan:
    """The plan for `parts` parts of a batch; by algebra alone, nothing is measured.

    A linear reducer commutes with the gradient, Σₖ ∇lossₖ = ∇ Σₖ lossₖ, so that one backward pass over the whole batch is the
    sum over its parts (`fused`), unless the loss threads shared buffers (then a part's loss depends on its mates),
    or `exact` asks for the bits of the tree.

    Raises `ArgumentError` for an unknown plan, or one that would give another result.
    """
    if how not in get_args(How):
        raise ArgumentError(f"how must be one of {', '.join(get_args(How))}, got {how!r}")
    obstacle = _against_fusing(grad, reduce, exact)
    if how == "fused":
        if obstacle:
            raise ArgumentError(f"how='fused' is not possible here, {obstacle}: use how='auto'")
        return Plan("fused", "asked for")
    if how == "vmap" and exact:
        raise ArgumentError("how='vmap' has other bits at other widths: exact=True needs threads, loop or auto")
    if how != "auto":
        return Plan(how, "asked for")
    if parts == 1:
        return Plan("loop", "one part")
    if not obstacle and reduce.scale is not None:
        return Plan("fused", "sums over examples add up: the parts of a batch are one")
    if not obstacle:
        return Plan("fused", "the reducer is linear: one backward pass over the batch is the sum over its parts")
    if workers > 1:
        return Plan("threads", f"not fused: {obstacle}; {workers} workers; ft.tune measures whether another plan is faster")
    return Plan("loop", f"not fused: {obstacle}; one worker")


def _against_fusing(grad: Any, reduce: Reducer, exact: bool) -> str:
    if exact:
        return "exact=True asks for the bits of the tree"
    if not reduce.linear and reduce.scale is None:
        return "the reducer has to see the parts"
    if reduce.scale is None and not grad.reduce.linear:
        return "the gradient inside has a reducer that has to see its parts"
    if "carry" in grad.uses and not grad.lanes:
        return "the loss threads shared buffers, so it is not additive over parts"
    return ""


def costs(plan: Plan, parts: int, workers: int, reduce: Reducer, exact: bool) -> dict[str, str]:
    """What a plan costs, known before it runs: backward passes, memory for gradients, and what `exact` changes."""
    passes = "1" if plan.how == "fused" or parts == 1 else f"{parts}, one for each part"
    if plan.how == "vmap":
        passes = f"{parts}, in one or two vmapped calls"
    if reduce.scale is not None:
        passes += "; inside, examples are told apart by layer algebra or vmap"
    note = "and examples' gradients within the budget" if reduce.scale is not None else ""
    facts = {"backward passes": passes, "memory for gradients": times_params(_alive(plan, parts, workers, reduce), note)}
    if exact:
        facts["exact"] = "yes: the bits do not depend on workers"
    elif plan.how == "fused":
        facts["exact"] = f"no: equal up to rounding; exact=True would take {parts} backward passes, on one intra-op thread each"
    else:
        facts["exact"] = "no: equal up to rounding; exact=True would take each part on one intra-op thread"
    return facts


def _alive(plan: Plan, parts: int, workers: int, reduce: Reducer) -> int:
    """How many trees like params are alive at the worst moment."""
    if plan.how == "fused":
        return reduce.copies
    # A gathering reducer keeps the parts and stacks them once; others merge as soon as two subtrees are whole.
    merged = 2 * parts if reduce.gathers else reduce.copies * (tree.depth(parts) + 1)
    return merged + {"vmap": parts, "threads": workers + 1, "loop": 1}[plan.how]
