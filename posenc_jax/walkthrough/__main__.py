"""`python -m posenc_jax.walkthrough`: see posenc_jax/walkthrough/command.py."""

import sys

from posenc_jax import command


def main(arguments: list[str]) -> None:
    from posenc_jax.walkthrough.command import main  # imports jax, whose environment variables are checked first

    main(arguments)


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
