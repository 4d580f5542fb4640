"""source.split(…, groups=labels): all of a group in one part, parts near to their fractions, and nothing leaks."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laid import Laid, numbers, order_of

import functrain as ft

group_lists = st.lists(st.integers(0, 9), min_size=4, max_size=120).filter(lambda groups: len(set(groups)) >= 4)
seeds = st.one_of(st.none(), st.integers())


def parts_of(groups, fractions, seed):
    return [order_of(part) for part in numbers(len(groups)).split(*fractions, seed=seed, groups=groups)]


@given(group_lists, st.sampled_from([(0.5,), (0.8, 0.1), (0.25, 0.25, 0.25, 0.25), (0.7, 0.3)]), seeds)
def test_parts_are_disjoint_cover_and_share_no_group(groups, fractions, seed):
    parts = parts_of(groups, fractions, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    labels = np.array(groups)
    for one, two in itertools.combinations(parts, 2):
        assert not set(labels[one]) & set(labels[two])
    # None is empty, and elements keep their order.
    assert all(len(part) and (np.diff(part) > 0).all() for part in parts)


@given(group_lists, st.integers(0, 5), st.integers())
def test_shuffled_in_any_epoch_nothing_passes_from_one_part_into_another(groups, epoch, seed):
    parts = numbers(len(groups)).split(0.6, seed=1, groups=groups)
    labels = np.array(groups)
    seen = [set(labels[order_of(part.shuffle(seed), epoch)]) for part in parts]
    assert not seen[0] & seen[1]


@given(st.lists(st.integers(1, 30), min_size=2, max_size=9), st.sampled_from([0.5, 0.8, 0.9]), seeds)
def test_of_two_parts_no_exchange_of_one_group_or_two_comes_nearer(sizes, fraction, seed):
    """Against all moves of one group, and all exchanges of two, one by one."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    first = parts_of(groups, (fraction,), seed)[0]
    target = fraction * len(groups)
    inside = set(groups[first].tolist())
    outside = set(range(len(sizes))) - inside
    off = abs(len(first) - target)
    moves = [-sizes[group] for group in inside if len(inside) > 1] + [sizes[group] for group in outside if len(outside) > 1]
    exchanges = [sizes[come] - sizes[go] for go in inside for come in outside]
    assert all(abs(len(first) + by - target) >= off - 1e-9 for by in moves + exchanges)


def test_many_small_groups_give_the_fractions_exactly():
    groups = np.random.default_rng(0).integers(0, 500, 20_000)
    parts = parts_of(groups, (0.7, 0.2), seed=3)
    assert [len(part) for part in parts] == pytest.approx([14_000, 4_000, 2_000], abs=2)


def test_a_seed_draws_the_groups_and_the_order_of_elements_does_not_matter():
    groups = np.repeat([f"patient {n}" for n in range(40)], 5)
    found = [frozenset(groups[parts_of(groups, (0.5,), seed)[0]]) for seed in range(10)]
    assert len(set(found)) == 10
    mixed = np.random.default_rng(0).permutation(groups)
    assert frozenset(mixed[parts_of(mixed, (0.5,), 0)[0]]) == found[0]
    # Each group is in the first part about as often as not.
    often = [sum(f"patient {n}" in parts for parts in found) for n in range(40)]
    assert 0 < np.mean(np.array(often) == 5) < 1


def test_without_a_seed_groups_go_in_order_of_appearance():
    groups = ["c"] * 4 + ["a"] * 4 + ["b"] * 2
    assert [part.tolist() for part in parts_of(groups, (0.4, 0.4), None)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(2, 9)), min_size=1, max_size=4), st.integers(1, 15), st.integers())
def test_runs_of_a_part_are_what_is_left_of_the_whole(layout, size, seed):
    base = Laid(*layout)
    groups = np.arange(len(base)) // size
    if groups[-1] < 1:
        return
    for part in base.split(0.5, seed=seed, groups=groups):
        runs = part.runs()
        assert runs.length == len(part)
        kept = base.run_of()[order_of(part)]
        expected = np.unique(kept, return_counts=True)[1].tolist()
        lengths = [min(step, length - start) for length, step in runs.stretches for start in range(0, length, step)]
        assert lengths == expected
        assert sorted(order_of(part.shuffle(seed, within=200)).tolist()) == order_of(part).tolist()


def test_a_part_of_whole_files_is_one_stretch_a_file():
    base = Laid((100, 10), (50, 10), (30, 10))
    part = base.split(0.5, groups=np.repeat([0, 1, 2], [100, 50, 30]))[0]
    assert part.runs().stretches == ((100, 10),)


TEN = numbers(10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TEN.split(0.5, groups=[0] * 10), "1 groups cannot be split into 2 parts"),
        (lambda: TEN.split(0.2, 0.2, groups=[0, 1] * 5), "2 groups cannot be split into 3 parts"),
        (lambda: TEN.split(0.5, groups=[0] * 9), "the source has 10, got 9 labels"),
        (lambda: TEN.split(0.5, groups=[None] * 10), "labels are ints or strings|have no label"),
        (lambda: TEN.split(1.5, groups=[0, 1] * 5), "fractions above 0 that sum to at most 1"),
        (lambda: TEN.shuffle(0).split(0.5, groups=[0, 1] * 5), "split first, then shuffle"),
    ],
)
def test_what_it_refuses(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


def test_explain_tells_how_many_groups():
    train, test = TEN.split(0.8, seed=4, groups=torch.arange(10) // 2)
    assert "part: 8 of 10 elements, in 4 groups, drawn with seed 4" in str(ft.explain(train))
    assert "part: 2 of 10 elements, in 1 groups" in str(ft.explain(test))


def test_labels_are_given_by_a_source_and_never_by_name(tmp_path):
    people = np.array([3, 3, 1, 1, 2, 2])
    ft.h5write(tmp_path / "a.h5", {"x": np.arange(6), "person": people})
    with ft.hdf5(tmp_path / "a.h5", "x") as source, ft.hdf5(tmp_path / "a.h5", "person") as person:
        parts = source.split(0.5, seed=1, groups=person)
        assert [part(i) for part in parts for i in range(len(part))] == [
            part(i) for part in source.split(0.5, seed=1, groups=people) for i in range(len(part))
        ]
        ours, theirs = source.balanced(person), source.balanced(people)
        assert [int(x) for x in ours] == [int(x) for x in theirs]
        for wrong in (lambda: source.split(0.5, groups="person"), lambda: source.balanced("person")):
            with pytest.raises(ft.ArgumentError, match=r"got the name 'person'.*functrain\.hdf5\(path, 'person'\)"):
                wrong()
        with pytest.raises(ft.ArgumentError, match="labels are"):
            source.split(0.5, groups=ft.hdf5(tmp_path / "a.h5"))


def test_the_sources_of_a_concatenation_and_the_files_of_a_pattern_are_groups(tmp_path):
    joined = ft.concat([ft.arrays(torch.arange(n)) for n in (3, 1, 4)])
    assert joined.groups.tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    for name in "abc":
        ft.h5write(tmp_path / f"{name}.h5", {"x": np.full(4, ord(name))})
    with ft.hdf5(tmp_path / "*.h5", "x") as source:
        train, test = source.split(0.67, seed=0, groups=source.groups)
        assert not {int(x) for x in train} & {int(x) for x in test}
        assert (len(train), len(test)) == (8, 4)
