"""What errors of other libraries say, on one line."""

import ast
import contextlib

MOST_LETTERS = 300  # of a line; a longer text keeps its beginning and its end


def one_line(error: BaseException) -> str:
    """The text of an error without line breaks, or the name of its class if it has none."""
    text = str(error)
    with contextlib.suppress(SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        text = str(ast.literal_eval(text))  # the text of a KeyError is quoted
    text = " ".join(text.split()).rstrip(".") or type(error).__name__
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS // 2]} ... {text[-MOST_LETTERS // 2 :]}"


def reason(error: BaseException) -> str:
    """The same without the file that an OSError names."""
    return getattr(error, "strerror", None) or one_line(error)
