"""Checkpoints: the states of a run on disk, each one whole under its name or not there at all."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from functrain.core.errors import ArgumentError, RunError
from functrain.core.step import check_owned
from functrain.core.tree import Tree
from functrain.data.atomic import sync
from functrain.runs.store import load_tree, read_record, save_tree, with_numbers, write_record
from functrain.search.lock import sole_writer

_NAME = re.compile(r"step-(\d{8,})")
_FILES = ("state.safetensors", "record.json")
_DRAFT = ".draft-"
_ASIDE = ".replaced-"


class Loaded(NamedTuple):
    """What `Checkpoints.load` found.

    - `state`: the tree, bit for bit as it was saved;
    - `position`: the position it was saved at;
    - `record`: what was saved with it, numbers that are not finite included;
    - `skipped`: newer checkpoints that were damaged, each with the reason. Whoever loads should show these.
    """

    state: Tree
    position: int
    record: dict[str, Any]
    skipped: list[str]


class Checkpoints:
    """The checkpoints in one folder, of which the `keep` newest are kept (all of them with `keep=None`).

    A checkpoint is a directory `step-00000120` with `state.safetensors`, `record.json` and, written last,
    `manifest.json`, which has the size and SHA-256 of the other two. It is made under another name and moved
    into place when all of it is on the disk, so a kill at any moment leaves whole checkpoints only. Damage
    that comes later is seen by the hashes, and loading falls back to the newest whole one.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoints = Checkpoints(folder, keep=2)
    ...     for position in (10, 20, 30):
    ...         checkpoints.save({"w": torch.full((2,), position)}, position, {"epoch": position // 10})
    ...     loaded = checkpoints.load({"w": torch.zeros(2, dtype=torch.int64)})
    ...     checkpoints.positions(), loaded.position, loaded.record, loaded.state
    ([20, 30], 30, {'epoch': 3}, {'w': tensor([30, 30])})
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int | None = 3) -> None:
        if keep is not None and keep < 1:
            raise ArgumentError(f"keep must be at least 1, or None to keep all checkpoints; got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def save(self, state: Tree, position: int, record: Mapping[str, Any]) -> None:
        """Write the checkpoint of `position`, then remove those older than the `keep` newest.

        When there is a whole one with the same content already, that one stays. Raises `TreeError` for a
        state that cannot be stored, `DonatedError` for one that a step has taken over, and `RunError` when
        writing fails.
        """
        if type(position) is not int or position < 0:
            raise ArgumentError(f"position must be an int of at least 0, got {position!r}")
        if hasattr(state, "position"):
            check_owned(state)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with sole_writer(self.folder / ".lock", wait=True):
                self._clean()
                self._write(state, position, record)
                self._prune(position)
        except OSError as error:
            raise RunError(f"could not write checkpoint {position} to {self.folder}: {error}") from error

    def positions(self) -> list[int]:
        """The positions that there are checkpoints of, in order, whether damaged or whole."""
        return sorted(self._places())

    def newest(self) -> int | None:
        """The position of the newest whole checkpoint, or None when there is none."""
        places = self._places()
        newest_first = sorted(places, reverse=True)
        return next((position for position in newest_first if damage(places[position]) is None), None)

    def load(self, like: Tree, position: int | None = None) -> Loaded:
        """The newest whole checkpoint, or that of `position`, in the structure of `like`.

        Raises `RunError` listing what was tried when none is whole (with `position`: when that one is not),
        and `TreeError` when a whole one holds another tree than `like`: the program changed, not the disk.
        """
        places = self._places()
        if not places:
            raise RunError(f"no checkpoint in {self.folder}: nothing was saved there yet")
        if position is not None and position not in places:
            there = ", ".join(str(other) for other in sorted(places))
            raise RunError(f"no checkpoint of position {position} in {self.folder}, only of {there}")
        skipped: list[str] = []
        for candidate in sorted(places, reverse=True) if position is None else [position]:
            place = places[candidate]
            reason = damage(place)
            if reason is None:
                try:
                    record = with_numbers(read_record(place / "record.json"))
                    return Loaded(load_tree(place / "state.safetensors", like), candidate, record, skipped)
                except RunError as error:
                    reason = str(error)
            skipped.append(f"{place.name}: {reason}")
        raise RunError(f"no whole checkpoint in {self.folder}; tried {'; '.join(skipped)}")

    def _places(self) -> dict[int, Path]:
        names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        # ".replaced-…" sorts first: it counts only where a kill came between the two moves of a replacement.
        matches = ((_NAME.fullmatch(name.removeprefix(_ASIDE)), name) for name in names)
        return {int(match[1]): self.folder / name for match, name in matches if match}

    def _clean(self) -> None:
        """Put away what a killed writer left; nobody else can be writing, as the lock is held."""
        for place in self.folder.iterdir():
            if place.name.startswith(_ASIDE):
                final = self.folder / place.name.removeprefix(_ASIDE)
                if not final.exists():
                    os.rename(place, final)
                    continue
            if place.name.startswith((_ASIDE, _DRAFT)):
                shutil.rmtree(place)

    def _write(self, state: Tree, position: int, record: Mapping[str, Any]) -> None:
        final = self.folder / f"step-{position:08d}"
        draft = self.folder / f"{_DRAFT}{final.name}-{secrets.token_hex(4)}"
        draft.mkdir()
        try:
            save_tree(draft / "state.safetensors", state)
            write_record(draft / "record.json", record)
            files = {name: _fingerprint(draft / name) for name in _FILES}
            write_record(draft / "manifest.json", {"format": 1, "position": position, "files": files})
            sync(draft)
            aside = self.folder / f"{_ASIDE}{final.name}"
            if final.exists():
                if damage(final) is None and read_record(final / "manifest.json")["files"] == files:
                    return
                os.rename(final, aside)
            os.rename(draft, final)
            sync(self.folder)
            # After a kill between the two moves the old one is still there to be found, under the name aside.
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _prune(self, newest: int) -> None:
        if self.keep is None:
            return
        places = self._places()
        # The one just written stays, also after going back to an earlier position.
        older = [position for position in sorted(places, reverse=True) if position != newest]
        for position in older[self.keep - 1 :]:
            doomed = self.folder / f"{_DRAFT}{places[position].name}-{secrets.token_hex(4)}"
            os.rename(places[position], doomed)
            shutil.rmtree(doomed)


def _fingerprint(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def damage(place: Path) -> str | None:
    """What is wrong with the checkpoint directory `place`, or None when it is whole.

    >>> damage(Path("nowhere"))
    'manifest.json is missing'
    """
    if not (place / "manifest.json").is_file():
        return "manifest.json is missing"
    try:
        files = read_record(place / "manifest.json").get("files")
        if not isinstance(files, dict) or sorted(files) != sorted(_FILES):
            return "manifest.json is damaged"
        for name, expected in files.items():
            if not (place / name).is_file():
                return f"{name} is missing"
            size = (place / name).stat().st_size
            if size != expected["size"]:
                return f"{name} has {size} bytes, expected {expected['size']}"
            if _fingerprint(place / name) != expected:
                return f"{name} has other bytes than were saved (its SHA-256 differs)"
    except (RunError, OSError, KeyError, TypeError) as error:
        return f"it cannot be read: {error}"
    return None
