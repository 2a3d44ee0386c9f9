"""Studies and other experiments. The environment variables of jax are checked before a module imports jax."""

from posenc_jax import command

command.check_environment()
