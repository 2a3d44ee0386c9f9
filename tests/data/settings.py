"""Settings for the data tests, which write only to the test's own folder."""

from pathlib import Path
from typing import Any

from posenc_jax.config import DataConfig


def settings(folder: Path, **changes: Any) -> DataConfig:
    """The default data settings with the cache in `folder`."""
    defaults = {
        "corpus": "stdlib",
        "path": "",
        "field": "text",
        "cache_dir": str(folder / "cache"),
        "validation_files": (),
        "test_files": (),
        "validation_fraction": 0.05,
        "test_fraction": 0.05,
        "tokenizer": "bytes",
        "tokenizer_sha256": "",
        "vocab_size": 256,
        "packing": "none",
    }
    return DataConfig(**(defaults | changes))


def write_books(folder: Path, count: int, *, text: str = "the text of {name}") -> Path:
    """Write a folder of `count` text files named book-00.txt, book-01.txt, ..."""
    books = folder / "books"
    books.mkdir()
    for number in range(count):
        name = f"book-{number:02}.txt"
        (books / name).write_text(text.format(name=name), encoding="utf-8")
    return books
