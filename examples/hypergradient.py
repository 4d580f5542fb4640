"""Learning the learning rate: gradient descent on the validation loss of a short training, through all of its steps.

Handwritten digits, 100 of them to train on. Each meta-step trains a fresh network for some steps of SGD with momentum
(`ft.unroll`), takes the validation loss at the end, and its gradient with respect to the logarithm of the learning rate and to
the momentum: one backward pass through training, whose memory grows as the square root of its steps.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import functrain as ft


def digits() -> tuple[ft.Source, dict[str, torch.Tensor]]:
    """A source of 100 training digits, and the other 1697 to validate on."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rows = {"x": torch.tensor(images, dtype=torch.float32)[order] / 16, "y": torch.tensor(labels)[order]}
    train, valid = ({name: leaf[part] for name, leaf in rows.items()} for part in (slice(100), slice(100, None)))
    return ft.arrays(train).shuffle(seed=0).repeat(), valid


def main() -> None:
    """Print rate, momentum and validation loss of every meta-step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="steps of each training")
    parser.add_argument("--meta-steps", type=int, default=30, help="how many trainings")
    parser.add_argument("--batch", type=int, default=32, help="digits in a batch")
    parser.add_argument("--rate", type=float, default=3e-3, help="the learning rate to begin with")
    parser.add_argument("--meta-rate", type=float, default=0.3, help="the learning rate of the learning rate, to begin with")
    flags = parser.parse_args()

    torch.set_num_threads(1)  # On networks as small as this, threads wait more than they work.
    torch.manual_seed(0)
    params, apply = ft.functional(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    source, valid = digits()

    def loss(params, batch):
        return F.cross_entropy(apply(params, batch["x"]), batch["y"], reduction="none")

    inner = ft.step(ft.grad(loss), ft.optim.sgd(flags.rate, momentum=0.5))
    train = ft.unroll(inner, flags.steps)
    batches = source.batch(flags.batch).batch(flags.steps)(0)

    def meta_loss(learnt, batch):
        # Any numbers are a rate and a momentum.
        rate, momentum = learnt["log rate"].exp(), learnt["logit momentum"].sigmoid()
        start = ft.with_hyper(train.init(params), lr=rate, momentum=momentum)
        end, _ = train(start, batches)
        return loss(end.params, batch)

    meta = ft.step(ft.grad(meta_loss), ft.optim.adam(ft.optim.cosine(flags.meta_rate, flags.meta_steps), b1=0.5))
    state = meta.init({"log rate": torch.tensor(flags.rate).log(), "logit momentum": torch.tensor(0.0)})
    print("meta-step       rate   momentum   validation loss")
    for number in range(flags.meta_steps):
        learnt = state.params
        state, metrics = meta(state, valid)
        rate, momentum = learnt["log rate"].exp(), learnt["logit momentum"].sigmoid()
        print(f"{number:9d} {rate:10.5f} {momentum:10.3f} {metrics['loss']:17.4f}")


if __name__ == "__main__":
    main()
