"""Gradients of a convolution's kernel: a matrix that multiplies the windows of its input."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from functrain.core.examples.contribution import SHIFT, Contribution, Rows, lengths, weighted
from functrain.core.examples.linear import gram, gram_pays, norms_by
from functrain.core.examples.tape import Make, Tape
from functrain.core.transforms import inside_tracing

# Windows of this many bytes stay in a processor's cache until they are multiplied: unfolding examples one block after the
# other took 5 ms where all at once took 6, torch's own unfold 12, and the batch's gradient 4 (16 to 32 channels, 14 × 14).
_CACHE = 1 << 20
# On a device, and in a graph, fewer and larger blocks.
_DEVICE = 1 << 28
# Numbers side by side that are worth to be copied as a run.
_RUN = 16


class Geometry(NamedTuple):
    """What a convolution is besides its kernel: one number for each spatial dimension, padding on both sides."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


class Convolution(Contribution):
    """A kernel `(O, C/G, *K)` over inputs `(N, B, C, *S)`, with output gradients δ `(N, B, O, *P)`.

    gᵢ = Σₗ δᵢₗ uᵢₗᵀ over the positions l, where uᵢₗ is the window of the input that position l has seen.

    A gradient for each example is a product of the windows of its input with its output gradients (Rochette et al. 2019): as
    many multiplications as the batch's own kernel gradient, which is not taken. Where the kernel is large next to
    the positions, norms come from products of pairs of positions instead, as for `Linear`.

    Source: Rochette, Manoel and Tramel, "Efficient per-example gradient computations in convolutional neural networks",
    arXiv 1912.06015.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, shape: torch.Size, geometry: Geometry) -> None:
        self.inputs, self.outputs, self.shape, self.geometry = inputs.to(outputs.dtype), outputs, shape, geometry
        self.elements = shape.numel()
        self.blocks = inputs.shape[1]
        self.positions = math.prod(outputs.shape[3:])
        self.taps, self.high = math.prod(shape[1:]), shape[0] // geometry.groups
        # Where channels lie side by side, so do a window's: copied in runs of a kernel's row, if these are long enough.
        self.last = inputs.stride(2) == 1 and shape[1] * shape[-1] >= _RUN
        known = norms_by(self.positions, self.taps, self.high)
        self.algebra = f"convolution: {known if self.pairs_pay() else 'a gradient for each example, over windows'}"

    def pairs_pay(self) -> bool:
        """Whether norms from pairs of positions are cheaper."""
        return self.blocks == 1 and self.positions > 1 and gram_pays(self.positions, self.taps, self.high)

    def each(self, start: int, stop: int) -> Tensor:
        inputs, outputs = self.inputs[start:stop].flatten(0, 1), self.outputs[start:stop].flatten(0, 1)
        grads = self._grads(inputs, outputs)
        return grads.unflatten(0, (stop - start, self.blocks)).sum(1) if self.blocks > 1 else grads

    def norms(self) -> Tensor | None:
        if not self.pairs_pay():
            return None
        inputs, outputs = self.inputs.flatten(0, 1), self.outputs.flatten(0, 1)
        found = [gram(*(side.mT for side in self._sides(*block))) for block in self._cut(inputs, outputs)]
        return lengths(torch.cat(found).unflatten(0, (-1, self.geometry.groups)))

    def scaled(self, scales: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.geometry
        outputs = weighted(scales, self.outputs)
        inputs = _padded(self.inputs.flatten(0, 1), padding)
        kernel = outputs.new_empty(self.shape)
        none = [0] * len(stride)
        taken = torch.ops.aten.convolution_backward.default(
            outputs.flatten(0, 1), inputs, kernel, None, stride, none, dilation, False, none, groups, [False, True, False]
        )
        return taken[1]

    def _cut(self, inputs: Tensor, outputs: Tensor) -> list[tuple[Tensor, Tensor]]:
        size = self.geometry.groups * self.taps * self.positions * inputs.element_size()
        limit = _CACHE if inputs.is_cpu and not inside_tracing() else _DEVICE
        count = max(1, limit // max(1, size))
        return list(zip(inputs.split(count), outputs.split(count)))

    def _sides(self, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Windows `(n G, taps, L)` and output gradients `(n G, O/G, L)` of n images."""
        groups = self.geometry.groups
        view = _windows(_padded(inputs, self.geometry.padding), self.shape[2:], outputs.shape[2:], self.geometry)
        view = view.unflatten(1, (groups, -1))
        if self.last:
            taps = 3 + len(self.shape[2:])
            order = (0, 1, *range(taps, view.ndim), *range(3, taps), 2)
            windows = view.permute(order).reshape(len(inputs) * groups, self.positions, self.taps).mT
        else:
            windows = view.reshape(len(inputs) * groups, self.taps, self.positions)
        return windows, outputs.unflatten(1, (groups, -1)).flatten(0, 1).flatten(2)

    def _grads(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        wide = self.taps >= self.high
        count = len(inputs) * self.geometry.groups
        grads = inputs.new_empty(count, *((self.high, self.taps) if wide else (self.taps, self.high)))
        place = 0
        for block in self._cut(inputs, outputs):
            windows, deltas = self._sides(*block)
            # The longer side comes last: with 9 taps and 16 channels, 0.7 ms against 1.1 the other way round.
            left, right = (deltas, windows.mT) if wide else (windows, deltas.mT)
            if len(left) == count:
                grads = torch.bmm(left, right)
            else:
                torch.bmm(left, right, out=grads[place : place + len(left)])
            place += len(left)
        grads = grads if wide else grads.mT
        if not self.last:
            return grads.reshape(len(inputs), *self.shape)
        high, wide_, *kernel = self.shape
        return grads.reshape(len(inputs), high, *kernel, wide_).movedim(-1, 2)


def channels_last(images: Tensor) -> Tensor:
    """Images `(N, C, H, W)` with their channels side by side in memory, where that is the faster way through oneDNN.

    One convolution of 1 to 16 channels, 28 × 28: 1.3 ms where channels apart take 9.7; the pooling after it 1.6 and 8.9.
    """
    if images.ndim != 4 or not images.is_cpu or images.dtype not in (torch.float32, torch.bfloat16):
        return images
    if images.stride(1) == 1 and images.is_contiguous(memory_format=torch.channels_last):
        return images
    # Not `contiguous`, to which a single channel is in place already.
    return images.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def _padded(inputs: Tensor, padding: tuple[tuple[int, int], ...]) -> Tensor:
    sides = [side for pair in reversed(padding) for side in pair]
    return F.pad(inputs, sides) if any(sides) else inputs


def _windows(inputs: Tensor, kernel: torch.Size, positions: torch.Size, geometry: Geometry) -> Tensor:
    """A view `(n, C, *K, *P)` of inputs `(n, C, *S)`: what each tap of the kernel meets at each position."""
    first, channel, *space = inputs.stride()
    taps = (step * dilation for step, dilation in zip(space, geometry.dilation))
    moves = (step * stride for step, stride in zip(space, geometry.stride))
    shape = (*inputs.shape[:2], *kernel, *positions)
    return inputs.as_strided(shape, (first, channel, *taps, *moves))


# --- rule -----------------------------------------------------------------------------------------------------------


def convolution(dimensions: int, tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """A convolution with a leaf as kernel, of images `(C, *S)` or `(B, C, *S)`."""
    return _convolved(dimensions, tape, func, *args, **kwargs)


def _convolved(
    dimensions: int,
    tape: Tape,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    leaf, shift = tape.leaf(weight), tape.leaf(bias)
    if leaf is None or tape.known(input) or (bias is not None and shift is None):
        return None
    x = tape.physical(input)
    alone = input.ndim == dimensions + 1
    outer = (x.shape[0], 1) if alone else x.shape[:2]
    images = x if alone else x.flatten(0, 1)
    images = channels_last(images) if tape.relay else images
    y = func(images, leaf.of(images), None if shift is None else shift.value, stride, padding, dilation, groups)
    shape = leaf.value.shape
    moves, spread = _each(stride, dimensions), _each(dilation, dimensions)
    geometry = Geometry(moves, _padding(padding, shape[2:], spread), spread, groups)

    def kernel(x: Tensor, grad: Tensor) -> Contribution:
        return Convolution(x.unflatten(0, outer), grad.unflatten(0, outer), shape, geometry)

    makes: list[tuple[int, Make]] = [(leaf.place, kernel)]
    if shift is not None:
        makes.append((shift.place, lambda x, grad: Rows(grad.unflatten(0, outer).flatten(3).sum((1, 3)), SHIFT)))
    return tape.record(images, y, makes, (*(outer[:1] if alone else outer), *y.shape[1:]))


def pooling(tape: Tape, func: Any, args: Any, kwargs: Any) -> Any:
    """Pooling of images with channels last: torch goes through them twice more for a gradient whose channels come first."""
    done = func(*args, **kwargs)
    if not tape.relaid or not tape.apart() or not isinstance(done, Tensor):
        return done
    output = tape.physical(done)
    shape = output.shape
    if output.requires_grad and len(shape) == 5 and output.flatten(0, 1).is_contiguous(memory_format=torch.channels_last):
        # Such a gradient comes from flattening: 3 of 30 ms of a small network.
        output.register_hook(lambda grad: channels_last(grad.flatten(0, 1)).view(shape))
    return done


def _each(value: Any, dimensions: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * dimensions if len(given) == 1 else given


def _padding(padding: Any, kernel: torch.Size, dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        padding = 0
    if padding == "same":
        missing = [step * (size - 1) for step, size in zip(dilation, kernel)]
        return tuple((size // 2, size - size // 2) for size in missing)
    return tuple((size, size) for size in _each(padding, len(kernel)))
