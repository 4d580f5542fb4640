"""The contestants in JAX: the same networks and loss, AdamW by optax, jitted, params and optimizer state donated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from torch import Tensor, nn

from bench.networks import RATE, Last, Work

JAX = "JAX jit, donated, optax"
OPTIMIZER = optax.adamw(RATE, weight_decay=1e-2)
Params = list[dict[str, Any]]


class Jax:
    """A jitted function that hands its first arguments on: `(*kept, *given) -> (*kept, loss)`."""

    def __init__(self, function: Callable[..., Any], kept: Sequence[Any], given: Sequence[Any]) -> None:
        self.function = jax.jit(function, donate_argnums=tuple(range(len(kept))))
        self.kept, self.given = tuple(kept), given

    def __call__(self) -> Any:
        *self.kept, value = self.function(*self.kept, *self.given)
        return jax.block_until_ready(value)


def one_step(work: Work) -> Jax:
    """One step on one batch."""
    params, step = _step(work.module())
    return Jax(step, (params, OPTIMIZER.init(params)), _arrays(work.batch))


def repeated(work: Work, batches: dict[str, Tensor]) -> Jax:
    """A step for each of the stacked batches `(steps, N, …)`, in one scan."""
    params, step = _step(work.module())

    def steps(params: Params, state: Any, x: Any, y: Any) -> Any:
        def one(kept: Any, batch: Any) -> Any:
            *kept, value = step(*kept, *batch)
            return tuple(kept), value

        (params, state), values = jax.lax.scan(one, (params, state), (x, y))
        return params, state, values

    return Jax(steps, (params, OPTIMIZER.init(params)), _arrays(batches))


def population(modules: list[nn.Sequential], batch: dict[str, Tensor]) -> Jax:
    """One step of each member on the same batch, vmapped."""
    _, step = _step(modules[0])
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[translated(module)[0] for module in modules])
    vmapped = jax.vmap(step, in_axes=(0, 0, None, None))
    return Jax(vmapped, (params, jax.vmap(OPTIMIZER.init)(params)), _arrays(batch))


def gradient(work: Work) -> Callable[[], Any]:
    """The loss and its gradient, without an optimizer."""
    params, apply = translated(work.module())
    jitted = jax.jit(jax.value_and_grad(lambda params, x, y: _loss(apply, params, x, y)))
    given = _arrays(work.batch)
    return lambda: jax.block_until_ready(jitted(params, *given))[0]


def _step(module: nn.Sequential) -> tuple[Params, Callable[..., Any]]:
    params, apply = translated(module)

    def step(params: Params, state: Any, x: Any, y: Any) -> Any:
        value, grads = jax.value_and_grad(lambda params: _loss(apply, params, x, y))(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return params, step


def _loss(apply: Callable[..., Any], params: Params, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def _arrays(batch: dict[str, Tensor]) -> tuple[Any, Any]:
    # Channels last, as JAX's convolutions have them.
    x = batch["x"].permute(0, 2, 3, 1) if batch["x"].ndim == 4 else batch["x"]
    return jnp.array(x.numpy()), jnp.array(batch["y"].numpy())


def translated(module: nn.Sequential) -> tuple[Params, Callable[[Params, Any], Any]]:
    """A network of PyTorch's layers as params and a function of JAX's."""
    layers = list(module)
    params = [_PARAMS.get(type(layer), _named)(layer) for layer in layers]

    def apply(params: Params, x: Any) -> Any:
        for layer, own in zip(layers, params):
            x = _APPLY[type(layer)](own, x)
        return x

    return params, apply


def _named(layer: nn.Module) -> dict[str, Any]:
    return {name: jnp.array(value.detach().numpy()) for name, value in layer.named_parameters()}


def _linear(layer: nn.Module) -> dict[str, Any]:
    own = _named(layer)
    return {"weight": own["weight"].T, "bias": own["bias"]}


def _kernel(layer: nn.Module) -> dict[str, Any]:
    own = _named(layer)
    return {"weight": own["weight"].transpose(2, 3, 1, 0), "bias": own["bias"]}


def _convolve(own: dict[str, Any], x: Any) -> Any:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, own["weight"], (1, 1), "SAME", dimension_numbers=layout) + own["bias"]


def _pool(own: dict[str, Any], x: Any) -> Any:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _lstm(own: dict[str, Any], x: Any) -> Any:
    # The products with the inputs do not wait for the recurrence: one for all time steps, as oneDNN takes it.
    inputs = (x @ own["weight_ih_l0"].T + own["bias_ih_l0"] + own["bias_hh_l0"]).swapaxes(0, 1)
    start = jnp.zeros((len(x), own["weight_hh_l0"].shape[1]), x.dtype)

    def one(kept: Any, given: Any) -> Any:
        hidden, cell = kept
        i, f, g, o = jnp.split(given + hidden @ own["weight_hh_l0"].T, 4, axis=1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    return jax.lax.scan(one, (start, start), inputs)[1].swapaxes(0, 1)


_PARAMS: dict[type, Callable[[nn.Module], dict[str, Any]]] = {nn.Linear: _linear, nn.Conv2d: _kernel}
_APPLY: dict[type, Callable[[dict[str, Any], Any], Any]] = {
    nn.Linear: lambda own, x: x @ own["weight"] + own["bias"],
    nn.ReLU: lambda own, x: jax.nn.relu(x),
    nn.Conv2d: _convolve,
    nn.MaxPool2d: _pool,
    # In PyTorch's order of features.
    nn.Flatten: lambda own, x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
    nn.LSTM: _lstm,
    Last: lambda own, x: x[:, -1],
}
