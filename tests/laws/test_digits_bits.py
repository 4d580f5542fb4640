"""The digits run ends in the same bits whoever computes it: any number of workers, threads or a loop, resumed or not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import functrain as ft
from examples.digits import Config, experiment
from functrain.testing import same_bits

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    # 22 steps, with dropout in the network; uncompiled, so that threads are threads.
    data = tmp_path_factory.mktemp("digits") / "digits.h5"
    return Config(data=data, epochs=1, parts=8, exact=True, dropout=0.3, compiled=False, how="loop", depth=0)


@pytest.fixture(scope="module")
def ended(config):
    return run(config)


def run(config, state=None, steps=None):
    program = experiment(config)
    state = program.initial() if state is None else state
    for state, _ in ft.fold(program.step, state, program.train, steps=program.steps if steps is None else steps):
        pass
    return state


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_any_number_of_workers(config, ended, workers):
    torch.set_num_threads(2)
    same_bits(f"{workers} workers", run(replace(config, how="threads", workers=workers)), ended)


def test_the_plan_that_is_chosen_and_prefetching(config, ended, tmp_path):
    program = experiment(replace(config, how="auto", workers=2, depth=3))
    trained = ft.train(program, ft.Run.create(tmp_path / "run", config={}, facts={}))
    same_bits("ft.train", trained.state, ended)


def test_resumed_with_another_number_of_workers(config, ended, tmp_path):
    first = run(replace(config, how="threads", workers=3), steps=17)
    ft.save_tree(tmp_path / "state.safetensors", first)
    again = ft.load_tree(tmp_path / "state.safetensors", experiment(config).initial())
    same_bits("resumed", run(replace(config, how="threads", workers=2), again, 22 - 17), ended)


def test_another_seed_ends_elsewhere(config, ended):
    with pytest.raises(ft.testing.LawError):
        same_bits("another seed", run(replace(config, seed=1)), ended)
