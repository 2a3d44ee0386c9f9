"""Errors of other libraries become one short line."""

import errno
import os
import sys
from types import SimpleNamespace

import pytest

import launch
from posenc_jax.errors import one_line, reason


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\nlines,  and a stop."), "two lines, and a stop"),
        (KeyError("name"), "name"),
        (ValueError(), "ValueError"),
        (ValueError("[" * 100_000), "[" * 150 + " ... " + "[" * 150),
    ],
)
def test_a_text_is_cut_to_one_line(error, line):
    assert one_line(error) == line


def test_the_reason_is_what_the_system_says():
    assert reason(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/file")) == "No space left on device"
    assert reason(OSError("no number")) == "no number"
    foreign = f"Error writing to a: b: c [os_error_code='{errno.ENOSPC}'] [tensorstore_spec='{'x' * 1000}']"
    assert reason(ValueError(foreign)) == "No space left on device"


def test_writes_that_end_after_a_failed_checkpoint_are_not_told_and_other_errors_are(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "__unraisablehook__", told.append)
    silent, *others = (
        SimpleNamespace(exc_value=error)
        for error in (
            RuntimeError("Event loop is closed"),
            RuntimeError("another"),
            ValueError("Event loop is closed"),
            None,
        )
    )
    for raised in (silent, *others):
        launch.tell_unraisable(raised)
    assert told == others


def test_an_error_is_one_line_without_control_characters(capsys):
    assert launch._fail(4, "\x1b[2Jcleared \u202etxet") == 4
    assert capsys.readouterr().err == "error: \\x1b[2Jcleared \\u202etxet\n"
