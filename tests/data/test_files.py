"""Opening files, and what their links lead to: what is wrong is said, nothing hangs, nothing crashes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from functrain.core.errors import ArgumentError, DataError
from functrain.data.h5.files import Handle, found, opened
from functrain.data.h5.plausible import plausible
from functrain.data.h5.source import hdf5

X = np.arange(10)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working folder too."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain(path: str) -> str:
    with h5py.File(path, "w") as file:
        file["x"] = X
    return path


def linking(path: str, link: object) -> str:
    with h5py.File(path, "w") as file:
        file["link"] = link
    return path


def virtual(path: str, sources: list[tuple[str, str]]) -> str:
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((len(sources), *X.shape), X.dtype)
        for place, (source, name) in enumerate(sources):
            layout[place] = h5py.VirtualSource(source, name, X.shape)
        file.create_virtual_dataset("v", layout)
    return path


def external(path: str, raw: str) -> str:
    X.tofile(raw)
    with h5py.File(path, "w") as file:
        file.create_dataset("e", X.shape, X.dtype, external=[(raw, 0, X.nbytes)])
    return path


def read(path: str, name: str, root: str | None = None) -> np.ndarray:
    with opened(path) as file:
        return found(file, path, name, root=root)[()]


# --- what is no HDF5 file ------------------------------------------------------------------------------------


def test_what_cannot_be_opened_is_said_in_words(folder: Path) -> None:
    whole = Path(plain("whole.h5")).read_bytes()
    Path("cut.h5").write_bytes(whole[:-1000])
    Path("empty.h5").touch()
    Path("text.h5").write_text("x,y\n" * 1000)
    Path("short.h5").write_bytes(b"\x89HDF")
    Path("folder.h5").mkdir()
    os.mkfifo("fifo.h5")
    Path("linked.h5").symlink_to("fifo.h5")
    Path("dangling.h5").symlink_to("nowhere.h5")
    cases = {
        "absent.h5": "no file 'absent.h5'",
        "dangling.h5": "no file 'dangling.h5'",
        "cut.h5": "'cut.h5' is truncated",
        "empty.h5": r"'empty.h5' is empty \(0 bytes\)",
        "text.h5": r"'text.h5' is not an HDF5 file \(4000 bytes",
        "short.h5": "'short.h5' is not an HDF5 file",
        "folder.h5": "'folder.h5' is a directory",
        "fifo.h5": "'fifo.h5' is a FIFO",
        "linked.h5": "'linked.h5' is a FIFO",
        "/dev/zero": "'/dev/zero' is a device",
    }
    for path, message in cases.items():
        with pytest.raises(DataError, match=message), opened(path):
            pass


def test_a_file_without_permission_is_told_as_such(folder: Path) -> None:
    plain("a.h5")
    os.chmod("a.h5", 0)
    os.chmod(".", 0o755)
    # As a user who may not, also where the tests are run by root.
    script = """
import os, h5py
from functrain.core.errors import DataError
from functrain.data.h5.files import opened
if os.geteuid() == 0:
    os.setuid(65534)
try:
    with opened("a.h5"):
        print("read")
except DataError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert "'a.h5' cannot be read: permission denied" in done.stdout, done.stderr


# A process that writes, until its input ends.
WRITER = """
import sys, h5py
with h5py.File("a.h5", "w", libver="latest") as file:
    file.create_dataset("x", data=range(10), maxshape=(None,), chunks=(4,))
    if sys.argv[1] == "swmr":
        file.swmr_mode = True
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["plain", "swmr"])
def test_a_file_that_a_writer_has_open_is_told_as_such(folder: Path, mode: str) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(DataError, match=r"'a.h5' cannot be opened: a writer has it open.*swmr=True"), opened("a.h5"):
            pass
        if mode == "swmr":
            with opened("a.h5", swmr=True) as file:
                assert found(file, "a.h5", "x")[()].tolist() == list(range(10))
    finally:
        writer.communicate(timeout=60)
    assert read("a.h5", "x").tolist() == list(range(10))


def test_a_file_whose_writer_was_killed_is_told_as_such(folder: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, "swmr"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    writer.stdout.readline()
    writer.kill()
    writer.communicate(timeout=60)
    with pytest.raises(DataError, match=r"it was\s+killed.*h5clear"), opened("a.h5"):
        pass


def test_options_for_urls_are_refused_for_a_path(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="storage= is for URLs"):
        Handle(plain("a.h5"), storage={"anon": True})
    with pytest.raises(DataError, match="is remote: swmr"):
        Handle("memory://a.h5", swmr=True)


# --- links ---------------------------------------------------------------------------------------------------


def test_links_that_lead_somewhere_are_followed_as_hdf5_does(folder: Path) -> None:
    plain("x.h5")
    with h5py.File("a.h5", "w") as file:
        file["data/x"] = X
        file["group/self"] = h5py.SoftLink("/group")
        file["group/near"] = h5py.SoftLink("./../x")
        file["group/soft"] = h5py.SoftLink("/data/x")
        file["group/further"] = h5py.SoftLink("soft")
        file["group/hard"] = file["group"]
        file["group/out"] = h5py.ExternalLink("x.h5", "/x")
        file["group/root"] = h5py.ExternalLink("x.h5", "/")
        file["group/twice"] = h5py.SoftLink("root/x")
    for name in ("soft", "further", "self/self/further", "hard/hard/soft", "out", "root/x", "twice", "./self//twice/"):
        assert np.array_equal(read("a.h5", f"group/{name}", root="."), X), name
    # What is no name of HDF5's is missing, here as there.
    with pytest.raises(DataError, match=r"'group/near' in 'a.h5' leads nowhere"):
        read("a.h5", "group/near")


def test_circles_of_links_are_told_and_end(folder: Path) -> None:
    with h5py.File("a.h5", "w") as file:
        file["alone"] = h5py.SoftLink("/alone")
        file["one"] = h5py.SoftLink("two")
        file["two"] = h5py.SoftLink("one")
        file["out"] = h5py.ExternalLink("b.h5", "/back")
        file["growing"] = h5py.SoftLink("/growing/more")
    with h5py.File("b.h5", "w") as file:
        file["back"] = h5py.ExternalLink("a.h5", "/out")
    circles = {
        "alone": "'/alone'",
        "one": "'/one' in 'a.h5' → '/two' in 'a.h5' → '/one' in 'a.h5'",
        "out": "'/back' in '.*b.h5'",
        "growing": "'/growing'",
    }
    for name, message in circles.items():
        with pytest.raises(DataError, match=message) as caught:
            read("a.h5", name)
        assert "leads in a circle" in str(caught.value)


def test_a_long_way_of_links_is_no_circle(folder: Path) -> None:
    with h5py.File("a.h5", "w") as file:
        file["0"] = X
        for number in range(30):
            file[str(number + 1)] = h5py.SoftLink(f"/{number}")
    for number in range(31):
        if number <= 16:
            assert np.array_equal(read("a.h5", str(number)), X)
        else:
            with pytest.raises(DataError, match="more than 16 links"):
                read("a.h5", str(number))
    with h5py.File("a.h5") as file:
        assert np.array_equal(file["16"], X)
        with pytest.raises((RuntimeError, KeyError)):
            file["17"]


def test_an_external_link_to_what_is_no_file_is_told_and_does_not_hang(folder: Path) -> None:
    os.mkfifo("fifo.h5")
    Path("text.h5").write_text("text")
    cases = {"fifo.h5": "leads to '.*fifo.h5' is a FIFO", "text.h5": "not an HDF5 file", "absent.h5": "which is neither"}
    for other, message in cases.items():
        with pytest.raises(DataError, match=message):
            read(linking("a.h5", h5py.ExternalLink(other, "/x")), "link")
    plain("x.h5")
    with pytest.raises(DataError, match=r"'link' in 'a.h5' leads nowhere, by the link '/link' in 'a.h5'"):
        read(linking("a.h5", h5py.ExternalLink("x.h5", "/y")), "link")


# --- virtual datasets and external storage -------------------------------------------------------------------


def test_virtual_datasets_are_read_and_their_circles_do_not_crash(folder: Path) -> None:
    plain("x.h5")
    assert np.array_equal(read(virtual("a.h5", [("x.h5", "x"), ("x.h5", "x")]), "v"), [X, X])
    virtual("own.h5", [(".", "v")])
    virtual("one.h5", [("two.h5", "v")])
    virtual("two.h5", [("x.h5", "x"), ("one.h5", "v")])
    for path in ("own.h5", "one.h5", "two.h5"):
        with pytest.raises(DataError, match=r"'v' in '.*\.h5' is virtual, and leads in a circle"):
            read(path, "v")


def test_many_ways_to_one_source_are_no_circle(folder: Path) -> None:
    plain("0.h5")
    with h5py.File("0.h5", "a") as file:
        file["v"] = X[None]
    for number in range(12):
        with h5py.File(f"{number + 1}.h5", "w") as file:
            layout = h5py.VirtualLayout((2, 10), X.dtype)
            for place in range(2):
                layout[place] = h5py.VirtualSource(f"{number}.h5", "v", (1 if number == 0 else 2, 10))[0]
            file.create_virtual_dataset("v", layout)
    assert np.array_equal(read("12.h5", "v"), [X, X])


def test_a_virtual_source_that_is_a_fifo_is_told_and_does_not_hang(folder: Path) -> None:
    os.mkfifo("fifo.h5")
    with pytest.raises(DataError, match=r"source of the virtual dataset 'v' .* is a FIFO"):
        read(virtual("a.h5", [("fifo.h5", "x")]), "v")
    external("e.h5", "raw")
    os.unlink("raw")
    os.mkfifo("raw")
    with pytest.raises(DataError, match=r"external storage of dataset 'e' .* is a FIFO"):
        read("e.h5", "e")


def numbered(path: str, pattern: str, name: str) -> str:
    """A virtual dataset of as many sources as there are, 10 rows of each."""
    with h5py.File(path, "w", libver="latest") as file:
        plist, space = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5s.create_simple((10,), (h5py.h5s.UNLIMITED,))
        space.select_hyperslab((0,), (h5py.h5s.UNLIMITED,), (10,), (10,))
        source = h5py.h5s.create_simple((10,))
        source.select_all()
        plist.set_virtual(space, pattern.encode(), name.encode(), source)
        h5py.h5d.create(file.id, b"v", h5py.h5t.NATIVE_INT64, space, plist)
    return path


def test_numbered_sources_are_looked_at_too(folder: Path) -> None:
    (folder / "in").mkdir()
    plain("in/part-0.h5")
    plain("in/part-1.h5")
    numbered("in/a.h5", "part-%b.h5", "x")
    assert len(read("in/a.h5", "v", root="in")) == 20
    plain("secret.h5")
    (folder / "in" / "part-2.h5").symlink_to(folder / "secret.h5")
    with pytest.raises(DataError, match=r"secret.h5', outside of root='in'"):
        read("in/a.h5", "v", root="in")
    with h5py.File("in/n.h5", "w") as file:
        file["x0"] = X
        file["x1"] = h5py.ExternalLink("../secret.h5", "/x")
    numbered("in/b.h5", "n.h5", "x%b")
    with pytest.raises(DataError, match=r"'/x1' in '.*n.h5' leads to .*secret.h5', outside of root='in'"):
        read("in/b.h5", "v", root="in")


def test_sources_that_are_missing_are_named(folder: Path) -> None:
    plain("x.h5")
    virtual("a.h5", [("x.h5", "x"), ("gone.h5", "x"), (".", "v2")])
    with pytest.raises(DataError, match=r"'/v' in 'a.h5' takes data from 'gone.h5', which is not there"):
        hdf5("a.h5", "v")


# --- root ----------------------------------------------------------------------------------------------------


@pytest.fixture
def rooms(folder: Path) -> Path:
    """A folder `in` with a file that leads to the folder `out` in every way that there is."""
    for name in ("in", "in/deep", "out"):
        (folder / name).mkdir()
    plain("in/x.h5")
    plain("out/x.h5")
    (folder / "in" / "disguised.h5").symlink_to(folder / "out" / "x.h5")
    with h5py.File("in/middle.h5", "w") as file:
        file["further"] = h5py.ExternalLink("../out/x.h5", "/x")
        file["x"] = X
    virtual("in/v.h5", [("x.h5", "x")])
    virtual("in/w.h5", [("../out/x.h5", "x")])
    external("in/e.h5", "out/raw")
    with h5py.File("in/a.h5", "w") as file:
        inside = {"plain": "x.h5", "deep": "deep/../x.h5", "whole": str(folder / "in" / "x.h5"), "middle": "middle.h5"}
        outside = {"up": "../out/x.h5", "absolute": str(folder / "out" / "x.h5"), "disguised": "disguised.h5"}
        for name, other in {**inside, **outside}.items():
            file[name] = h5py.ExternalLink(other, "/x")
        file["chain"] = h5py.ExternalLink("middle.h5", "/further")
        file["soft"] = h5py.SoftLink("/up")
        file["virtual"] = h5py.ExternalLink("v.h5", "/v")
        file["outer"] = h5py.ExternalLink("w.h5", "/v")
        file["raw"] = h5py.ExternalLink("e.h5", "/e")
    return folder


@pytest.mark.parametrize("name", ["plain", "deep", "whole", "middle", "virtual"])
def test_what_stays_in_the_root_is_read(rooms: Path, name: str) -> None:
    for root in ("in", str(rooms / "in"), "in/", "out/../in", str(rooms), "/"):
        assert np.array_equal(np.ravel(read("in/a.h5", name, root=root)), X)
    with pytest.raises(DataError, match=r"outside of root='in/deep'"):
        read("in/a.h5", name, root="in/deep")


@pytest.mark.parametrize("name", ["up", "absolute", "disguised", "chain", "soft", "outer", "raw"])
def test_what_leads_out_of_the_root_is_refused(rooms: Path, name: str) -> None:
    assert np.array_equal(np.ravel(read("in/a.h5", name)), X)
    with pytest.raises(DataError, match=rf"leads to '{rooms}/out/(x.h5|raw)', outside of root='in'"):
        read("in/a.h5", name, root="in")


def test_a_root_that_begins_alike_is_another(rooms: Path) -> None:
    (rooms / "in2").mkdir()
    plain("in2/x.h5")
    linking("in/b.h5", h5py.ExternalLink("../in2/x.h5", "/x"))
    with pytest.raises(DataError, match=r"in2/x.h5', outside of root='in'"):
        read("in/b.h5", "link", root="in")


def test_a_folder_of_the_environment_is_looked_in_first(rooms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with h5py.File("out/x.h5", "a") as file:
        file["x"][:] = -X
    monkeypatch.setenv("HDF5_EXT_PREFIX", str(rooms / "out"))
    assert np.array_equal(read("in/a.h5", "plain"), -X)
    with pytest.raises(DataError, match=r"out/x.h5', outside of root='in'"):
        read("in/a.h5", "plain", root="in")


# --- sizes ---------------------------------------------------------------------------------------------------


def claiming(shape: tuple[int, ...], chunks: tuple[int, ...] | None = None, written: int = 0, **more: object) -> None:
    with h5py.File("a.h5", "w") as file:
        dataset = file.create_dataset("x", shape, "f4", chunks=chunks, **more)
        if written:
            dataset[:written] = 1


def refused(message: str, **how: int) -> None:
    with h5py.File("a.h5") as file, pytest.raises(DataError, match=rf"dataset '/x' in 'a.h5' {message}"):
        plausible(file["x"], **how)


def accepted(**how: int) -> None:
    with h5py.File("a.h5") as file:
        plausible(file["x"], **how)


def test_absurd_sizes_in_a_header_are_refused_before_anything_is_allocated(folder: Path) -> None:
    claiming((2**60,), (1024,), written=10)
    refused(r"has shape \(1152921504606846976,\), 4.0 EiB, against 4.0 KiB of it .*: its header is damaged")
    claiming((2**58,))
    refused(r"has shape .*, 1.0 EiB, against 0 B of it")
    claiming((2**40,), (2**31,))
    refused(r"has chunks \(2147483648,\) of 8.0 GiB")
    claiming((2**31, 2**31, 2**31), (1, 1, 1024))
    refused("has samples of 16.0 EiB")
    claiming((10, 2**20), (1, 2**20))
    refused("has chunks .* of 4.0 MiB, against 1.0 MiB of memory", memory=2**20)
    refused("has chunks .* of 4.0 MiB", memory=2**20, axis=1)
    claiming((10, 2**20), (1, 2**10))
    refused("has samples of 4.0 MiB", memory=2**20)
    accepted(memory=2**20, axis=1)
    accepted(memory=2**20, axis=-1)


def test_large_and_sparse_and_odd_datasets_are_accepted(folder: Path) -> None:
    for shape, chunks in (((2**40,), (1024,)), ((0, 5), None), ((10, 0), None), ((), None), ((2**42,), None)):
        claiming(shape, chunks)
        accepted()
    claiming((100,), (10,), written=100, compression="gzip")
    accepted()
    external("a.h5", "raw")
    with h5py.File("a.h5", "a") as file:
        file["x"] = h5py.SoftLink("/e")
    accepted()
