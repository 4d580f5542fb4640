"""Deferred batches: drawn by the worker that takes a part's gradient, and the same whoever draws them."""

from __future__ import annotations

import itertools
import threading
import traceback

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from instances import keyed_loss, net_batch, net_loss, net_params, plain_loss

import functrain as ft
from functrain.core.deferred import drawn
from functrain.data import Source, arrays
from functrain.data.laws import check_source, same
from functrain.testing import equal, same_bits


class Watched(Source):
    """Numbers, and a note of every read: which indices, in which epoch, in which thread."""

    steady = False

    def __init__(self, length):
        self.length, self.reads = length, []

    def get(self, i, epoch):
        return self.take(np.array([i]), epoch)[0]

    def take(self, indices, epoch):
        self.reads.append((indices.tolist(), epoch, threading.current_thread().name))
        return torch.from_numpy(indices * 1000 + epoch)


def examples(size, seed=0):
    return arrays(net_batch(size, seed))


def sample(keys):
    """A tree like `net_batch`'s, each row out of its own key."""
    assert keys.ndim == 1
    assert keys.dtype == torch.int64
    x, targets = ft.random.normal(keys, (3,)), ft.random.normal(ft.random.fold_in(keys, 1), (2,))
    return {"x": x, "targets": (targets, keys.float()), "weight": ft.random.uniform(keys) + 0.5}


# --- the same rows, whoever draws them ----------------------------------------------------------------------------

CHAINS = {
    "plain": lambda s: s,
    "shuffled": lambda s: s.shuffle(3),
    "sharded": lambda s: s.shuffle(3).shard(1, 2),
    "split": lambda s: s.split(0.5, seed=1)[0].shuffle(2),
    "mapped": lambda s: s.shuffle(1).map(lambda n: {"n": n, "twice": 2 * n}),
    "zipped": lambda s: s.shuffle(1).zip(s.shuffle(2)),
    "windows": lambda s: s.windows(2, stride=1),
    "repeated": lambda s: s.shuffle(1).repeat(2),
    "endless": lambda s: s.shuffle(1).repeat(),
    "an epoch": lambda s: s.shuffle(1).epoch(4),
    "balanced": lambda s: s.balanced(np.arange(len(s)) % 3, 1),
    "batches": lambda s: s.batch(2, drop_last=True),
}


@given(
    chain=st.sampled_from(sorted(CHAINS)),
    length=st.integers(4, 40),
    size=st.integers(1, 12),
    parts=st.integers(1, 9),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_drawn_parts_are_the_rows_of_the_plain_batch(chain, length, size, parts, epoch, drop_last):
    examples = CHAINS[chain](arrays(torch.arange(length)))
    if examples.length is not None and examples.length < size:
        drop_last = False
    batches = examples.batch(size, drop_last)
    deferred = batches.deferred()
    assert deferred.length == batches.length
    assert deferred.steady == batches.steady
    places = range(batches.length) if batches.length is not None else range(7)
    for i in places:
        plain, batch = batches.get(i, epoch), deferred.get(i, epoch)
        assert isinstance(batch, ft.Deferred)
        draws = batch.parts(parts)
        assert len(draws) == min(parts, batch.size)
        # Last one first, and twice: draws know nothing of each other.
        drawings = [draw() for draw in draws[::-1]][::-1]
        assert same(ft.tree.concat(drawings), plain)
        assert [ft.tree.batch_size(part) for part in drawings] == ft.tree.part_sizes(batch.size, parts)
        assert same(draws[0](), drawings[0])
        assert same(batch.whole(), plain)
        assert same(deferred.drawn().get(i, epoch), plain)


@given(
    length=st.integers(1, 30),
    size=st.integers(1, 8),
    ranks=st.integers(1, 3),
    epoch=st.integers(0, 2),
    seed=st.integers(0, 9),
)
def test_deferred_batches_are_ordered_like_plain_ones(length, size, ranks, epoch, seed):
    batches = arrays(torch.arange(length)).shuffle(seed).batch(size)
    for order in (
        lambda s: s.shuffle(seed + 1),
        lambda s: s.shard(ranks - 1, ranks),
        lambda s: s.repeat(2),
        lambda s: s.epoch(epoch),
        lambda s: s.repeat().shard(0, ranks),
    ):
        plain, deferred = order(batches), order(batches.deferred())
        assert deferred.length == plain.length
        assert deferred.deferring
        for i in range(min(plain.length if plain.length is not None else 9, 9)):
            assert same(deferred.get(i, epoch), plain.get(i, epoch))


def test_nothing_is_read_before_a_part_is_drawn_and_then_that_part_alone():
    watched = Watched(10)
    batch = watched.batch(6).deferred().get(1, 2)
    assert (batch.size, repr(batch)) == (4, "<Deferred batch of 4, not drawn yet>")
    draws = batch.parts(3)
    assert watched.reads == []
    assert draws[1]().tolist() == [8002]
    assert [read[:2] for read in watched.reads] == [([8], 2)]
    draws[0]()
    assert [read[:2] for read in watched.reads] == [([8], 2), ([6, 7], 2)]


DEFERRED = {
    "batches": lambda: arrays(torch.arange(23)).shuffle(1).batch(5).deferred(),
    "no ragged one": lambda: arrays(torch.arange(23)).shuffle(1).batch(5, drop_last=True).deferred(),
    "one": lambda: arrays(torch.arange(3)).batch(5).deferred(),
    "sharded": lambda: arrays(torch.arange(23)).shuffle(1).batch(5).deferred().shard(1, 2),
    "shuffled": lambda: arrays(torch.arange(23)).batch(5).deferred().shuffle(1).epoch(2),
    "repeated": lambda: arrays(torch.arange(23)).shuffle(1).batch(5).deferred().repeat(2),
    "endless": lambda: arrays(torch.arange(9)).shuffle(1).repeat().batch(4).deferred(),
    "sampled": lambda: ft.sampled(ft.random.uniform, 5, seed=3),
    "a shard of samples": lambda: ft.sampled(ft.random.uniform, 5, seed=3).shard(1, 2),
    "drawn": lambda: ft.sampled(ft.random.uniform, 5, seed=3).drawn(),
}


@pytest.mark.parametrize("name", DEFERRED)
def test_they_are_lawful_sources(name):
    check_source(DEFERRED[name]())


class Own(Source):
    """A source of one's own whose batches depend on where they are cut, or do not keep their word in other ways."""

    length, deferring = 3, True

    def __init__(self, draw):
        self.draw = draw

    def get(self, i, epoch):
        return ft.Deferred(4, lambda start, stop: self.draw(i, start, stop))


class Silent(Own):
    deferring = False


def test_a_deferred_source_of_ones_own():
    check_source(Own(lambda i, start, stop: torch.arange(start, stop) + i))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Own(lambda i, start, stop: torch.arange(start, stop) - start), "batch 0 is another in 2 parts, in epoch 0"),
        (Silent(lambda i, start, stop: torch.arange(start, stop)), "source.deferring says otherwise"),
        (ft.sampled(lambda keys: keys - keys[0], 4), "batch 0 is another in 2 parts"),
        (ft.sampled(lambda keys: torch.full((len(keys),), next(COUNTER)), 4), "differs from one call to the next"),
    ],
)
def test_the_check_finds_what_depends_on_the_cut(source, message):
    with pytest.raises(AssertionError, match=message):
        check_source(source)


COUNTER = itertools.count()


# --- workers ------------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 33),
    length=st.integers(1, 40),
    parts=st.integers(1, 8),
    workers=st.integers(1, 3),
    epoch=st.integers(0, 2),
    loss=st.sampled_from([net_loss, plain_loss, keyed_loss]),
)
def test_workers_that_prepare_their_own_part_change_no_bit(size, length, parts, workers, epoch, loss):
    source = examples(length).shuffle(1).batch(size)
    key = ft.random.key(2)
    alone = ft.parallel(ft.grad(loss), parts, how="loop", exact=True)
    together = ft.parallel(ft.grad(loss), parts, how="threads", workers=workers, exact=True)
    for i in {0, len(source) - 1}:
        expected = alone(net_params(), source.get(i, epoch), key=key)
        same_bits("Own parts", together(net_params(), source.deferred().get(i, epoch), key=key), expected)


@given(size=st.integers(1, 40), parts=st.integers(1, 8), workers=st.integers(1, 3), seed=st.integers(), i=st.integers(0, 9))
def test_samplers_in_workers_change_no_bit(size, parts, workers, seed, i):
    source = ft.sampled(sample, size, seed)
    grad = ft.parallel(ft.grad(net_loss), parts, how="threads", workers=workers, exact=True)
    alone = ft.parallel(ft.grad(net_loss), parts, how="loop", exact=True)
    same_bits("Own parts", grad(net_params(), source(i)), alone(net_params(), source(i).whole()))


@given(size=st.integers(1, 40), seed=st.integers(), i=st.integers(0, 10**9), parts=st.integers(1, 8))
def test_every_example_has_the_key_of_its_place(size, seed, i, parts):
    keys = ft.random.example_keys(ft.random.fold_in(ft.random.key(seed), i), size)
    batch = ft.sampled(lambda keys: keys.clone(), size, seed)(i)
    assert torch.equal(batch.whole(), keys)
    assert torch.equal(torch.cat([draw() for draw in batch.parts(parts)]), keys)


PRODUCTS = st.sampled_from([1, 3, 7, 13, 64, 513])


@given(
    size=st.integers(2, 70), width=PRODUCTS, outputs=st.sampled_from([1, 2, 10]), parts=st.integers(2, 5), double=st.booleans()
)
def test_parts_have_the_same_bits_wherever_they_lie_in_memory(size, width, outputs, parts, double):
    """A matrix times a vector rounds by its address (MKL): parts cut from a batch lie elsewhere than drawn ones."""
    dtype = torch.float64 if double else torch.float32
    data = {
        "x": ft.random.normal(ft.random.key(1), (size, width), dtype),
        "y": ft.random.normal(ft.random.key(2), (size, outputs), dtype),
    }
    params = ft.random.normal(ft.random.key(3), (width, outputs), dtype)
    loss = lambda params, batch: (torch.tanh(batch["x"] @ params) - batch["y"]).square().sum(1)  # noqa: E731
    grad = ft.parallel(ft.grad(loss), parts, how="loop", exact=True)
    expected = grad(params, arrays(data).batch(size).deferred()(0))
    same_bits("cut", grad(params, data), expected)
    # Laid out in columns, and at an odd address.
    columns = ft.tree.map(lambda leaf: leaf.T.contiguous().T, data)
    same_bits("columns", grad(params, columns), expected)
    moved = ft.tree.map(lambda leaf: torch.cat([leaf[:1], leaf])[1:], data)
    same_bits("moved", grad(params, moved), expected)


@pytest.mark.parametrize("how", ["threads", "loop"])
def test_a_sampler_is_called_once_for_each_part_in_its_worker(how):
    calls = []

    def noted(keys):
        calls.append((threading.current_thread().name, keys.tolist()))
        return sample(keys)

    source = ft.sampled(noted, 10, seed=7)
    step = ft.step(ft.parallel(ft.grad(net_loss), parts=4, how=how, workers=2, exact=True), ft.optim.sgd(0.1))
    state = step.init(net_params())
    for iteration, (state, _) in enumerate(ft.fold(step, state, source, steps=3)):
        keys = ft.random.example_keys(ft.random.fold_in(ft.random.key(7), iteration), 10).split([3, 3, 2, 2])
        assert sorted(mine for _, mine in calls) == sorted(part.tolist() for part in keys)
        assert all(name.startswith("functrain-part") == (how == "threads") for name, _ in calls)
        calls.clear()
    one = ft.step(ft.parallel(ft.grad(net_loss), parts=4, how="loop", exact=True), ft.optim.sgd(0.1))
    other = one.init(net_params())
    for other, _ in ft.fold(one, other, source.drawn(), steps=3):
        pass
    same_bits("One producer", state, other)


def test_deferred_rows_are_read_in_workers():
    watched = Watched(20)
    loss = lambda params, batch: batch * params  # noqa: E731
    grad = ft.parallel(ft.grad(loss), 4, how="threads", workers=2)
    taken = grad(torch.tensor(1.0), watched.batch(10).deferred()(1))
    assert sorted(read[0] for read in watched.reads) == [[10, 11, 12], [13, 14, 15], [16, 17], [18, 19]]
    assert all(name.startswith("functrain-part") for _, _, name in watched.reads)
    assert float(taken.grads) == sum(range(10, 20)) * 1000


@pytest.mark.parametrize("how", ["fused", "vmap", "threads", "loop"])
def test_every_plan_takes_deferred_batches(how):
    source = examples(11).batch(6).deferred()
    grad = ft.parallel(ft.grad(net_loss), 3, how=how, workers=2)
    for batch in source:
        equal(how, grad(net_params(), batch), ft.grad(net_loss)(net_params(), batch.whole()))
        equal(how, grad.finished(net_params(), batch), ft.grad(net_loss).finished(net_params(), batch.whole()))


class StubbornError(Exception):
    pass


@pytest.mark.parametrize("how", ["threads", "loop"])
def test_an_error_in_a_draw_has_its_own_traceback_and_names_the_part(how):
    def fails_at_the_third(keys):
        if keys[0] == third:
            raise StubbornError("no such file")
        return sample(keys)

    third = ft.random.example_keys(ft.random.fold_in(ft.random.key(0), 4), 10)[6]
    grad = ft.parallel(ft.grad(net_loss), 4, how=how, workers=2)
    before = threading.active_count()
    with pytest.raises(StubbornError, match="no such file") as raised:
        grad(net_params(), ft.sampled(fails_at_the_third, 10)(4))
    assert raised.value.__notes__ == ["in part 3 of 4 (2 examples) of a batch"]
    assert "fails_at_the_third" in [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert threading.active_count() == before


# --- where they go ------------------------------------------------------------------------------------------------


def trained(step, source, **more):
    state = step.init(net_params())
    for state, _ in ft.fold(step, state, source, **more):
        pass
    return state


def test_fold_evaluate_accumulate_population_and_repeat_take_them():
    source = examples(14).shuffle(2).batch(4)
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    for more in ({}, {"steps": 9}):
        same_bits("fold", trained(step, source.deferred(), **more), trained(step, source, **more))
    assert ft.evaluate(net_loss, net_params(), source.deferred()) == ft.evaluate(net_loss, net_params(), source)
    some = itertools.islice(ft.sampled(sample, 5), 4)
    assert ft.evaluate(net_loss, net_params(), some) == ft.evaluate(
        net_loss, net_params(), [ft.sampled(sample, 5)(i).whole() for i in range(4)]
    )
    same_bits("accumulate", *(ft.accumulate(ft.grad(net_loss), 2)(net_params(), s(0)) for s in (source, source.deferred())))
    twice, pairs = ft.repeat(step, 2), source.batch(2, drop_last=True)
    same_bits("repeat", trained(twice, pairs.deferred(), steps=2), trained(twice, pairs, steps=2))


@pytest.mark.parametrize("how", ["auto", "threads"])
def test_a_population_draws_once_and_outside_of_its_transform(how):
    def from_torch(keys):
        # Refused inside vmap: torch's own generators are not keyed.
        calls.append(torch.stack([torch.rand(3, generator=torch.Generator().manual_seed(int(key))) for key in keys]))
        return calls[-1]

    calls = []
    loss = lambda params, batch: (batch @ params) ** 2  # noqa: E731
    step = ft.step(ft.parallel(ft.grad(loss), 2, how=how, workers=2), ft.optim.sgd(0.1))
    members = [step.init(torch.full((3,), value)) for value in (1.0, 2.0)]
    both = ft.population(step)
    state, _ = both(both.init(members), ft.sampled(from_torch, 4)(0))
    assert len(calls) == 1
    for member, alone in zip(ft.tree.unstack(state), members):
        equal("member", member, step(alone, calls[0])[0])


def test_experiments_are_run_on_them(tmp_path):
    source = examples(14).shuffle(2).batch(4)
    step = ft.step(ft.parallel(ft.grad(net_loss), 2, how="threads", workers=2, exact=True), ft.optim.sgd(0.1))
    ends = []
    for name, train in (("plain", source), ("deferred", source.deferred())):
        run = ft.Run.create(tmp_path / name, config={}, facts={})
        ends.append(ft.train(ft.Experiment(step, net_params(), train, 2, depth=0), run).state)
    same_bits("train", *ends)


def test_members_of_a_search_share_deferred_batches():
    def trial(config):
        # Each its own source: that they are the same is seen in what they draw.
        train = arrays(torch.arange(6.0)).shuffle(1).batch(3).deferred()
        step = ft.step(ft.grad(lambda params, batch: (batch - params) ** 2), ft.optim.sgd(config["lr"]))
        score = lambda state: {"distance": float((state.params - 2.5).abs())}  # noqa: E731
        return ft.Experiment(step, torch.tensor(0.0), train, 2, score, depth=0, score="distance", maximize=False)

    result = ft.grid_search(trial, ft.grid(lr=[0.1, 0.2]), together=("lr",))
    assert [found.how for found in result.trials] == ["population of 2"] * 2


def test_drawn_gives_back_what_prefetch_and_compiled_steps_take():
    source = examples(14).shuffle(2).batch(4)
    assert source.drawn() is source
    step = ft.step(ft.grad(net_loss), ft.optim.sgd(0.1))
    with ft.prefetch(source.deferred().drawn(), depth=2) as batches:
        same_bits("prefetch", trained(step, batches, steps=6), trained(step, source, steps=6))
    with ft.prefetch(ft.sampled(sample, 4).drawn()) as batches:
        same_bits("prefetch", trained(step, batches, steps=3), trained(step, ft.sampled(sample, 4), steps=3))


@pytest.mark.parametrize(
    "take",
    [
        lambda source: ft.prefetch(source),
        lambda source: ft.prefetch(source.shard(0, 2)),
        lambda source: ft.prefetch(source.repeat()),
    ],
)
def test_prefetching_them_is_refused(take):
    with pytest.raises(ft.ArgumentError, match=r"nothing to load ahead.*depth=0.*prefetch\(source.drawn\(\)\)"):
        take(examples(14).batch(4).deferred())


def test_compiled_steps_refuse_them():
    step = ft.compiled(ft.step(ft.grad(plain_loss), ft.optim.sgd(0.1)))
    state = step.init(net_params())
    with pytest.raises(ft.ArgumentError, match=r"one graph.*source.drawn\(\).*uncompiled"):
        step(state, examples(4).batch(4).deferred()(0))
    # Nothing was taken over.
    assert int(state.position) == 0


TEN = arrays(torch.arange(10))
RIGHT_AFTER = r"write .deferred\(\) right after .batch"
HAVE_READ = r"first, then .batch\(…\).deferred\(\); or have them read whole, source.drawn\(\)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TEN.deferred(), r"deferred takes batches, got <source arrays, length 10>: batch it first"),
        (lambda: TEN.windows(2).deferred(), "deferred takes batches"),
        (lambda: TEN.batch(2).map(lambda b: b.float()).deferred(), RIGHT_AFTER),
        (lambda: TEN.batch(2).zip(TEN.batch(2)).deferred(), RIGHT_AFTER),
        (lambda: TEN.batch(2).shard(0, 2).deferred(), RIGHT_AFTER),
        (lambda: TEN.batch(2).repeat().deferred(), RIGHT_AFTER),
        (lambda: TEN.batch(2).windows(2).deferred(), RIGHT_AFTER),
        (lambda: TEN.batch(2).deferred().deferred(), "deferred already"),
        (lambda: TEN.batch(2).deferred().shard(0, 2).deferred(), "deferred already"),
        (lambda: ft.sampled(sample, 3).deferred(), "deferred already"),
        (lambda: TEN.batch(2).deferred().map(lambda b: b), "map needs examples.*map " + HAVE_READ),
        (lambda: TEN.batch(2).deferred().shuffle(0).batch(2), "batch needs examples.*batch " + HAVE_READ),
        (lambda: TEN.batch(2).deferred().windows(2), "windows needs examples"),
        (lambda: TEN.batch(2).deferred().zip(TEN.batch(2)), "zip needs examples"),
        (lambda: TEN.batch(2).zip(TEN.batch(2).deferred()), "zip needs examples"),
        (lambda: TEN.batch(2).deferred().take(np.array([0]), 0), "take needs examples"),
        (lambda: ft.sampled(sample, 0), "size must be at least 1, got 0"),
        (lambda: ft.sampled(sample, 2.0), "size must be an int, got 2.0"),
        (lambda: ft.sampled(sample, 2, seed="a"), "seed must be an int, got 'a'"),
        (lambda: ft.sampled(torch.ones(3), 2), r"a function of keys \(n,\) that gives n examples, got Tensor"),
        (lambda: ft.evaluate(net_loss, net_params(), ft.sampled(sample, 4)), "has no end"),
        (
            lambda: list(
                ft.fold(
                    ft.step(ft.grad(net_loss), ft.optim.sgd(0.1)),
                    ft.step(ft.grad(net_loss), ft.optim.sgd(0.1)).init(net_params()),
                    ft.sampled(sample, 4),
                )
            ),
            "say how many steps",
        ),
        (lambda: ft.Deferred(0, lambda start, stop: None), "a size of at least 1, got 0"),
        (lambda: ft.Deferred(True, lambda start, stop: None), "a size of at least 1, got True"),
        (lambda: ft.Deferred(3, torch.ones(3)), r"a function \(start, stop\).*got Tensor"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ft.ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda keys: torch.ones(len(keys) + 1), "sample was given 5 keys and made 6 examples: one for each key"),
        (lambda keys: {"x": torch.ones(len(keys)), "y": torch.ones(2)}, "must have the same first dimension N"),
        (lambda keys: 1.0, "must have the same first dimension N"),
        (lambda keys: {}, "has no leaves"),
        (lambda keys: ["text"] * len(keys), "sample returned a leaf of type str: expected tensors, arrays, numbers"),
    ],
)
def test_a_sampler_gives_a_row_for_each_key(made, message):
    source = ft.sampled(made, 10)
    with pytest.raises(ft.TreeError, match=message):
        source(0).parts(2)[0]()
    with pytest.raises(ft.TreeError) as raised:
        ft.parallel(ft.grad(net_loss), 2, how="threads", workers=2)(net_params(), source(0))
    assert raised.value.__notes__ == ["in part 1 of 2 (5 examples) of a batch"]


def test_a_draw_gives_the_rows_that_it_was_asked_for():
    batch = ft.Deferred(5, lambda start, stop: torch.zeros(5))
    assert drawn(batch).shape == (5,)
    with pytest.raises(ft.TreeError, match="asked for the 2 examples from 3 to 5 of a batch of 5, draw gave 5"):
        batch.parts(2)[1]()


def test_samplers_may_give_arrays():
    batch = ft.sampled(lambda keys: {"n": keys.numpy() % 7, "x": np.ones((len(keys), 2), "f4")}, 3)(0)
    assert {name: leaf.dtype for name, leaf in batch.whole().items()} == {"n": torch.int64, "x": torch.float32}


def test_explain_says_who_reads():
    assert repr(TEN.batch(4).deferred()) == "<source deferred, length 3>"
    text = str(ft.explain(TEN.shuffle(3).batch(4).deferred()))
    for part in ("length: 3", "read: by the worker that takes a part's gradient", "3 of 4", "seed 3"):
        assert part in text
    text = str(ft.explain(ft.sampled(sample, 8, seed=5)))
    for part in ("endless of 8", "sample: sample", "of seed 5 and the batch's position"):
        assert part in text


def test_a_story_workers_that_draw_their_own_noise_learn_what_one_does():
    """The reference's `ttrain!`: nobody holds the data, and three workers end with the bits that one ends with."""

    def noisy_line(keys):
        x = ft.random.uniform(keys, dtype=torch.float64)
        return {"x": x, "y": 3 * x - 1 + 0.01 * ft.random.normal(ft.random.fold_in(keys, 1), dtype=torch.float64)}

    loss = lambda params, batch: (params[0] * batch["x"] + params[1] - batch["y"]) ** 2  # noqa: E731
    ends = []
    for how, workers in (("threads", 3), ("threads", 1), ("loop", 1)):
        grad = ft.parallel(ft.grad(loss), parts=4, how=how, workers=workers, exact=True)
        step = ft.step(grad, ft.optim.adam(0.3))
        state = step.init(torch.zeros(2, dtype=torch.float64))
        for state, _ in ft.fold(step, state, ft.sampled(noisy_line, 64, seed=1), steps=50):
            pass
        ends.append(state)
    same_bits("workers", ends[0], ends[1])
    same_bits("workers", ends[0], ends[2])
    equal("learnt", ends[0].params, torch.tensor([3.0, -1.0], dtype=torch.float64), tolerance=0.05)
