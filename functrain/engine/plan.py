"""Plans: the ways in which the parts of a batch can become one gradient, and the choice between them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from functrain.core.errors import ArgumentError

How = Literal["auto", "fused", "vmap", "threads", "loop"]


class Plan(NamedTuple):
    """A way to compute a gradient and the reason why it was taken."""

    how: str
    reason: str


def choose(grad: Any, how: str, parts: int, workers: int, linear: bool, exact: bool) -> Plan:
    """The plan for `parts` parts of a batch; by algebra alone, nothing is measured.

    A linear reducer commutes with the gradient, Σₖ ∇lossₖ = ∇ Σₖ lossₖ, so that one backward pass over the whole batch is the
    sum over its parts (`fused`), unless the loss threads shared buffers (then a part's loss depends on its mates),
    or `exact` asks for the bits of the tree.

    Raises `ArgumentError` for an unknown plan, or one that would give another result.
    """
    if how not in get_args(How):
        raise ArgumentError(f"how must be one of {', '.join(get_args(How))}, got {how!r}")
    obstacle = _against_fusing(grad, linear, exact)
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
    if not obstacle:
        return Plan("fused", "the reducer is linear: one backward pass over the batch is the sum over its parts")
    if workers > 1:
        return Plan("threads", f"not fused: {obstacle}; {workers} workers")
    return Plan("loop", f"not fused: {obstacle}; one worker")


def _against_fusing(grad: Any, linear: bool, exact: bool) -> str:
    if exact:
        return "exact=True asks for the bits of the tree"
    if not linear:
        return "the reducer has to see the parts"
    if not grad.reduce.linear:
        return "the gradient inside has a reducer that has to see its parts"
    if "carry" in grad.uses and not grad.lanes:
        return "the loss threads shared buffers, so it is not additive over parts"
    return ""
