"""Sources one after the other, and episodes: whole, as windows, step by step."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functrain.core.errors import ArgumentError, TreeError
from functrain.data import Source, arrays, concat, episodes
from functrain.data.laws import check_prefetch, check_source


class Told(Source):
    """Numbers from `start` on, that notes which were read at once and which were announced."""

    def __init__(self, start, length):
        self.start, self.length, self.taken, self.announced = start, length, [], []

    def get(self, i, epoch):
        return torch.tensor(self.start + i)

    def take(self, indices, epoch):
        self.taken.append(indices.tolist())
        return torch.from_numpy(self.start + indices)

    def announce(self, indices, epoch):
        self.announced.append(indices.tolist())


def told(lengths):
    bounds = np.cumsum([0, *lengths])
    return [Told(int(start), length) for start, length in zip(bounds, lengths)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.data())
def test_concat_is_the_elements_of_all(lengths, data):
    source = concat(told(lengths))
    total = sum(lengths)
    assert [int(x) for x in source] == list(range(total)) == [int(source(i)) for i in range(len(source))]
    if total:
        indices = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=12)))
        assert source.take(indices, 0).tolist() == indices.tolist()
        assert [int(x) for x in source.elements(indices, 0)] == indices.tolist()


def test_laws_hold_for_concatenations_of_all_kinds():
    parts = [arrays({"x": torch.randn(n, 2), "y": torch.arange(n)}) for n in (3, 1, 5)]
    check_source(concat(parts))
    check_source(concat([part.shuffle(seed=n) for n, part in enumerate(parts)]).batch(2))
    check_source(concat([concat(parts).map(lambda e: e["y"]), arrays(torch.arange(4))]))
    check_prefetch(concat(parts).shuffle(seed=0).batch(2))


def test_each_source_is_read_once_and_told_what_comes():
    sources = told([4, 3, 5])
    joined = concat(sources)
    indices = np.array([11, 0, 5, 3, 11, 8])
    assert joined.take(indices, 0).tolist() == indices.tolist()
    assert [source.taken for source in sources] == [[[0, 3]], [[1]], [[4, 4, 1]]]
    joined.announce(indices, 0)
    assert [source.announced for source in sources] == [[[0, 3]], [[1]], [[4, 4, 1]]]


def test_sources_that_disagree_are_named():
    first = arrays({"x": torch.zeros(2, 3)})
    for other, message in [
        (arrays({"x": torch.zeros(2, 4)}), r"source 0 and source 1 disagree \(x: \(3,\) float32 and \(4,\) float32\)"),
        (arrays({"x": torch.zeros(2, 3, dtype=torch.float64)}), "float32 and .* float64"),
        (arrays({"y": torch.zeros(2, 3)}), "missing 'x'; unexpected 'y'"),
    ]:
        with pytest.raises(TreeError, match=message):
            concat([first, other]).batch(4)(0)


def test_arguments_of_concat():
    for given_, message in [
        ([], "at least one source"),
        (arrays(torch.arange(3)), "takes a list"),
        ([torch.arange(3)], "got Tensor at place 0"),
        ([arrays(torch.arange(3)).repeat()], "needs a source with an end"),
        ([arrays(torch.arange(3)).batch(2).deferred()], "deferred"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            concat(given_)


def test_explain_abbreviates_many_sources():
    text = str(concat(told([2] * 3)).explain())
    assert text.count("told") == 3
    text = str(concat(told([2] * 100)).explain())
    assert text.count("told") == 4
    assert "… 96 more" in text
    assert "length: 192" in text
    assert "sources: 100, of 2 elements" in text


# --- episodes -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 6))
def test_windows_never_cross_from_one_episode_into_the_next(lengths, size, stride):
    source = episodes(told(lengths))
    assert source.lengths.tolist() == lengths
    starts = np.cumsum([0, *lengths])
    whole = [list(range(start, start + length)) for start, length in zip(starts.tolist(), lengths)]
    assert [episode.tolist() for episode in source] == whole
    assert [int(step) for step in source.steps()] == [step for steps in whole for step in steps]
    expected = [steps[at : at + size] for steps in whole for at in range(0, len(steps) - size + 1, stride)]
    if not expected:
        with pytest.raises(ArgumentError, match=f"the longest has {max(lengths)} steps"):
            source.windows(size, stride)
        return
    windows = source.windows(size, stride)
    assert [window.tolist() for window in windows] == expected
    assert windows.take(np.arange(len(windows))[::-1].copy(), 0).tolist() == expected[::-1]
    seen = {step for window in expected for step in window}
    begun = np.array([window[0] for window in expected])
    for step in range(1, sum(lengths) + 1):
        assert windows.before(np.array([step])).tolist() == [int((begun < step).sum())]
    facts = windows.explain().facts
    assert facts["left over"].startswith(f"{sum(lengths) - len(seen):,} steps")
    short = sum(length < size for length in lengths)
    assert (f"{short} episodes that are too short" in facts["left over"]) == (short > 0)


def test_laws_hold_for_episodes():
    source = episodes([arrays({"x": torch.randn(n, 2), "y": torch.arange(n)}) for n in (3, 1, 5, 2)])
    check_source(source)
    check_source(source.windows(2, stride=1).shuffle(seed=0).batch(2))
    check_source(source.padded(5).shuffle(seed=1).batch(3))
    check_prefetch(source.windows(2))


def test_episodes_of_a_concatenation_are_its_sources():
    parts = told([3, 2])
    assert [episode.tolist() for episode in episodes(concat(parts))] == [[0, 1, 2], [3, 4]]
    for given_, message in [
        (arrays(torch.arange(3)), "episodes takes a list of sources"),
        ([], "at least one source"),
        (told([2, 0]), "episode 1 has no steps"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            episodes(given_)
    with pytest.raises(ArgumentError, match="stride must be at least 1"):
        episodes(parts).windows(2, 0)
