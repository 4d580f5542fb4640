"""Virtual datasets: sources are found again, and a missing one is an error where HDF5 reads fill values."""

import os
import shutil

import h5py
import numpy as np
import pytest

from functrain.core.errors import DataError
from functrain.data import h5concat, h5write
from functrain.data.h5.virtual import check_virtual


def joined(folder, names=("parts/a.h5", "parts/b.h5")):
    for number, name in enumerate(names):
        os.makedirs(folder / os.path.dirname(name), exist_ok=True)
        h5write(folder / name, {"g": {"x": np.full((3, 2), number)}})
    h5concat(folder / "all.h5", [folder / name for name in names], virtual=True)
    return folder / "all.h5"


def check(path, name="g/x"):
    with h5py.File(path) as file:
        check_virtual(file[name])
        return file[name][...]


def test_sources_beside_the_file_move_with_it(tmp_path):
    (tmp_path / "here").mkdir()
    path = joined(tmp_path / "here")
    assert os.path.getsize(path) < 20_000
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert check(tmp_path / "there" / "all.h5").tolist() == [[0, 0]] * 3 + [[1, 1]] * 3


def test_sources_elsewhere_are_named_in_full(tmp_path, monkeypatch):
    for folder in ("data", "out"):
        (tmp_path / folder).mkdir()
    h5write(tmp_path / "data" / "a.h5", {"x": np.arange(3)})
    monkeypatch.chdir(tmp_path / "data")
    h5concat("../out/all.h5", ["a.h5"] * 2, virtual=True)
    monkeypatch.chdir(tmp_path)
    shutil.move("out/all.h5", "all.h5")
    assert check("all.h5", "x").tolist() == [0, 1, 2] * 2


def test_signs_that_stand_for_numbers_are_meant_as_they_are(tmp_path):
    path = joined(tmp_path, ("a%b.h5", "100%.h5"))
    assert check(path).tolist() == [[0, 0]] * 3 + [[1, 1]] * 3


def test_a_missing_source_is_named(tmp_path):
    path = joined(tmp_path)
    os.unlink(tmp_path / "parts" / "b.h5")
    with h5py.File(path) as file:
        # What makes the check worth its while.
        assert file["g/x"][...].tolist() == [[0, 0]] * 6
    with pytest.raises(DataError, match=r"'/g/x' in .*all\.h5' takes data from 'parts/b\.h5', which is not there"):
        check(path)
    with pytest.raises(DataError, match=r"'parts/b\.h5', which is not there"):
        h5concat(tmp_path / "more.h5", [path])
    assert not (tmp_path / "more.h5").exists()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"y": np.zeros(3)}, "takes data from '/g/x' in .*b.h5', which does not have it"),
        ({"g": {"x": {"z": np.zeros(3)}}}, "which is no dataset"),
        ({"g": {"x": np.zeros((2, 2))}}, r"up to 6 from '/g/x' in .*b.h5', which has shape \(2, 2\)"),
        ({"g": {"x": np.zeros(3)}}, r"which has shape \(3,\)"),
    ],
)
def test_a_source_that_became_another_is_named(tmp_path, tree, message):
    path = joined(tmp_path)
    h5write(tmp_path / "parts" / "b.h5", tree, overwrite=True)
    with pytest.raises(DataError, match=message):
        check(path)


def test_sources_that_are_virtual_themselves_are_looked_into(tmp_path):
    path = joined(tmp_path)
    h5concat(tmp_path / "twice.h5", [path, path], virtual=True)
    assert check(tmp_path / "twice.h5").tolist() == ([[0, 0]] * 3 + [[1, 1]] * 3) * 2
    os.unlink(tmp_path / "parts" / "a.h5")
    with pytest.raises(DataError, match=r"all\.h5' takes data from 'parts/a\.h5'"):
        check(tmp_path / "twice.h5")


def test_a_circle_is_an_error(tmp_path):
    for one, other in ("ab", "ba"):
        layout = h5py.VirtualLayout((3,), "f8")
        layout[:] = h5py.VirtualSource(f"{other}.h5", "x", (3,))
        with h5py.File(tmp_path / f"{one}.h5", "w") as file:
            file.create_virtual_dataset("x", layout)
    with pytest.raises(DataError, match="leads in a circle"), h5py.File(tmp_path / "a.h5") as file:
        check_virtual(file["x"])


def test_parts_of_the_same_file_and_other_datasets_pass(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(4)
        layout = h5py.VirtualLayout((2,), file["x"].dtype)
        layout[:] = h5py.VirtualSource(file["x"])[1:3]
        file.create_virtual_dataset("v", layout)
    assert check(tmp_path / "a.h5", "v").tolist() == [1, 2]
    assert check(tmp_path / "a.h5", "x").tolist() == [0, 1, 2, 3]


def test_a_source_of_which_a_part_is_taken_must_hold_it(tmp_path):
    layout = h5py.VirtualLayout((2, 3), "f8")
    layout[:] = h5py.VirtualSource("a.h5", "x", (6, 3))[3:5]
    with h5py.File(tmp_path / "all.h5", "w") as file:
        file.create_virtual_dataset("x", layout)
    for rows, fine in ((6, True), (5, True), (4, False)):
        h5write(tmp_path / "a.h5", {"x": np.ones((rows, 3))}, overwrite=True)
        if fine:
            assert check(tmp_path / "all.h5", "x").tolist() == [[1, 1, 1]] * 2
        else:
            with pytest.raises(DataError, match=r"up to \(5, 3\) from 'x' in .*a.h5', which has shape \(4, 3\)"):
                check(tmp_path / "all.h5", "x")


def test_a_source_that_grows_is_as_long_as_it_is(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("x", data=np.arange(3.0), maxshape=(None,))
    layout = h5py.VirtualLayout((3,), "f8", maxshape=(None,))
    source = h5py.VirtualSource("a.h5", "x", (3,), maxshape=(None,))
    layout[: h5py.h5s.UNLIMITED] = source[: h5py.h5s.UNLIMITED]
    with h5py.File(tmp_path / "all.h5", "w", libver="latest") as file:
        file.create_virtual_dataset("x", layout)
    assert check(tmp_path / "all.h5", "x").tolist() == [0, 1, 2]
    os.unlink(tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"'a\.h5', which is not there"):
        check(tmp_path / "all.h5", "x")


def test_strings_of_any_length_are_referred_to(tmp_path):
    for number in range(2):
        with h5py.File(tmp_path / f"{number}.h5", "w") as file:
            file["words"] = np.array([f"word {number}", "ß"], dtype=h5py.string_dtype())
    h5concat(tmp_path / "all.h5", [tmp_path / "0.h5", tmp_path / "1.h5"], virtual=True)
    assert [word.decode() for word in check(tmp_path / "all.h5", "words")] == ["word 0", "ß", "word 1", "ß"]
