"""source.balanced: every class as often, every element of a class as often, and nothing but arithmetic on positions."""

import concurrent.futures
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import functrain as ft
from functrain.data import Source, arrays
from functrain.data.laws import check_prefetch, check_source, same
from functrain.data.permutation import permuted, permuted_each


def numbered(labels):
    return arrays(torch.arange(len(labels)))


def seen(source, epochs=1):
    return [int(source.get(i, epoch)) for epoch in range(epochs) for i in range(len(source))]


# Uneven classes, whose numbers have gaps.
label_lists = st.lists(st.sampled_from([-7, 0, 3, 3, 3, 3, 40]), min_size=1, max_size=60)
LABELS = [1] * 17 + [0] * 4 + [5] * 9 + [2]


# --- laws ---------------------------------------------------------------------------------------------------------


@given(label_lists, st.integers(), st.integers(0, 5))
def test_every_aligned_window_holds_every_class_once_in_ascending_order(labels, seed, epoch):
    classes = sorted(set(labels))
    source = numbered(labels).balanced(labels, seed).epoch(epoch)
    assert len(source) == len(classes) * -(-len(labels) // len(classes))
    got = [labels[int(n)] for n in source]
    assert got == classes * (len(source) // len(classes))


@given(label_lists, st.integers(), st.integers(1, 5), st.integers(0, 40))
def test_every_element_of_a_class_comes_as_often_as_every_other(labels, seed, epochs, more):
    length = len(set(labels)) + more
    drawn = seen(numbered(labels).balanced(labels, seed, length=length), epochs)
    # Not only at the end: whenever one looks.
    for stop in sorted({len(drawn), len(drawn) // 2, len(drawn) // 3}):
        counts = Counter(drawn[:stop])
        for name in set(labels):
            members = [counts[n] for n, label in enumerate(labels) if label == name]
            assert max(members) - min(members) <= 1
    for name in set(labels):
        of_class = [n for n in drawn if labels[n] == name]
        size = labels.count(name)
        for start in range(0, len(of_class), size):
            chunk = of_class[start : start + size]
            assert len(set(chunk)) == len(chunk), "an element came again before its class was through"


@given(label_lists, st.integers(1, 6), st.integers(1, 3), st.integers(0, 3))
def test_batches_of_a_multiple_of_the_classes_hold_as_many_of_each(labels, times, ranks, epoch):
    classes = len(set(labels))
    batches = numbered(labels).balanced(labels, 1).batch(classes * times)
    for rank in range(ranks):
        for batch in batches.shard(rank, ranks).epoch(epoch):
            counts = Counter(labels[n] for n in batch.tolist())
            assert set(counts.values()) == {len(batch) // classes}
            assert len(counts) == classes


@given(label_lists, st.integers(), st.integers(0, 3), st.integers(0, 10**4), st.integers(1, 5))
def test_elements_follow_the_formula(labels, seed, epoch, extra, stride):
    """Against loops over lists: pass after pass of each class, its order drawn by `permuted` alone."""
    classes = sorted(set(labels))
    length = len(classes) + extra % 50
    source = numbered(labels).balanced(labels, seed, length=length)
    keys = ft.random.split(ft.random.key(seed), len(classes)).tolist()
    places = np.arange(0, length, stride)
    expected = []
    for i in places.tolist():
        c = i % len(classes)
        members = [n for n, label in enumerate(labels) if label == classes[c]]
        before = epoch * len(range(c, length, len(classes))) + i // len(classes)
        order = permuted(np.arange(len(members)), len(members), keys[c], before // len(members))
        expected.append(members[int(order[before % len(members)])])
    assert source.take(places, epoch).tolist() == expected
    assert [int(source.get(int(i), epoch)) for i in places] == expected


@pytest.mark.parametrize(
    "make",
    [
        lambda s: s,
        lambda s: s.batch(8),
        lambda s: s.batch(5).deferred(),
        lambda s: s.shuffle(1).shard(1, 2),
        lambda s: s.repeat(2).batch(12),
        lambda s: s.repeat().batch(8),
        lambda s: s.epoch(2),
        lambda s: s.windows(4, stride=3),
        lambda s: s.map(lambda x: (x, 2 * x)),
    ],
)
@pytest.mark.parametrize("length", [None, 13])
def test_it_is_a_source_like_any_other(make, length):
    check_source(make(numbered(LABELS).balanced(LABELS, 3, length=length)))


def test_it_can_be_prefetched():
    check_prefetch(numbered(LABELS).balanced(LABELS, 3).batch(4))


@given(st.integers(2, 5), st.integers(1, 4), st.integers(0, 2))
def test_shards_and_parts_of_a_split_are_balanced_with_their_own_labels(classes, ranks, epoch):
    labels = np.arange(40) % classes
    for rank in range(ranks):
        shard = numbered(labels).shard(rank, ranks)
        mine = labels[rank::ranks]
        held = sorted(set(mine.tolist()))
        got = [int(labels[int(n)]) for n in shard.balanced(mine).epoch(epoch)]
        assert got == held * (len(got) // len(held))
    data = arrays({"n": torch.arange(40), "y": torch.from_numpy(labels)})
    for part in data.split(0.7, seed=2):
        mine = torch.stack([element["y"] for element in part])
        got = [int(element["y"]) for element in part.balanced(mine).epoch(epoch)]
        assert got == sorted(set(mine.tolist())) * (len(got) // len(set(mine.tolist())))


def test_blocks_of_positions_and_scattered_ones_agree():
    labels = np.random.default_rng(0).integers(0, 7, 10_000)
    source = numbered(labels).balanced(labels)
    neighbours = np.concatenate(
        [source.take(np.arange(start, min(start + 100, len(source))), 1) for start in range(0, len(source), 100)]
    )
    places = np.random.default_rng(1).permutation(len(source))
    assert np.array_equal(source.take(places, 1), neighbours[places])


# --- orders -------------------------------------------------------------------------------------------------------


def test_orders_are_those_of_their_seed_epoch_and_class():
    labels = [0] * 30 + [1] * 30
    source = numbered(labels).balanced(labels, 1)
    again = numbered(labels).balanced(labels, 1)
    assert seen(source, 3) == seen(again, 3)
    orders = [tuple(seen(numbered(labels).balanced(labels, seed).epoch(epoch))) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == 25
    # Two classes of one size do not go through their elements in step.
    order = np.array(seen(source))
    assert np.mean(order[0::2] == order[1::2] - 30) < 0.2


@pytest.mark.parametrize("size", [2, 3, 5, 300])
def test_every_place_of_a_pass_sees_every_element_equally_often(size):
    """Chi-square over passes, five standard deviations; the seed is fixed, so this never flakes."""
    passes = 400
    labels = [0] * size
    drawn = numbered(labels).balanced(labels, 9, length=size * passes)
    order = drawn.take(np.arange(size * passes), 0).reshape(passes, size).numpy()
    counts = np.zeros((size, size))
    for row in order:
        counts[np.arange(size), row] += 1
    freedom = (size - 1) ** 2
    assert ((counts - passes / size) ** 2 / (passes / size)).sum() < freedom + 5 * np.sqrt(2 * freedom)


def test_the_order_is_the_one_it_always_was():
    """A run is resumed by its position alone: the order of a seed must not change between versions."""
    assert seen(numbered(LABELS).balanced(LABELS, 5, length=12), 2) == [
        18, 5, 30, 27, 17, 14, 30, 29, 19, 11, 30, 28,
        20, 1, 30, 25, 20, 13, 30, 26, 18, 10, 30, 21,
    ]  # fmt: skip


@given(
    st.lists(
        st.tuples(
            st.one_of(st.integers(1, 300), st.sampled_from([2**16, 2**16 + 1, 10**12])),
            st.integers(-(2**63), 2**63 - 1),
            st.integers(0, 10**9),
            st.floats(0, 1, exclude_max=True),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_many_permutations_at_once_are_each_of_them(rows):
    lengths, seeds, epochs = (np.array([row[n] for row in rows]) for n in range(3))
    places = np.array([int(row[3] * row[0]) for row in rows])
    expected = [int(permuted(places[k : k + 1], *map(int, (lengths[k], seeds[k], epochs[k])))[0]) for k in range(len(rows))]
    assert permuted_each(places, lengths, seeds, epochs).tolist() == expected


def test_threads_see_one_order():
    source = numbered(LABELS).balanced(LABELS, 5).batch(4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: source.get(n % 8, n % 7).tolist(), range(60)))
    assert found == [source.get(n % 8, n % 7).tolist() for n in range(60)]


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [2, 0, 0, 1, 0, 0],
        np.array([2, 0, 0, 1, 0, 0], dtype=np.uint8),
        torch.tensor([2, 0, 0, 1, 0, 0], dtype=torch.int32),
        torch.tensor([2.0, 0, 0, 1, 0, 0], dtype=torch.bfloat16, requires_grad=True),
        ["dog", "ant", "ant", "cat", "ant", "ant"],
        np.array(["dog", "ant", "ant", "cat", "ant", "ant"], dtype=object),
        np.array([b"dog", b"ant", b"ant", b"cat", b"ant", b"ant"]),
    ],
)
def test_labels_are_ints_or_strings_in_any_array(labels):
    expected = numbered(range(6)).balanced([2, 0, 0, 1, 0, 0], 4)
    assert seen(numbered(range(6)).balanced(labels, 4)) == seen(expected)


def test_labels_may_be_true_or_false_and_one_class_is_a_shuffle():
    labels = torch.tensor([True, False, False, False])
    assert [bool(labels[n]) for n in seen(numbered(labels).balanced(labels))] == [False, True] * 2
    alone = numbered(range(9)).balanced(np.zeros(9), 1)
    assert sorted(seen(alone)) == sorted(seen(alone.epoch(1))) == list(range(9))
    assert seen(alone) != seen(alone.epoch(1))


def test_labels_are_copied_into_the_order():
    labels = np.array([0, 1, 1, 1])
    source = numbered(labels).balanced(labels)
    before = seen(source)
    labels[:] = 0
    assert seen(source) == before


class Empty(Source):
    length = 0


TEN = arrays(torch.arange(10))
OBJECTS = np.array(["a", None, "b"] + ["a"] * 7, dtype=object)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TEN.balanced([0] * 9), "labels are one for each element: the source has 10, got 9 labels"),
        (lambda: TEN.balanced(np.eye(10)), r"labels are \(n,\), one for each element, got \(10, 10\).*argmax"),
        (lambda: TEN.balanced(3), r"labels are \(n,\), one for each element, got \(\)"),
        (lambda: TEN.balanced([0.0] * 7 + [float("nan")] * 3), r"3 of 10 elements have no label \(label 7 is nan\)"),
        (lambda: TEN.balanced(torch.tensor([0.0] * 9 + [float("nan")])), r"1 of 10 elements have no label \(label 9 is nan\)"),
        (lambda: TEN.balanced(OBJECTS), r"1 of 10 elements have no label \(label 1 is None\)"),
        (lambda: TEN.balanced(np.array([1, "a"] * 5, dtype=object)), "ints or strings, of one kind"),
        (lambda: TEN.balanced([[0], [0, 1]] * 5), r"an array \(n,\) of ints or strings"),
        (lambda: TEN.balanced(np.zeros(10, dtype="M8[s]")), "ints or strings, got ndarray of datetime64"),
        (lambda: Empty().balanced([]), "without elements has no classes"),
        (lambda: TEN.repeat().balanced([0] * 10), "balanced needs a source with an end: balanced first, then repeat"),
        (lambda: TEN.shuffle(0).balanced([0] * 10), "order of this source changes with the epoch.*leave .shuffle out"),
        (lambda: TEN.balanced([0, 1] * 5, length=1), "length must be at least 2, the number of classes, got 1"),
        (lambda: TEN.balanced([0, 1] * 5, length=0), "length must be at least 1, got 0"),
        (lambda: TEN.balanced([0, 1] * 5, length=2.5), "length must be an int, got 2.5"),
        (lambda: TEN.balanced([0, 1] * 5, seed=None), "seed must be an int, got None"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_explain_tells_the_classes():
    labels = ["cat"] * 3 + ["dog"] * 2
    text = str(ft.explain(numbered(labels).balanced(labels, 8)))
    assert "classes: 2 (cat: 3, dog: 2)" in text
    assert "seed 8" in text
    assert "length: 6" in text
    many = list(range(20))
    assert "classes: 20 (0: 1, 1: 1, 2: 1, …, 18: 1, 19: 1)" in str(ft.explain(numbered(many).balanced(many)))


def test_a_rare_class_is_learnt_from_balanced_batches():
    """A story: one in fifty is positive. The mean of the labels that a model sees is a half."""
    labels = (torch.arange(500) % 50 == 0).long()
    loss = lambda params, batch: (batch["y"].float() - params) ** 2  # noqa: E731
    step = ft.step(ft.grad(loss), ft.optim.sgd(0.2))
    source = arrays({"y": labels}).balanced(labels, 0).batch(20)
    state = step.init(torch.tensor(0.0))
    for state, _ in ft.fold(step, state, source, steps=40):
        pass
    assert float(state.params) == pytest.approx(0.5, abs=1e-4)
    assert same(source(3), source(3))
