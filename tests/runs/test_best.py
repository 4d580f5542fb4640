"""The best-state keeper: what is better, what is kept, and a file that is whole at any time."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import keyed_loss, net_batch, net_params

import functrain as ft
from functrain.testing import same_bits

VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.nan, math.inf, -math.inf]), st.floats(allow_nan=True, allow_infinity=True)
)


def train():
    return ft.step(ft.grad(keyed_loss), ft.optim.adam(0.05), donate=True)


@given(values=st.lists(VALUES, max_size=12), maximize=st.booleans())
def test_what_is_kept_is_the_first_of_the_best_finite_values(values, maximize):
    best = ft.Best("score", maximize=maximize)
    taken = [place for place, value in enumerate(values) if best.offer(value, {"place": torch.tensor(place)})]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert (taken, best.value, best.state, best.position) == ([], None, None, None)
        return
    top = max(finite) if maximize else min(finite)
    assert best.value == top
    assert best.state["place"].item() == values.index(top) == taken[-1]
    for place in range(len(values)):
        before = [value for value in values[:place] if math.isfinite(value)]
        now = values[place]
        better = math.isfinite(now) and (not before or (now > max(before) if maximize else now < min(before)))
        assert (place in taken) == better


def test_a_state_that_is_donated_later_stays():
    step, best = train(), ft.Best("loss", maximize=False)
    state = step.init(net_params(), seed=1)
    copies = []
    for place in range(4):
        state, _ = step(state, net_batch(3, place))
        copies.append(ft.tree.map(torch.clone, state))
        assert best.offer(torch.tensor(3.0 - place if place < 2 else 7.0), state) == (place < 2)
    assert (best.value, best.position) == (2.0, 2)
    same_bits("the best", best.state, copies[1])
    assert repr(best) == "<Best loss: 2 at position 2>"
    given = step.init(net_params())
    step(given, net_batch(2))
    with pytest.raises(ft.DonatedError):
        best.offer(0.0, given)
    assert best.value == 2.0


def test_what_cannot_be_offered():
    best = ft.Best()
    assert repr(best) == "<Best accuracy: none yet>"
    for value in ("0.5", None, torch.ones(2), [1.0]):
        with pytest.raises(ft.ArgumentError, match="the accuracy offered"):
            best.offer(value, {"w": torch.ones(1)})
    with pytest.raises(ft.TreeError, match="all leaves to store must be tensors"):
        best.offer(0.5, {"w": 1.0})
    assert best.value is None
    for bad in ("", None, 3):
        with pytest.raises(ft.ArgumentError, match="name of a measure"):
            ft.Best(bad)
    with pytest.raises(ft.ArgumentError, match="maximize is True"):
        ft.Best("loss", maximize="no")


def test_a_graph_is_not_kept():
    best, leaf = ft.Best(), torch.ones(2, requires_grad=True)
    best.offer(1, {"w": leaf * 2})
    assert not best.state["w"].requires_grad


# --- on disk ------------------------------------------------------------------------------------------------------


def test_the_file_is_the_best_and_goes_on(tmp_path: Path):
    step, folder = train(), tmp_path / "new" / "folder"
    best = ft.Best("loss", maximize=False, directory=folder)
    state = like = step.init(net_params(), seed=1)
    like = ft.tree.map(torch.zeros_like, like)
    for place, value in enumerate([0.1 + 0.2, 0.7, math.nan]):
        state, _ = step(state, net_batch(3, place))
        best.offer(value, state)
    again = ft.Best.load(folder, like)
    same_bits("the state", again.state, best.state)
    assert (again.value, again.position, again.score, again.maximize) == (0.1 + 0.2, 1, "loss", False)
    same_bits("for others", ft.load_tree(folder / "best.safetensors", like), best.state)
    assert not again.offer(0.1 + 0.2, state)
    assert again.offer(-4, state)
    assert ft.Best.load(folder, like).value == -4.0
    assert [path.name for path in folder.iterdir()] == ["best.safetensors"]


def test_a_best_state_is_not_given_up_unseen(tmp_path: Path):
    ft.Best(directory=tmp_path).offer(0.9, {"w": torch.ones(2)})
    with pytest.raises(ft.RunError, match=r"Best\.load\(directory, like=state\)"):
        ft.Best(directory=tmp_path)
    with pytest.raises(ft.TreeError, match="another tree"):
        ft.Best.load(tmp_path, {"w": torch.ones(3)})


def test_what_is_no_best_state_is_not_loaded(tmp_path: Path):
    like = {"w": torch.ones(2)}
    with pytest.raises(ft.RunError, match=r"best\.safetensors"):
        ft.Best.load(tmp_path, like)
    ft.save_tree(tmp_path / "best.safetensors", like)
    with pytest.raises(ft.RunError, match="not the best state that a Best has written"):
        ft.Best.load(tmp_path, like)
    ft.save_tree(tmp_path / "best.safetensors", like, {"functrain.best": '{"score": "loss"}'})
    with pytest.raises(ft.RunError, match="not the best state that a Best has written"):
        ft.Best.load(tmp_path, like)
    (tmp_path / "best.safetensors").write_bytes(b"torn")
    with pytest.raises(ft.RunError, match="could not read"):
        ft.Best.load(tmp_path, like)


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path):
    best = ft.Best(directory=tmp_path)
    best.offer(0.5, {"w": torch.ones(2)})
    with pytest.raises(ft.TreeError, match="safetensors cannot hold"):
        best.offer(0.9, {"w": torch.ones(2, dtype=torch.complex128)})
    assert best.value == 0.5
    assert ft.Best.load(tmp_path, {"w": torch.zeros(2)}).value == 0.5
    (tmp_path / "file").write_text("")
    with pytest.raises(ft.RunError, match="could not make the directory"):
        ft.Best(directory=tmp_path / "file" / "below").offer(0.5, {"w": torch.ones(2)})


def test_bare_params_have_no_position(tmp_path: Path):
    best = ft.Best(directory=tmp_path)
    best.offer(0.5, torch.arange(3))
    found = ft.Best.load(tmp_path, torch.arange(3))
    assert found.position is None
    same_bits("params", found.state, torch.arange(3))
