"""A first look at files: what is there, how it lies, what is wrong with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

import functrain as ft
from functrain.cli.data import show
from functrain.core.errors import DataError
from functrain.data.h5.inspect import DatasetReport, Report

DRAW = np.random.default_rng(0)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with what one meets in the wild."""
    path = tmp_path_factory.mktemp("inspect") / "a.h5"
    images = DRAW.integers(0, 9, (64, 96, 96, 3), "u1")
    with h5py.File(path, "w") as file:
        train = file.create_group("train")
        train["x"] = DRAW.standard_normal((1000, 200))
        train["y"] = np.arange(1000)
        train.create_dataset("images", data=images, chunks=(16, 12, 12, 1), compression="gzip", shuffle=True)
        train["names"] = ["one", "two"]
        train.attrs["encoding-type"] = "csr_matrix"
        packed = file.create_dataset("deep/er/packed", data=np.arange(5, dtype="i2"))
        packed.attrs["scale_factor"], packed.attrs["units"], packed.attrs["other"] = 0.5, "K", "not told"
        file["soft"] = h5py.SoftLink("/train/y")
        file["group"] = h5py.SoftLink("/train")
        file["train/up"] = file["/"]
        file["scalar"], file["null"] = 3, h5py.Empty("f4")
        file["empty"] = np.zeros((0, 3))
        file["gone"] = h5py.SoftLink("/nowhere")
        file.create_dataset("absurd", (2**60,), "f4", chunks=(1024,))
        file.create_dataset("tiny", data=np.arange(300_000), chunks=(100,))
        file.create_dataset("large", (4, 2**22), "f4", chunks=(2, 2**22), compression="gzip")
        layout = h5py.VirtualLayout((2, 1000), "i8")
        layout[0], layout[1] = h5py.VirtualSource(".", "train/y", (1000,)), h5py.VirtualSource("lost.h5", "y", (1000,))
        file.create_virtual_dataset("virtual", layout)
    return path


@pytest.fixture(scope="module")
def report(shelf: Path) -> Report:
    return ft.h5inspect(shelf)


def of(report: Report, name: str) -> DatasetReport:
    return next(each for each in report.datasets if each.name == name)


def test_every_dataset_is_told_as_h5py_has_it(shelf: Path, report: Report) -> None:
    names = []
    with h5py.File(shelf) as file:
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for each in report.datasets:
            dataset = file[each.name]
            assert each.shape == dataset.shape
            assert each.stored == dataset.id.get_storage_size()
            assert each.size == (dataset.size or 0) * dataset.dtype.itemsize
    assert sorted(each.name for each in report.datasets) == sorted([*names, "soft"])
    assert report.size == shelf.stat().st_size
    images = of(report, "train/images")
    assert (images.dtype, images.layout, images.filters) == ("uint8", "chunks 16×12×12×1", "shuffle+gzip")
    assert images.ratio == images.size / images.stored > 1
    assert of(report, "scalar").shape == ()
    assert of(report, "null").shape is None
    assert of(report, "soft").link == "→ /train/y"


def test_the_way_is_that_of_the_source(shelf: Path, report: Report) -> None:
    for name, way in (("x", "mmap"), ("images", "direct"), ("names", "h5py")):
        each = of(report, f"train/{name}")
        assert each.way == way
        if name != "names":
            with ft.hdf5(shelf, "train", datasets=[name]) as source:
                assert f"{way}: {each.reason}" in str(source.explain())


def test_speed_is_measured_where_there_is_enough_to_read(shelf: Path, report: Report) -> None:
    assert {each.name for each in report.datasets if each.speed} == {"train/x", "train/images", "tiny", "large"}
    assert all(each.speed > 0 for each in report.datasets if each.speed is not None)
    assert all(each.speed is None for each in ft.h5inspect(shelf, speed=False).datasets)


def test_what_is_awkward_is_told(report: Report) -> None:
    cases = {
        "train/images": "one sample touches 192 chunks",
        "train/names": "has dtype string, which no tensor can hold",
        "virtual": "takes data from 'lost.h5', which is not there: it would be read as fill values",
        "absurd": "4.0 EiB",
        "empty": "has no samples",
        "tiny": "chunks of 800 B are small",
        "large": "chunks of 32.0 MiB hold 2 samples",
    }
    for name, text in cases.items():
        assert any(text in warning for warning in of(report, name).warnings), (name, of(report, name).warnings)
    for name in ("train/x", "train/y", "deep/er/packed", "scalar", "null", "soft"):
        assert of(report, name).warnings == ()
    assert [name for name, _ in report.broken] == ["gone"]
    assert "leads nowhere" in report.broken[0][1]


def test_groups_are_entered_once_and_tell_of_themselves(report: Report) -> None:
    groups = {each.name: each for each in report.groups}
    assert set(groups) == {"", "train", "train/up", "deep", "deep/er", "group"}
    assert (groups["train"].datasets, groups["train"].groups) == (4, 1)
    assert groups["train"].attributes == {"encoding-type": "csr_matrix"}
    assert groups["train"].warnings == (
        "its datasets differ in length (images: 64, names: 2, x: 1000, y: 1000): choose with datasets=[…]",
    )
    assert groups["group"].link == "→ /train"


def test_attributes_that_say_how_to_read_are_told(report: Report) -> None:
    packed = of(report, "deep/er/packed")
    assert packed.attributes == {"scale_factor": "0.5", "units": "K"}
    # Not as though it were an attribute.
    assert [each.name for each in report.datasets if each.packed] == [packed.name]


def test_it_is_printed_as_the_command_line_shows_it(shelf: Path, report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    text = str(report)
    lines = text.splitlines()
    assert lines[0].endswith("a.h5: " + lines[0].rpartition(": ")[2])
    head, *rows = lines[1 : 2 + len(report.datasets)]
    assert head.split() == ["dataset", "shape", "dtype", "layout", "filters", "size", "ratio", "way", "MB/s"]
    for each, row in zip(report.datasets, rows):
        assert row.startswith(each.name)
        assert row.index(each.dtype, len(each.name)) == head.index("dtype")
    assert "packed: unpack=True gives what the numbers stand for\n  deep/er/packed\n" in text
    assert "  deep/er/packed: scale_factor = 0.5, units = K\n" in text
    show(report)
    # Cells are folded there, where they have not enough room.
    assert set(capsys.readouterr().out.split()) - set(text.split()) == set()


def test_names_that_a_terminal_would_take_for_commands_are_written_out(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["\x1b[31mred\n"] = np.arange(3)
    lines = str(ft.h5inspect(tmp_path / "a.h5")).splitlines()
    assert lines[2].startswith("\\x1b[31mred\\n")


def test_small_datasets_are_no_concern_and_others_are_for_h5advice_to_measure(tmp_path: Path) -> None:
    for length in (50, 200):
        with h5py.File(tmp_path / "a.h5", "w") as file:
            file.create_dataset("x", (length, 1000), "f8", chunks=(50, 10))
        (x,) = ft.h5inspect(tmp_path / "a.h5").datasets
        (told,) = ft.h5advice(tmp_path / "a.h5", seconds=0.05).datasets
        assert told.advice.endswith("It is small: keep it.") == (x.warnings == ())
        assert any("h5advice" in warning for warning in x.warnings) == (length == 200)


def test_hashes_are_those_of_content_hash(shelf: Path, report: Report) -> None:
    hashed = {each.name: each.hash for each in report.datasets if each.hash}
    assert ft.content_hash(shelf, "deep") == {"er/packed": hashed["deep/er/packed"]}
    assert all(ft.content_hash(shelf, name) == hash_ for name, hash_ in hashed.items())
    assert set(hashed) == {each.name for each in report.datasets} - {"absurd", "virtual"}
    assert all(each.hash is None for each in ft.h5inspect(shelf, hashes=False).datasets)


def test_a_group_or_dataset_is_looked_at_alone(shelf: Path) -> None:
    below = ft.h5inspect(shelf, "deep")
    assert [each.name for each in below.datasets] == ["deep/er/packed"]
    assert [each.name for each in below.groups] == ["deep", "deep/er"]
    alone = ft.h5inspect(shelf, "/train/y")
    assert [each.name for each in alone.datasets] == ["train/y"]
    assert alone.groups == ()
    with pytest.raises(DataError, match="has no 'absent'"):
        ft.h5inspect(shelf, "absent")


def test_a_link_out_of_the_root_is_told_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/a.h5", "b.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            file["x"] = np.arange(3)
            file["out"] = h5py.ExternalLink(str(tmp_path / "b.h5"), "/x")
    assert [each.name for each in ft.h5inspect(tmp_path / "in" / "a.h5").datasets] == ["out", "x"]
    report = ft.h5inspect(tmp_path / "in" / "a.h5", root=tmp_path / "in")
    assert [each.name for each in report.datasets] == ["x"]
    assert [(name, "outside of root" in text) for name, text in report.broken] == [("out", True)]


def test_one_damaged_dataset_lets_the_others_be(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("bad", data=np.arange(300_000), chunks=(100_000,), fletcher32=True)
        file.create_dataset("good", data=np.arange(300_000), chunks=(100_000,), fletcher32=True)
        place = file["bad"].id.get_chunk_info(1).byte_offset
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    bad, good = ft.h5inspect(path).datasets
    assert any("chunk (1,)" in warning for warning in bad.warnings)
    assert (bad.speed, bad.hash, good.warnings) == (None, None, ())
    assert good.hash == ft.content_hash(path, "good")


# A filter that h5py does not bring is registered by hdf5plugin, in a process of its own.
ZSTD = """
import sys, h5py, hdf5plugin, numpy as np
with h5py.File(sys.argv[1], "w") as file:
    file.create_dataset("x", data=np.arange(1000), chunks=(100,), compression=hdf5plugin.Zfp(reversible=True))
"""


@pytest.mark.usefixtures("without_plugins")
def test_a_filter_that_is_missing_is_named_with_its_package(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", ZSTD, str(tmp_path / "a.h5")], check=True, timeout=60)
    (zfp,) = ft.h5inspect(tmp_path / "a.h5").datasets
    assert (zfp.filters, zfp.way, zfp.speed, zfp.hash) == ("zfp", "h5py", None, None)
    assert "without the filter zfp (filter 32013; for h5py: pip install hdf5plugin" in zfp.warnings[0]
