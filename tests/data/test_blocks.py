"""source.shuffle(seed, within=…): chunks stay together in blocks that fit into memory, and nothing else does."""

import concurrent.futures
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from laid import Laid, numbers, order_of

import functrain as ft
from functrain.data.runs import Runs

layouts = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 20)), min_size=1, max_size=5)


def blocks_of(base, source, epoch):
    """The runs in each block of an epoch, found by where they begin and end in it."""
    seen = base.run_of()[order_of(source, epoch)]
    first, last = {}, {}
    for place, run in enumerate(seen.tolist()):
        first.setdefault(run, place)
        last[run] = place
    blocks, runs, end = [], set(), -1
    for place, run in enumerate(seen.tolist()):
        if place > end and runs:
            blocks.append(runs)
            runs = set()
        runs.add(run)
        end = max(end, last[run])
    return [*blocks, runs]


@given(layouts, st.integers(1, 4000), st.integers(), st.integers(0, 9))
def test_a_block_holds_no_more_than_within_unless_a_run_alone_does(layout, within, seed, epoch):
    base = Laid(*layout)
    source = base.shuffle(seed, within=within)
    if not base.runs():
        return
    sizes = 8 * np.bincount(base.run_of())
    # What seems to be a block may be a part of one, never more than one.
    for runs in blocks_of(base, source, epoch):
        assert sum(sizes[run] for run in runs) <= max(within, sizes.max())
    assert source.bytes <= max(within, sizes.max())


def test_blocks_are_as_large_as_they_may_be_and_even():
    base = Laid((1700, 10))
    source = base.shuffle(0, within=8 * 10 * 16)
    assert source.blocks == 11
    held = [len(runs) for runs in blocks_of(base, source, 0)]
    assert sum(held) == 170
    assert set(held) <= {15, 16}


def test_which_runs_share_a_block_changes_with_epoch_and_seed():
    base = Laid((1000, 10))
    orders = [(base.shuffle(seed, within=800), epoch) for seed in (0, 1) for epoch in (0, 1)]
    together = [
        {pair for runs in blocks_of(base, source, epoch) for pair in itertools.combinations(sorted(runs), 2)}
        for source, epoch in orders
    ]
    for one, two in itertools.combinations(together, 2):
        # 450 pairs of 4950 each: 41 in common on average.
        assert len(one & two) < 80


def test_each_run_is_read_in_one_block_only():
    """What a cache of two blocks has to decode: every chunk once."""
    base = Laid((5000, 20))
    order = base.run_of()[order_of(base.shuffle(3, within=8 * 20 * 10))]
    cache, decoded = {}, 0
    for run in order.tolist():
        if run not in cache:
            decoded += 1
            if len(cache) == 20:
                del cache[next(iter(cache))]
        else:
            del cache[run]
        cache[run] = True
    assert decoded == 250


def test_the_order_is_the_one_it_always_was():
    """A run is resumed by its position alone: the order of a seed must not change between versions."""
    source = Laid((13, 3), (7, 4)).shuffle(5, within=8 * 8)
    assert order_of(source).tolist() == [18, 19, 17, 12, 8, 7, 2, 6, 0, 1, 14, 10, 15, 11, 13, 16, 9, 3, 5, 4]
    assert order_of(source, 1).tolist() == [17, 0, 18, 2, 1, 19, 14, 13, 16, 4, 5, 15, 3, 9, 11, 8, 10, 7, 6, 12]


def test_scattered_positions_and_neighbours_agree():
    source = Laid((100_000, 37), (5000, 8)).shuffle(2, within=8 * 37 * 30)
    whole = np.concatenate(list(source.epoch(4).batch(100)))
    places = np.random.default_rng(0).permutation(len(source))
    assert np.array_equal(source.take(places, 4), whole[places])


def test_threads_see_one_order():
    source = Laid((3000, 17), (100, 3)).shuffle(2, within=8 * 17 * 30).batch(64)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: source.get(n % 40, n % 7).tolist(), range(120)))
    assert found == [source.get(n % 40, n % 7).tolist() for n in range(120)]


@pytest.mark.parametrize("make", [lambda: numbers(50), lambda: ft.arrays(torch.arange(50)), lambda: Laid((50, 7)).batch(5)])
def test_where_each_element_lies_alone_it_is_the_full_shuffle(make):
    source = make()
    alone = source.shuffle(4, within="1 KiB")
    assert all(torch.equal(alone.get(i, 2), source.shuffle(4).get(i, 2)) for i in range(len(source)))
    assert alone.quality == 1.0
    assert "within: 1.0 KiB, not needed: each element lies alone" in str(ft.explain(alone))
    assert "within" not in str(ft.explain(source.shuffle(4)))


def test_a_source_without_elements_has_a_shuffle_without_elements():
    assert list(Laid((7, 3)).shard(7, 8).shuffle(0, within=10)) == []


class Wrong(Laid):
    def runs(self):
        return Runs(((40, 7),), 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Laid((50, 7)).shuffle(0, within=0), "within takes a number of bytes above 0"),
        (lambda: Laid((50, 7)).shuffle(0, within="many"), "within takes a number of bytes above 0"),
        (lambda: Laid((50, 7)).shuffle(0, within=2.5), "within takes a number of bytes above 0"),
        (lambda: Laid((50, 7)).shuffle(within=100), "shuffle needs a seed"),
        (lambda: Laid((50, 7)).repeat().shuffle(0, within=100), "shuffle needs a source with an end"),
        (lambda: Wrong((50, 7)).shuffle(0, within=100), r"runs\(\) of .*, length 50> are of 40 elements"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_explain_tells_blocks_bytes_and_quality():
    text = str(ft.explain(Laid((1000, 10), size=1024).shuffle(3, within="100 KiB")))
    assert "blocks: 10 of 10 runs, 100.0 KiB at most (within=100.0 KiB)" in text
    assert "runs: 100 of 10 elements of 1.0 KiB" in text
    assert "quality: 0.9189 (a full shuffle: 1)" in text
    assert "seed 3" in text
    assert "stored: nothing" in text
    uneven = str(ft.explain(Laid((1003, 10), (500, 5)).shuffle(3, within="100 KiB")))
    assert "stored: 1.6 KiB an epoch, for 101 runs of another length" in uneven


# --- training -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sorted_file(tmp_path_factory):
    """Ten noisy classes, one after the other, in chunks of 20 rows."""
    generator = np.random.default_rng(0)
    y = np.repeat(np.arange(10), 320)
    x = (generator.normal(size=(10, 16))[y] + 1.5 * generator.normal(size=(len(y), 16))).astype("f4")
    path = tmp_path_factory.mktemp("blocks") / "sorted.h5"
    ft.h5write(path, {"x": x, "y": y}, chunks=20, compression="gzip")
    return path


def test_training_on_sorted_data_is_on_a_par_with_a_full_shuffle(sorted_file):
    """Softmax regression over data sorted by class: blocks of 16 chunks of 160, against all, and against none."""

    def loss(params, batch):
        return F.cross_entropy(batch["x"] @ params["w"] + params["b"], batch["y"], reduction="none")

    def reached(source):
        batches = source.batch(32)
        steps = 2 * len(batches)
        step = ft.step(ft.grad(loss), ft.optim.sgd(ft.optim.cosine(1.0, steps)))
        state = step.init({"w": torch.zeros(16, 10), "b": torch.zeros(10)})
        for state, _ in ft.fold(step, state, batches, steps=steps):
            pass
        return float(loss(state.params, data.take(np.arange(len(data)), 0)).mean())

    with ft.hdf5(sorted_file) as data:
        runs = data.runs()
        assert runs is not None
        assert runs.number == 160
        blocks = data.shuffle(0, within=16 * 20 * runs.size)
        assert blocks.blocks == 10
        full = reached(data.shuffle(0))
        assert reached(blocks) == pytest.approx(full, rel=0.03)
        assert reached(data) > 1.3 * full
