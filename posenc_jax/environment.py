"""What jax is told by environment variables: checked before it fails on them, and the folder of compiled programs."""

import contextlib
import functools
import glob
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any

from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

MOST_CPU_DEVICES = 1024
UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '([^'/]+)'")  # as jax warns


def check() -> None:
    """Raise ConfigError for variables that jax, or a run, cannot work with. Call it before jax is imported."""
    name = "JAX_NUM_CPU_DEVICES"
    number = os.environ.get(name, "1")
    if not (re.fullmatch("[0-9]{1,4}", number) and 1 <= int(number) <= MOST_CPU_DEVICES):
        raise ConfigError(name, number, f"must be a whole number from 1 to {MOST_CPU_DEVICES}, or not be set")
    name = "JAX_DISABLE_JIT"
    if os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
        raise ConfigError(
            name, os.environ[name], "must not be set: nothing would be compiled, and each step take hours"
        )


def check_devices() -> None:
    """Find the devices. Raises ConfigError if jax cannot, as where JAX_PLATFORMS names one that is not here."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        name = "JAX_PLATFORMS"
        reason = " ".join(str(error).partition("(set JAX_PLATFORMS")[0].split()).rstrip(".") or "jax finds no device"
        allowed = f'must name platforms with devices, such as "cpu", "cuda", "tpu" or "cuda,cpu": {reason}'
        raise ConfigError(name, os.environ.get(name), allowed) from error


def keep_compiled_programs(folder: Path) -> None:
    """Keep compiled programs in a private folder, or that of JAX_COMPILATION_CACHE_DIR, for later processes.

    Programs that jax cannot read, as after a crash or on a bad disk, are deleted and kept anew: jax would leave them
    there, and compile them each time. Raises ConfigError if the folder cannot be written.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        folder = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
    else:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            problem = f"must be a folder that can be written: {error.strerror}"
            raise ConfigError("config.data.cache_dir", str(folder.parent), problem) from error
        jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    _delete_what_cannot_be_read(folder)


@functools.cache
def _delete_what_cannot_be_read(folder: Path) -> None:
    """Have jax's warning that a program cannot be read delete its file, and others of its name, before it compiles."""
    show_other = warnings.showwarning

    def show(message: Warning | str, *arguments: Any, **options: Any) -> None:
        match = UNREADABLE.search(str(message))
        if match is None:
            show_other(message, *arguments, **options)
            return
        log.warning("a compiled program, %s, could not be read, and is compiled again", match[1])
        with contextlib.suppress(OSError):  # as in a folder of somebody else
            for path in folder.glob(f"{glob.escape(match[1])}-*"):
                path.unlink(missing_ok=True)

    warnings.showwarning = show
    warnings.filterwarnings("always", message=UNREADABLE.pattern)
