"""The errors functrain raises: one base class, each also the builtin that a caller would expect."""

from __future__ import annotations


class FunctrainError(Exception):
    """Base of every error that functrain raises on purpose.

    >>> issubclass(PositionError, FunctrainError) and issubclass(PositionError, IndexError)
    True
    """


class ArgumentError(FunctrainError, ValueError):
    """An argument has a value that the function is not defined for."""


class TreeError(ArgumentError):
    """Trees disagree in structure, shape or dtype where they have to agree."""


class LossError(ArgumentError):
    """A loss function breaks its contract (per-example losses, declared carry and key)."""


class PositionError(FunctrainError, IndexError):
    """A position lies outside its source."""


class DataError(FunctrainError, OSError):
    """A file or dataset is missing, damaged, or of a kind that cannot be read."""


class ConfigError(ArgumentError):
    """A configuration has an unknown key or a value of the wrong type."""


class RunError(FunctrainError):
    """A run directory or checkpoint cannot be used as asked."""


class NonFiniteError(FunctrainError, ArithmeticError):
    """A step of training gave NaN or infinities."""


class DonatedError(FunctrainError, RuntimeError):
    """A state was used after a donating step had taken over its buffers."""


class MissingExtraError(FunctrainError, ImportError):
    """An optional dependency is needed; the message names the extra that brings it."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        """The error for `package`, needed for `purpose` and brought by `functrain[extra]`."""
        return cls(f"{purpose} needs the package {package!r}: install it with: pip install 'functrain[{extra}]'")
