"""A character model: an LSTM on the text of Python's own standard library, `functrain train examples/characters.py`.

The text is written once to an HDF5 file of bytes and read from it in windows. Sequences of 256 characters are
backpropagated through 32 at a time: the recurrent state crosses from window to window, the gradient does not.
"""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import functrain as ft

VOCABULARY = 128


@dataclass(frozen=True)
class Config:
    """What can be varied about the character model."""

    data: Path = Path("data/characters.h5")
    """The HDF5 file; written when it is not there."""
    characters: int = 500_000
    """How much text, in characters."""
    epochs: int = 6
    """Passes over the text."""
    batch: int = 32
    """Sequences in a batch."""
    length: int = 256
    """Characters in a sequence."""
    window: int = 32
    """Characters that the gradient goes back through."""
    width: int = 128
    """Units of the LSTM."""
    rate: float = 5e-3
    """Peak learning rate of the cosine schedule, after a warm-up of 20 updates."""
    seed: int = 0
    """Of the weights and the order of the sequences."""


def text_file(path: Path, characters: int) -> Path:
    """The standard library's modules, one after the other, as ASCII codes `(L,)` uint8: `train`, and a tenth as `valid`."""
    if path.exists():
        return path
    pieces: list[bytes] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        pieces.append(file.read_text(encoding="utf-8").encode("ascii", "replace"))
        if sum(map(len, pieces)) >= characters:
            break
    text = np.frombuffer(b"".join(pieces), dtype=np.uint8)[:characters]
    border = len(text) * 9 // 10
    path.parent.mkdir(parents=True, exist_ok=True)
    ft.h5write(path, {"train": text[:border], "valid": text[border:]}, overwrite=True)
    return path


class CharacterModel(nn.Module):
    """Characters `(N, T)` and a state of leaves `(N, width)` to scores `(N, T, 128)` and the next state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.read = nn.Linear(width, VOCABULARY)

    def forward(self, x, state):
        hidden, (h, c) = self.lstm(self.embed(x), tuple(leaf.unsqueeze(0) for leaf in state))
        return self.read(hidden), (h.squeeze(0), c.squeeze(0))


def pairs(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Windows of text `(N, T + 1)` as inputs and the characters that follow them, `(N, T)` each."""
    return {"x": text[:, :-1].long(), "y": text[:, 1:].long()}


def experiment(config: Config) -> ft.Experiment:
    """The character model's run as a value."""
    torch.manual_seed(config.seed)
    params, apply = ft.functional(CharacterModel(config.width))

    def start(batch):
        return tuple(torch.zeros(len(batch["x"]), config.width) for _ in range(2))

    def loss(params, batch, *, carry):
        scores, carry = apply(params, batch["x"], carry)
        return F.cross_entropy(scores.transpose(1, 2), batch["y"], reduction="none"), carry

    def judged(params, batch):
        losses, _ = loss(params, batch, carry=start(batch))
        return ft.Losses(losses, aux={"bits": losses / np.log(2)})

    file = text_file(config.data, config.characters)

    def sequences(part):
        return ft.hdf5(file, part).windows(config.length + 1, stride=config.length)

    train = sequences("train").shuffle(seed=config.seed).batch(config.batch).map(pairs)
    valid = sequences("valid").batch(64).map(pairs)

    updates = max(1, config.epochs * len(train) * -(-config.length // config.window))
    schedule = ft.optim.warmup(20, ft.optim.cosine(config.rate, updates))
    step = ft.tbptt(ft.step(ft.grad(loss), ft.optim.adam(schedule)), config.window, start)

    def evaluate(state):
        return {f"valid/{name}": value for name, value in ft.evaluate(judged, state.params, valid).items()}

    return ft.Experiment(
        step, params, train, config.epochs, evaluate, seed=config.seed, score="valid/loss", maximize=False
    )


if __name__ == "__main__":
    raise SystemExit("this is a program for the command line: functrain train examples/characters.py")
