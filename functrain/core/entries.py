"""Entries of a tree by dotted name: what of params a gradient is of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import optree

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.layout import Memo
from functrain.core.tree import Tree

Names = str | tuple[str, ...]


class Entry(NamedTuple):
    """What an entry of a tree (or several of them, or all of it) is made of.

    - `leaves`: its leaves, in order;
    - `spec`: its structure; that of a dict by name for several entries;
    - `whole(leaves)`: the tree with other leaves in this place, in containers of its own.
    """

    leaves: list[Any]
    spec: Any
    whole: Callable[[Sequence[Any]], Tree]

    @property
    def value(self) -> Tree:
        """The entry by itself."""
        return tree.unflatten(self.spec, self.leaves)


def entry(params: Tree, of: Names | None = None, memo: Memo | None = None) -> Entry:
    """The entry of `params` that has the name `of`: a key of the dict, or a dotted path in it; None: all of `params`.

    A tuple of names is a dict of these entries. Raises `TreeError` for a name that is none, listing those there are, and for
    entries that have leaves in common. `memo` spares a walk over params of a structure that it knows.

    >>> params = {"net": {"w": 1, "b": 2}, "scale": 3}
    >>> entry(params, "net").value, entry(params, "net.w").value, entry(params, ("scale", "net.b")).value
    ({'w': 1, 'b': 2}, 1, {'net.b': 2, 'scale': 3})
    >>> entry(params, "net").whole([20, 10])
    {'net': {'w': 10, 'b': 20}, 'scale': 3}
    """
    if of is None:
        leaves, layout = (memo or Memo()).flatten(params)
        return Entry(leaves, layout.spec, lambda others: layout.built(list(others)))
    flat, spec = tree.flatten(params)
    places, inner = _located(spec, of)

    def whole(leaves: Sequence[Any]) -> Tree:
        filled = list(flat)
        for place, leaf in zip(places, leaves, strict=True):
            filled[place] = leaf
        return tree.unflatten(spec, filled)

    return Entry([flat[place] for place in places], inner, whole)


def check_names(of: Any) -> None:
    """Raise `ArgumentError` unless `of` is a name, a tuple of names, or None for everything."""
    names = of if isinstance(of, tuple) else (of,)
    if of is not None and not (names and all(isinstance(name, str) and name for name in names)):
        raise ArgumentError(f"of names an entry of the params, 'generator' or ('generator', 'encoder.out'), got {of!r}")
    if len(set(names)) < len(names):
        raise ArgumentError(f"of names an entry twice: {of!r}")


# A structure is hashable, and the same in every step: looked up, a step need not walk its params by name.
@lru_cache(maxsize=256)
def _located(spec: Any, of: Names) -> tuple[tuple[int, ...], Any]:
    """At which of a structure's leaves an entry lies, and its own structure."""
    nodes = _nodes(spec)
    names = of if isinstance(of, tuple) else (of,)
    for name in names:
        if name not in nodes:
            raise TreeError(f"the params have no entry {name!r}: {_known(list(nodes))}")
        if len(nodes[name]) > 1:
            raise TreeError(f"two entries of the params have the name {name!r}: rename a key that holds '.'")
    # In sorted order, as optree flattens a dict.
    found = {name: nodes[name][0] for name in sorted(names)}
    places = tuple(place for where, _ in found.values() for place in where)
    if len(set(places)) < len(places):
        raise TreeError(f"the entries {', '.join(tree.quoted(names))} have leaves in common: name each once")
    if isinstance(of, str):
        return places, found[of][1]
    return places, optree.treespec_dict({name: inner for name, (_, inner) in found.items()})


Node = tuple[range, Any]


def _nodes(spec: Any) -> dict[str, list[Node]]:
    """Where each node below the root lies that has leaves, with its structure, by dotted name; outer nodes first."""
    accessors = spec.accessors()
    nodes: dict[str, list[Node]] = {}
    level = [(spec, 0, "")]
    for depth in range(max(map(len, accessors), default=0)):
        above, level = level, []
        for outer, start, prefix in above:
            for child in outer.children():
                if child.num_leaves:
                    name = prefix + tree.entry_name(accessors[start][depth])
                    nodes.setdefault(name, []).append((range(start, start + child.num_leaves), child))
                    level.append((child, start, name + "."))
                    start += child.num_leaves
    return nodes


def _known(names: list[str], most: int = 12) -> str:
    if not names:
        return "they are a single tensor; give them names, {'generator': …}"
    more = f" … ({len(names)} in all)" if len(names) > most else ""
    return f"expected one of {', '.join(tree.quoted(names[:most]))}{more}"
