"""Sequences of different lengths: values with offsets, padding, and functions of them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functrain.core.errors import ArgumentError, TreeError
from functrain.data import Source, arrays, concat, h5write, hdf5, ragged
from functrain.data.laws import check_prefetch, check_source
from functrain.data.runs import Runs

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=8)


def rows(lengths, before=0):
    offsets = before + np.cumsum([0, *lengths])
    return np.arange(offsets[-1] + 3), offsets


@given(LENGTHS, st.integers(0, 3), st.data())
def test_elements_are_the_rows_between_offsets(lengths, before, data):
    values, offsets = rows(lengths, before)
    source = ragged({"x": values, "y": values[:, None] * [1.0, 2.0]}, offsets)
    assert source.lengths.tolist() == lengths
    for element, start, stop in zip(source, offsets[:-1], offsets[1:], strict=True):
        assert element["x"].tolist() == values[start:stop].tolist()
        assert element["y"].shape == (stop - start, 2)
    indices = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6)))
    read = source.elements(indices, 0)
    assert [element["x"].tolist() for element in read] == [values[offsets[i] : offsets[i + 1]].tolist() for i in indices]
    if len({lengths[i] for i in indices}) == 1:
        assert torch.equal(source.take(indices, 0)["x"], torch.stack([element["x"] for element in read]))
    else:
        with pytest.raises(TreeError, match=rf"\.padded\({max(lengths[i] for i in indices)}\) makes them alike"):
            source.take(indices, 0)


@pytest.mark.parametrize("chunks", [None, 3])
def test_laws_hold_over_arrays_and_files(tmp_path, chunks):
    values, offsets = rows([2, 0, 4, 1, 1, 3])
    h5write(tmp_path / "a.h5", {"flat": {"x": values, "y": values * 0.5}, "index": {"offsets": offsets}}, chunks=chunks)
    with hdf5(tmp_path / "a.h5", "flat") as flat, hdf5(tmp_path / "a.h5", "index/offsets") as index:
        for source in (ragged({"x": values, "y": values * 0.5}, offsets), ragged(flat, index)):
            assert [element["x"].tolist() for element in source][2] == [2, 3, 4, 5]
            check_source(source)
            check_source(source.padded(4).shuffle(seed=0).batch(4))
            check_source(source.map(lambda element: element["x"].sum()).batch(2))
        check_prefetch(ragged(flat, index).padded(4).batch(2))


@given(LENGTHS, st.integers(1, 4))
def test_runs_are_those_of_the_values(lengths, step):
    class Chunked(Source):
        def __init__(self, length):
            self.length = length

        def runs(self):
            return Runs(((self.length, step),), 4)

    values, offsets = rows(lengths)
    runs = ragged(Chunked(len(values)), offsets).runs()
    begun = (offsets[:-1] // step).tolist()
    if runs is None:
        assert len(set(begun)) == len(begun)
        return
    assert runs.length == len(lengths)
    ends = runs.ends().tolist()
    # Elements of one run begin in one chunk of the values, and those of the next in a later one.
    chunks = [set(begun[start:stop]) for start, stop in zip([0, *ends], ends)]
    assert all(len(each) == 1 for each in chunks)
    assert [min(each) for each in chunks] == sorted(set(begun))


def test_one_batch_is_one_read():
    class Counted(Source):
        length, reads = 100, 0

        def take(self, indices, epoch):
            self.reads += 1
            return torch.from_numpy(indices)

    values = Counted()
    source = ragged(values, np.arange(0, 101, 10))
    source.elements(np.array([7, 2, 3, 9]), 0)
    source.batch(5)(1)
    assert values.reads == 2


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3, 2], "offset 1 is 3, offset 2 is 2"),
        ([0, 11], r"must lie in 0 … 10.*got 0 … 11"),
        ([-1, 4], "got -1 … 4"),
        (np.array([0, 2**64 - 1], np.uint64), "must lie in 0 … 10"),
        ([0], "n\\+1 ints"),
        ([0.0, 3.0], "float64"),
        ([[0, 3]], r"shape \(1, 2\)"),
        ([[0], [1, 2]], "n\\+1 ints"),
        ("text", "n\\+1 ints"),
    ],
)
def test_offsets_that_are_none_are_refused(offsets, message):
    with pytest.raises(ArgumentError, match=message):
        ragged(torch.arange(10), offsets)


def test_other_arguments_of_ragged():
    with pytest.raises(ArgumentError, match="needs a source with an end"):
        ragged(arrays(torch.arange(3)).repeat(), [0, 3])
    with pytest.raises(ArgumentError, match="deferred"):
        ragged(arrays(torch.arange(3)).batch(2).deferred(), [0, 1])
    for offsets in (torch.tensor([0, 1, 3]), np.array([0, 1, 3], np.uint8), arrays(torch.tensor([0, 1, 3])), (0, 1, 3)):
        assert [element.tolist() for element in ragged(torch.arange(3), offsets)] == [[0], [1, 2]]


# --- padded -------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 6), st.booleans())
def test_padded_fills_up_and_tells_where(lengths, size, cut):
    values, offsets = rows(lengths)
    source = ragged(values, offsets).padded(size, value=-1, cut=cut)
    if max(lengths) > size and not cut:
        with pytest.raises(TreeError, match=rf"padded\({size}\) no room: give a larger size, or cut=True"):
            source.batch(len(lengths))(0)
        return
    filled, mask = source.batch(len(lengths))(0)
    for row, there, start, stop in zip(filled.tolist(), mask.tolist(), offsets[:-1], offsets[1:], strict=True):
        held = values[start:stop][:size].tolist()
        assert row == held + [-1] * (size - len(held))
        assert there == [True] * len(held) + [False] * (size - len(held))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.float16, torch.bfloat16, torch.complex64])
def test_padded_keeps_dtypes_and_further_dimensions(dtype):
    values = torch.ones(5, 2, 3, dtype=dtype)
    (filled, label), mask = ragged(values, [0, 2, 5]).zip(arrays(torch.tensor([7, 8]))).padded(4).batch(2)(0)
    assert (filled.dtype, filled.shape, label.tolist()) == (dtype, (2, 4, 2, 3), [7, 8])
    assert torch.equal(filled.sum((2, 3)) != 0, mask)


def test_padded_names_the_longest_of_a_batch():
    values, offsets = rows([3, 9, 5])
    with pytest.raises(TreeError, match=r"an element has 9 rows, and padded\(2\) no room"):
        ragged(values, offsets).padded(2).batch(3)(0)


def test_padded_refuses_what_it_cannot_hold_or_tell_apart():
    numbers = ragged(torch.arange(5, dtype=torch.uint8), [0, 2, 5])
    for value in (-1, 256, 0.5, float("nan")):
        with pytest.raises(TreeError, match="uint8 cannot hold the value"):
            numbers.padded(3, value=value)(0)
    for arguments, message in [
        ((0,), "size must be"),
        ((2, "x"), "value takes"),
        ((2, True), "value takes"),
        ((2, 0, 1), "cut takes"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            numbers.padded(*arguments)
    pairs = numbers.zip(arrays(torch.zeros(2, 7)))
    with pytest.raises(TreeError, match=r"differ in length \('0': 2, '1': 7\).*\.zip"):
        pairs.padded(9)(0)
    with pytest.raises(TreeError, match="has none"):
        arrays(torch.arange(3)).padded(2)(0)
    mixed = concat([numbers, ragged(torch.zeros(4, 2, dtype=torch.uint8), [0, 4])])
    with pytest.raises(TreeError, match=r"leaf 'elements' differs in more than its length"):
        mixed.padded(4).batch(3)(0)


def test_functions_of_ragged_elements_may_follow_one_another():
    source = arrays(torch.arange(5)).map(lambda n: torch.arange(int(n))).shuffle(seed=0)
    check_source(source)
    totals = source.repeat(2).map(lambda sequence: sequence.sum())
    assert sorted(totals.batch(10)(0).tolist()) == [0, 0, 0, 0, 1, 1, 3, 3, 6, 6]
    with pytest.raises(TreeError, match=r"\.padded\(size\)"):
        source.batch(5)(0)
    check_source(source.padded(4).batch(2))
