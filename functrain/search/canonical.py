"""A config in its one canonical form: JSON values, and the key that names it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from functrain.core.errors import ArgumentError


def normalised(value: Any, name: str = "") -> Any:
    """`value` as JSON has it: what a trial is given is what a journal keeps, and reads again.

    Scalars of NumPy and torch become numbers, arrays, tuples and ranges lists, paths text.
    Raises `ArgumentError`, naming the place, for anything else that JSON cannot hold, nan and ±inf included.

    >>> normalised({"hidden": (64, 32), "data": PurePath("digits.h5")})
    {'hidden': [64, 32], 'data': 'digits.h5'}
    """
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {_text(key, name): normalised(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [normalised(item, f"{name}[{place}]") for place, item in enumerate(value)]
    plain = value.tolist() if hasattr(value, "ndim") and hasattr(value, "tolist") else value
    # A long double gives itself back.
    if type(plain) is not type(value):
        return normalised(plain, name)
    raise ArgumentError(
        f"{name or 'the config'} is {value!r} ({type(value).__name__}), which a config cannot hold: "
        "expected None, a bool, a finite number, text, a path, or lists and dicts of them"
    )


def _text(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise ArgumentError(f"{name or 'the config'} has the key {key!r} ({type(key).__name__}): expected text")
    return str(key)


def canonical(config: Mapping[str, Any]) -> str:
    """The config as JSON text, the same for every order of its keys; 1, 1.0 and True are different values.

    >>> canonical({"b": 1, "a": 1.0}), canonical({"a": 1.0, "b": True})
    ('{"a":1.0,"b":1}', '{"a":1.0,"b":true}')
    """
    if not isinstance(config, Mapping):
        raise ArgumentError(f"a config is a dict of names and values, got {type(config).__name__}")
    return json.dumps(normalised(config), sort_keys=True, separators=(",", ":"), allow_nan=False)


def config_key(config: Mapping[str, Any]) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the config's canonical text: its name in a journal.

    Raises `ArgumentError`, naming it, for a value that JSON cannot hold.

    >>> config_key({"lr": 0.1, "width": 32}) == config_key({"width": 32, "lr": 0.1})
    True
    >>> config_key({"lr": 1}) == config_key({"lr": 1.0})
    False
    """
    return hashlib.sha256(canonical(config).encode()).hexdigest()[:16]
