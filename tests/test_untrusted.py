"""Untrusted files: their size, depth and form are bounded, and their text cannot control the terminal."""

import io
import json
import logging
import os
import zipfile
import zlib

import numpy as np
import pytest
from rich.console import Console

import launch
from posenc_jax import untrusted
from posenc_jax.data import cache
from posenc_jax.evaluation.window_sums import Key, Sums, read_sums, write_sums
from posenc_jax.reporting.metrics_log import read_log
from posenc_jax.reporting.tables import escape_markdown, text_table
from posenc_jax.untrusted import DamagedError, check_form, parse_json, printable, read_arrays, read_json
from tests.small import run_config

STEERING = "a\x1b[31m\x07\x9b\r\x7f\u202e\u2066\u200f\ufeff\ud800\u2028z"
SHOWN = r"a\x1b[31m\x07\x9b\r\x7f\u202e\u2066\u200f\ufeff\ud800\u2028z"


def test_characters_that_steer_a_terminal_or_turn_text_around_are_written_as_escapes():
    assert printable(STEERING) == SHOWN


def test_other_text_is_shown_as_it_is():
    text = "Zoë, 한국어, עברית, می‌خواهم, 👩‍🔬 \u00a0x\n\ty \\x1b"
    assert printable(text) == text


def test_tables_and_messages_show_no_control_characters():
    console = Console(file=io.StringIO(), width=300)
    text_table((STEERING, "b"), [(STEERING, STEERING)]).print(console)
    assert console.file.getvalue().count(SHOWN) == 3
    assert not set(STEERING[1:-1]) - set(SHOWN) & set(console.file.getvalue())
    assert escape_markdown("\x1b _a_") == r"\\x1b \_a\_"
    formatter = launch.PrintableFormatter("%(message)s")
    assert formatter.format(logging.LogRecord("", 0, "", 0, "%s", (STEERING,), None)) == SHOWN


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000 + "]" * 200_000, "nested more than 32 deep"),
        ("[" * 33 + "]" * 33, "nested more than 32 deep"),
        ('{"a":' * 40 + "1" + "}" * 40, "nested more than 32 deep"),
        ("1" * 10_000, "more than 64 bits"),
        (str(2**64), "more than 64 bits"),
        ("", "Expecting value"),
        ("[" + " " * (1 << 24) + "]", "more than 16777216 characters"),
    ],
    ids=["deep", "33 deep", "objects", "10,000 digits", "65 bits", "empty", "large"],
)
def test_json_out_of_bounds_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_json_within_bounds_is_read():
    value = {"a": [1, -(2**63), 2**64 - 1, 0.5, None, True, "é"], "b": json.loads("[" * 31 + "]" * 31)}
    assert parse_json(json.dumps(value)) == value


def test_a_file_that_is_too_large_no_utf_8_or_no_file_is_refused_by_name(tmp_path):
    path = tmp_path / "record.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file, which needs no disk space
    with pytest.raises(DamagedError, match=r"record.json is damaged: it has 1099511627776 bytes, more than 16777216"):
        read_json(path)
    path.write_bytes(b"\xff")
    with pytest.raises(DamagedError, match=r"record.json is damaged: 'utf-8'"):
        read_json(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DamagedError, match=r"record.json is damaged: it is a folder"):
        read_json(path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(DamagedError, match=r"record.json is damaged: it is not a regular file"):
        read_json(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_json(path)


def test_a_form_says_what_must_be_there_and_of_which_type():
    form = {"a": int, "b": [{"c": str | None}], "d": {str: float}}
    check_form({"a": 1, "b": [{"c": "x"}, {"c": None}], "d": {"e": 0.5}, "more": 3}, form)
    for wrong, reason in (
        ([], "it must be of type dict, not list"),
        ({"b": []}, "it has no 'a'"),
        ({"a": True}, "it.a must be of type int, not bool"),
        ({"a": 1, "b": [{"c": None}, {"c": 3}]}, r"it.b\[1\].c must be of type str | None, not int"),
        ({"a": 1, "b": [], "d": {"e": "x"}}, "it.d.e must be of type float, not str"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_form(wrong, form)


def arrays_of(path, **entries):
    """An .npz file that contains these bytes instead of arrays."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_arrays_come_back(tmp_path):
    given = {"a": np.arange(6.0).reshape(2, 3), "b": np.array("né"), "c": np.zeros(0, np.float32), "d": np.eye(3).T}
    np.savez_compressed(tmp_path / "a.npz", **given, allow_pickle=False)
    found = read_arrays(tmp_path / "a.npz")
    assert found.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def test_arrays_that_unpack_to_more_than_allowed_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    path = arrays_of(tmp_path / "a.npz", a=bytes(1 << 20), b=bytes(1 << 20))
    assert path.stat().st_size < 5000
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(DamagedError, match=r"a.npz is damaged: it holds 2097152 bytes, more than 2000000"):
        read_arrays(path, 2_000_000)


def test_no_more_is_unpacked_than_the_directory_says(tmp_path):
    path = arrays_of(tmp_path / "a.npz", a=npy(np.zeros(1 << 20)))
    size = len(npy(np.zeros(1 << 20)))
    path.write_bytes(path.read_bytes().replace(size.to_bytes(4, "little"), (200).to_bytes(4, "little")))
    with pytest.raises(DamagedError):
        read_arrays(path, 1_000_000)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(3,)", b"(3000000000,)"),
        (b"(3,)", b"(-3,)"),
        (b"(3,)", b"(3, 0)"),
        (b"(3,)", b"(" * 60 + b")" * 60),
        (b"<f8", b"<U0"),
        (b"<f8", b"|O"),
        (b"\x93NUMPY\x01", b"\x93NUMPY\x02"),
        (b"'descr'", b"__import__('os')"),
    ],
)
def test_an_array_whose_header_is_absurd_is_refused(old, new, tmp_path):
    content = npy(np.zeros(3))
    damaged = content.replace(old, new).replace(b" " * max(0, len(new) - len(old)), b"", 1)
    with pytest.raises(DamagedError, match=r"a.npz is damaged"):
        read_arrays(arrays_of(tmp_path / "a.npz", a=damaged))


def test_an_array_of_nothing_whose_shape_is_huge_is_refused(tmp_path):
    header = npy(np.zeros(3))[:-24].replace(b"<f8", b"<U0").replace(b"(3,), }" + b" " * 12, b"(1000000000000,), }")
    with pytest.raises(DamagedError, match="has the unsupported dtype <U0"):
        read_arrays(arrays_of(tmp_path / "a.npz", a=header))


def test_objects_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    with pytest.raises(DamagedError, match="object"):
        read_arrays(tmp_path / "a.npz")


def test_a_zip_file_with_a_large_directory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = arrays_of(tmp_path / "a.npz", **{f"{i:0500}": b"" for i in range(100)})
    monkeypatch.setattr(untrusted, "MAX_NAMES_BYTES", 10_000)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(DamagedError, match="directory is too large"):
        read_arrays(path)


CONFIG = run_config(evaluation__lengths=(32, 64), evaluation__windows=2)
SUMS = Sums(np.ones(2), np.ones(2), np.ones(2))


@pytest.mark.parametrize(
    ("measured", "documents"),
    [
        ({Key("none", "prefix", 32): SUMS}, ("a", "a", "a")),
        ({Key("none", "prefix", 32): Sums(*(np.ones(1 << 10) for _ in range(3)))}, ("a",) * (1 << 10)),
        ({Key("none", "prefix", 16): SUMS}, ("a", "a")),
        ({Key("none", "by_position", 2**40): SUMS}, ("a", "a")),
        ({Key("linear:1e9", "prefix", 32): SUMS}, ("a", "a")),
        ({Key("none", str(i), 32): SUMS for i in range(20_000)}, ("a", "a")),
    ],
    ids=["windows", "many windows", "length", "position", "scaling", "keys"],
)
def test_sums_that_a_run_does_not_have_are_refused_though_their_checksum_is_right(measured, documents, tmp_path):
    write_sums(tmp_path / "a.npz", {Key("none", "prefix", 64): SUMS}, ("a", "b"), {})
    assert len(read_sums(tmp_path / "a.npz", CONFIG)[0]) == 1
    write_sums(tmp_path / "a.npz", measured, documents, {})
    with pytest.raises(DamagedError, match=r"a.npz is damaged"):
        read_sums(tmp_path / "a.npz", CONFIG)


def test_a_record_of_sums_that_is_nested_too_deep_is_refused(tmp_path):
    record = json.loads("[" * 40 + "]" * 40)
    write_sums(tmp_path / "a.npz", {}, (), {"deep": record})
    with pytest.raises(DamagedError, match="nested"):
        read_sums(tmp_path / "a.npz")


@pytest.mark.parametrize(
    "entry",
    [
        '{"step": null',
        '{"loss": 1',
        '{"step": -1',
        '{"step": 1, "loss": "x"',
        '{"step": 1, "loss": [[1]]',
        '{"step": 1, "tokens": 1e9',
        '{"step": 1, "a": ' + "[" * 10_000 + "]" * 10_000,
    ],
    ids=["null", "none", "negative", "text", "nested", "fraction", "deep"],
)
def test_a_line_of_a_log_of_another_form_is_left_out_though_its_checksum_is_right(entry, tmp_path):
    lines = [f'{text}, "crc32": {zlib.crc32(text.encode())}}}\n' for text in ('{"step": 1, "loss": NaN', entry)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    log = read_log(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in log.entries] == [1]
    assert log.lost.startswith("metrics.jsonl: 1 damaged line left out")


def test_compiled_programs_are_kept_in_folders_of_ones_own_alone(tmp_path):
    assert cache.is_private(tmp_path)
    for mode in (0o720, 0o702):
        tmp_path.chmod(mode)
        assert not cache.is_private(tmp_path)
    tmp_path.chmod(0o700)
