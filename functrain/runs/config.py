"""Configs: typed dataclasses to JSON and back without loss, and to command-line flags."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from functrain.core.errors import ArgumentError, ConfigError, MissingExtraError
from functrain.runs.store import jsonable

Config = TypeVar("Config")

# The key that says which dataclass of a union a value is: a keyword, so no field has this name.
_TAG = "class"
_LISTS: dict[Any, Callable[..., Any]] = {list: list, tuple: tuple, Sequence: tuple}
_MAPPINGS = (dict, Mapping)


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config as JSON has it: dicts, lists, text, numbers, booleans and None.

    Enums are written by name, paths as text, what is not finite as "inf", "-inf", "nan"; where a field may be
    one of several dataclasses, the key "class" says which. `config_from_dict` gives the same config back.
    Raises `ConfigError` for a value that is not of its declared type, or that JSON cannot hold.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Digits:
    ...     lr: float = 1e-3
    ...     widths: tuple[int, ...] = (64, 32)
    ...     data: Path = Path("digits.h5")
    >>> config_to_dict(Digits(lr=0.1))
    {'lr': 0.1, 'widths': [64, 32], 'data': 'digits.h5'}
    """
    _check_dataclass(type(config))
    try:
        plain = jsonable(_converter().unstructure(config), "config")
    except (ArgumentError, NameError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{type(config).__name__} cannot be written: {error}") from error
    # A file that could not be read back would be found out only when the run is to be resumed.
    config_from_dict(type(config), plain)
    return plain


def config_from_dict(cls: type[Config], data: Mapping[str, Any]) -> Config:
    """The config of the dataclass `cls` that `data` describes; keys that are left out take their defaults.

    Types are strict: "3", True and 3.0 are no int; 3 is a float. Raises `ConfigError` that lists unknown keys
    (with the closest known one), missing keys and values of a wrong type, each with its path.

    >>> @dataclasses.dataclass
    ... class Digits:
    ...     lr: float = 1e-3
    ...     epochs: int = 10
    >>> config_from_dict(Digits, {"epochs": 3})
    Digits(lr=0.001, epochs=3)
    >>> config_from_dict(Digits, {"epoch": 3})
    Traceback (most recent call last):
    functrain.core.errors.ConfigError: Digits: unknown key 'epoch' (did you mean 'epochs'?); known: lr, epochs
    """
    from cattrs.errors import StructureHandlerNotFoundError

    _check_dataclass(cls)
    try:
        return _converter().structure(data, cls)
    except (StructureHandlerNotFoundError, NameError) as error:
        raise ConfigError(f"{cls.__name__} has a field of a type that no config can have: {error}") from error
    except Exception as error:
        found = [f"{path.lstrip('.')}: {text}" if path else text for path, text in _problems(error)]
        separator = " " if len(found) == 1 else "\n  "
        raise ConfigError(f"{cls.__name__}:{separator}{separator.join(found)}") from error


def config_from_flags(cls: type[Config], args: Sequence[str], prog: str) -> Config:
    """The config of the dataclass `cls` that command-line `args` describe: a flag a field, with its help.

    Wrong flags (or `--help`) print what is wrong (or the help) and raise `SystemExit` with code 2 (or 0).

    >>> @dataclasses.dataclass
    ... class Digits:
    ...     rate: float = 1e-3
    ...     widths: tuple[int, ...] = (64, 32)
    >>> config_from_flags(Digits, ["--rate", "0.1", "--widths", "8", "8", "8"], prog="train")
    Digits(rate=0.1, widths=(8, 8, 8))
    """
    try:
        import tyro
    except ImportError as error:
        raise MissingExtraError.of("tyro", "cli", "reading a config from flags") from error
    _check_dataclass(cls)
    return tyro.cli(cls, args=list(args), prog=prog)


def _is_dataclass(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _check_dataclass(cls: Any) -> None:
    if not _is_dataclass(cls):
        name = getattr(cls, "__name__", repr(cls))
        raise ConfigError(f"{name} is no config: expected a dataclass with typed fields")


# --- what does not fit, and where ---------------------------------------------------------------------------


class _MisfitError(Exception):
    """Values that do not fit their type, as its arguments: where (`.field`, `[place]`), and why."""


def _problems(error: BaseException, path: str = "") -> list[tuple[str, str]]:
    from cattrs.errors import ClassValidationError, IterableValidationError

    if isinstance(error, _MisfitError):
        return [(path + inner, text) for inner, text in error.args]
    if isinstance(error, (ClassValidationError, IterableValidationError)):
        noted, others = error.group_exceptions()
        found = [item for inner in others for item in _problems(inner, path)]
        for inner, note in noted:
            step = f".{note.name}" if hasattr(note, "name") else f"[{note.index!r}]"
            found += _problems(inner, path + step)
        return found
    return [(path, f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")]


def _wrong(value: Any, expected: Any) -> _MisfitError:
    return _MisfitError(("", f"got {value!r} ({type(value).__name__}), expected {_says(expected)}"))


def _says(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(_plain(choice)) for choice in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(repr(name) for name in kind.__members__)
    if _is_union(kind):
        return " or ".join(_says(member) for member in get_args(kind))
    plain = isinstance(kind, type) and not get_args(kind)
    return kind.__name__ if plain else str(kind).replace("typing.", "")


# --- one hook for each kind of type -------------------------------------------------------------------------


@functools.cache
def _converter() -> Any:
    try:
        from cattrs import Converter
    except ImportError as error:
        raise MissingExtraError.of("cattrs", "cli", "reading and writing a config") from error
    converter = Converter()
    # By class, and so for subclasses too: an IntEnum comes to the hook of int first.
    for kind in (bool, int, float, str, Enum, PurePath, Path):
        converter.register_structure_hook(kind, _read_scalar)
        converter.register_unstructure_hook(kind, _plain)
    fields_hook = functools.cache(converter.gen_structure_attrs_fromdict)
    for fits, read in (
        (_is_dataclass, functools.partial(_read_dataclass, fields_hook)),
        (_is_union, functools.partial(_read_union, converter)),
        (lambda kind: _bare(kind) is Literal, _read_literal),
        (lambda kind: _bare(kind) in _LISTS, functools.partial(_read_list, converter)),
        (lambda kind: _bare(kind) in _MAPPINGS, functools.partial(_read_mapping, converter)),
    ):
        converter.register_structure_hook_func(fits, read)
    for fits, write in ((_is_dataclass, _write_dataclass), (_is_tagged, _write_tagged)):
        converter.register_unstructure_hook_factory(fits, functools.partial(write, converter))
    converter.register_unstructure_hook_func(lambda kind: _bare(kind) is Literal, _plain)
    return converter


def _bare(kind: Any) -> Any:
    return get_origin(kind) or kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _is_tagged(kind: Any) -> bool:
    return _is_union(kind) and sum(_is_dataclass(member) for member in get_args(kind)) > 1


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else str(value) if isinstance(value, PurePath) else value


def _read_scalar(value: Any, kind: Any) -> Any:
    if issubclass(kind, Enum):
        if isinstance(value, str) and value in kind.__members__:
            return kind[value]
    elif issubclass(kind, PurePath):
        if isinstance(value, str):
            return kind(value)
    elif kind is float and (type(value) is int or value in ("nan", "inf", "-inf")):
        return float(value)
    elif type(value) is kind:
        return value
    raise _wrong(value, kind)


def _read_literal(value: Any, kind: Any) -> Any:
    for choice in get_args(kind):
        if type(_plain(choice)) is type(value) and _plain(choice) == value:
            return choice
    raise _wrong(value, kind)


def _read_dataclass(hook: Callable[[Any], Any], value: Any, cls: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _wrong(value, cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    found = []
    for key in value:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            found.append(("", f"unknown key {key!r}{hint}; known: {', '.join(fields)}"))
    for key, field in fields.items():
        if key not in value and field.default is field.default_factory is dataclasses.MISSING:
            found.append(("", f"missing key {key!r}, which has no default"))
    if found:
        raise _MisfitError(*found)
    return hook(cls)(value, cls)


def _read_union(converter: Any, value: Any, kind: Any) -> Any:
    members = get_args(kind)
    if type(value) in members:
        return value
    tagged = {member.__name__: member for member in members if _is_tagged(kind) and _is_dataclass(member)}
    if tagged and isinstance(value, Mapping):
        name = value.get(_TAG)
        if name not in tagged:
            raise _MisfitError(("", f"key {_TAG!r} is {name!r}, expected one of {', '.join(tagged)}"))
        return converter.structure({key: item for key, item in value.items() if key != _TAG}, tagged[name])
    others = [member for member in members if member is not type(None) and member not in tagged.values()]
    for member in others:
        try:
            return converter.structure(value, member)
        except Exception:
            if len(others) == 1 and not tagged and isinstance(value, (Mapping, list, tuple)):
                raise  # which part of it is wrong, not only that it is
    raise _wrong(value, kind)


def _each(converter: Any, values: Iterable[tuple[Any, Any, Any]]) -> list[Any]:
    read, found = [], []
    for place, value, kind in values:
        try:
            read.append(converter.structure(value, kind))
        except Exception as error:
            found += _problems(error, f"[{place!r}]")
    if found:
        raise _MisfitError(*found)
    return read


def _read_list(converter: Any, value: Any, kind: Any) -> Any:
    origin, args = _bare(kind), get_args(kind) or (Any,)
    fixed = origin is tuple and get_args(kind) and args[-1] is not Ellipsis
    if not isinstance(value, (list, tuple)) or (fixed and len(value) != len(args)):
        raise _wrong(value, kind)
    kinds = args if fixed else args[:1] * len(value)
    return _LISTS[origin](_each(converter, zip(range(len(value)), value, kinds)))


def _read_mapping(converter: Any, value: Any, kind: Any) -> Any:
    keys, items = get_args(kind) or (Any, Any)
    if not isinstance(value, Mapping):
        raise _wrong(value, kind)
    names = _each(converter, ((key, key, keys) for key in value))
    return dict(zip(names, _each(converter, ((key, item, items) for key, item in value.items()))))


def _write_dataclass(converter: Any, cls: Any) -> Callable[[Any], Any]:
    inner = converter.gen_unstructure_attrs_fromdict(cls)

    def write(value: Any) -> Any:
        if type(value) is not cls:  # a subclass would lose its own fields without a word
            raise ConfigError(f"a field of type {cls.__name__} holds {type(value).__name__}: {value!r}")
        return inner(value)

    return write


def _write_tagged(converter: Any, kind: Any) -> Callable[[Any], Any]:
    def write(value: Any) -> Any:
        plain = converter.unstructure(value)
        return {_TAG: type(value).__name__, **plain} if _is_dataclass(type(value)) else plain

    return write
