"""What a source says when it is used wrongly, and what it says it is."""

import math

import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError, PositionError, TreeError
from functrain.core.explain import explain
from functrain.data import Source, arrays

TEN = arrays(torch.arange(10))


@pytest.mark.parametrize("i", [-1, 10, 10**12])
def test_a_position_outside_names_the_length(i):
    with pytest.raises(PositionError, match="source of length 10: positions run from 0 to 9"):
        TEN(i)


def test_a_position_past_the_end_suggests_repeat_and_a_negative_one_does_not():
    with pytest.raises(PositionError, match=r"source\.repeat\(\)"):
        TEN(10)
    with pytest.raises(PositionError) as caught:
        TEN(-1)
    assert "repeat" not in str(caught.value)


def test_positions_are_any_kind_of_integer_and_nothing_else():
    assert int(TEN(np.int64(3))) == int(TEN(torch.tensor(3))) == 3
    with pytest.raises(TypeError):
        TEN(1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TEN.shuffle(), "shuffle needs a seed"),
        (lambda: TEN.shuffle(0.5), "seed must be an int, got 0.5"),
        (lambda: TEN.shuffle(True), "seed must be an int, got True"),
        (lambda: TEN.batch(0), "size must be at least 1, got 0"),
        (lambda: TEN.batch("3"), "size must be an int"),
        (lambda: TEN.batch(11, drop_last=True), "leaves no batch: 10 elements, batches of 11"),
        (lambda: TEN.map(3), "map takes a function"),
        (lambda: TEN.zip(), "at least one other"),
        (lambda: TEN.zip([1]), "zip takes sources, got list"),
        (lambda: TEN.zip(TEN, TEN.shard(0, 3)), "one length, got 10, 10, 4"),
        (lambda: TEN.zip(TEN.repeat()), "one length, got 10, endless"),
        (lambda: TEN.shard(3, 3), r"rank must lie in 0 … 2, got 3"),
        (lambda: TEN.shard(-1, 3), "rank must be at least 0"),
        (lambda: TEN.split(), "fractions above 0"),
        (lambda: TEN.split(0.6, 0.6), "sum to at most 1"),
        (lambda: TEN.split(-0.5, 0.5), "fractions above 0"),
        (lambda: TEN.split(math.nan), "fractions above 0"),
        (lambda: TEN.split(0.99), "leaves a part empty"),
        (lambda: TEN.shuffle(0).batch(2).split(0.5), "split first, then shuffle"),
        (lambda: TEN.repeat().split(0.5), "split needs a source with an end"),
        (lambda: TEN.repeat().shuffle(0), "shuffle needs a source with an end"),
        (lambda: TEN.repeat().repeat(), "repeat needs a source with an end"),
        (lambda: TEN.repeat(0), "epochs must be at least 1"),
        (lambda: TEN.shard(10, 11).repeat(), "without elements cannot be repeated"),
        (lambda: TEN.windows(11), "windows of 11 do not fit into a source of length 10"),
        (lambda: TEN.windows(0), "size must be at least 1, got 0"),
        (lambda: TEN.windows(2.0), "size must be an int, got 2.0"),
        (lambda: TEN.windows(2, stride=0), "stride must be at least 1, got 0"),
        (lambda: TEN.windows(2, stride=True), "stride must be an int, got True"),
        (lambda: TEN.repeat().windows(2), "windows needs a source with an end"),
        (lambda: TEN.shard(10, 11).windows(1), "do not fit into a source of length 0"),
        (lambda: TEN.shard(10, 11).repeat(3), "without elements cannot be repeated"),
        (lambda: TEN.shard(10, 11).shuffle(0).batch(2).repeat(), "without elements cannot be repeated"),
        (lambda: TEN.epoch(-1), "epoch must be at least 0"),
        (lambda: len(TEN.repeat()), "no len()"),
        (lambda: list(TEN.repeat()), "no len()"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ArgumentError) as caught:
        wrong()
    assert message in str(caught.value)


@pytest.mark.parametrize(("size", "stride", "rest"), [(3, None, 1), (3, 2, 1), (4, 6, 0), (10, 7, 0), (2, 5, 3), (1, 1, 0)])
def test_windows_say_what_is_left_over(size, stride, rest):
    windows = TEN.windows(size, stride)
    assert f"left over: {rest} time steps" in str(explain(windows))
    assert int(windows(len(windows) - 1)[-1]) == 9 - rest
    with pytest.raises(PositionError, match=f"source of length {len(windows)}"):
        windows(len(windows))


def test_windows_of_trees_and_of_ragged_elements():
    steps = arrays({"x": torch.arange(12.0).reshape(6, 2), "y": (torch.arange(6),)})
    window = steps.windows(3)(1)
    assert window["x"].tolist() == [[6.0, 7.0], [8.0, 9.0], [10.0, 11.0]]
    assert window["y"][0].tolist() == [3, 4, 5]
    assert int(window["y"][0].zero_().sum()) == 0
    assert steps.windows(3)(1)["y"][0].tolist() == [3, 4, 5]
    with pytest.raises(TreeError, match=r"\.map\(fn\)"):
        TEN.map(lambda n: torch.zeros(int(n))).windows(2)(0)


def test_elements_that_do_not_stack_say_what_to_do():
    ragged = TEN.batch(3).batch(4)
    with pytest.raises(TreeError, match="drop_last=True"):
        ragged(0)
    uneven = TEN.map(lambda n: torch.zeros(int(n)))
    with pytest.raises(TreeError, match=r"\.map\(fn\)"):
        uneven.batch(2)(0)


def test_a_mapped_function_returns_tensors_arrays_or_numbers():
    element = TEN.map(lambda n: {"a": 1.5, "b": np.arange(2), "c": None, "d": True})(0)
    assert element["a"].dtype == torch.float32
    assert element["b"].tolist() == [0, 1]
    assert element["d"].dtype == torch.bool
    with pytest.raises(TreeError, match="leaf of type str"):
        TEN.map(lambda n: "text")(0)


def test_a_whole_batch_of_batches_is_one_read():
    class Counting(Source):
        length, reads = 12, 0

        def take(self, indices, epoch):
            self.reads += 1
            return torch.from_numpy(indices)

    source = Counting()
    assert source.batch(2).batch(3)(1).tolist() == [[6, 7], [8, 9], [10, 11]]
    assert source.shuffle(0).shard(0, 2).batch(6)(0).shape == (6,)
    assert source.reads == 2


def test_finite_epochs_of_an_endless_stream_go_on():
    three = TEN.shuffle(0).repeat(3)
    for place in range(30):
        assert int(three.epoch(1)(place)) == int(TEN.shuffle(0).repeat()(30 + place))


def test_explain_tells_the_whole_line():
    text = str(explain(TEN.zip(TEN).shuffle(seed=7).shard(1, 2).batch(2)))
    for part in (
        "3 of 2",
        "ragged: 1 elements",
        "rank 1 of 2",
        "seed 7",
        "length: 10",
        "(10,) int64, in memory",
    ):
        assert part in text
    assert "dropped" in str(explain(TEN.batch(3, drop_last=True)))
    assert "endless" in str(explain(TEN.repeat().batch(3)))
    assert repr(TEN) == "<source arrays, length 10>"


def test_a_split_explains_its_part_and_a_source_of_ones_own_its_name():
    class Mine(Source):
        length = 3

    assert "8 of 10 elements, drawn with seed 1" in str(explain(TEN.split(0.8, seed=1)[0]))
    assert str(explain(Mine())).startswith("mine")
    with pytest.raises(NotImplementedError, match="Mine has to define get"):
        Mine()(0)


@pytest.mark.parametrize("index", [slice(2, 5), "x", 1.0, [1, 2], None])
def test_what_is_no_position_says_what_is_possible(index):
    for read in (TEN.__getitem__, TEN):
        with pytest.raises(TypeError, match=r"positions of a source are ints.*\.split.*\.map"):
            read(index)


def test_arrays_that_may_not_be_written_to_are_copied():
    frozen = np.arange(3)
    frozen.setflags(write=False)
    element = TEN.map(lambda n: frozen)(0)
    element += 1
    assert frozen.tolist() == [0, 1, 2]
    assert element.tolist() == [1, 2, 3]
