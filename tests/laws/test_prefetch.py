"""Law 4: prefetching changes nothing, keeps its bound, shows errors where they happen, and always ends."""

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from functrain.data import Budget, Source, arrays, h5write, hdf5, prefetch
from functrain.data.laws import check_prefetch, same


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


OPTIONS = [{}, {"workers": 2}, {"workers": 4, "memory": "1 MiB"}, {"memory": "1 MiB", "device": "cpu"}]


@pytest.mark.parametrize(
    ("depth", "options"),
    [(depth, options) for depth in (1, 2, 5, 100) for options in OPTIONS if options.get("workers", 1) <= depth],
    ids=str,
)
@pytest.mark.parametrize("kind", ["arrays", "mmap", "chunked", "one"])
def test_the_law_holds_over_sources(kind, depth, options, tmp_path):
    data = {"x": torch.randn(17, 3), "y": torch.arange(17)}
    h5write(tmp_path / "a.h5", data, chunks=4 if kind == "chunked" else None)
    base = arrays(data) if kind == "arrays" else hdf5(tmp_path / "a.h5")
    source = base.shuffle(0).batch(17 if kind == "one" else 3)
    check_prefetch(source, depth, **options)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_law_holds_over_files_that_are_decoded_ahead(workers, tmp_path):
    budget = Budget("1 MiB")
    h5write(tmp_path / "a.h5", {"x": torch.randn(60, 3)}, chunks=4, compression="gzip")
    with hdf5(tmp_path / "a.h5", threads=2, memory=budget) as file:
        source = file.shuffle(0).batch(5)
        assert source.heeding
        check_prefetch(source, 3, workers=workers, memory=budget)
    # The file has let go of its chunks, prefetching of its batches.
    del file, source
    gc.collect()
    assert budget.used == 0
    assert budget.peak <= budget.limit


class Failing(Source):
    def __init__(self, length, at):
        self.length, self.at = length, at

    def get(self, i, epoch):
        if i == self.at:
            raise ZeroDivisionError(str(i))
        return torch.tensor([i, epoch])


@settings(max_examples=150, deadline=None)
@given(
    depth=st.integers(1, 9),
    length=st.integers(1, 20),
    failing=st.integers(0, 25),
    start=st.integers(0, 30),
    count=st.integers(0, 30),
    leave=st.integers(0, 30),
    workers=st.integers(1, 4),
    memory=st.sampled_from([None, 1, 40, 1000]),
)
def test_drawn_streams_are_what_the_source_says(depth, length, failing, start, count, leave, workers, memory):
    source = Failing(length, failing)
    endless = source.repeat()
    with prefetch(source, depth, workers=min(workers, depth), memory=memory) as batches:
        stream = batches.between(start, start + count)
        for place in range(start, start + min(count, leave)):
            if place % length == failing:
                with pytest.raises(ZeroDivisionError, match=f"^{failing}$"):
                    next(stream)
                assert list(stream) == []
                return
            assert same(next(stream), endless(place))
        if leave >= count:
            assert list(stream) == []


@settings(max_examples=60, deadline=None)
@given(depth=st.integers(1, 9), length=st.integers(0, 20), failing=st.integers(0, 25))
def test_drawn_iterables_give_the_same_items_in_order(depth, length, failing):
    def items():
        for n in range(length):
            if n == failing:
                raise ZeroDivisionError(str(n))
            yield n

    taken = []
    with prefetch(items(), depth) as stream:
        try:
            for item in stream:
                taken.append(item)
        except ZeroDivisionError as error:
            assert str(error) == str(failing)  # noqa: PT017
            assert len(taken) == failing
        else:
            assert failing >= length
    assert taken == list(range(min(length, failing)))


class Eager(Source):
    """Breaks nothing itself: a source of which the checker can see every load."""

    length = 6

    def get(self, i, epoch):
        return torch.tensor(i + 10 * epoch)


def test_the_check_finds_a_prefetch_that_reorders(monkeypatch):
    from functrain.data import laws

    class Reversed(laws.Prefetch):
        def __iter__(self):
            return iter(list(super().__iter__())[::-1])

    monkeypatch.setattr(laws, "prefetch", Reversed)
    with pytest.raises(AssertionError, match="one epoch: element 0 differs"):
        check_prefetch(Eager(), 2)


def test_the_check_finds_a_prefetch_without_a_bound(monkeypatch):
    from functrain.data import laws

    monkeypatch.setattr(laws, "prefetch", lambda source, depth: prefetch(source, depth + 1))
    with pytest.raises(AssertionError, match="3 elements were outstanding at depth 2"):
        check_prefetch(Eager(), 2)
