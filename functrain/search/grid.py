"""Grids: an algebra of configs, with products, unions and grids inside grids."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, overload

from functrain.core.errors import ArgumentError
from functrain.core.tree import quoted
from functrain.search.canonical import canonical, normalised

Config = dict[str, Any]


class Grid:
    """Configs (dicts of names and JSON values) in declaration order, without duplicates; it never changes.

    - `a * b`: every config of a with every one of b, b's varying fastest: sizes multiply.
      Raises `ArgumentError` for a name that both have.
    - `a | b`: a's configs, then those of b that are new: sizes of disjoint grids add.
    - `len(g)`, iteration, `g[2]`, `g[1:3]` (a grid), `config in g`, `==`.

    Two configs are the same when their JSON text is, whatever the order of keys: 1, 1.0 and True differ.
    What comes out is a copy.

    >>> (Grid([{"lr": 0.1}, {"lr": 0.2}]) * Grid([{"width": 32}]))[1]
    {'lr': 0.2, 'width': 32}
    """

    __slots__ = ("_configs",)

    def __init__(self, configs: Iterable[Mapping[str, Any]] = ()) -> None:
        if isinstance(configs, (str, bytes, Mapping)) or not isinstance(configs, Iterable):
            raise ArgumentError(f"a grid is made of configs (dicts of names and values), got {configs!r}")
        self._configs: dict[str, Config] = {}
        for config in configs:
            self._configs.setdefault(canonical(config), normalised(config))

    @property
    def names(self) -> list[str]:
        """All names that a config has, in declaration order."""
        return list(dict.fromkeys(name for config in self._configs.values() for name in config))

    def __mul__(self, other: Grid) -> Grid:
        if not isinstance(other, Grid):
            return NotImplemented
        both = [name for name in self.names if name in other.names]
        if both:
            raise ArgumentError(
                f"both grids of a product have {', '.join(quoted(both))}: give a name to one of them, or unite the grids with |"
            )
        return Grid({**left, **right} for left, right in itertools.product(self, other))

    def __or__(self, other: Grid) -> Grid:
        return Grid(itertools.chain(self, other)) if isinstance(other, Grid) else NotImplemented

    def __len__(self) -> int:
        return len(self._configs)

    def __iter__(self) -> Iterator[Config]:
        return (copy.deepcopy(config) for config in self._configs.values())

    @overload
    def __getitem__(self, place: int) -> Config: ...
    @overload
    def __getitem__(self, place: slice) -> Grid: ...
    def __getitem__(self, place: int | slice) -> Config | Grid:
        configs = list(self._configs.values())
        return Grid(configs[place]) if isinstance(place, slice) else copy.deepcopy(configs[place])

    def __contains__(self, config: object) -> bool:
        try:
            return isinstance(config, Mapping) and canonical(config) in self._configs
        except ArgumentError:
            return False

    def __eq__(self, other: object) -> bool:
        return list(self._configs) == list(other._configs) if isinstance(other, Grid) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._configs))

    def __repr__(self) -> str:
        return f"<Grid: {len(self)} configs of {', '.join(self.names) or 'no names'}>"


def grid(**values: Any) -> Grid:
    """The product of alternatives: `grid(lr=[1e-3, 1e-2], width=[32, 64])` is four configs.

    The last name varies fastest.

    - a list, tuple, range or array holds alternatives; text, None and any other bare value is one value;
    - an alternative that is itself a grid stands for its configs, as nested dicts.

    Raises `ArgumentError` for a name without values, and, naming it, for a value that JSON cannot hold.

    >>> list(grid(lr=[0.1, 0.2], loss="hinge"))
    [{'lr': 0.1, 'loss': 'hinge'}, {'lr': 0.2, 'loss': 'hinge'}]
    >>> list(grid(optimizer=[grid(name="sgd", momentum=[0, 0.9]), grid(name="adam")]))[1:]
    [{'optimizer': {'name': 'sgd', 'momentum': 0.9}}, {'optimizer': {'name': 'adam'}}]
    """
    axes = [_alternatives(name, given) for name, given in values.items()]
    return Grid(dict(zip(values, chosen)) for chosen in itertools.product(*axes))


def _alternatives(name: str, given: Any) -> list[Any]:
    listed = isinstance(given, (list, tuple, range)) or getattr(given, "ndim", 0) > 0
    values: list[Any] = []
    for value in given if listed else [given]:
        values += list(value) if isinstance(value, Grid) else [normalised(value, name)]
    if not values:
        raise ArgumentError(f"{name} has no values: expected at least one, or leave the name out")
    return values


def nested(spec: Iterable[Any]) -> Grid:
    """A grid from nested lists, as junky's `make_model_fit_params` takes them.

    - a pair `(name, values)` holds alternatives as in `grid`; pairs at one level multiply, the last
      varying fastest;
    - a list of such items is a level of its own; each list at a level gives one block: the level's pairs
      times that list.

    Raises `ArgumentError` for a name used twice at one level or again below it, and for an item of
    another kind.

    Source: junky's autotrain, https://github.com/fostroll/junky.

    >>> list(nested([("a", [50, 100]), [("b", 0.1)], [("b", None), ("c", ["X", "Y"])]]))[2:4]
    [{'a': 50, 'b': None, 'c': 'X'}, {'a': 50, 'b': None, 'c': 'Y'}]
    """
    if isinstance(spec, (str, bytes, Mapping)) or not isinstance(spec, Iterable):
        raise ArgumentError(f"nested takes a list of pairs (name, values) and lists of them, got {spec!r}")
    product, blocks = Grid([{}]), []
    for item in spec:
        if not isinstance(item, (list, tuple)):
            raise ArgumentError(f"nested takes pairs (name, values) and lists of them, got {item!r}")
        if item and isinstance(item[0], str):
            if len(item) != 2:
                raise ArgumentError(f"expected a pair (name, values), got {item!r}: put several values into a list")
            product = product * grid(**{item[0]: item[1]})
        else:
            blocks.append(nested(item))
    united = Grid()
    for block in blocks:
        united = united | product * block
    return united if blocks else product
