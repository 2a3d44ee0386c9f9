"""The file of sums is read exactly as written, or reported as damaged."""

import json

import numpy as np
import pytest

from posenc_jax.evaluation.window_sums import DamagedError, FormatError, Key, Sums, read_sums, write_sums


def test_sums_and_record_come_back(tmp_path):
    nats, counts = np.array([1.5, 0.1, 3e4]), np.array([64.0, 60.0, 2**23])
    measured = {
        Key("none", "prefix", 64): Sums(nats, counts, counts + 1),
        Key("yarn:beta_fast=2,beta_slow=0.0625", "context_gain", 512): Sums(-nats, counts, counts),
        Key("none", "tail", 1024): None,
    }
    record = {"parameters": 12, "config": {"name": "a/b"}}
    documents = ("a.py", "a.py", "caf\udce9.py")
    write_sums(tmp_path / "windows.npz", measured, documents, record)
    found, windows, own = read_sums(tmp_path / "windows.npz")
    assert own == record
    assert windows == documents
    assert list(found) == list(measured)
    assert found[Key("none", "tail", 1024)] is None
    for key in list(measured)[:2]:
        for mine, theirs in zip(found[key], measured[key], strict=True):
            assert mine.dtype == np.float64
            np.testing.assert_array_equal(mine, theirs.astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["windows.npz"]


@pytest.fixture
def small(tmp_path):
    one = np.ones(1)
    write_sums(tmp_path / "small.npz", {Key("none", "tail", 8): Sums(one, one, one)}, ["a"], {"seed": 1})
    return tmp_path / "small.npz"


def test_no_flipped_bit_changes_what_is_read(small):
    content, expected = small.read_bytes(), read_sums(small)
    damaged = 0
    for i in range(len(content)):
        flipped = bytearray(content)
        flipped[i] ^= 1 << i % 8
        small.write_bytes(flipped)
        try:
            assert repr(read_sums(small)) == repr(expected)  # if a bit of a timestamp is flipped
        except DamagedError:
            damaged += 1
    assert damaged > len(content) / 2


@pytest.mark.parametrize("content", [b"", b"PK", b"words", b"\x93NUMPY\x01\x00"])
def test_what_is_no_archive_is_damaged(small, content):
    small.write_bytes(content)
    with pytest.raises(DamagedError, match=r"small.npz is damaged"):
        read_sums(small)


def test_a_truncated_file_is_damaged(small):
    content = small.read_bytes()
    for end in range(0, len(content), 7):
        small.write_bytes(content[:end])
        with pytest.raises(DamagedError):
            read_sums(small)


def test_an_array_that_was_exchanged_is_noticed_though_the_archive_is_sound(small):
    with np.load(small, allow_pickle=False) as file:
        arrays = dict(file)
    np.savez(small, **{**arrays, "none/tail/8": arrays["none/tail/8"] + 1})
    with pytest.raises(DamagedError, match="does not have the sum"):
        read_sums(small)


def test_a_file_of_a_release_without_checksums_is_refused_and_not_called_damaged(small):
    np.savez(small, record=np.array(json.dumps({})))
    with pytest.raises(FormatError, match="of another release"):
        read_sums(small)


def test_a_file_that_is_not_there_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_sums(tmp_path / "none.npz")
