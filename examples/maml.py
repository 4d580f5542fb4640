"""MAML on sinusoids: initial params from which one step of gradient descent learns a curve from ten points.

The regression of Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep networks", ICML 2017: each
task is a curve A sin(x − φ) with amplitude A in [0.1, 5] and phase φ in [0, π], its points at x in [−5, 5]; the network has two
hidden layers of 40 ReLU units. The meta-loss of a task is the error on 10 new points after one inner step on 10 points
(`ft.unroll`), a loss for each example like any other: the examples are tasks, and an ordinary step with Adam trains on them.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise

import torch

import functrain as ft

HIDDEN = 40


def initial(seed: int) -> dict[str, torch.Tensor]:
    """Params of a network 1-40-40-1: normal weights of variance 1 / inputs, biases 0."""
    sizes = (1, HIDDEN, HIDDEN, 1)
    params = {}
    for number, ((inputs, outputs), key) in enumerate(zip(pairwise(sizes), ft.random.split(ft.random.key(seed), 3))):
        params[f"w{number}"] = ft.random.normal(key, (inputs, outputs)) / math.sqrt(inputs)
        params[f"b{number}"] = torch.zeros(outputs)
    return params


def network(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Values `(N, 1)` at places `(N, 1)`."""
    x = torch.relu(x @ params["w0"] + params["b0"])
    x = torch.relu(x @ params["w1"] + params["b1"])
    return x @ params["w2"] + params["b2"]


def loss(params: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The squared error at each point `(N,)`."""
    return (network(params, batch["x"]) - batch["y"]).square().squeeze(1)


def tasks(key: torch.Tensor, count: int, shots: int, queries: int) -> dict[str, dict[str, torch.Tensor]]:
    """Curves, each with points to adapt to, stacked as the batches of one step `(count, 1, shots, 1)`, and to judge by."""
    of_task, of_points = ft.random.split(key, 2)
    drawn = ft.random.uniform(of_task, (2, count, 1, 1))
    amplitude, phase = 0.1 + 4.9 * drawn[0], math.pi * drawn[1]
    x = 10 * ft.random.uniform(of_points, (count, shots + queries, 1)) - 5
    points = {"x": x, "y": amplitude * torch.sin(x - phase)}
    return {
        "shots": {name: leaf[:, None, :shots] for name, leaf in points.items()},
        "queries": {name: leaf[:, shots:] for name, leaf in points.items()},
    }


def adapted_loss(train: ft.Step, params: dict[str, torch.Tensor], batch: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
    """The error of each task `(T,)` on its queries, after training on its shots."""

    def one(shots, queries):
        state, _ = train(train.init(params), shots)
        return loss(state.params, queries).mean()

    return torch.func.vmap(one)(batch["shots"], batch["queries"])


def repeated(batch: dict[str, dict[str, torch.Tensor]], steps: int) -> dict[str, dict[str, torch.Tensor]]:
    """The same tasks for another number of inner steps, all on the same shots."""
    return {**batch, "shots": {name: leaf.expand(-1, steps, -1, -1) for name, leaf in batch["shots"].items()}}


def main() -> None:
    """Train, and print the error on fresh tasks after 0, 1 and 10 inner steps, for MAML and for plain training on all tasks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--meta-steps", type=int, default=12_000, help="how many batches of tasks")
    parser.add_argument("--tasks", type=int, default=25, help="tasks in a batch")
    parser.add_argument("--shots", type=int, default=10, help="points of a task to adapt to")
    parser.add_argument("--inner-rate", type=float, default=0.01, help="learning rate of the inner step")
    parser.add_argument("--meta-rate", type=float, default=3e-3, help="learning rate of Adam, to begin with")
    parser.add_argument("--test-tasks", type=int, default=600, help="fresh tasks to test on")
    parser.add_argument("--eager", action="store_true", help="leave the meta-steps uncompiled")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks and the weights")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # On networks as small as this, threads wait more than they work.

    inner = ft.step(ft.grad(loss), ft.optim.sgd(flags.inner_rate))
    once = ft.unroll(inner, 1)

    def meta_loss(params, batch):
        return adapted_loss(once, params, batch)

    def plain_loss(params, batch):
        return torch.func.vmap(lambda points: loss(params, points).mean())(batch["queries"])

    fresh = tasks(ft.random.key(flags.seed + 1_000_003), flags.test_tasks, flags.shots, 100)
    key = ft.random.key(flags.seed)
    print("mean squared error after   0 inner steps    1 inner step   10 inner steps")
    for name, objective in (("MAML", meta_loss), ("plain training", plain_loss)):
        meta = ft.step(ft.grad(objective), ft.optim.adam(ft.optim.cosine(flags.meta_rate, flags.meta_steps)))
        meta = meta if flags.eager else ft.compiled(meta)
        state = meta.init(initial(flags.seed))
        for number in range(flags.meta_steps):
            state, _ = meta(state, tasks(ft.random.fold_in(key, number), flags.tasks, flags.shots, flags.shots))
        errors = [plain_loss(state.params, fresh)]
        errors += [adapted_loss(ft.unroll(inner, steps), state.params, repeated(fresh, steps)) for steps in (1, 10)]
        print(f"{name:18s}" + "".join(f"{error.mean():17.3f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
