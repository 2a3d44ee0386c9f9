"""Benchmarks. The environment variables of jax are checked before a benchmark module imports jax."""

from posenc_jax import command

command.check_environment()
