"""Memory: micro-batches take that of one, and what does not fit at once is taken in smaller groups, with the same result."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from allocated import peak

import functrain as ft
from functrain.engine.memory import fewer, out_of_memory
from functrain.testing import equal

# --- micro-batches -------------------------------------------------------------------------------------------------

LAYERS, WIDTH, ROWS, MICRO = 4, 8, 4096, 4


@pytest.fixture
def chain():
    """A chain of layers that keeps much, with params that weigh next to nothing, and a batch."""
    keys = ft.random.split(ft.random.key(0), LAYERS)
    params = [ft.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5 for key in keys]

    def loss(params, x):
        for w in params:
            x = torch.tanh(x @ w)
        return x.square().sum(1)

    return ft.grad(loss), params, ft.random.normal(ft.random.key(1), (ROWS, WIDTH))


@pytest.mark.parametrize(
    "micro",
    [
        lambda grad: ft.accumulate(grad, MICRO),
        lambda grad: ft.parallel(grad, MICRO, how="loop", exact=True),
        lambda grad: ft.parallel(grad, MICRO, workers=1, exact=True),
        lambda grad: ft.parallel(grad, MICRO, ft.reduce.median, how="loop"),
    ],
    ids=["accumulate", "exact", "one worker", "gathered"],
)
def test_micro_batches_take_the_memory_of_one(chain, micro):
    grad, params, x = chain
    whole, one = peak(lambda: grad(params, x)), peak(lambda: grad(params, x[: ROWS // MICRO]))
    taken = micro(grad)
    gc.disable()
    try:
        together = peak(lambda: taken(params, x))
    finally:
        gc.enable()
    assert whole > LAYERS * x.nbytes
    assert together < 1.2 * one
    assert together < 2 * whole / MICRO


def test_compiled_micro_batches_take_the_memory_of_one(chain):
    grad, params, x = chain
    step = ft.step(ft.accumulate(grad, MICRO), ft.optim.sgd(0.1))
    compiled, state = ft.compiled(step, donate=False), step.init(params)
    new, _ = compiled.update(state, x)
    equal("params", new.params, step.update(state, x)[0].params)
    one = peak(lambda: grad(params, x[: ROWS // MICRO]))
    assert peak(lambda: compiled.update(state, x)) < 1.5 * one


# --- out of memory -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def starved():
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of address space are tested on Linux")
    tests = Path(__file__).parents[1]
    # Each thread's arena would reserve 64 MiB of address space, and freed memory would stay in it.
    quiet = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, tests / "starved.py"], capture_output=True, text=True, timeout=300, env=os.environ | quiet
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


HALVED = {
    "threads": ["4 parts alive (threads): 2 from now on; take workers=2"],
    "two threads": ["2 parts alive (threads): 1 from now on; take workers=1"],
    "drawn": ["4 parts alive (threads): 2 from now on; take workers=2"],
    "stacks": [
        "4 parts alive (threads): 2 from now on; take workers=2",
        "2 parts alive (threads): 1 from now on; take workers=1",
    ],
    "vmap": ['4 parts alive (vmap): 2 from now on; take how="loop"'],
    "fused": ['4 parts alive (fused): 2 from now on; take how="loop"'],
    "finished": ['4 parts alive (fused): 2 from now on; take how="loop"'],
}


@pytest.mark.parametrize("name", HALVED)
def test_out_of_memory_half_as_many_parts_are_alive(starved, name):
    facts = starved[name]
    assert "error" not in facts, facts["error"]
    first, second = facts["warnings"]
    assert len(first) == len(HALVED[name])
    for warning, text in zip(first, HALVED[name]):
        assert warning.startswith(f"RuntimeWarning: out of memory with {text}")
    # It remembers: the second call does not try in vain.
    assert second == []
    if name in ("fused", "finished", "vmap"):
        for result in facts["starved"]:
            for leaf, expected in zip(result, facts["plenty"], strict=True):
                np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)
    else:
        assert facts["starved"] == [facts["plenty"]] * 2


@pytest.mark.parametrize("name", ["too large", "too large, fused", "too large, loop"])
def test_a_part_that_does_not_fit_alone_is_the_allocators_error(starved, name):
    facts = starved[name]
    assert facts["starved"] == []
    assert facts["error"].startswith("RuntimeError: ")
    assert "memory" in facts["error"]
    assert {"loss", "keyed_loss"} & set(facts["frames"]) == {"loss"}
    assert "in part 1 of 4 (2 examples) of a batch" in facts["notes"]
    (advice,) = [note for note in facts["notes"] if "does not fit" in note]
    assert "take more parts or a smaller batch" in advice
    # From four to two to one, and there it stays.
    count = 0 if name == "too large, loop" else 2
    assert [len(warnings) for warnings in facts["warnings"]] == [count, 0]


@pytest.mark.parametrize("name", [*HALVED, "too large", "too large, fused", "too large, loop"])
def test_nothing_is_left_behind(starved, name):
    before, after = starved[name]["threads"]
    assert before == after
    assert starved[name]["left"] < 0.5


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (ft.LossError("the loss says: out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, is_memory):
    assert out_of_memory(error) is is_memory


@pytest.mark.parametrize(("alive", "half"), [(8, 4), (5, 3), (3, 2), (2, 1)])
def test_half_as_many_rounded_up(alive, half):
    with pytest.warns(RuntimeWarning, match=f"out of memory with {alive} parts alive .threads.: {half} from now on"):
        assert fewer(alive, "threads", MemoryError()) == half


def test_other_errors_are_no_reason_to_try_again():
    calls = []

    def loss(params, batch):
        calls.append(len(batch))
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        ft.parallel(ft.grad(loss), 2, how="loop")(torch.ones(1), torch.ones(4))
    assert calls == [2]


def test_one_part_that_does_not_fit_has_one_note_however_deep_it_was():
    def loss(params, batch):
        raise MemoryError

    inner = ft.parallel(ft.grad(loss), 2, how="loop")
    with pytest.raises(MemoryError) as raised:
        ft.parallel(inner, 2, how="loop")(torch.ones(1), torch.ones(8))
    assert sum("does not fit" in note for note in raised.value.__notes__) == 1
