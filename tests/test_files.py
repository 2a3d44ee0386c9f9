"""Files are written completely or not at all, and never through a link."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posenc_jax.files import atomic_write, atomic_write_text, read_regular, remove_abandoned


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    atomic_write_text(tmp_path / "a", "old")
    with pytest.raises(TypeError), atomic_write(tmp_path / "a") as file:
        file.write(b"new" + "text")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    for link in (os.symlink, os.link):
        link(outside, tmp_path / "a")
        atomic_write_text(tmp_path / "a", "ours")
        assert (outside.read_text(), (tmp_path / "a").read_text()) == ("theirs", "ours")
        (tmp_path / "a").unlink()


def test_text_that_is_no_utf_8_keeps_its_bytes_readable(tmp_path):
    atomic_write_text(tmp_path / "a", "na\udcefve\r\n")
    assert (tmp_path / "a").read_bytes() == b"na\\udcefve\r\n"


def test_pipes_devices_and_folders_are_not_read(tmp_path):
    (tmp_path / "text").write_bytes(b"text")
    assert read_regular(tmp_path / "text") == b"text"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match=r"Not a regular file|Is a directory"):
            read_regular(path)


def test_a_file_that_says_it_is_empty_is_not_waited_for():
    assert read_regular(Path("/proc/uptime")) == b""


KILLED = """
import os, sys
from pathlib import Path
from posenc_jax.files import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), 9)
"""


def test_what_killed_processes_left_is_removed_and_what_others_write_is_not(tmp_path):
    for name in ("a", "folder/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)]).returncode == -9
    left = [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]
    assert [path.read_bytes() for path in left] == [b"half"] * 2
    (tmp_path / "somebody's.tmp").write_text("not ours")
    os.mkfifo(tmp_path / f"pipe.{'0' * 16}.tmp")  # opening it must not wait for a writer
    os.symlink(tmp_path / "somebody's.tmp", tmp_path / f"link.{'0' * 16}.tmp")
    with atomic_write(tmp_path / "a") as file:
        file.write(b"whole")
        remove_abandoned(tmp_path)
        file.write(b" and more")
    assert (tmp_path / "a").read_bytes() == b"whole and more"
    assert (tmp_path / "somebody's.tmp").read_text() == "not ours"
    assert not any(path.exists() for path in left)


def test_a_new_file_that_another_process_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, removed = fcntl.flock, []

    def late(file, how):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    atomic_write_text(tmp_path / "a", "text")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "text"}


def test_files_are_replaced_also_where_nothing_can_be_locked(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    atomic_write_text(tmp_path / "a", "text")
    remove_abandoned(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "text"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    atomic_write_text(path, "old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            atomic_write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    atomic_write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"
    assert [child.name for child in tmp_path.iterdir()] == ["report.md"]
