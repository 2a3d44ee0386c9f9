"""Atomic writes of files in the cache folder, which runs share."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from posenc_jax import files
from posenc_jax.errors import reason
from posenc_jax.schema import ConfigError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path`, as in `files.replacing`. Creates the folder if needed.

    Raises ConfigError if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            yield file
    except OSError as error:
        problem = f"must be a folder that can be written: {reason(error)}"
        raise ConfigError("config.data.cache_dir", str(path.parent), problem) from error
