"""Tomorrow's temperature from a folder of weather stations' files, as one finds them: `python examples/stations.py`.

Nobody laid these HDF5 files out for training: one a station, gzip with h5py's own chunks, series of different lengths,
temperature and pressure packed into 16-bit integers with a scale and an offset, gaps marked by a fill value, wind as big-endian
records. (They are written here once, into data/stations, and hold weather that was made up: seasons, days, and waves that pass
over all stations, one after the other.) The program looks at a file, asks what its layout costs, and trains from the files as
they are: windows of three days that never cross from one station into another, shuffled chunk by chunk, prefetched. It ends
with the error on stations that it never saw, beside that of "tomorrow is like today".

    functrain train examples/stations.py                       the same as a run: checkpoints, curves, resume
    python examples/stations.py --picture stations.png         with a picture of the curves
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor, nn

import functrain as ft
from functrain.cli.data import show

PAST, AHEAD = 48, 24
FEATURES = 9
DAY, YEAR = 24, 24 * 365.25


@dataclass(frozen=True)
class Config:
    """What can be varied about the forecast."""

    data: Path = Path("data/stations")
    """The folder of files; they are written when it is not there."""
    stations: int = 12
    """How many files are written; a quarter of them is held out."""
    years: float = 2.0
    """Length of the shortest series; the longest has twice as many."""
    epochs: int = 6
    """Passes over the windows."""
    stride: int = 5
    """Hours from one window to the next in training."""
    batch: int = 256
    """Windows in a batch."""
    width: int = 128
    """Hidden units."""
    rate: float = 2e-3
    """Peak learning rate of the cosine schedule."""
    threads: int = 2
    """Threads that decode chunks."""
    within: str = "1 MiB"
    """Bytes of neighbouring chunks that are shuffled together."""
    memory: str = "64 MiB"
    """Budget for decoded chunks and prefetched batches together."""
    compiled: bool = True
    """Whether the step runs as one compiled graph."""
    seed: int = 0
    """Of the weights and the order of the data."""


# --- files as they are found -----------------------------------------------------------------------------------


def station_files(folder: Path, stations: int, years: float) -> list[Path]:
    """The stations' files, written if there are none."""
    found = sorted(folder.glob("*.h5"))
    if found:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    hours = int(2 * years * YEAR)
    waves = _waves(np.random.default_rng(0), hours + 24 * stations)
    paths = [folder / f"station-{number:02}.h5" for number in range(stations)]
    for number, path in enumerate(paths):
        # A wave arrives a few hours later at each station; the series of some begin later.
        later = 6 * number
        begin = (number * 7 % stations) * (hours // 2) // stations
        _write_station(path, number, waves[24 * stations - later :][:hours][begin:], begin)
    return paths


def _waves(rng: np.random.Generator, hours: int) -> np.ndarray:
    """Weather as it passes by: a complex series that turns once in about eight days and forgets itself in about four."""
    kicks = rng.standard_normal((hours, 2)) @ [1, 1j]
    turn = np.exp(2j * np.pi / (8 * DAY) - 1 / (4 * DAY))
    found = np.empty(hours, complex)
    state = 0j
    for hour, kick in enumerate(kicks):
        found[hour] = state = turn * state + kick
    return found / np.abs(found).std()


def _write_station(path: Path, number: int, waves: np.ndarray, begin: int) -> None:
    rng = np.random.default_rng(100 + number)
    hours = np.arange(begin, begin + len(waves))
    latitude = rng.uniform(35, 65)
    local = _waves(rng, len(waves))
    weather = waves + 0.4 * local
    season, day = np.cos(2 * np.pi * (hours / YEAR - 0.55)), np.cos(2 * np.pi * (hours / DAY - 0.6))
    cloud = 1 / (1 + np.exp(1.5 * weather.real))
    temperature = 32 - 0.45 * latitude + 0.22 * latitude * season + 6 * (1 - cloud) * day + 3 * (weather * np.exp(0.9j)).real
    temperature += 0.4 * rng.standard_normal(len(hours))
    pressure = 1013 + 9 * weather.real + 0.3 * rng.standard_normal(len(hours))
    humidity = np.clip(60 + 30 * (cloud - 0.5) - 8 * day + 3 * rng.standard_normal(len(hours)), 5, 100)
    wind = np.empty(len(hours), [("u", ">f4"), ("v", ">f4")])
    wind["u"], wind["v"] = (
        4 * weather.imag + rng.standard_normal(len(hours)),
        3 * weather.real + rng.standard_normal(len(hours)),
    )
    packed = np.round(temperature / 0.01).astype("i2")
    for gap in rng.integers(0, len(hours) - DAY, len(hours) // 2000):
        packed[gap : gap + rng.integers(1, DAY)] = -32768
    with h5py.File(path, "w") as file:
        file.attrs.update(title="hourly observations", station=f"ST{number:02}", latitude=latitude, Conventions="CF-1.8")
        group = file.create_group("observations")
        how = {"compression": "gzip", "chunks": True}
        group.create_dataset("time", data=hours, **how).attrs["units"] = "hours since 2015-01-01"
        stored = group.create_dataset("temperature", data=packed, **how)
        stored.attrs.update(units="degC", scale_factor=0.01, add_offset=0.0, _FillValue=np.int16(-32768))
        stored = group.create_dataset("pressure", data=np.round((pressure - 1000) / 0.05).astype("i2"), **how)
        stored.attrs.update(units="hPa", scale_factor=0.05, add_offset=1000.0)
        group.create_dataset("humidity", data=humidity.astype("f4"), **how).attrs["units"] = "%"
        group.create_dataset("wind", data=wind, **how).attrs["units"] = "m s-1"


# --- from files to batches -------------------------------------------------------------------------------------


def sequences(files: Sequence[Path], config: Config, stride: int, memory: ft.Budget) -> ft.Source:
    """Windows of past and future `(PAST + AHEAD, …)` that stay inside a station."""
    steps = ft.hdf5(files, "observations", unpack=True, threads=config.threads, memory=memory)
    return ft.episodes(steps).windows(PAST + AHEAD, stride)


def prepared(steps: dict[str, Any]) -> dict[str, Tensor]:
    """Windows as they are stored to inputs `x` (N, PAST, FEATURES), `today` and `tomorrow` (N, AHEAD), in units of ten degrees.

    What was not measured is NaN: 0 in the inputs, beside a feature that says so, and without `weight` in the loss.
    """
    temperature = steps["temperature"].float() / 10
    measured = ~temperature.isnan()
    filled = temperature.nan_to_num(0.0)
    hour, season = (2 * torch.pi * steps["time"].double() / period for period in (DAY, YEAR))
    features = [
        filled,
        measured.float(),
        (steps["pressure"].float() - 1013) / 10,
        steps["humidity"] / 100,
        steps["wind"]["u"] / 10,
        steps["wind"]["v"] / 10,
        hour.cos().float(),
        hour.sin().float(),
        season.cos().float(),
    ]
    x = torch.stack(features, -1)[:, :PAST]
    today = slice(PAST - AHEAD, PAST)
    # Where today has gaps, "as today" says nothing: such hours count for nobody.
    weight = (measured[:, PAST:] & measured[:, today]).float()
    return {"x": x, "today": filled[:, today], "tomorrow": filled[:, PAST:], "weight": weight}


# --- the experiment --------------------------------------------------------------------------------------------


class Forecast(nn.Module):
    """Tomorrow as today, and what is to be added to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Flatten(),
            nn.Linear(PAST * FEATURES, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, AHEAD),
        )

    def forward(self, x: Tensor, today: Tensor) -> Tensor:
        return today + self.change(x)


def split(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Stations to train on and stations to judge by: whole files, so that no hour is in both."""
    held_out = max(1, len(files) // 4)
    return list(files[:-held_out]), list(files[-held_out:])


def experiment(config: Config, memory: ft.Budget | None = None) -> ft.Experiment:
    """The forecast's run as a value; what its sources hold in memory counts against `memory`."""
    torch.manual_seed(config.seed)
    params, apply = ft.functional(Forecast(config.width))

    def loss(params, batch):
        wrong = (apply(params, batch["x"], batch["today"]) - batch["tomorrow"]) ** 2
        return wrong, batch["weight"]

    def judged(params, batch):
        wrong = (apply(params, batch["x"], batch["today"]) - batch["tomorrow"]) ** 2
        as_today = (batch["today"] - batch["tomorrow"]) ** 2
        return ft.Losses(wrong, batch["weight"], aux={"as today": as_today})

    memory = memory or ft.Budget(config.memory)
    known, unseen = split(station_files(config.data, config.stations, config.years))
    windows = sequences(known, config, config.stride, memory)
    shuffled = windows.shuffle(seed=config.seed, within=config.within)
    train = shuffled.batch(config.batch, drop_last=True).map(prepared)
    test = sequences(unseen, config, AHEAD, memory).batch(512).map(prepared)

    schedule = ft.optim.warmup(50, ft.optim.cosine(config.rate, max(1, config.epochs * len(train))))
    step = ft.step(ft.grad(loss), ft.optim.adamw(schedule, weight_decay=1e-2))

    def evaluate(state):
        found = ft.evaluate(judged, state.params, test)
        # From squares of ten degrees to degrees.
        return {"test/error": 10 * found["loss"] ** 0.5, "test/persistence": 10 * found["as today"] ** 0.5}

    return ft.Experiment(
        ft.compiled(step) if config.compiled else step,
        params,
        train,
        config.epochs,
        evaluate,
        seed=config.seed,
        depth=4,
        score="test/error",
        maximize=False,
    )


# --- from first look to curves ---------------------------------------------------------------------------------


def trained(experiment: ft.Experiment, memory: ft.Budget) -> tuple[Any, list[dict[str, float]]]:
    """The last state, and the errors in degrees after each epoch, printed as they come."""
    state, rows = experiment.initial(), []
    print(f"\n{'epoch':>5}{'training':>10}{'unseen':>10}{'as today':>10}{'seconds':>10}")
    with ft.prefetch(experiment.train, depth=experiment.depth, workers=2, memory=memory) as batches:
        for epoch in range(experiment.epochs):
            began, losses = time.perf_counter(), []
            for state, metrics in ft.fold(experiment.step, state, batches):  # noqa: B007
                losses.append(metrics["loss"])
            seconds = time.perf_counter() - began
            assert experiment.evaluate is not None
            rows.append({"train/error": 10 * float(torch.stack(losses).mean()) ** 0.5, **experiment.evaluate(state)})
            print(f"{epoch + 1:>5}{''.join(f'{error:>10.2f}' for error in rows[-1].values())}{seconds:>10.1f}")
        print(f"\n{batches.stats}")
    return state, rows


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """The errors over the epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    epochs = range(1, len(rows) + 1)
    names = {"train/error": "training stations", "test/error": "unseen stations", "test/persistence": "tomorrow is like today"}
    for (name, label), colour, style in zip(names.items(), ("#3b6fb6", "#e08214", "#666666"), ("-o", "-o", "--")):
        axes.plot(epochs, [row[name] for row in rows], style, color=colour, markersize=4, label=label)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("error of hourly temperatures, °C (RMS)")
    axes.set_title("Tomorrow's temperature")
    axes.set_ylim(0)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(config: Config, picture: Path | None = None) -> None:
    """Look at the files, train from them as they are, and compare with "tomorrow is like today".

    Args:
        config: What can be varied.
        picture: Where the curves are drawn.
    """
    torch.set_num_threads(1)
    files = station_files(config.data, config.stations, config.years)
    print(f"{len(files)} files; the first one, as `functrain data inspect {files[0]}` shows it:\n")
    show(ft.h5inspect(files[0]))
    print(f"\n{ft.h5advice(files[0], 'observations', seconds=1.0)}\n")
    memory = ft.Budget(config.memory)
    chosen = experiment(config, memory)
    print(ft.explain(chosen.train))
    _, rows = trained(chosen, memory)
    gain = 1 - rows[-1]["test/error"] / rows[-1]["test/persistence"]
    print(f"unseen stations: {rows[-1]['test/error']:.2f} °C, {gain:.0%} below tomorrow as today")
    print(f"memory: {memory}, at most {memory.peak / 2**20:.1f} MiB")
    if picture:
        draw(rows, picture)
        print(f"picture: {picture}")


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
