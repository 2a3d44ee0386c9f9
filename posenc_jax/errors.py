"""Formats the errors of other libraries as one line."""

import ast
import contextlib
import os
import re

MAX_LETTERS = 300  # of a line; a longer text is shortened to its beginning and its end


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks, or the name of its class if it has no text."""
    text = str(error)
    with contextlib.suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        text = str(ast.literal_eval(text))  # the text of a KeyError is quoted
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    return text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS // 2]} ... {text[-MAX_LETTERS // 2 :]}"


def reason(error: BaseException) -> str:
    """The system's reason for an OSError, or for the error code in a long message of tensorstore; else `one_line`."""
    code = re.search("os_error_code='([0-9]{1,9})'", str(error))
    return os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or one_line(error)
