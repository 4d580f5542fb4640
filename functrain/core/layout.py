"""Flattening and unflattening trees of one known structure, by code written for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functrain.core import tree
from functrain.core.tree import Tree


class Layout:
    """The structure of a tree: `leaves(other)` of another such tree, and `built(leaves)`, as `tree.flatten` and back.

    One that knows the keys walks through a step's state six times faster than a general function (of 20 leaves, 6 µs for
    37), which matters to steps of 300 µs. `leaves` gives None for a tree of another structure, or order of keys. Trees with
    containers other than lists, tuples, named tuples and dicts of text, or nested too deeply, go the general way (`written`
    is False).

    >>> layout = Layout({"b": [1, 2], "a": None})
    >>> layout.leaves({"b": [3, 4], "a": None}), layout.leaves({"b": [3]}), layout.built([5, 6])
    ([3, 4], None, {'b': [5, 6], 'a': None})
    """

    def __init__(self, like: Tree) -> None:
        self.spec = tree.structure(like)
        self.leaves: Callable[[Tree], list[Any] | None] = self._leaves
        self.built: Callable[[list[Any]], Tree] = self._built
        self.written = False
        try:
            self._write(like)
        except (_OtherContainerError, RecursionError, MemoryError, SyntaxError):
            # The last two are Python's, for code of many brackets.
            return

    def _write(self, like: Tree) -> None:
        code = _Code()
        place = code.node(like, "t")
        names = ", ".join(f"l{number}" for number in range(code.count))
        unpacked = f"    [{names}] = leaves\n" if names else ""
        taken = f"def leaves(t):\n{''.join(code.checks)}    return [{names}]\n"
        space: dict[str, Any] = dict(code.constants)
        # Keys and types come in as constants: no text of a tree becomes code.
        exec(f"{taken}\ndef built(leaves):\n{unpacked}    return {place}\n", space)
        self.leaves, self.built, self.written = space["leaves"], space["built"], True

    def _leaves(self, other: Tree) -> list[Any] | None:
        flat, spec = tree.flatten(other)
        return flat if spec == self.spec else None

    def _built(self, leaves: list[Any]) -> Tree:
        return tree.unflatten(self.spec, leaves)


class _OtherContainerError(Exception):
    pass


class _Code:
    """The lines that check a structure and take its leaves out, in optree's order."""

    def __init__(self) -> None:
        self.checks: list[str] = []
        self.constants: dict[str, Any] = {}
        self.count = 0
        self.nodes = 0

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def node(self, value: Tree, path: str) -> str:
        """Write the checks of what lies at `path`; the expression that builds it again."""
        kind = type(value)
        if value is None:
            self.checks.append(f"    if {path} is not None: return None\n")
            return "None"
        if kind in (dict, list, tuple):
            self._check(path, f"type(n) is not {kind.__name__} or len(n) != {len(value)}")
        elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
            self._check(path, f"type(n) is not {self.constant(kind)}")
        elif tree.structure(value) == _LEAF:
            # What is a container elsewhere is no leaf here.
            self.checks.append(f"    l{self.count} = {path}\n")
            self.count += 1
            return f"l{self.count - 1}"
        else:
            raise _OtherContainerError
        return self._children(value, kind)

    def _check(self, path: str, wrong: str) -> None:
        self.nodes += 1
        self.checks.append(f"    n = n{self.nodes} = {path}\n    if {wrong}: return None\n")

    def _children(self, value: Tree, kind: type[Any]) -> str:
        mine = f"n{self.nodes}"
        if kind is dict:
            # True, 1 and 1.0 are one key.
            if any(type(key) is not str for key in value):
                raise _OtherContainerError
            names = {key: self.constant(key) for key in value}
            # In another order it is another tree, to a loss that goes through its values; though not to optree.
            self.checks.append(f"    if tuple({mine}) != {self.constant(tuple(value))}: return None\n")
            built = {key: self.node(value[key], f"{mine}[{names[key]}]") for key in sorted(value)}
            return "{" + ", ".join(f"{names[key]}: {built[key]}" for key in value) + "}"
        built_items = [self.node(one, f"{mine}[{place}]") for place, one in enumerate(value)]
        if kind is list:
            return "[" + ", ".join(built_items) + "]"
        if kind is tuple:
            return "(" + "".join(f"{item}, " for item in built_items) + ")"
        return f"{self.constant(kind)}({', '.join(built_items)})"


_LEAF = tree.structure(0)


class Memo:
    """Flattening that remembers the structures it met: `flatten(value)` gives the leaves and their `Layout`.

    >>> import torch
    >>> memo = Memo()
    >>> leaves, layout = memo.flatten({"x": torch.ones(1)})
    >>> memo.flatten({"x": torch.zeros(1)})[1] is layout
    True
    """

    def __init__(self) -> None:
        self._latest: Layout | None = None
        self._known: dict[Any, Layout] = {}

    def flatten(self, value: Tree) -> tuple[list[Any], Layout]:
        """The leaves, in `tree.flatten`'s order, and the layout that builds such a tree of others."""
        latest = self._latest
        if latest is not None:
            leaves = latest.leaves(value)
            # What is no tensor might be a container where a leaf was before.
            if leaves is not None and all(isinstance(leaf, Tensor) for leaf in leaves):
                return leaves, latest
        leaves, spec = tree.flatten(value)
        kind = spec, order(value)
        layout = self._known.get(kind)
        if layout is None:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            layout = self._known[kind] = Layout(value)
        # One that goes the general way knows no order of keys.
        self._latest = layout if layout.written else None
        return leaves, layout


_REMEMBERED = 64


def order(value: Tree) -> tuple[Any, ...]:
    """The keys of all dicts in a tree, in the order they have there, with their types: what optree takes for equal."""
    if isinstance(value, dict):
        return tuple((type(key), key, order(one)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(order, value))
    return ()
