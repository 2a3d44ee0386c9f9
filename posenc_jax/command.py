"""What the commands of this project share: how they begin and fail, and bounded numbers among their arguments."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from posenc_jax.distributed import environment
from posenc_jax.schema import ConfigError, Range
from posenc_jax.untrusted import printable


def run(main: Callable[..., int | None], *arguments: Any) -> None:
    """Run a command and exit. An error that has an `exit_code` becomes one line and that code.

    Errors that jax raises for its own environment variables become one line and 2.
    """
    make_output_writable()
    try:
        environment.check()
        code = main(*arguments)
    except Exception as raised:
        error = raised if hasattr(raised, "exit_code") else environment.cause_of(raised)
        if error is None:
            raise
        code = error.exit_code  # pyright: ignore[reportAttributeAccessIssue]
        print(f"error: {printable(str(error))}", file=sys.stderr)
    sys.exit(code or 0)


def check_environment() -> None:
    """Check the variables of jax before a module imports it. Wrong ones end the process with one line and 2."""
    try:
        environment.check()
    except ConfigError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)


def make_output_writable() -> None:
    """Write "?" for characters that the encoding of stdout or stderr lacks, where Python would raise an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of notebooks and tests may lack it
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def whole(at_least: int = 1, at_most: int = 2**20) -> Callable[[str], int]:
    """The `type` of an argument of argparse that is a whole number within bounds, such as `count`."""
    allowed = Range(at_least=at_least, at_most=at_most)

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = None
        if number is None or number not in allowed:
            raise argparse.ArgumentTypeError(f"{text!r}: {allowed}, a whole number")
        return number

    return parse


count = whole()
