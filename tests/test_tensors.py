import errno
import os
import subprocess
import sys

import pytest
import torch

from lafq import tensors as io


def test_roundtrip_and_expected_metadata(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    io.save_tensors(path, {"x": torch.arange(3)}, width=4)
    tensors, metadata = io.load_tensors(path, "01", width=4)
    assert tensors["x"].tolist() == [0, 1, 2]
    assert metadata == {"width": 4}
    with pytest.raises(ValueError, match="made with width=4, not 8: delete it and run 01 again"):
        io.load_tensors(path, "01", width=8)


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    io.save_tensors(path, {"x": torch.ones(2)})
    before = path.read_bytes()

    def full(tensors, target, metadata):
        target.write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(OSError, match=r"could not write .*No space left on device.*`make resume`"):
        io.save_tensors(path, {"x": torch.zeros(2)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_other_errors_pass_through_and_leave_nothing(tmp_path):
    with pytest.raises(KeyError), io.atomic_write(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a safetensors file", b"\x02\0\0\0\0\0\0\0{}"])
def test_not_our_file(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"a.safetensors is damaged or not a lafq file .*: delete it and run 02 again",
    ):
        io.load_tensors(path, "02")


def test_two_writers_of_one_path_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with io.atomic_write(path) as first, io.atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # its writer finished last
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_clean_up_that_fails_does_not_hide_the_error(tmp_path, monkeypatch):
    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(io.Path, "unlink", read_only)
    with (
        pytest.raises(OSError, match=r"could not write .*No space"),
        io.atomic_write(tmp_path / "a.txt"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_files_have_the_users_umask(tmp_path):
    before = os.umask(0o022)
    try:
        io.save_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)}, sealed=True)
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o644


def test_leftovers_of_killed_processes_go_and_those_of_running_ones_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "in").mkdir()
    left = [tmp_path / "in" / f".a.csv.{pid}-3.part" for pid in (ended.pid, os.getpid())]
    for path in (*left, tmp_path / "a.csv", tmp_path / ".b.part"):
        path.write_text("x")
    io.remove_leftovers(tmp_path)
    assert not left[0].exists()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        [left[1].name, "a.csv", ".b.part"]
    )
