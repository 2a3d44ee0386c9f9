"""Position schedules: the positions of tokens in training and in evaluation. They combine with every encoding.

Most schedules return increasing positions. A random schedule draws them once for the whole batch, [1, T], or once per
layer, [layers, 1, T]. Positions 0 .. T-1 are returned as None: the model then knows at compile time that they are
contiguous. In `coupled` and `abacus`, each sample of a task has positions of its own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Real

from posenc_jax.evaluation_config import PositionsConfig


def in_training(
    config: PositionsConfig, length: int, num_layers: int, key: Array
) -> Real[Array, "1 T"] | Real[Array, "layers 1 T"] | None:
    """Positions of one training step.

    - `contiguous`: 0 .. T-1, returned as None.
    - `offset`: contiguous from a random start, below `range`. Kiyono et al. 2021 (SHAPE).
    - `randomized`: T whole numbers below `range`, without replacement, in order. Ruoss et al. 2023.
    - `random_float`: T real numbers in [0, range), in order. Shimizu et al. 2026 (Random Float Sampling).
    - `coupled` and `abacus`: None; see `of_samples`.
    """
    if config.training == "contiguous" or config.of_task:
        return None

    def draw(key):
        if config.training == "offset":
            return jnp.arange(length)[None] + jax.random.randint(key, (), 0, config.range - length + 1)
        if config.training == "randomized":
            return jnp.sort(jax.random.permutation(key, config.range)[:length])[None]
        return jnp.sort(jax.random.uniform(key, (1, length), maxval=config.range))

    return jax.vmap(draw)(jax.random.split(key, num_layers)) if config.per_layer else draw(key)


def of_samples(config: PositionsConfig, places: Int[Array, "B T"], key: Array) -> Int[Array, "B T"]:
    """Positions of a training step on a task, from those of its samples, `places`, which count from 1.

    Each sample is shifted by a random number, so that its positions are below `range`. A place of 0 means that a token
    has no position, and is kept. In evaluation, positions are the places. The places are

    - `coupled`: equal for tokens that belong together, such as digits of the same significance. Cho et al. 2024.
    - `abacus`: those of digits in their number, and 0 for other tokens. McLeish et al. 2024.
    """
    shift = jax.random.randint(key, (len(places), 1), 0, config.range - places.max(axis=1, keepdims=True))
    return jnp.where(places > 0, places + shift, 0)


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
