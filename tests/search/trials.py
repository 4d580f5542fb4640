"""Trials that the tests of searches share; at the top of a module, so that processes can be sent them."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import functrain as ft
from functrain.search import Scored

Config = dict[str, Any]


def parabola(config: Config) -> float:
    """Best at x = 3."""
    return -float((config["x"] - 3) ** 2)


def kept(config: Config) -> Scored:
    """A score with a state of every kind."""
    state = {"w": torch.full((2,), float(config["x"])), "half": torch.tensor(config["x"], dtype=torch.bfloat16)}
    return Scored(parabola(config), state, {"x squared": config["x"] ** 2})


def unsteady(config: Config) -> Any:
    """Returns, raises or breaks its contract, as its config says."""
    if config["does"] == "raise":
        raise ValueError(f"no good: {config['x']}")
    return {"nan": float("nan"), "text": "0.5", "inf": float("inf"), "score": config["x"]}[config["does"]]


def counted(config: Config) -> float:
    """Leaves a line in a file for every time it is called."""
    with open(config["log"], "a") as log:
        log.write(f"{config['x']}\n")
    return parabola(config)


def once(config: Config) -> float:
    """Fails the first time that it is called with x = 1."""
    flag = Path(config["flag"])
    if config["x"] == 1 and not flag.exists():
        flag.write_text("failed")
        raise RuntimeError("the first time")
    return parabola(config)


def threads(config: Config) -> float:
    """How many threads torch uses inside an operation here."""
    return float(torch.get_num_threads())


def killed(config: Config) -> float:
    """Its process dies at x = 2."""
    if config["x"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return parabola(config)


def line(config: Config) -> ft.Experiment:
    """The mean of some numbers by gradient descent: lr and start are in the state, `closure` is not."""
    data = torch.arange(12, dtype=torch.float32).remainder(5)
    source = ft.arrays(data).shuffle(seed=config.get("order", 0)).batch(config.get("batch", 4))
    factor = config.get("closure", 1.0)

    def loss(params: Any, batch: Any) -> torch.Tensor:
        return factor * (batch - params["mean"]).abs() ** 1.5

    made = ft.step(ft.grad(loss), getattr(ft.optim, config.get("optimizer", "sgd"))(config.get("lr", 0.1)))
    if config.get("compiled"):
        made = ft.step(ft.grad(loss), ft.optim.sgd(config["lr"]), donate=True)
    start = torch.full((config.get("size", 1),), float(config.get("start", 0)))

    def evaluate(state: Any) -> dict[str, float]:
        if config.get("start") == 99:
            raise ArithmeticError("too far")
        return {"distance": float((state.params["mean"] - data.mean()).abs().sum())}

    return ft.Experiment(
        made,
        {"mean": start},
        source,
        epochs=config.get("epochs", 2),
        evaluate=evaluate,
        score=config.get("score", "distance"),
        maximize=config.get("maximize", False),
        depth=config.get("depth", 0),
    )


def mixed(config: Config) -> Any:
    """An experiment or, for some, a number."""
    return parabola({"x": 0}) if config.get("number") else line({**config, "maximize": True})


def forever(config: Config) -> Any:
    """Ends for x = 0; at x = 1 it interrupts the process and never ends; then there is an experiment that goes on."""
    if config["x"] == 0:
        return 0.5
    if config["x"] == 1:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            time.sleep(0.01)
    return line({"epochs": 10**9, "lr": 0.1})


_seen: dict[int, int] = {}


def endless(config: Config) -> ft.Experiment:
    """Two of these at once, of batches of 4 and of 3, interrupt the process when both have taken 50 batches."""
    whole = line({**config, "epochs": 10**9})

    def counted(batch: torch.Tensor) -> torch.Tensor:
        _seen[config["batch"]] = _seen.get(config["batch"], 0) + 1
        if _seen[config["batch"]] >= 50 and min(_seen.get(4, 0), _seen.get(3, 0)) >= 50 and not _seen.get(0):
            _seen[0] = 1
            os.kill(os.getpid(), signal.SIGINT)
        return batch

    return replace(whole, train=whole.train.map(counted))


def names() -> set[str]:
    """The names of all threads that are alive."""
    return {thread.name for thread in threading.enumerate()}
