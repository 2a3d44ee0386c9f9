"""Files that runs share in the cache folder: written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from posenc_jax import files
from posenc_jax.errors import reason
from posenc_jax.schema import ConfigError


def is_private(folder: Path) -> bool:
    """Whether the folder is this user's, and nobody else may write in it: others could plant programs there."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file that replaces `path`, as of `files.replacing`. Makes the folder.

    Raises ConfigError if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            yield file
    except OSError as error:
        problem = f"must be a folder that can be written: {reason(error)}"
        raise ConfigError("config.data.cache_dir", str(path.parent), problem) from error
