"""Law 5: a source is a pure function of position; shuffles are bijections; shards and batches cover."""

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.data import Source, arrays, h5write, hdf5, mix
from functrain.data.laws import check_source, same
from functrain.data.permutation import permuted

LENGTH = 23


def data():
    generator = np.random.default_rng(0)
    return {"x": generator.normal(size=(LENGTH, 3, 2)).astype("f4"), "y": np.arange(LENGTH)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    h5write(folder / "contiguous.h5", data())
    h5write(folder / "chunked.h5", data(), chunks=4, compression="gzip")
    with h5py.File(folder / "mixed.h5", "w") as file:
        file["x"] = data()["x"].astype(">f4")
        file.create_dataset("y", data=data()["y"], chunks=(5,), shuffle=True, fletcher32=True)
    return folder


class Squares(Source):
    length = LENGTH

    def get(self, i, epoch):
        return torch.tensor([i * i, epoch])

    steady = False


BASES = {
    "arrays": lambda files: arrays(data()),
    "tensors": lambda files: arrays({"x": torch.randn(LENGTH, 2).bfloat16(), "y": (torch.arange(LENGTH),)}),
    "mmap": lambda files: hdf5(files / "contiguous.h5"),
    "bare mmap": lambda files: hdf5(files / "contiguous.h5", "x"),
    "chunked": lambda files: hdf5(files / "chunked.h5"),
    "mixed": lambda files: hdf5(files / "mixed.h5", datasets=["y", "x"]),
    "own": lambda files: Squares(),
}
COMBINATIONS = {
    "itself": lambda s: s,
    "shuffled": lambda s: s.shuffle(1),
    "shuffled twice": lambda s: s.shuffle(1).shuffle(1),
    "shuffled within": lambda s: s.shuffle(1, within=300),
    "mixed": lambda s: mix([s.shuffle(1, within=300), s], seed=1).batch(6),
    "part of batches": lambda s: s.shuffle(1).batch(5).part(1, 3),
    "an epoch": lambda s: s.shuffle(1).epoch(3),
    "sharded": lambda s: s.shuffle(1).shard(1, 3),
    "an empty shard": lambda s: s.shard(LENGTH, LENGTH + 1),
    "one element": lambda s: s.shard(0, LENGTH),
    "zipped": lambda s: s.zip(s.shuffle(2), s),
    "mapped": lambda s: s.map(lambda element: {"element": element, "two": 2.0}),
    "batched": lambda s: s.shuffle(1).batch(5),
    "batched, whole": lambda s: s.shuffle(1).batch(5, drop_last=True),
    "batches mapped": lambda s: s.batch(4).map(lambda batch: (batch, torch.ones(1))),
    "batches of batches": lambda s: s.batch(2, drop_last=True).shuffle(1).batch(3),
    "repeated": lambda s: s.shuffle(1).repeat(2),
    "repeated batches": lambda s: s.shuffle(1).batch(4).repeat(3),
    "batches over epochs": lambda s: s.shuffle(1).repeat(2).batch(9),
    "windows": lambda s: s.windows(4),
    "windows apart": lambda s: s.windows(2, stride=5),
    "windows that overlap": lambda s: s.shuffle(1).windows(5, stride=2),
    "one window": lambda s: s.windows(LENGTH),
    "windows shuffled": lambda s: s.windows(5, stride=2).shuffle(1),
    "windows in batches": lambda s: s.windows(4, stride=3).shuffle(1).shard(1, 2).batch(2),
    "windows of windows": lambda s: s.windows(3, stride=1).windows(2),
    "windows repeated": lambda s: s.windows(4).shuffle(1).repeat(2),
    "endless": lambda s: s.shuffle(1).repeat(),
    "endless batches": lambda s: s.shuffle(1).repeat().batch(4),
    "endless shard": lambda s: s.shuffle(1).repeat().shard(1, 2),
}


@pytest.mark.parametrize("combination", COMBINATIONS)
@pytest.mark.parametrize("base", ["mmap", "own"])
def test_every_combination_is_a_source(base, combination, files):
    check_source(COMBINATIONS[combination](BASES[base](files)))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "combination",
    ["itself", "batched", "zipped", "shuffled within", "mixed", "windows that overlap", "windows shuffled"],
)
def test_every_base_is_a_source(base, combination, files):
    check_source(COMBINATIONS[combination](BASES[base](files)))


@pytest.mark.parametrize("base", ["arrays", "mmap", "chunked"])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_part_of_a_split_is_a_source(base, seed, files):
    for part in BASES[base](files).split(0.5, 0.2, seed=seed):
        check_source(part)


@pytest.mark.parametrize("base", ["mmap", "bare mmap", "chunked", "mixed"])
def test_files_hold_what_arrays_hold(base, files):
    expected = BASES["arrays"](files)
    source = BASES[base](files)
    for i in range(LENGTH):
        element = expected(i)["x"] if base == "bare mmap" else expected(i)
        assert same(source(i), element)


class Drifting(Source):
    """Breaks the law: what it gives depends on how often it was asked."""

    length = 4

    def __init__(self):
        self.asked = 0

    def get(self, i, epoch):
        self.asked += 1
        return torch.tensor(self.asked)


class Sharing(Source):
    """Breaks the law: it hands out its own memory."""

    length = 4

    def __init__(self):
        self.memory = torch.arange(1, 5)

    def get(self, i, epoch):
        return self.memory[i]


@pytest.mark.parametrize(("source", "reason"), [(Drifting(), "one call to the next"), (Sharing(), "handed out before")])
def test_the_check_finds_a_source_that_breaks_the_law(source, reason):
    with pytest.raises(AssertionError, match=reason):
        check_source(source)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 200),
    seed=st.integers(),
    epoch=st.integers(0, 10**6),
    size=st.integers(1, 12),
    ranks=st.integers(1, 7),
)
def test_batches_of_shards_of_a_shuffle_cover_every_epoch(length, seed, epoch, size, ranks):
    source = arrays(torch.arange(length)).shuffle(seed)
    shards = [source.shard(rank, ranks) for rank in range(ranks)]
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1
    seen = [n for shard in shards for batch in shard.batch(size).epoch(epoch) for n in batch.tolist()]
    assert sorted(seen) == list(range(length))


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 300), size=st.integers(1, 40), drop_last=st.booleans())
def test_batches_cover_and_end_with_the_epoch(length, size, drop_last):
    source = arrays(torch.arange(length))
    if drop_last and size > length:
        return
    batches = source.batch(size, drop_last=drop_last)
    whole = length // size * size if drop_last else length
    assert torch.cat(list(batches)).tolist() == list(range(whole))
    assert all(len(batch) == size for batch in list(batches)[:-1])
    twice = batches.repeat(2)
    assert [twice(len(batches) + i).tolist() for i in range(len(batches))] == [batch.tolist() for batch in batches]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 80),
    size=st.integers(1, 9),
    stride=st.one_of(st.none(), st.integers(1, 12)),
    seed=st.one_of(st.none(), st.integers()),
    epoch=st.integers(0, 5),
)
def test_windows_are_the_runs_of_neighbours(length, size, stride, seed, epoch):
    if size > length:
        return
    windows = arrays(torch.arange(length)).windows(size, stride)
    step = size if stride is None else stride
    expected = [list(range(start, start + size)) for start in range(0, length - size + 1, step)]
    assert [window.tolist() for window in windows] == expected
    if seed is not None:
        shuffled = windows.shuffle(seed).epoch(epoch)
        assert sorted(window.tolist() for window in shuffled) == expected
        assert torch.cat(list(shuffled.batch(3))).tolist() == [window.tolist() for window in shuffled]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(30, 300),
    parts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.one_of(st.none(), st.integers()),
    epochs=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_parts_of_a_split_are_disjoint_and_cover_in_all_epochs(length, parts, seed, epochs):
    fractions = [part / 25 for part in parts]
    pieces = arrays(torch.arange(length)).split(*fractions, seed=seed)
    assert len(pieces) == len(parts) + 1
    assert all(abs(len(piece) - fraction * length) <= 1 for piece, fraction in zip(pieces, fractions))
    seen = [n for number, piece in enumerate(pieces) for n in map(int, piece.shuffle(0).epoch(epochs[number % 2]))]
    assert sorted(seen) == list(range(length))


def test_a_shuffle_is_a_bijection_for_every_small_length():
    for length in range(1, 601):
        order = permuted(np.arange(length), length, seed=length, epoch=2)
        assert np.array_equal(np.sort(order), np.arange(length)), length


@settings(max_examples=12, deadline=None)
@given(length=st.integers(601, 300_000), seed=st.integers(), epoch=st.integers(0, 2**40))
def test_a_shuffle_is_a_bijection_for_drawn_lengths(length, seed, epoch):
    seen = np.zeros(length, bool)
    for start in range(0, length, 50_000):
        seen[permuted(np.arange(start, min(start + 50_000, length)), length, seed, epoch)] = True
    assert seen.all()


def test_a_trillion_elements_are_shuffled_without_a_list_of_them():

    class Vast(Source):
        length = 10**12

        def get(self, i, epoch):
            return torch.tensor(i)

    source = Vast().shuffle(0)
    seen = [int(n) for n in source.batch(1000)(10**9 - 1)]
    assert len(set(seen)) == 1000
    assert min(seen) >= 0
    assert max(seen) < 10**12
    assert np.mean(seen) == pytest.approx(5e11, rel=0.1)
