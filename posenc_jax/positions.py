"""Position schedules: the positions of tokens in training and in evaluation. They combine with every encoding.

Every schedule returns increasing positions. A random schedule draws them once for the whole batch, [1, T], or once per
layer, [layers, 1, T]. Positions 0 .. T-1 are returned as None: the model then knows at compile time that they are
contiguous.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Real

from posenc_jax.evaluation_config import PositionsConfig


def in_training(
    config: PositionsConfig, length: int, num_layers: int, key: Array
) -> Real[Array, "1 T"] | Real[Array, "layers 1 T"] | None:
    """Positions of one training step.

    - `contiguous`: 0 .. T-1, returned as None.
    - `offset`: contiguous from a random start, below `range`. Kiyono et al. 2021 (SHAPE).
    - `randomized`: T whole numbers below `range`, without replacement, in order. Ruoss et al. 2023.
    - `random_float`: T real numbers in [0, range), in order. Shimizu et al. 2026 (Random Float Sampling).
    """
    if config.training == "contiguous":
        return None

    def draw(key):
        if config.training == "offset":
            return jnp.arange(length)[None] + jax.random.randint(key, (), 0, config.range - length + 1)
        if config.training == "randomized":
            return jnp.sort(jax.random.permutation(key, config.range)[:length])[None]
        return jnp.sort(jax.random.uniform(key, (1, length), maxval=config.range))

    return jax.vmap(draw)(jax.random.split(key, num_layers)) if config.per_layer else draw(key)


def in_evaluation(
    config: PositionsConfig, length: int, num_layers: int, training_length: int
) -> Real[Array, "1 T"] | Real[Array, "layers 1 T"] | None:
    """Positions of the T tokens of an evaluation window.

    - `contiguous`: 0 .. T-1, returned as None.
    - `drawn`: drawn as in training, with one fixed draw per length. Ruoss et al. 2023 also do this.
    - `even`: evenly spaced from 0 to `range` - 1, which is about the mean of many draws.
    - `interpolated`: windows longer than the training length are squeezed into it: position interpolation for any
      encoding.
    """
    if config.evaluation == "drawn":
        return in_training(config, length, num_layers, jax.random.key(0))
    if config.evaluation == "even":
        return jnp.linspace(0, config.range - 1, length)[None]
    if config.evaluation == "interpolated" and length > training_length:
        return jnp.linspace(0, training_length - 1, length)[None]
    return None


def depend_on_length(config: PositionsConfig) -> bool:
    """Whether the position of a token in evaluation depends on the length of the window."""
    return config.evaluation != "contiguous" and (config.evaluation, config.training) != ("drawn", "contiguous")
