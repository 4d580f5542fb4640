"""A budget of bytes: what holders share, and what prefetching holds of it."""

import gc
import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functrain.core.errors import ArgumentError
from functrain.data import Budget, Source, arrays, prefetch
from functrain.data.budget import Account, size_of

SIZE = 1000
TEN = arrays(torch.arange(10 * SIZE // 8).reshape(10, -1))


@pytest.mark.parametrize(
    ("given", "size"), [(1, 1), ("1", 1), ("512 MiB", 512 << 20), ("1.5KB", 1500), (" 2 gib ", 2 << 30), ("3 B", 3)]
)
def test_sizes(given, size):
    assert size_of("memory", given) == size
    assert Budget(given).limit == size


@pytest.mark.parametrize("given", [0, -1, True, 1.5, "", "much", "1 TB", "-1 MB", "0", "0.1 B", None, b"1"])
def test_what_is_no_size_is_named(given):
    with pytest.raises(ArgumentError, match="memory takes a number of bytes above 0"):
        Budget.of(given)


class Cache:
    """Holds bytes that it can do without."""

    def __init__(self, budget, size):
        self.account, self.size, self.used_at = Account(budget), size, budget.now()
        self.account.begin(size, anyway=True)
        budget.on_pressure(self)

    def oldest(self):
        return self.used_at if self.size else None

    def evict(self, size):
        given = min(size, self.size)
        self.size -= given
        self.account.grow(-given)


def test_what_can_be_had_again_makes_room_the_oldest_first():
    budget = Budget(100)
    old, new = Cache(budget, 40), Cache(budget, 40)
    account = Account(budget)
    assert account.begin(50)
    assert (old.size, new.size, budget.used) == (10, 40, 100)
    assert account.begin(50)
    assert (old.size, new.size, budget.used) == (0, 0, 100)
    assert not account.begin(1)
    assert account.begin(1, anyway=True)
    assert (budget.used, budget.peak) == (101, 101)
    account.end(50)
    late = Cache(budget, 49)
    # What turns out to be larger than it was said to be makes room as well.
    account.grow(9)
    assert (late.size, account.held, budget.used) == (40, 60, 100)
    account.settle()
    # Closed: what is ended late is not given back twice.
    account.end(60)
    assert (budget.used, account.held) == (late.size, 0)


def test_a_forgotten_account_gives_everything_back():
    budget = Budget(100)
    account = Account(budget)
    account.begin(30)
    del account
    gc.collect()
    assert budget.used == 0


def test_threads_charge_and_release_without_loss():
    budget = Budget(1 << 40)

    def turn():
        account = Account(budget)
        for size in range(2000):
            account.begin(size)
            account.grow(1)
            account.end(size + 1)

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.used == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_while_another_thread_holds_the_budget():
    budget = Budget(100)
    account = Account(budget)
    account.begin(60)
    holding, done = threading.Event(), threading.Event()

    def hold():
        with budget.lock():
            holding.set()
            assert done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert holding.wait(30)
    pid = os.fork()
    if pid == 0:
        # Holders begin anew in the child, which has nothing of what the parent's held.
        mine = Account(budget)
        mine.begin(70)
        account.settle()
        os._exit(7 if budget.used == 70 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    done.set()
    thread.join()
    assert budget.used == 60


# --- prefetching ------------------------------------------------------------------------------------------------------


class Counted(Source):
    """Elements of so many bytes each; counts how many are loaded, or being loaded, and not yet asked for."""

    def __init__(self, sizes):
        self.sizes, self.length = sizes, len(sizes)
        self.lock, self.begun, self.taken, self.most = threading.Lock(), 0, 0, 0

    def get(self, i, epoch):
        with self.lock:
            self.begun += 1
            self.most = max(self.most, self.begun - self.taken)
        return {"i": torch.tensor(i, dtype=torch.uint8), "rest": torch.zeros(self.sizes[i] - 1, dtype=torch.uint8)}

    def checked(self, batches):
        for i, element in enumerate(batches):
            assert int(element["i"]) == i
            with self.lock:
                self.taken += 1
        assert i == self.length - 1


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(("memory", "held"), [(3 * SIZE, 3), (3 * SIZE + 999, 3), (SIZE, 1), (SIZE // 2, 1), (100 * SIZE, 8)])
def test_elements_hold_at_most_so_many_bytes(memory, held, workers):
    source, budget = Counted([SIZE] * 40), Budget(memory)
    with prefetch(source, 8, workers=workers, memory=budget) as batches:
        source.checked(batches)
        assert budget.used == 0
        assert batches.stats.bytes == 40 * SIZE
    # One more: an element was taken when its bytes are given back, and is counted when the loop has it.
    assert source.most <= held + 1
    assert budget.peak == held * SIZE


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    memory=st.integers(1, 20_000),
    depth=st.integers(1, 6),
    workers=st.integers(1, 3),
    leave=st.integers(0, 30),
)
def test_elements_of_any_sizes_come_in_order_and_leave_nothing_behind(sizes, memory, depth, workers, leave):
    source, budget = Counted(sizes), Budget(memory)
    with prefetch(source, depth, workers=min(workers, depth), memory=budget) as batches:
        if leave >= len(sizes):
            source.checked(batches)
        else:
            for _, element in zip(range(leave), batches):
                assert element["rest"].nbytes < 5000
    assert budget.used == 0
    # What a load turns out to take more than the one before it is above the limit, for each that is under way.
    assert budget.peak <= max(memory, max(sizes)) + min(workers, depth) * max(sizes)


@pytest.mark.parametrize("workers", [1, 3])
def test_whatever_ends_a_stream_its_bytes_are_given_back(workers):
    def fail(rows):
        if int(rows[0]) == 5 * SIZE // 8:
            raise KeyError("five")
        return rows

    budget = Budget("1 MiB")
    with prefetch(TEN.map(fail), 4, workers=workers, memory=budget) as batches, pytest.raises(KeyError, match="five"):
        list(batches)
    assert budget.used == 0
    with prefetch(TEN, 4, workers=workers, memory=budget) as batches:
        first = iter(batches)
        next(first)
        next(batches.between(3))
        with pytest.raises(ArgumentError, match="another stream"):
            next(first)
    assert budget.used == 0
    forgotten = prefetch(TEN, 4, workers=workers, memory=budget).__enter__()
    next(iter(forgotten))
    threads = [thread for thread in threading.enumerate() if thread.name == "functrain-prefetch"]
    del forgotten
    gc.collect()
    for thread in threads:
        thread.join(30)
    del thread, threads
    gc.collect()
    assert budget.used == 0


def test_streams_and_caches_that_share_a_budget_all_go_on():
    budget = Budget(3 * SIZE)
    cache = Cache(budget, 3 * SIZE)
    with (
        prefetch(TEN.repeat(3), 4, workers=2, memory=budget) as first,
        prefetch(TEN.repeat(3), 4, memory=budget) as second,
    ):
        taken = [(int(a[0]), int(b[0])) for a, b in zip(first, second, strict=True)]
    assert taken == [(SIZE // 8 * n, SIZE // 8 * n) for n in range(10)] * 3
    assert cache.size == 0
    # Each stream may have one element, whether there is room or not.
    assert budget.peak <= 4 * SIZE
    assert budget.used == 0


def test_items_of_an_iterable_are_counted_where_they_have_a_size():
    items = [{"x": torch.zeros(3), "name": "text"}, b"four", 7]
    with prefetch(items, 4, memory="1 MiB") as stream:
        assert list(stream) == items
        assert stream.stats.bytes == 16
