"""Sources and torch's datasets, both ways: a source in a DataLoader, a dataset or an iterable as a source."""

import os
import pickle
import subprocess
import sys
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)

import functrain as ft
from functrain.data.laws import check_prefetch, check_source, same

DATA = {"x": torch.randn(23, 3), "y": torch.arange(23)}
SOURCE = ft.arrays(DATA)
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Pairs(Dataset):
    """A map-style dataset of its own arrays, which it hands out uncopied."""

    def __init__(self):
        self.x, self.y = np.arange(46, dtype="f4").reshape(23, 2), torch.arange(23)

    def __len__(self):
        return 23

    def __getitem__(self, i):
        if i == 99:
            raise IndexError("no such row")
        return {"x": self.x[i], "y": (self.y[i], i, float(i), i > 3)}


class Many(Pairs):
    def __getitems__(self, indices):
        return [self[i] for i in indices]

    def __getitem__(self, i):
        item = super().__getitem__(i)
        return item | {"row": np.float32(i)}


class Counting(IterableDataset):
    def __iter__(self):
        buffer = np.zeros(2)
        for n in range(60):
            # The same array each time: what was given before has to be a copy.
            buffer[:] = n
            yield {"n": n, "buffer": buffer}


class Sized(Counting):
    def __len__(self):
        return 60


def numbers():
    n = 0
    while True:
        yield torch.tensor([n, -n])
        n += 1


FOREIGN = {
    "map-style": Pairs,
    "many at once": Many,
    "tensors": lambda: TensorDataset(torch.arange(23.0), torch.arange(23)),
    "subset": lambda: Subset(Many(), list(range(20, 3, -1))),
    "joined": lambda: ConcatDataset([Pairs(), Pairs()]),
    "list": lambda: [torch.arange(n, n + 3) for n in range(9)],
    "ragged list": lambda: [torch.arange(n) for n in range(9)],
    "range": lambda: range(7),
    "no elements": list,
    "iterable": Counting,
    "iterable with a length": Sized,
    "generator": lambda: numbers,
    "data loader": lambda: DataLoader(Pairs(), batch_size=4),
    "function of a list": lambda: lambda: list(range(50)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_everything_foreign_is_a_source(kind):
    check_source(ft.source(FOREIGN[kind]()))


@pytest.mark.parametrize("kind", ["map-style", "many at once", "data loader", "iterable with a length"])
def test_it_is_prefetched_and_combined(kind):
    source = ft.source(FOREIGN[kind]())
    check_prefetch(source, depth=3)
    if kind != "data loader":
        check_source(source.shuffle(0).batch(4, drop_last=True))
        check_source(source.windows(5, stride=9).map(lambda rows: rows))


@pytest.mark.parametrize("kind", ["map-style", "many at once"])
def test_several_workers_read_a_dataset(kind):
    check_prefetch(ft.source(FOREIGN[kind]()), depth=4, workers=3)


def test_items_are_what_the_dataset_gives():
    data = Many()
    source = ft.source(data)
    for i in (0, 22, 7):
        x, (row, number, real, flag) = source(i)["x"], source(i)["y"]
        assert x.dtype == torch.float32
        assert x.tolist() == data[i]["x"].tolist()
        assert [int(row), int(number), float(real), bool(flag)] == [i, i, float(i), i > 3]
        assert [leaf.dtype for leaf in (row, number, real, flag)] == [torch.int64, torch.int64, torch.float32, torch.bool]
    assert len(source) == 23
    for outside in (-1, 23):
        with pytest.raises(ft.PositionError, match=f"position {outside} lies outside a source of length 23"):
            source(outside)


def test_a_source_is_given_back_as_it_is():
    assert ft.source(SOURCE) is SOURCE
    assert same(ft.source(Subset(SOURCE, [3, 1]))(0), SOURCE(3))


Named = namedtuple("Named", "a b")


def test_containers_dtypes_and_byte_orders_are_kept():
    items = [Named(np.array([1, 2], ">i2"), [np.bool_(True), {"deep": torch.ones(2, dtype=torch.bfloat16)}, None])]
    element = ft.source(items)(0)
    assert isinstance(element, Named)
    assert (element.a.dtype, element.a.tolist()) == (torch.int16, [1, 2])
    assert element.b[0].dtype == torch.bool
    assert element.b[1]["deep"].dtype == torch.bfloat16
    assert element.b[2] is None


def test_gradients_are_left_behind():
    assert not ft.source([torch.ones(2, requires_grad=True)])(0).requires_grad


class Image:
    """Stands for what is neither tensor nor array."""


@pytest.mark.parametrize(
    ("item", "kind"),
    [("text", "str"), (Image(), "Image"), ({"a": np.array(["x"])}, "ndarray of <U1"), (np.datetime64(0, "s"), "datetime64")],
)
def test_items_that_are_no_numbers_are_named(item, kind):
    for source in (ft.source([1, item]), ft.source(lambda: iter([1, item]))):
        with pytest.raises(ft.TreeError, match=f"item 1 of .* holds a {kind}.*Convert it in the dataset"):
            source(1)


class Unsized:
    def __getitem__(self, i):
        return i


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(3), "got a Tensor: for arrays whose rows are the elements use ft.arrays"),
        (np.zeros(3), r"ft\.arrays"),
        ({"x": [1]}, r"ft\.arrays"),
        ((1, 2), r"list\(data\)"),
        ("file.h5", r"ft\.hdf5"),
        (b"bytes", r"ft\.hdf5"),
        ({1, 2}, "a set has no order"),
        (3, "got a int"),
        (Unsized(), "__len__ and __getitem__"),
    ],
)
def test_what_is_none_is_named(data, message):
    with pytest.raises(ft.ArgumentError, match=message):
        ft.source(data)


def test_errors_pass_with_their_position():
    class Failing(Many):
        def __getitem__(self, i):
            raise IndexError("inside the dataset")

    source = ft.source(Failing())
    for read in (lambda: source(4), lambda: source.take(np.array([4, 9]), 0)):
        with pytest.raises(IndexError, match="inside the dataset") as caught:
            read()
        assert "at position" in caught.value.__notes__[0]
        assert "4" in caught.value.__notes__[0]


def test_a_dataset_that_gives_too_few_is_named():
    class Short(Many):
        def __getitems__(self, indices):
            return super().__getitems__(indices)[1:]

    with pytest.raises(ft.ArgumentError, match=r"__getitems__ gave 2 items for 3 positions"):
        ft.source(Short()).batch(3)(0)


# --- iterations ---------------------------------------------------------------------------------------------------------


def begun(length=60, fails=None):
    """A function that begins an iteration, and a list of what was asked of it: a list of counts, one for each beginning."""
    counts = []

    def begin():
        counts.append(0)
        for n in range(length):
            counts[-1] += 1
            if n == fails:
                raise KeyError("fails")
            yield n

    return begin, counts


@given(st.lists(st.integers(0, 59), max_size=30))
def test_reading_forward_goes_on_and_going_back_begins_anew(places):
    begin, counts = begun()
    source = ft.source(begin)
    assert [int(source(i)) for i in places] == places
    beginnings = sum(later <= earlier for earlier, later in zip([99, *places], places))
    assert len(counts) == beginnings


def test_a_batch_is_read_in_one_pass():
    begin, counts = begun()
    source = ft.source(begin)
    assert source.take(np.array([7, 2, 9, 2]), 0).tolist() == [7, 2, 9, 2]
    assert counts == [10]
    elements = source.elements(np.array([5, 5]), 0)
    elements[0].zero_()
    assert int(elements[1]) == 5


def test_an_iteration_that_ends_early_says_where():
    source = ft.source(begun(5)[0])
    assert source.length is None
    with pytest.raises(ft.PositionError, match=r"position 7 lies outside: .*begin ended after 5 items"):
        source(7)
    assert int(source(4)) == 4

    class Short(Sized):
        def __len__(self):
            return 70

    with pytest.raises(ft.PositionError, match="position 65 lies outside: a Short ended after 60 of the 70 items"):
        ft.source(Short())(65)
    with ft.prefetch(source, 2) as batches:
        stream = iter(batches)
        assert [int(next(stream)) for _ in range(5)] == [0, 1, 2, 3, 4]
        assert list(stream) == []


@pytest.mark.parametrize("kind", ["begun anew", "once"])
def test_iteration_ends_where_the_iterable_does(kind):
    begin = begun(5)[0]

    def fresh():
        return ft.source(begin if kind == "begun anew" else begin())

    assert [int(n) for n in fresh()] == [int(n) for n in fresh().map(lambda n: n)] == [0, 1, 2, 3, 4]
    assert [int(n) for n in fresh().shard(1, 2)] == [1, 3]
    assert [(int(a), int(b)) for a, b in fresh().zip(ft.arrays(torch.arange(9)).repeat())] == [(n, n) for n in range(5)]
    assert [batch.tolist() for batch in fresh().batch(2)] == [[0, 1], [2, 3], [4]]
    assert [batch.tolist() for batch in fresh().batch(2, drop_last=True)] == [[0, 1], [2, 3]]
    assert [batch.tolist() for batch in fresh().batch(5)] == [[0, 1, 2, 3, 4]]
    with ft.prefetch(fresh().batch(2), 3) as batches:
        assert [batch.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    with ft.prefetch(fresh().batch(2), 3) as batches, pytest.raises(ft.PositionError, match="position 6 lies outside"):
        list(batches.between(0, 5))
    source = fresh()
    assert len(list(source)) == 5
    with pytest.raises(ft.PositionError, match="position 5 lies outside"):
        source(5)
    with pytest.raises(ft.ArgumentError, match=r"split needs a length.*length=n"):
        source.split(0.5)
    with pytest.raises(ft.ArgumentError, match="length=n"):
        len(source)


def test_a_length_can_be_stated():
    source = ft.source(begun(60)[0], length=10)
    assert len(source) == 10
    assert [int(n) for n in source] == list(range(10))
    check_source(source.windows(5))
    assert [part.length for part in source.split(0.8, seed=0)] == [8, 2]
    with pytest.raises(ft.PositionError, match=r"ended after 5 of the 6 items that length= promised"):
        list(ft.source(begun(5)[0], length=6))

    class Unsized:
        def __getitem__(self, i):
            return i * i

    assert [int(n) for n in ft.source(Unsized(), length=3)] == [0, 1, 4]
    for data in ([1, 2], ft.source([1, 2])):
        with pytest.raises(ft.ArgumentError, match=r"length is for what has no len\(\)"):
            ft.source(data, length=2)
    with pytest.raises(ft.ArgumentError, match="length must be at least 1"):
        ft.source(begun(5)[0], length=0)


def test_an_error_is_raised_again_by_a_new_iteration():
    begin, counts = begun(fails=3)
    source = ft.source(begin)
    for _ in range(2):
        with pytest.raises(KeyError, match="fails") as caught:
            source(5)
        assert "at position 3 of begun" in caught.value.__notes__[0]
    assert counts == [4, 4]
    assert int(source(2)) == 2


@pytest.mark.parametrize("kind", ["iterator", "function of one iterator"])
def test_an_iterator_cannot_go_back(kind):
    items = iter(range(5))
    source = ft.source(items if kind == "iterator" else lambda: items)
    assert [int(source(i)) for i in (0, 2)] == [0, 2]
    with pytest.raises(ft.PositionError, match=r"position 1 of .* was passed: the iterator gave 3 items, .*ft.source\(lambda"):
        source(1)
    with ft.prefetch(ft.source(iter(range(5))), 2) as batches:
        stream = iter(batches)
        assert [int(next(stream)) for _ in range(5)] == list(range(5))


def test_a_function_that_begins_nothing_is_named():
    for wrong in (lambda: 3, lambda i: iter([i])):
        with pytest.raises(ft.ArgumentError, match="does not begin an iteration: "):
            ft.source(wrong)(0)


def test_threads_share_an_iteration():
    source, wrong = ft.source(Counting()), []

    def read(places):
        wrong.extend(i for i in places if int(source(i)["n"]) != i or source(i)["buffer"].tolist() != [i, i])

    threads = [threading.Thread(target=read, args=(range(start, 60, 7),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@FORKS
def test_a_forked_process_begins_its_own_iteration(tmp_path):
    # Parent and child would otherwise share the place in the file.
    (tmp_path / "lines").write_text("".join(f"{n}\n" for n in range(20_000)))

    def lines():
        with open(tmp_path / "lines") as file:
            for line in file:
                yield int(line)

    source, single = ft.source(lines), ft.source(iter(range(9)))
    assert int(source(5)) == int(single(5)) == 5
    pid = os.fork()
    if pid == 0:
        try:
            right = [int(source(i)) for i in range(6, 20_000, 371)] == list(range(6, 20_000, 371))
            try:
                single(6)
            except ft.PositionError as error:
                right &= "belongs to the process that began it" in str(error)
            os._exit(7 if right else 1)
        finally:
            os._exit(1)
    assert [int(source(i)) for i in range(6, 20_000, 371)] == list(range(6, 20_000, 371))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert int(single(6)) == 6


def test_explain_says_how_it_is_read():
    assert "of: a Many" in str(ft.explain(ft.source(Many())))
    assert "many at once" in str(ft.explain(ft.source(Many())))
    assert "going back begins anew" in str(ft.explain(ft.source(Counting())))
    assert "cannot go back" in str(ft.explain(ft.source(iter([]))))


# --- a source in a DataLoader -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loaded")
    ft.h5write(folder / "chunked.h5", DATA, chunks=4, compression="gzip")
    ft.h5write(folder / "contiguous.h5", DATA)
    return {
        "arrays": SOURCE,
        "shuffled": SOURCE.shuffle(0),
        "mapped": SOURCE.map(lambda element: (element["x"] * 2, element["y"])),
        "chunked": ft.hdf5(folder / "chunked.h5"),
        "contiguous": ft.hdf5(folder / "contiguous.h5").shuffle(1),
        "foreign": ft.source(Many()),
    }


@FORKS
@pytest.mark.parametrize("kind", ["arrays", "shuffled", "mapped", "chunked", "contiguous", "foreign"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_batches_of_the_source(sources, kind, workers):
    source = sources[kind]
    loaded = list(DataLoader(source, batch_size=5, num_workers=workers))
    assert len(loaded) == 5
    for batch, expected in zip(loaded, source.batch(5), strict=True):
        assert same(*(tuple(ft.tree.leaves(tree)) for tree in (batch, expected)))
    generator = torch.Generator().manual_seed(0)
    shuffled = DataLoader(source, batch_size=4, shuffle=True, num_workers=workers, generator=generator)
    seen = torch.cat([ft.tree.leaves(batch)[-1] for batch in shuffled])
    assert sorted(seen.tolist()) == sorted(float(ft.tree.leaves(source(i))[-1]) for i in range(23))


def test_samplers_subsets_and_collating_of_ones_own():
    sampler = WeightedRandomSampler([0.0] * 20 + [1.0] * 3, 50)
    assert {int(y) for batch in DataLoader(SOURCE, batch_size=8, sampler=sampler) for y in batch["y"]} == {20, 21, 22}
    parts = random_split(SOURCE, [20, 3], generator=torch.Generator().manual_seed(0))
    assert sorted(int(element["y"]) for part in parts for element in DataLoader(part, batch_size=None)) == list(range(23))
    assert same(default_collate([SOURCE[3], SOURCE[4]]), SOURCE.take(np.array([3, 4]), 0))
    ragged = DataLoader(SOURCE.batch(4), batch_size=3, collate_fn=lambda batches: [len(batch["y"]) for batch in batches])
    assert list(ragged) == [[4, 4, 4], [4, 4, 3]]
    batches = DataLoader(SOURCE.batch(4), batch_size=None)
    assert all(same(batch, expected) for batch, expected in zip(batches, SOURCE.batch(4), strict=True))


def test_positions_are_those_of_a_sequence():
    assert same(SOURCE[4], SOURCE(4))
    assert same(tuple(SOURCE.__getitems__([3, 1, 3])), (SOURCE(3), SOURCE(1), SOURCE(3)))
    assert SOURCE.__getitems__([]) == []
    for outside in (-1, 23):
        with pytest.raises(IndexError, match=f"position {outside} lies outside"):
            SOURCE[outside]
        with pytest.raises(IndexError, match=f"position {outside} lies outside"):
            SOURCE.__getitems__([0, outside])
    with pytest.raises(TypeError):
        SOURCE[1:3]
    with pytest.raises(ft.ArgumentError, match="no end, so no len"):
        DataLoader(SOURCE.repeat(), shuffle=True)
    elements = SOURCE.__getitems__([2, 2])
    elements[0]["x"].zero_()
    assert same(elements[1], SOURCE(2))


def test_deferred_batches_pass_through():
    (batch,) = DataLoader(ft.sampled(lambda keys: keys, 4), batch_size=None, sampler=[3])
    assert same(batch, ft.sampled(lambda keys: keys, 4)(3))


def test_sources_survive_being_sent_to_another_process(tmp_path):
    ft.h5write(tmp_path / "a.h5", {"x": torch.arange(40.0).reshape(20, 2)}, chunks=3, compression="gzip")
    files = ft.hdf5([tmp_path / "a.h5", tmp_path / "a.h5"], threads=2)
    for source in (SOURCE.shuffle(0).batch(4), ft.source(Pairs()).split(0.5)[0], ft.source(numbers).batch(2), files.batch(3)):
        source(1)
        assert same(pickle.loads(pickle.dumps(source))(1), source(1))
    files.close()


SPAWNED = """
import torch
from torch.utils.data import DataLoader
import functrain as ft
from functrain.data.laws import same

if __name__ == "__main__":
    source = ft.arrays({"x": torch.arange(40.0).reshape(20, 2), "y": torch.arange(20)}).shuffle(3)
    loader = DataLoader(source, batch_size=6, num_workers=1, multiprocessing_context="spawn")
    assert all(same(ours, theirs) for ours, theirs in zip(loader, source.batch(6), strict=True))
    print("same")
"""


def test_workers_that_are_spawned(tmp_path):
    (tmp_path / "program.py").write_text(SPAWNED)
    ended = subprocess.run(
        [sys.executable, tmp_path / "program.py"], timeout=120, capture_output=True, text=True, check=False, cwd=os.getcwd(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.stdout == "same\n", ended.stderr
