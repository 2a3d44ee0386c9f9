"""Files that runs share in the cache folder: written whole or not at all."""

import contextlib
import hashlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from posenc_jax.schema import ConfigError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, or vanishes when it ends in an error.

    Processes that write the same path at once do not disturb each other; the last one stays. Makes the folder. Raises
    ConfigError where it cannot write.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        problem = f"must be a folder that can be written: {error.strerror}"
        raise ConfigError("config.data.cache_dir", str(path.parent), problem) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
