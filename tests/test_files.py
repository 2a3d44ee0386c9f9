"""Files are written whole or not at all, and through no link."""

import os
from pathlib import Path

import pytest

from posenc_jax.files import read_regular, replace_text, replacing


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    replace_text(tmp_path / "a", "old")
    with pytest.raises(TypeError), replacing(tmp_path / "a") as file:
        file.write(b"new" + "text")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old"}


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("theirs")
    for link in (os.symlink, os.link):
        link(outside, tmp_path / "a")
        replace_text(tmp_path / "a", "ours")
        assert (outside.read_text(), (tmp_path / "a").read_text()) == ("theirs", "ours")
        (tmp_path / "a").unlink()


def test_text_that_is_no_utf_8_keeps_its_bytes_readable(tmp_path):
    replace_text(tmp_path / "a", "na\udcefve\r\n")
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
