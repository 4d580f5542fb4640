"""Windows out of whole sequences: cut within each, of any part of them, and never stacked by mistake."""

import h5py
import numpy as np
import pytest
import torch

import functrain as ft
from functrain.data.laws import check_prefetch, check_source

LENGTHS = [7, 3, 12, 5, 9, 4]


def sources():
    """A source of steps for each episode: episode k has the numbers from 100 k on."""
    return [ft.arrays(torch.arange(100 * k, 100 * k + length)) for k, length in enumerate(LENGTHS)]


def flat():
    bounds = np.cumsum([0, *LENGTHS])
    return ft.ragged(torch.cat([source.leaves[0] for source in sources()]), bounds)


WHOLE = {
    "episodes": lambda: ft.episodes(sources()),
    "ragged": flat,
    "episodes of ragged": lambda: ft.episodes(flat()),
}
PARTS = {
    "all": lambda s: s,
    "contiguous": lambda s: s.split(0.5)[1],
    "drawn": lambda s: s.split(0.7, seed=3)[0],
    "by groups": lambda s: s.split(0.5, seed=1, groups=[0, 0, 1, 1, 2, 2])[0],
    "shard": lambda s: s.shard(1, 2),
    "shard of a part": lambda s: s.split(0.7, seed=3)[0].shard(0, 2),
    "one shuffled epoch": lambda s: s.shuffle(seed=0).epoch(2),
    "an epoch of a shuffled epoch": lambda s: s.split(0.7, seed=1)[0].shuffle(seed=0).epoch(2).epoch(5),
    "drawn with replacement": lambda s: s.weighted([1, 2, 0, 1, 0, 3], seed=0).epoch(1),
}


def cut(sequences, size, stride):
    return [s[i : i + size].tolist() for s in sequences for i in range(0, len(s) - size + 1, stride)]


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("size", "stride"), [(4, 4), (3, 1), (2, 3)])
def test_windows_of_a_part_are_cut_out_of_each_of_its_sequences(kind, part, size, stride):
    chosen = PARTS[part](WHOLE[kind]())
    whole = [sequence.tolist() for sequence in chosen]
    again = ft.episodes(chosen)
    assert [sequence.tolist() for sequence in again] == whole
    assert again.lengths.tolist() == [len(sequence) for sequence in whole]
    assert [int(step) for step in again.steps()] == [step for sequence in whole for step in sequence]
    windows = again.windows(size, stride)
    assert [window.tolist() for window in windows] == cut([torch.tensor(s) for s in whole], size, stride)
    assert [whole[k][0] // 100 for k in windows.groups] == [int(window[0]) // 100 for window in windows]
    train, test = windows.split(0.5, seed=0, groups=windows.groups)
    numbers = [{int(window[0]) // 100 for window in each} for each in (train, test)]
    # An episode that was drawn twice is two.
    assert part == "drawn with replacement" or not numbers[0] & numbers[1]


@pytest.mark.parametrize("kind", WHOLE)
def test_laws_hold_for_windows_of_parts(kind):
    episodes = ft.episodes(WHOLE[kind]().split(0.7, seed=3)[0])
    check_source(episodes)
    check_source(episodes.windows(3, stride=2).shuffle(seed=0).batch(2))
    check_prefetch(episodes.windows(3))


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize(
    "made",
    [
        lambda s: s.split(0.5, seed=0)[0],
        lambda s: s.shuffle(seed=0),
        lambda s: s.map(lambda steps: steps * 2),
        lambda s: s.epoch(1),
        lambda s: s.zip(s),
        lambda s: ft.concat([s, s]),
        lambda s: s.padded(12),
        lambda s: s.shard(0, 2).repeat(2),
    ],
)
def test_windows_never_stack_whole_sequences(kind, made):
    with pytest.raises(ft.ArgumentError, match=r"whole sequences.*groups=windows\.groups.*functrain\.episodes\(part\)"):
        made(WHOLE[kind]()).windows(5)


def test_windows_of_ragged_name_the_way():
    with pytest.raises(ft.ArgumentError, match="whole sequences"):
        flat().windows(5)


def test_what_has_no_episodes_is_refused():
    episodes = ft.episodes(sources())
    for wrong, message in [
        (lambda: ft.episodes(episodes.shuffle(seed=0)), r"changes with the epoch: shuffle the windows.*source\.epoch\(0\)"),
        (lambda: ft.episodes(episodes.map(lambda steps: steps)), r"whole sequences.*\.map"),
        (lambda: ft.episodes(sources()[0]), "one for each episode"),
        (lambda: ft.episodes([episodes, episodes.split(0.5)[0]]), "whole sequences already"),
        (lambda: ft.episodes(ft.ragged(torch.arange(3), [0, 3, 3])), "episode 1 has no steps"),
    ]:
        with pytest.raises(ft.ArgumentError, match=message):
            wrong()


def test_parts_of_files_and_steps_that_change_with_the_epoch(tmp_path):
    for k, source in enumerate(sources()):
        ft.h5write(tmp_path / f"{k}.h5", {"x": source.leaves[0].numpy()})
    with ft.hdf5(tmp_path / "*.h5") as files:
        test = ft.episodes(files).split(0.5)[1]
        assert [w["x"].tolist() for w in ft.episodes(test).windows(4)] == cut([s.leaves[0] for s in sources()[3:]], 4, 4)
    moving = ft.episodes([source.shuffle(seed=0) for source in sources()])
    fixed = moving.epoch(3)
    assert [s.tolist() for s in ft.episodes(fixed)] == [s.tolist() for s in fixed] != [s.tolist() for s in moving]


def test_windows_of_ragged_know_the_chunks_of_its_values(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(40), chunks=(8,), compression="gzip")
    with ft.hdf5(tmp_path / "a.h5", "x") as values:
        sequences = ft.ragged(values, [4, 11, 20, 36])
        assert ft.episodes(sequences).steps().runs().stretches == ((4, 4), (28, 8))
        assert ft.episodes(sequences.split(0.67, groups=[0, 1, 0])[0]).steps().runs() is None


def test_sequences_of_variable_length_are_not_stacked_and_bytes_are_decoded(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for name, dtype in {"waves": "f4", "bytes": "u1"}.items():
            dataset = file.create_dataset(name, (6,), h5py.vlen_dtype(np.dtype(dtype)))
            for i in range(6):
                dataset[i] = np.full(i + 1, i)
    with ft.hdf5(tmp_path / "a.h5", "waves") as waves, ft.hdf5(tmp_path / "a.h5", "bytes") as images:
        for source in (waves, waves.shuffle(seed=0), waves.split(0.5)[0]):
            with pytest.raises(ft.ArgumentError, match="whole sequences"):
                source.windows(2)
        frames = images.map(lambda data: data.float().mean())
        assert [window.tolist() for window in frames.windows(3)] == [[0, 1, 2], [3, 4, 5]]
