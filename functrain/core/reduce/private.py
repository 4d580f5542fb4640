"""Differentially private gradients: examples' gradients clipped, added, and hidden in Gaussian noise."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from functrain.core import random, tree
from functrain.core.reduce.base import Gradient, Reducer, add, checked_weight, divided
from functrain.core.reduce.clip import clipping, lifting, number
from functrain.core.tree import Tree


def private(norm: float, noise: float, size: float | None = None) -> Reducer:
    """DP-SGD's gradient: each example's clipped to the length `norm`, their sum, noise on it, divided by the size of the batch.

    With gᵢ = wᵢ ∇lossᵢ the gradient of example i over all leaves together, C the norm and σ the noise,

        (Σᵢ min(1, C / ‖gᵢ‖) gᵢ + σC · N(0, I)) / size.

    - `noise`: the noise multiplier σ: the standard deviation of the noise in units of C; 0 for none, and no privacy;
    - `size`: the batch size expected, rate · n for Poisson batches (`source.poisson`). By default the weight of the batch,
      which then counts as public; with a size given, a batch of which no example was drawn is noise alone, and its loss 0.

    `ft.privacy.epsilon(noise=σ, rate=…, steps=…, delta=…)` tells what a run spends, if each batch is Poisson-subsampled. What
    is protected is one row of the batch, and by the gradients alone: loss, aux and weight are those of the plain mean,
    without noise, so metrics are not for publication. Weights, several losses of an example, and gradients that are not
    finite (a leak, whether or not `ft.guard` skips the step) are clipped as by `clip_per_example`.

    The noise is keyed: the same in every plan, another one at each position of a run. It is drawn in float32 or better. The
    generator is statistical, a SplitMix64 hash of a key of 64 bits, not cryptographic: who learns the seed can take the
    noise off again, so keep it secret. Attacks on the rounding of floating-point noise (Mironov, CCS 2012) are not covered.

    Raises `ArgumentError` for a norm or size that is not a finite number above 0, or a noise below 0; `LossError` for a loss
    whose examples share buffers (batch norm), and without `size` for a batch whose weights sum to zero.

    Source: Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang, "Deep learning with differential privacy", CCS 2016.

    >>> import functrain as ft
    >>> hidden = ft.parallel(ft.grad(lambda w, batch: batch @ w), 1, ft.reduce.private(1.0, noise=0.0, size=4))
    >>> hidden.finished(torch.zeros(2), torch.tensor([[3.0, 4.0], [0.2, 0.0]]), key=ft.random.key(0)).grads
    tensor([0.2000, 0.2000])
    """
    norm = number("private", "norm", norm, "the length that no example's gradient may exceed")
    noise = number("private", "noise", noise, "the noise's standard deviation in units of the norm", zero=True)
    if size is not None:
        size = number("private", "size", size, "the batch size expected, rate · n for Poisson batches")
    scale = clipping(norm)

    def finish(total: Gradient, key: Tensor) -> Gradient:
        # An empty batch has no weight, which is fine where the size is known.
        checked_weight(total.weight if size is None else torch.where(total.weight == 0, 1.0, total.weight))
        by = total.weight if size is None else torch.full_like(total.weight, size)
        grads = divided(_noised(total.grads, noise * norm, key) if noise else total.grads, by)
        # Of nothing, the sums are zero, and so are their means: NaN would be taken for a bad step.
        loss, aux = divided((total.loss, total.aux), torch.where(total.weight == 0, 1.0, total.weight))
        return total._replace(grads=grads, loss=loss, aux=aux)

    name = f"private({norm:g}, {noise:g}{'' if size is None else f', size={size:g}'})"
    return Reducer(name, add, finish, lifting(scale), scale=scale, keyed=True)


def _noised(grads: Tree, deviation: float, key: Tensor) -> Tree:
    leaves, spec = tree.flatten(grads)
    # Drawn in half precision, the noise would have so few values that it hides little.
    wide = functools.reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
    # At once, for all leaves: one by one, six small ones took three times as long.
    drawn = random.normal(key, (sum(leaf.numel() for leaf in leaves),), wide).split([leaf.numel() for leaf in leaves])
    return tree.unflatten(spec, [_added(leaf, noise.view(leaf.shape), deviation) for leaf, noise in zip(leaves, drawn)])


def _added(leaf: Tensor, noise: Tensor, deviation: float) -> Tensor:
    return torch.add(leaf.to(noise.dtype), noise, alpha=deviation).to(leaf.dtype)
