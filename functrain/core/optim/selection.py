"""Which leaves of params are meant: their dotted paths, matched by globs, or by a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from functrain.core import tree
from functrain.core.errors import ArgumentError, TreeError
from functrain.core.explain import explain
from functrain.core.tree import Tree

Where = str | Sequence[str] | Callable[[str], Any]
"""A glob (`"*.bias"`), several, or a function of the path that is true where it matches."""
Labels = Mapping[str, str] | Callable[[str], str] | Tree
"""A label for each leaf: by the first glob that matches its path, as a function of the path, or as a tree like params."""
Groups = dict[str, dict[str, int]]
"""For every label the leaves that have it: their paths, and their places in flattening order."""
Labelling = Callable[[list[str], Any], list[str]]
"""`labelling(paths, spec) -> labels` of all leaves."""


def grouping(labels: Sequence[str], labelling: Labelling) -> Callable[[Any], Groups]:
    """The groups of a tree by its structure; a structure seen lately is not labelled again."""

    @lru_cache(maxsize=8)
    def groups(spec: Any) -> Groups:
        found: Groups = {label: {} for label in labels}
        paths = _paths(spec)
        for place, (path, label) in enumerate(zip(paths, labelling(paths, spec))):
            found[label][path] = place
        return found

    return groups


def _paths(spec: Any) -> list[str]:
    return tree.paths(_like(spec))


def _like(spec: Any) -> Tree:
    return tree.unflatten(spec, range(spec.num_leaves))


# --- two groups: what `where` selects, and the others --------------------------------------------------------------


def selecting(owner: str, where: Where, selected: str, others: str) -> Labelling:
    """The label `selected` for paths that `where` matches, `others` for the rest.

    `ArgumentError` for what is no selection; `TreeError`, once there are paths, for a glob or function that matches none.
    """
    globs = () if callable(where) else _globs(owner, where)
    matches = where if callable(where) else _any_of(globs)

    def labelling(paths: list[str], spec: Any) -> list[str]:
        for glob in globs:
            if not any(fnmatchcase(path, glob) for path in paths):
                raise TreeError(f"{owner}: {glob!r} matches no path of params; they are {_some(paths)}")
        chosen = [bool(matches(path)) for path in paths]
        if not any(chosen):
            raise TreeError(f"{owner}: {told(where)} selects no path of params; they are {_some(paths)}")
        return [selected if one else others for one in chosen]

    return labelling


def _globs(owner: str, where: Any) -> tuple[str, ...]:
    globs = (where,) if isinstance(where, str) else tuple(where) if isinstance(where, list | tuple | set | frozenset) else ()
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise ArgumentError(
            f"{owner}: where is a glob ('*.bias'), several, or a function of the dotted path; got {where!r}"
        )
    return globs


def _any_of(globs: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda path: any(fnmatchcase(path, glob) for glob in globs)


def told(selection: Any) -> Any:
    """A selection for `explain`: a function by its name."""
    return explain(selection).title if callable(selection) else selection


# --- any number of groups ------------------------------------------------------------------------------------------


def labelling_of(owner: str, labels: Any, known: Sequence[str]) -> Labelling:
    """Every leaf's label, each one of `known`.

    `TreeError` names the paths without a label, labels that are not known or get no leaf, and patterns that match nothing or
    nothing that is left to them.
    """
    if callable(labels):
        rule: Labelling = lambda paths, spec: [labels(path) for path in paths]  # noqa: E731
    elif isinstance(labels, Mapping) and all(isinstance(label, str) for label in labels.values()):
        if not labels:
            raise ArgumentError(f"{owner}: labels is empty: expected {{glob: label}}, a function of the path, or a tree")
        rule = _by_globs(owner, dict(labels))
    else:
        rule = lambda paths, spec: tree.leaves_like(spec, labels, _like(spec))  # noqa: E731

    def labelling(paths: list[str], spec: Any) -> list[str]:
        found = rule(paths, spec)
        unknown = [f"{label!r} of {path!r}" for path, label in zip(paths, found) if not _among(label, known)]
        if unknown:
            raise TreeError(f"{owner}: no optimizer for the label {', '.join(unknown[:5])}; labels are {_some(known)}")
        unused = [label for label in known if label not in found]
        if unused:
            raise TreeError(f"{owner}: no path of params has the label {_some(unused)}; paths are {_some(paths)}")
        return found

    return labelling


def _among(label: Any, known: Sequence[str]) -> bool:
    return isinstance(label, str) and label in known


def _by_globs(owner: str, labels: dict[str, str]) -> Labelling:
    def rule(paths: list[str], spec: Any) -> list[str]:
        first = {path: next((glob for glob in labels if fnmatchcase(path, glob)), None) for path in paths}
        missed = [path for path, glob in first.items() if glob is None]
        if missed:
            raise TreeError(f"{owner}: no pattern matches {_some(missed)}; end with '*' for all the others")
        for glob in labels:
            if glob not in first.values():
                matched = any(fnmatchcase(path, glob) for path in paths)
                why = "only paths that patterns before it have taken" if matched else "no path of params"
                raise TreeError(f"{owner}: {glob!r} matches {why}; paths are {_some(paths)}")
        return [labels[glob] for glob in first.values() if glob is not None]

    return rule


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(tree.quoted(names[:8]))}{' …' if len(names) > 8 else ''}" or "none"
