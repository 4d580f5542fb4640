"""announce and runs: what comes next, and what lies together, told through every combinator down to the base."""

import numpy as np
import pytest
import torch
from laid import Laid, numbers

import functrain as ft
from functrain.core.deferred import drawn
from functrain.data import Source
from functrain.data.permutation import permuted

LABELS = np.arange(24) % 3


class Watched(Laid):
    """Keeps what was read, too."""

    def __init__(self, *stretches):
        super().__init__(*stretches)
        self.read = []

    def get(self, i, epoch):
        self.read.append((i, epoch))
        return super().get(i, epoch)

    def take(self, indices, epoch):
        self.read += [(i, epoch) for i in indices.tolist()]
        return super().take(indices, epoch)


MAKES = {
    "itself": lambda s: s,
    "shuffle": lambda s: s.shuffle(1),
    "chunk-aware shuffle": lambda s: s.shuffle(1, within=64),
    "shard": lambda s: s.shard(1, 2),
    "part of a split": lambda s: s.split(0.5)[1],
    "drawn part of a split": lambda s: s.split(0.5, seed=0)[1],
    "group part": lambda s: s.split(0.5, seed=0, groups=LABELS)[1],
    "epoch": lambda s: s.shuffle(1).epoch(3),
    "repeat": lambda s: s.shuffle(1).repeat(),
    "repeat batches": lambda s: s.shuffle(1).batch(5).repeat(3),
    "batches over epochs": lambda s: s.shuffle(1).repeat(3).batch(7),
    "batch": lambda s: s.batch(5),
    "whole batches": lambda s: s.batch(5, drop_last=True),
    "batches of batches": lambda s: s.batch(4).batch(3),
    "part of batches": lambda s: s.batch(5).part(1, 3),
    "deferred": lambda s: s.shuffle(1).batch(5).deferred(),
    "drawn": lambda s: s.batch(5).deferred().drawn(),
    "map": lambda s: s.map(lambda n: n + 1).batch(3),
    "zip": lambda s: s.zip(s.shuffle(1)),
    "windows": lambda s: s.windows(5, stride=2).batch(2),
    "balanced": lambda s: s.balanced(LABELS).batch(6),
    "weighted": lambda s: s.weighted(LABELS, 0).batch(6),
    "poisson": lambda s: s.poisson(0.2, seed=0, pad=1),
    "mix": lambda s: ft.mix([s, s.shuffle(1)], seed=0).batch(5),
    "concat": lambda s: ft.concat([s, s.shuffle(1)]).shuffle(2).batch(5),
}


@pytest.mark.parametrize("name", MAKES)
def test_what_is_announced_is_what_is_read(name):
    base = Watched((24, 5))
    source = MAKES[name](base)
    places = range(min(5, source.length or 5))
    for epoch in (0, 2):
        for i in places:
            base.read.clear()
            base.announced.clear()
            source.announce(np.array([i]), epoch)
            assert base.read == []
            drawn(source.get(i, epoch))
            told = {(place, when) for indices, when in base.announced for place in indices}
            # What is shuffled in blocks tells of the next block too.
            assert told >= set(base.read) if name == "chunk-aware shuffle" else told == set(base.read)
    told = []
    for chosen in ([np.array(places)[::-1]], [np.array([i]) for i in places]):
        base.announced.clear()
        for indices in chosen:
            source.announce(indices, 1)
        told.append({(place, when) for indices, when in base.announced for place in indices})
    assert told[0] == told[1]


@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("layout", [((96, 4),), ((30, 4), (17, 3), (50, 4))])
def test_while_one_block_is_read_the_runs_of_the_next_are_told_of_bit_by_bit(layout, batch):
    base = Laid(*layout)
    source = base.shuffle(3, within=8 * 4 * 6)
    run_of = base.run_of()
    order = run_of[source.take(np.arange(len(source)), 1).numpy()]
    block_of = {run: source._block(np.array([slot])).item() for slot, run in slots(source)}
    told = []
    for start in range(0, len(source), batch):
        base.announced.clear()
        stop = min(start + batch, len(source))
        source.announce(np.arange(start, stop), 1)
        assert set(run_of[base.announced[0][0]]) == set(order[start:stop])
        ahead = [run_of[place] for indices, _ in base.announced[1:] for place in indices]
        assert len(ahead) <= batch // 3 + 2
        told += [int(run) for run in ahead]
        near = {block_of[int(run)] + 1 for run in order[start:stop]}
        assert {block_of[int(run)] for run in ahead} <= near
    assert sorted(told) == sorted(run for run, block in block_of.items() if block)


def slots(source):
    """Which run stands at each slot in epoch 1, found by reading the whole epoch without its blocks."""
    line, number = source._line(1), source.layout.number
    begins = line.begins(np.arange(number))
    firsts = permuted(np.arange(number), number, source._runs_seed, 1)
    assert sorted(begins.tolist()) == begins.tolist()
    return list(enumerate(firsts.tolist()))


def test_every_source_hears_of_elements_without_harm():
    ft.arrays(torch.arange(4)).announce(np.array([1, 2]), 0)
    ft.sampled(lambda keys: keys, 3).announce(np.array([1]), 0)


class Alone(Source):
    length = 24

    def get(self, i, epoch):
        return torch.tensor(i)


BASE = Laid((20, 5), (4, 3), size=10)


@pytest.mark.parametrize(
    ("source", "stretches", "size"),
    [
        (BASE, ((20, 5), (4, 3)), 10),
        (BASE.map(lambda n: n), ((20, 5), (4, 3)), 10),
        (BASE.epoch(3), ((20, 5), (4, 3)), 10),
        (BASE.zip(Alone(), Laid((24, 12), size=4)), ((24, 12),), 14),
        (BASE.zip(BASE), ((20, 5), (4, 3)), 20),
        (BASE.split(0.5)[0], ((12, 5),), 10),
        (BASE.split(0.5)[1], ((3, 3), (5, 5), (4, 3)), 10),
        (BASE.split(1 / 24)[0], ((1, 5),), 10),
        (BASE.split(1 / 24, 1 / 24)[1], ((1, 1),), 10),
        (BASE.split(0.5)[1].split(0.5)[0], ((3, 3), (3, 5)), 10),
        (ft.concat([BASE, Alone()]), ((20, 5), (4, 3), (24, 1)), 10),
    ],
)
def test_runs_pass_through_what_keeps_neighbours(source, stretches, size):
    runs = source.runs()
    assert runs.stretches == stretches
    assert runs.size == size
    assert runs.length == len(source)


@pytest.mark.parametrize(
    "source",
    [
        numbers(24),
        Alone(),
        Alone().zip(numbers(24)),
        BASE.shuffle(0),
        BASE.shuffle(0, within=100),
        BASE.shard(0, 2),
        BASE.split(0.5, seed=0)[0],
        BASE.batch(2),
        BASE.repeat(2),
        BASE.balanced(LABELS),
        ft.mix([BASE, BASE]),
    ],
    ids=lambda source: source.explain().title,
)
def test_and_through_nothing_else(source):
    assert source.runs() is None
