"""Functions that all commands of this project share: start-up checks, error exit, and bounded numeric arguments."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

from posenc_jax.distributed import environment
from posenc_jax.schema import ConfigError, Range
from posenc_jax.untrusted import printable

CLOSED = 141  # the exit code that shells give to a process that a closed pipe ends


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Run a command and exit. An error with an `exit_code` is printed as one line, and the process exits with the code.

    Errors that jax raises for its own environment variables are printed as one line, with exit code 2. If the reader of
    the output ends before the command, as in `COMMAND | head`, so does the command, with CLOSED and without a message.
    """
    make_output_writable()
    try:
        environment.check()
        code = main(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest of the output at exit
        code = CLOSED
    except Exception as raised:
        error = raised if hasattr(raised, "exit_code") else environment.cause_of(raised)
        if error is None:
            raise
        code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
        print(f"error: {printable(str(error))}", file=sys.stderr)
    sys.exit(code or 0)


def check_environment() -> None:
    """Check the environment variables of jax before a module imports it: for an invalid one, print it and exit."""
    try:
        environment.check()
    except ConfigError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def make_output_writable() -> None:
    """Print "?" for characters that the encoding of stdout or stderr lacks. By default, Python raises an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # the streams of notebooks and tests may lack it
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def whole(at_least: int = 1, at_most: int = 2**20) -> Callable[[str], int]:
    """A `type` for argparse arguments: an integer between two bounds, such as `count`."""
    return _bounded(int, Range(at_least=at_least, at_most=at_most), "an integer")


def number(allowed: Range) -> Callable[[str], float]:
    """A `type` for argparse arguments: a finite number in a range."""
    return _bounded(float, allowed, "a number")


def _bounded(kind: Callable[[str], Any], allowed: Range, name: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            found = kind(text)
        except ValueError:
            found = None
        if found is None or found not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r}: {allowed}, and {name}")
        return found

    return parse


count = whole()
