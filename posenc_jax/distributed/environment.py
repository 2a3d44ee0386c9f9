"""The environment of a process, before it imports jax: checks of variables on which jax fails, and glibc's malloc."""

import ctypes
import os
import re
import sys

from posenc_jax.schema import ConfigError

MAX_CPU_DEVICES = 1024
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def check() -> None:
    """Raise ConfigError for environment variables that jax or a run does not support. Call it before importing jax."""
    name = "JAX_NUM_CPU_DEVICES"
    number = os.environ.get(name, "1")
    if not (re.fullmatch("[0-9]{1,4}", number) and 1 <= int(number) <= MAX_CPU_DEVICES):
        raise ConfigError(name, number, f"must be an integer from 1 to {MAX_CPU_DEVICES}, or not be set")
    name = "JAX_DISABLE_JIT"
    if os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
        allowed = "must not be set: nothing would be compiled, and a step would take hours"
        raise ConfigError(name, os.environ[name], allowed)


def cause_of(error: Exception) -> ConfigError | None:
    """The wrong setting that caused an error of jax; None if jax finds its devices."""
    if isinstance(error, AssertionError | RuntimeError):
        try:
            check_devices()
        except ConfigError as cause:
            return cause
    return None


def check_devices() -> None:
    """Raise ConfigError if jax finds no devices, for example if JAX_PLATFORMS names a platform that is not here."""
    import jax

    try:
        jax.devices()
    except (AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).partition("(set JAX_PLATFORMS")[0].split()).rstrip(".") or "jax finds no device"
        allowed = f'must name platforms with devices, such as "cpu", "cuda", "tpu" or "cuda,cpu": {reason}'
        raise ConfigError("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS"), allowed) from error


def keep_freed_memory() -> None:
    """Make glibc's malloc keep freed memory for reuse. Does nothing elsewhere. Call it before a device is first used.

    XLA on CPU allocates the working memory of a step anew in each step. By default glibc returns such large blocks to
    the system, which must then clear every page again. This takes about a fifth of a step's CPU time.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries of Linux do not have it
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_ARENA_MAX, 1)):
            mallopt(option, value)
