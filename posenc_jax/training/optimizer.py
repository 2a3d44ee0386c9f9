"""AdamW with gradient clipping and a warm-up and cosine schedule."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from posenc_jax.config import OptimizerConfig


class Optimizer(NamedTuple):
    """An optax gradient transformation, and a function from its state to the learning rate of the next step."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[Any], Float[Array, ""]]


def build(config: OptimizerConfig, *, total_steps: int, warmup_steps: int) -> Optimizer:
    """Clip by global norm, then AdamW. Peak learning rate and weight decay are arrays in the optimizer state."""
    static = ("b1", "b2", "eps", "eps_root", "mu_dtype", "mask", "nesterov")
    adamw = optax.inject_hyperparams(optax.adamw, static_args=static, hyperparam_dtype=jnp.dtype("float32"))
    share = warmup_cosine(config, total_steps=total_steps, warmup_steps=warmup_steps)
    mask = functools.partial(weight_decay_mask, pattern=config.weight_decay_mask)
    options = {"b1": config.b1, "b2": config.b2, "eps": config.eps, "weight_decay": config.weight_decay, "mask": mask}
    descent = adamw(learning_rate=config.learning_rate, **options)
    clip, scale = optax.clip_by_global_norm(config.grad_clip_norm), optax.scale_by_schedule(share)
    transformation = optax.chain(clip, descent, scale)

    def learning_rate(state: Any) -> Float[Array, ""]:
        return state[1].hyperparams["learning_rate"] * share(state[2].count)

    return Optimizer(*transformation, learning_rate)


def warmup_cosine(config: OptimizerConfig, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """The learning rate at a step, relative to its peak: linear warm-up to 1, then a cosine to `end_lr_ratio`."""
    warmup = optax.linear_schedule(1 / (warmup_steps + 1), 1.0, warmup_steps)
    cosine = optax.cosine_decay_schedule(1.0, max(total_steps - warmup_steps, 1), config.end_lr_ratio)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def weight_decay_mask(params: dict, pattern: str) -> dict:
    """A tree of bools: True if the path of a parameter, such as "block_0/attention/out/kernel", matches the pattern."""

    def matches(path: Any, _: Any) -> bool:
        return re.fullmatch(pattern, "/".join(str(part.key) for part in path)) is not None

    return jax.tree_util.tree_map_with_path(matches, params)
