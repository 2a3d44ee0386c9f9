"""The cache folder, which runs share: atomic writes of files, and compiled programs."""

import contextlib
import functools
import glob
import logging
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from posenc_jax import files
from posenc_jax.errors import reason
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([^'/]+)'")  # a warning of jax


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """`files.atomic_write` in a folder that is created if needed. Raises ConfigError if it cannot be written."""
    with _in_cache(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_write(path) as file:
            yield file


def keep_compiled_programs(folder: Path) -> None:
    """Keep compiled programs for later processes, in a private folder or in that of JAX_COMPILATION_CACHE_DIR.

    Programs that jax cannot read, for example after a crash or on a bad disk, are deleted, compiled again and kept. jax
    alone would not replace them, and would compile them each time. Raises ConfigError if the folder cannot be written.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    else:
        with _in_cache(folder.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not is_private(folder):
            log.warning("compiled programs are not kept: others own %s or can write in it", folder)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _delete_what_cannot_be_read(folder)


def is_private(folder: Path) -> bool:
    """Whether this user owns the folder and nobody else can write in it. Otherwise others could plant programs."""
    found = folder.stat()
    return found.st_uid == os.getuid() and not found.st_mode & 0o022


@functools.cache
def _delete_what_cannot_be_read(folder: Path) -> None:
    """Delete the files of a program when jax warns that it cannot read them. jax then compiles and keeps it again."""
    show_other = warnings.showwarning

    def show(message: Warning | str, *arguments: Any, **options: Any) -> None:
        match = UNREADABLE.search(str(message))
        if match is None:
            show_other(message, *arguments, **options)
            return
        log.warning("a compiled program, %s, could not be read, and is compiled again", match[1])
        with contextlib.suppress(OSError):  # for example in a folder of another user
            for path in folder.glob(f"{glob.escape(match[1])}-*"):
                path.unlink(missing_ok=True)

    warnings.showwarning = show
    warnings.filterwarnings("always", message=UNREADABLE.pattern)


@contextlib.contextmanager
def _in_cache(folder: Path) -> Iterator[None]:
    """Raise ConfigError if the folder cannot be written."""
    try:
        yield
    except OSError as error:
        problem = f"must be a folder that can be written: {reason(error)}"
        raise ConfigError("config.data.cache_dir", str(folder), problem) from error
