"""Configs: strict about names and types, with errors that say where and what instead."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from functrain.core.errors import ConfigError
from functrain.runs.config import config_from_dict, config_from_flags, config_to_dict


class Mode(Enum):
    FAST = (1, "fast")
    EXACT = "exact"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Split(StrEnum):
    TRAIN = "train"
    TEST = "test"


@dataclass(frozen=True)
class Adam:
    """Adam, as in the paper."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Sgd:
    lr: float = 1e-2
    momentum: float = 0.0


@dataclass(frozen=True)
class Tall(Adam):
    height: int = 3


@dataclass
class Node:
    value: int
    child: Node | None = None


@dataclass
class Config:
    """Digits, learned."""

    epochs: int
    """How often all digits are seen."""
    rate: float = 0.1
    optimizer: Adam | Sgd = Adam()
    inner: Adam = field(default_factory=Adam)
    widths: tuple[int, ...] = (64, 32)
    mode: Mode = Mode.FAST
    level: Level = Level.LOW
    split: Split = Split.TRAIN
    how: Literal["fused", "vmap", 8] = "fused"
    exact: Literal[Mode.EXACT] = Mode.EXACT
    clip: float | None = None
    data: Path = Path("digits.h5")
    out: Path | None = None
    shuffle: bool = True
    names: list[str] = field(default_factory=list)
    pairs: Sequence[tuple[int, str]] = ()
    scales: dict[str, float] = field(default_factory=dict)
    counts: dict[Split, int] = field(default_factory=dict)
    steps: tuple[Adam | Sgd, ...] = ()
    node: Node | None = None
    limit: int | float | str | None = None
    noted: Annotated[int, "a note"] = 0
    extra: Any = None
    derived: int = field(default=7, init=False)


FULL = Config(
    epochs=3,
    rate=math.inf,
    optimizer=Sgd(0.5),
    inner=Adam(-math.inf, (0.5, 0.25)),
    widths=(),
    mode=Mode.EXACT,
    level=Level.HIGH,
    split=Split.TEST,
    how=8,
    clip=0.5,
    out=Path("/a/b"),
    shuffle=False,
    names=["a", "", "ü"],
    pairs=((1, "a"), (2, "b")),
    scales={"x": 1.0},
    counts={Split.TEST: 2},
    steps=(Adam(), Sgd()),
    node=Node(1, Node(2)),
    limit="7",
    extra={"a": [1, None]},
)


@pytest.mark.parametrize("config", [Config(epochs=1), FULL, Config(1, limit=7), Config(1, limit=7.5)])
def test_a_config_is_the_same_after_text_and_back(config: Config) -> None:
    text = json.dumps(config_to_dict(config), allow_nan=False)
    again = config_from_dict(Config, json.loads(text))
    assert again == config
    assert type(again.limit) is type(config.limit)
    assert config_to_dict(again) == json.loads(text)


def test_what_is_written_reads_well() -> None:
    written = config_to_dict(FULL)
    assert written["optimizer"] == {"class": "Sgd", "lr": 0.5, "momentum": 0.0}
    assert (written["mode"], written["level"], written["split"]) == ("EXACT", "HIGH", "TEST")
    assert (written["rate"], written["out"], written["counts"]) == ("inf", "/a/b", {"TEST": 2})
    assert "derived" not in written


WRONG = [
    ({"epochs": "3"}, r"Config: epochs: got '3' \(str\), expected int"),
    ({"epochs": True}, r"epochs: got True \(bool\), expected int"),
    ({"epochs": 3.0}, r"epochs: got 3.0 \(float\), expected int"),
    ({"epochs": None}, r"epochs: got None \(NoneType\), expected int"),
    ({"rate": "0.1"}, r"rate: got '0.1' \(str\), expected float"),
    ({"rate": True}, r"rate: got True \(bool\), expected float"),
    ({"rate": 10**400}, r"rate: .*too large"),
    ({"shuffle": 1}, r"shuffle: got 1 \(int\), expected bool"),
    ({"names": "abc"}, r"names: got 'abc' \(str\), expected list\[str\]"),
    ({"names": ["a", 1]}, r"names\[1\]: got 1 \(int\), expected str"),
    ({"widths": [1, "2"]}, r"widths\[1\]: got '2' \(str\), expected int"),
    ({"inner": {"betas": [0.9]}}, r"inner\.betas: got \[0.9\] \(list\), expected tuple\[float, float\]"),
    ({"inner": {"lr": "x"}}, r"inner\.lr: got 'x' \(str\), expected float"),
    ({"inner": 3}, r"inner: got 3 \(int\), expected Adam"),
    ({"mode": "SLOW"}, r"mode: got 'SLOW' \(str\), expected one of 'FAST', 'EXACT'"),
    ({"level": 1}, r"level: got 1 \(int\), expected one of 'LOW', 'HIGH'"),
    ({"split": "train"}, r"split: got 'train' \(str\), expected one of 'TRAIN', 'TEST'"),
    ({"how": "loop"}, r"how: got 'loop' \(str\), expected one of 'fused', 'vmap', 8"),
    ({"how": 8.0}, r"how: got 8.0 \(float\)"),
    ({"clip": "1"}, r"clip: got '1' \(str\), expected float or None"),
    ({"data": 3}, r"data: got 3 \(int\), expected Path"),
    ({"optimizer": {"lr": 1.0}}, r"optimizer: key 'class' is None, expected one of Adam, Sgd"),
    ({"optimizer": {"class": "Adam", "lr": "x"}}, r"optimizer\.lr: got 'x' \(str\), expected float"),
    ({"optimizer": 3}, r"optimizer: got 3 \(int\), expected Adam or Sgd"),
    ({"steps": [{"class": "Sgd"}, {"class": "Sdg"}]}, r"steps\[1\]: key 'class' is 'Sdg'"),
    ({"scales": {"a": "b"}}, r"scales\['a'\]: got 'b' \(str\), expected float"),
    ({"scales": []}, r"scales: got \[\] \(list\), expected dict\[str, float\]"),
    ({"counts": {"test": 1}}, r"counts\['test'\]: got 'test' \(str\), expected one of 'TRAIN', 'TEST'"),
    ({"node": {"value": 1, "child": {"value": "x"}}}, r"node\.child\.value: got 'x' \(str\), expected int"),
    ({"node": {}}, r"node: missing key 'value'"),
    ({"epoch": 3}, r"unknown key 'epoch' \(did you mean 'epochs'\?\); known: epochs, rate, optimizer, "),
    ({"inner": {"lrr": 3}}, r"inner: unknown key 'lrr' \(did you mean 'lr'\?\); known: lr, betas"),
    ({"derived": 3}, r"unknown key 'derived'"),
    ({"zzz": 3}, r"unknown key 'zzz'; known: epochs"),
]


@pytest.mark.parametrize(("data", "says"), WRONG, ids=[json.dumps(data)[:40] for data, _ in WRONG])
def test_what_does_not_fit_is_named_with_its_place(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_from_dict(Config, {"epochs": 1, **data})


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_dict(Config, {"epochs": "3", "shuffle": 0, "inner": {"lr": None}})
    assert len(str(caught.value).splitlines()) == 4
    with pytest.raises(ConfigError, match="missing key 'epochs', which has no default"):
        config_from_dict(Config, {})


@pytest.mark.parametrize("data", [None, 3, "epochs", [1]])
def test_data_that_is_no_dict_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="expected Config"):
        config_from_dict(Config, data)


def test_an_integer_is_a_float() -> None:
    config = config_from_dict(Config, {"epochs": 1, "rate": 3})
    assert type(config.rate) is float


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Config(epochs="3"), "epochs: got '3'"),  # type: ignore[arg-type]
        (Config(1, extra=object()), r"config\['extra'\] is object"),
        (Config(1, inner=Tall()), "a field of type Adam holds Tall"),
        (Config(1, inner=None), "a field of type Adam holds NoneType"),  # type: ignore[arg-type]
        ({"epochs": 3}, "expected a dataclass"),
        (Config, "expected a dataclass"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(config: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_to_dict(config)


def test_a_check_of_the_config_itself_is_passed_on() -> None:
    @dataclass
    class Checked:
        parts: int = 8

        def __post_init__(self) -> None:
            if self.parts < 1:
                raise ValueError(f"parts must be at least 1, got {self.parts}")

    with pytest.raises(ConfigError, match="parts must be at least 1, got 0"):
        config_from_dict(Checked, {"parts": 0})


def test_a_field_of_a_type_that_json_has_not() -> None:
    @dataclass
    class Odd:
        number: complex = 1j

    with pytest.raises(ConfigError, match="Odd"):
        config_to_dict(Odd())
    with pytest.raises(ConfigError, match="Odd"):
        config_from_dict(Odd, {"number": 3})


# --- flags --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flags:
    """Digits, learned."""

    epochs: int
    """How often all digits are seen."""
    rate: float = 0.1
    widths: tuple[int, ...] = (64, 32)
    mode: Mode = Mode.FAST
    how: Literal["fused", "vmap"] = "fused"
    clip: float | None = None
    data: Path = Path("digits.h5")
    shuffle: bool = True
    inner: Adam = field(default_factory=Adam)


def test_flags_make_the_config_and_the_config_makes_text() -> None:
    args = (
        "--epochs 3 --rate 1e-3 --widths 8 9 10 --mode EXACT --how vmap --clip 1 --data a/b.h5 --no-shuffle "
        "--inner.lr 0.5 --inner.betas 0.1 0.2"
    )
    config = config_from_flags(Flags, args.split(), prog="train")
    adam = Adam(0.5, (0.1, 0.2))
    assert config == Flags(3, 1e-3, (8, 9, 10), Mode.EXACT, "vmap", 1.0, Path("a/b.h5"), False, adam)
    assert config_from_dict(Flags, config_to_dict(config)) == config
    assert config_from_flags(Flags, ["--epochs", "1"], prog="train") == Flags(1)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--epochs", "three"], "int"),
        (["--epochs", "3", "--ratee", "1"], "--rate"),
        ([], "--epochs"),
        (["--epochs", "3", "--how", "loop"], "fused"),
    ],
)
def test_wrong_flags_end_as_a_command_does(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        config_from_flags(Flags, args, prog="functrain train digits.py")
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert says in printed.out + printed.err


def test_the_help_shows_docstrings_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        config_from_flags(Flags, ["--help"], prog="functrain train digits.py")
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    for text in ("functrain train digits.py", "Digits, learned.", "How often all digits are seen."):
        assert text in printed
    assert "--inner.lr" in printed
