"""What measured layouts say for or against another one, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from functrain.core.explain import readable

# Gains that are worth a copy of the file: so many times as fast, or what it takes on disk by such a part less.
_FASTER, _SMALLER = 1.3, 0.2


class Figures(NamedTuple):
    """A layout, with what it takes and gives: bytes on disk for the whole dataset, bytes a second and rows a second.

    `options` are the arguments of `h5concat` for it, None for the layout at hand. Speeds are those of a warm page cache, in
    order and in random batches; None where nothing reads such rows.
    """

    layout: str
    options: dict[str, Any] | None
    stored: int
    in_order: float | None
    at_random: float | None
    in_order_h5py: float | None
    at_random_h5py: float | None


def sentence(figures: list[Figures], beside: int, chunked: bool, ragged: bool) -> str:
    """What to do, of a dataset whose samples lie in `beside` chunks; the layout at hand is the first."""
    now = figures[0]
    scattered = f"One sample lies in {beside} chunks, all of which are decoded for it. " if beside > 1 else ""
    if ragged:
        return f"{scattered}No other layout is measured of sequences of variable length."
    if now.at_random is None or now.in_order is None:
        return f"{scattered}No tensor holds such elements: they are not read for training."
    others = [each for each in figures[1:] if each.at_random is not None]
    if not others:
        return f"{scattered}It is small: keep it."
    best = _best(now, others)
    if best is None:
        small = min(others, key=lambda each: each.stored)
        spared = f" ({small.layout} would take {readable(small.stored)})" if _is_smaller(small, now) else ""
        return f"{scattered}Keep it: no other layout reads random rows much faster{spared}."
    text = f"{scattered}{_gain(best, now)}. Write the file so: h5concat(new, [path], {_arguments(best)})."
    instead = " Or leave it, and shuffle(seed, within=…) blocks of chunks, so that each is decoded once." if chunked else ""
    return text + instead


def _best(now: Figures, others: list[Figures]) -> Figures | None:
    """The layout that is worth a copy of the file: faster, or smaller and about as fast. None where there is none."""
    speed = now.at_random or 0.0
    fastest = max(each.at_random or 0.0 for each in others)
    if fastest < _FASTER * speed:
        choice = [each for each in others if _is_smaller(each, now) and (each.at_random or 0.0) * _FASTER >= speed]
    else:
        # Which one of those that are about as fast was the fastest is chance: what they take is not.
        choice = [each for each in others if (each.at_random or 0.0) >= max(fastest / _FASTER, _FASTER * speed)]
    return min(choice, key=lambda each: each.stored, default=None)


def _is_smaller(one: Figures, now: Figures) -> bool:
    return one.stored <= (1 - _SMALLER) * now.stored


def _gain(one: Figures, now: Figures) -> str:
    random, order = ((getattr(one, name) or 0.0) / (getattr(now, name) or 1.0) for name in ("at_random", "in_order"))
    return (
        f"{one.layout} would read random rows {_figure(random)} times as fast, rows in order {_figure(order)} times, "
        f"and take {readable(one.stored)} instead of {readable(now.stored)}"
    )


def _figure(value: float) -> str:
    """A measured number with the two figures that can be relied on."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"


def _arguments(one: Figures) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in (one.options or {}).items())


def table(figures: tuple[Figures, ...]) -> Iterator[str]:
    """The lines of a table, a layout each."""
    head = ("layout", "on disk", "MB/s in order", "random rows/s", "h5py: MB/s", "rows/s")
    rows = [
        (
            each.layout,
            readable(each.stored),
            *(
                "-" if speed is None else _figure(speed / scale)
                for speed, scale in (
                    (each.in_order, 1e6),
                    (each.at_random, 1),
                    (each.in_order_h5py, 1e6),
                    (each.at_random_h5py, 1),
                )
            ),
        )
        for each in figures
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        yield "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])


__all__ = ["Figures", "sentence", "table"]
