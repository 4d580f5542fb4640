"""Losses whose examples' gradients are taken in every way that there is, with what they are expected to be found by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from instances import random_tree
from torch import Tensor, nn

import functrain as ft

N = 5


class Case(NamedTuple):
    params: Any
    loss: Callable[..., Any]
    batch: Any
    # The algebra of the leaf named first, by its first word.
    leaf: str
    algebra: str


def by_hand(loss: Any, params: Any, batch: Any) -> tuple[Any, Tensor]:
    """Each example's gradient (leaves `(N, …)`) and loss, by autograd on that example alone."""
    rows, values = [], []
    for place in range(ft.tree.batch_size(batch)):
        part = ft.tree.map(lambda leaf, place=place: leaf[place : place + 1], batch)
        flat, spec = ft.tree.flatten(params)
        leaves = [leaf.detach().clone().requires_grad_() for leaf in flat]
        output = loss(ft.tree.unflatten(spec, leaves), part)
        value = output.sum()
        grads = torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
        rows.append([torch.zeros_like(leaf) if grad is None else grad for grad, leaf in zip(grads, leaves)])
        values.append(value.detach())
    return ft.tree.unflatten(spec, [torch.stack(column) for column in zip(*rows)]), torch.stack(values)


def norms_of(grads: Any) -> Tensor:
    """‖gᵢ‖ over all leaves `(N, …)`, in float64."""
    return sum(leaf.double().reshape(len(leaf), -1).square().sum(1) for leaf in ft.tree.leaves(grads)).sqrt()


def of_module(module: nn.Module, x: Tensor, leaf: str, algebra: str) -> Case:
    params, apply = ft.functional(module.double())

    def loss(params: Any, batch: Any) -> Tensor:
        return apply(params, batch["x"]).flatten(1).square()

    # Small biases everywhere, so that no unit is dead and no gradient zero by chance.
    params = {name: value + 0.01 for name, value in params.items()}
    return Case(params, loss, {"x": x}, leaf, algebra)


def _x(*shape: int) -> Tensor:
    return random_tree(shape, 3, torch.float64)


def _modules() -> dict[str, Case]:
    torch.manual_seed(0)
    tokens = torch.tensor([[0, 3, 3, 6], [1, 1, 1, 1], [6, 5, 4, 0], [2, 2, 5, 5], [6, 6, 6, 1]])
    return {
        "mlp": of_module(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)), _x(N, 3), "0.weight", "linear"
        ),
        "in place activations": of_module(
            nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ReLU(True)), _x(N, 3), "0.bias", "shift"
        ),
        "linear over time": of_module(
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), _x(N, 7, 3), "0.weight", "linear"
        ),
        "linear over little time": of_module(nn.Linear(30, 40), _x(N, 2, 30), "weight", "linear"),
        "conv1d": of_module(
            nn.Sequential(nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), nn.Tanh(), nn.Conv1d(6, 2, 3)),
            _x(N, 4, 13),
            "0.weight",
            "convolution",
        ),
        "conv2d": of_module(
            nn.Sequential(
                nn.Conv2d(2, 6, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
                nn.ReLU(inplace=True),
                nn.Conv2d(6, 4, 3, padding="same", dilation=2, groups=2),
                nn.MaxPool2d(2),
            ),
            _x(N, 2, 9, 8),
            "0.weight",
            "convolution",
        ),
        "conv2d circular": of_module(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), _x(N, 2, 4, 4), "bias", "shift"),
        "conv2d wide, few positions": of_module(
            nn.Conv2d(10, 20, 3, padding=1, groups=5), _x(N, 10, 2, 2), "weight", "convolution"
        ),
        "conv3d": of_module(
            nn.Sequential(nn.Conv3d(2, 3, 2, padding="valid"), nn.Tanh(), nn.Conv3d(3, 3, 3, padding=1, groups=3)),
            _x(N, 2, 4, 5, 3),
            "0.weight",
            "convolution",
        ),
        "transposed convolution": of_module(nn.ConvTranspose2d(2, 3, 2, stride=2), _x(N, 2, 4, 5), "weight", "expanded"),
        "norms": of_module(
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3)),
            _x(N, 2, 4, 4),
            "1.weight",
            "scale",
        ),
        "norms without a shift": of_module(
            nn.Sequential(nn.LayerNorm((2, 3), bias=False), nn.Linear(3, 2)), _x(N, 4, 2, 3), "0.weight", "scale"
        ),
        "batch norm at rest": of_module(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.PReLU(4)).eval(), _x(N, 3), "1.weight", "expanded"
        ),
        "embedding": of_module(
            nn.Sequential(nn.Embedding(7, 4, padding_idx=-1), nn.Tanh(), nn.Linear(4, 2)), tokens, "0.weight", "embedding"
        ),
        "embedding, long": of_module(nn.Embedding(7, 4), tokens.repeat(1, 4), "weight", "embedding"),
        "embedding, one token": of_module(nn.Embedding(7, 4), tokens[:, 0], "weight", "embedding"),
        "embedding by frequency": of_module(nn.Embedding(7, 4, scale_grad_by_freq=True), tokens, "weight", "expanded"),
    }


# --- raw trees ------------------------------------------------------------------------------------------------------

_SHAPES = {"a": (3, 3), "b": (3,), "e": (6, 3), "k": (2, 1, 2, 2), "s": (), "t": (1,)}


def _batch() -> Any:
    batch = random_tree({"x": (N, 3), "xt": (N, N, 3), "xx": (N, 3, 3)}, 7, torch.float64)
    return batch | {"ids": torch.arange(4 * N).reshape(N, 4) % 6}


def _without_grad(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return function()


def _recurrent(p: Any, b: Any) -> Tensor:
    hidden = torch.zeros_like(b["x"])
    for time in range(N):
        hidden = torch.tanh(b["xt"][:, time] @ p["a"] + F.linear(hidden, p["a"], p["b"]))
    return hidden


def _inner_grad(p: Any, b: Any) -> Tensor:
    return torch.func.grad(lambda x: (x @ p["a"]).tanh().square().sum())(b["x"]) * p["b"]


def _penalty(p: Any, b: Any) -> Tensor:
    x = b["x"].detach().requires_grad_()
    (slope,) = torch.autograd.grad((x @ p["a"]).tanh().square().sum(), x, create_graph=True)
    return slope * p["b"]


def _viewed(p: Any, b: Any) -> Tensor:
    images = F.conv2d(b["xx"].unsqueeze(1), p["k"])
    return images.view(images.size(0), -1).tanh()


def _frames(p: Any, b: Any) -> Tensor:
    frames = b["xt"].reshape(-1, 1, 1, 3).expand(-1, 1, 3, 3)
    return F.conv2d(frames, p["k"], p["t"].expand(2)).reshape(len(b["xt"]), -1).tanh()


class Doubled(torch.autograd.Function):
    """An operation that no tape can see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.T @ grad


_RAW: dict[str, tuple[Callable[..., Any], str, str]] = {
    "x @ w": (lambda p, b: (b["x"] @ p["a"] + p["b"]).square(), "a", "linear"),
    "w @ x": (lambda p, b: (p["a"] @ b["xx"]).square(), "a", "linear"),
    "w @ vector": (lambda p, b: torch.stack([p["a"] @ x for x in b["x"]]).square(), "a", "linear"),
    "transposed": (lambda p, b: torch.matmul(b["xt"], p["a"].T).square(), "a", "linear"),
    "mm": (lambda p, b: torch.mm(b["x"], p["a"].t()).square() + b["x"].mm(p["a"].transpose(0, -1)), "a", "linear"),
    "addmm": (lambda p, b: torch.addmm(p["b"], b["x"], p["a"]).square(), "b", "shift"),
    "cast": (lambda p, b: (b["x"] @ p["a"].to(torch.float64)).square() * p["b"].double(), "a", "linear"),
    "used twice": (lambda p, b: torch.tanh(b["x"] @ p["a"]) @ p["a"], "a", "linear"),
    "used twice, once transposed": (lambda p, b: torch.tanh(b["x"] @ p["a"]) @ p["a"].T, "a", "linear"),
    "used twice, once oddly": (lambda p, b: torch.tanh(b["x"] @ p["a"]) * p["a"].norm(), "a", "linear and expanded"),
    "times itself": (lambda p, b: b["x"] @ (p["a"] @ p["a"]), "a", "expanded"),
    "tied embedding": (lambda p, b: F.embedding(b["ids"], p["e"]) @ p["e"].T, "e", "embedding and linear"),
    "looked up by index": (lambda p, b: p["e"][b["ids"]].tanh(), "e", "expanded"),
    "scalars": (lambda p, b: (p["s"] * b["x"]).exp() + p["t"] / p["s"], "s", "expanded"),
    "odd operations": (
        lambda p, b: (
            torch.linalg.solve(p["a"] + 3 * torch.eye(3, dtype=p["a"].dtype), b["x"].unsqueeze(2)).squeeze(2)
            + torch.cat([p["b"].sin(), p["t"]]).sum()
            + torch.stack([p["b"], p["b"]]).sum(0)
            + p["a"][1:, 0].sum() * p["e"].norm()
        ),
        "a",
        "expanded",
    ),
    "einsum": (lambda p, b: torch.einsum("nti,ij->ntj", b["xt"], p["a"]).square(), "a", "expanded"),
    "time first, T = N": (
        lambda p, b: (torch.tanh(b["xt"].transpose(0, 1) @ p["a"]) @ p["a"]).transpose(0, 1),
        "a",
        "linear",
    ),
    "time first linear, T = N": (
        lambda p, b: F.linear(b["xt"].transpose(0, 1), p["a"], p["b"]).tanh().transpose(0, 1),
        "b",
        "shift",
    ),
    "bias derived": (lambda p, b: F.linear(b["x"], p["a"], p["b"] * 2).tanh(), "b", "expanded"),
    "weight derived": (lambda p, b: F.linear(b["x"], p["a"] * 2, p["b"]).tanh(), "a", "expanded"),
    "constant input": (lambda p, b: F.linear(torch.ones(2, 3).double(), p["a"], p["b"]).sum() * b["x"], "a", "linear"),
    "unused": (lambda p, b: b["x"] * p["b"], "a", "unused"),
    "detached": (lambda p, b: (b["x"] @ p["a"].detach()) * p["b"], "a", "unused"),
    "stopped": (lambda p, b: (b["x"] @ p["a"]) * _without_grad(lambda: b["x"] @ p["a"] + p["b"]), "b", "unused"),
    "read": (
        lambda p, b: (
            (b["x"] @ p["a"]) * p["s"].detach().item() + p["a"].shape[0] * len(p["b"]) * p["a"].size(0) / p["b"].numel()
        ),
        "a",
        "linear",
    ),
    "written to": (lambda p, b: F.linear(b["x"], p["a"], p["b"]).add_(1).mul_(3).tanh(), "a", "linear"),
    "vmap inside": (lambda p, b: torch.func.vmap(lambda x: p["a"] @ x * p["b"])(b["x"]).tanh(), "a", "expanded"),
    "grad inside": (_inner_grad, "a", "expanded"),
    "autograd inside": (_penalty, "a", "all leaves"),
    "folded time": (lambda p, b: F.linear(b["xt"].reshape(-1, 3), p["a"], p["b"]).tanh().reshape(-1, N, 3), "a", "linear"),
    "frames": (_frames, "k", "expanded"),
    "viewed images": (_viewed, "k", "convolution"),
    "kernel twice": (
        lambda p, b: F.conv2d(b["xx"].unsqueeze(1), p["k"])[:, 1:] * F.conv2d(b["xx"].unsqueeze(1).tanh(), p["k"])[:, :1],
        "k",
        "convolution",
    ),
    "one image": (lambda p, b: torch.stack([F.conv2d(x.unsqueeze(0), p["k"]) for x in b["xx"]]).tanh(), "k", "convolution"),
    "a param as loss": (lambda p, b: p["b"].expand(len(b["x"]), 3) * b["x"][:, :1], "b", "expanded"),
    "a param alone": (lambda p, b: p["t"], "t", "all leaves"),
    "unseen operation": (lambda p, b: Doubled.apply(b["x"], p["a"]).square(), "a", "all leaves"),
    "values read": (lambda p, b: (b["x"] @ p["a"]) * float(b["x"].sum()), "a", "all leaves"),
    "cell over time": (_recurrent, "a", "linear"),
    "class scores": (lambda p, b: F.cross_entropy(b["x"] @ p["a"], b["ids"][:, 0] % 3, reduction="none"), "a", "linear"),
    "class scores over time": (
        lambda p, b: F.cross_entropy((b["xt"] @ p["a"]).mT, b["ids"][:, :1].expand(-1, N) % 3, reduction="none"),
        "a",
        "linear",
    ),
    "class scores, smoothed": (
        lambda p, b: F.cross_entropy(b["x"] @ p["a"], b["ids"][:, 0] % 3, reduction="none", label_smoothing=0.1),
        "a",
        "linear",
    ),
    "attention": (
        lambda p, b: F.scaled_dot_product_attention(b["xt"] @ p["a"], b["xt"] * p["b"], b["xt"], is_causal=True),
        "a",
        "linear",
    ),
}


def _raw() -> dict[str, Case]:
    params, batch = random_tree(_SHAPES, 1, torch.float64), _batch()
    return {name: Case(params, loss, batch, leaf, algebra) for name, (loss, leaf, algebra) in _RAW.items()}


CASES = {**_modules(), **_raw()}
