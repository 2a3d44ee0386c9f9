"""Studies and other experiments. Their modules import jax, so its environment variables are checked first."""

from posenc_jax import command

command.check_environment()
