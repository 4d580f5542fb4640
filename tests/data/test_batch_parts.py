"""source.batch(n).part(rank, size): each batch once, in equally many steps, whatever the number of ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laid import numbers

import functrain as ft
from functrain.core.deferred import drawn


@given(st.integers(1, 200), st.integers(1, 40), st.booleans(), st.integers(1, 7), st.integers(), st.integers(0, 5))
def test_the_parts_of_all_ranks_are_each_batch(length, size, drop_last, ranks, seed, epoch):
    last = length % size if length % size and not drop_last else size
    if (drop_last and length < size) or last < ranks:
        return
    batches = numbers(length).shuffle(seed).batch(size, drop_last=drop_last)
    parts = [batches.part(rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {len(batches)}
    for i in range(len(batches)):
        mine = [part.get(i, epoch) for part in parts]
        assert torch.equal(torch.cat(mine), batches.get(i, epoch))
        assert max(map(len, mine)) - min(map(len, mine)) <= 1
        assert all(torch.equal(drawn(batches.deferred().part(r, ranks).get(i, epoch)), mine[r]) for r in range(ranks))
        assert all(torch.equal(drawn(batches.part(r, ranks).deferred().get(i, epoch)), mine[r]) for r in range(ranks))


def test_the_parts_are_those_that_a_gradient_in_parts_takes():
    batches = numbers(100).shuffle(0).batch(10)
    ranks = [batches.part(rank, 3)(4) for rank in range(3)]
    assert all(map(torch.equal, ranks, [draw() for draw in batches.deferred()(4).parts(3)]))


def test_a_rank_alone_has_it_all_and_map_comes_before_or_after():
    batches = numbers(23).shuffle(1).batch(5)
    assert all(map(torch.equal, batches.part(0, 1), batches))
    before = numbers(23).shuffle(1).map(lambda n: n * 2).batch(5).part(1, 3)
    after = numbers(23).shuffle(1).batch(5).part(1, 3).map(lambda n: n * 2)
    assert all(map(torch.equal, before, after))
    assert torch.equal(before(7 - 5), batches(2)[2:4] * 2)


def test_many_whole_parts_are_one_read():
    base = numbers(23)
    asked = []
    base.take = lambda indices, epoch: asked.append(indices) or torch.from_numpy(indices)
    part = base.batch(5).part(1, 3)
    assert part.batch(2)(1).tolist() == [[12, 13], [17, 18]]
    assert len(asked) == 1


def test_batches_without_end_have_parts_without_end():
    part = numbers(10).repeat().batch(7).part(1, 2)
    assert part.length is None
    assert part(10).tolist() == [4, 5, 6]


BATCHES = numbers(10).batch(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BATCHES.part(0, 3), r"the last batch of 4 has 2 rows, too few for 3 ranks: drop_last=True, or another size"),
        (lambda: BATCHES.part(0, 5), r"the last batch of 4 has 2 rows, too few for 5 ranks"),
        (lambda: numbers(10).batch(4, drop_last=True).part(0, 5), "batches have 4 rows, too few for 5 ranks: another size"),
        (lambda: BATCHES.deferred().part(0, 3), "the last batch of 4 has 2 rows"),
        (lambda: BATCHES.part(2, 2), "rank must lie in 0 … 1, got 2 of size 2"),
        (lambda: BATCHES.part(-1, 2), "rank must be at least 0"),
        (lambda: BATCHES.part(0, 0), "size must be at least 1"),
        (lambda: BATCHES.part(True, 2), "rank must be an int"),
        (lambda: BATCHES.part(0, 2).part(0, 2), "a part already, of rank 0 of 2"),
        (lambda: numbers(10).part(0, 2), r"right after .batch\(size\)"),
        (lambda: BATCHES.map(lambda n: n).part(0, 2), r"right after .batch\(size\)"),
        (lambda: BATCHES.shuffle(0).part(0, 2), r"right after .batch\(size\)"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_explain_tells_the_rank():
    text = str(ft.explain(BATCHES.part(1, 2)))
    assert "part: rank 1 of 2: 2 rows of each, contiguous" in text
    assert "batches: 3 of 4" in text
