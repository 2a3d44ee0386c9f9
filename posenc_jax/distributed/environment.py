"""Checks of the environment variables of jax, before jax fails on them."""

import os
import re

from posenc_jax.schema import ConfigError

MOST_CPU_DEVICES = 1024


def check() -> None:
    """Raise ConfigError for environment variables that jax or a run does not support. Call it before importing jax."""
    name = "JAX_NUM_CPU_DEVICES"
    number = os.environ.get(name, "1")
    if not (re.fullmatch("[0-9]{1,4}", number) and 1 <= int(number) <= MOST_CPU_DEVICES):
        raise ConfigError(name, number, f"must be an integer from 1 to {MOST_CPU_DEVICES}, or not be set")
    name = "JAX_DISABLE_JIT"
    if os.environ.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
        raise ConfigError(
            name, os.environ[name], "must not be set: nothing would be compiled, and a step would take hours"
        )


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
        name = "JAX_PLATFORMS"
        reason = " ".join(str(error).partition("(set JAX_PLATFORMS")[0].split()).rstrip(".") or "jax finds no device"
        allowed = f'must name platforms with devices, such as "cpu", "cuda", "tpu" or "cuda,cpu": {reason}'
        raise ConfigError(name, os.environ.get(name), allowed) from error
