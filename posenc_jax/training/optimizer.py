"""Optimizers with gradient clipping and weight decay, and the schedules of their learning rate."""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from posenc_jax.training_config import OptimizerConfig

# Paths of the matrices that Muon orthogonalizes: those between embeddings and output layer, but not of encodings.
HIDDEN = r"(?!encoding_|unembedding/).*kernel"


class Optimizer(NamedTuple):
    """An optax gradient transformation, and a function from its state to the learning rate of the next step."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[Any], Float[Array, ""]]


def build(config: OptimizerConfig, *, total_steps: int, warmup_steps: int, decay_steps: int = 0) -> Optimizer:
    """Clip by global norm, take the direction of the optimizer, add weight decay, and scale by the learning rate.

    Peak learning rate and weight decay are arrays in the optimizer state. Weight decay is decoupled, as in AdamW.
    """
    static = ("direction", "mask")
    descent = optax.inject_hyperparams(_descent, static_args=static, hyperparam_dtype=jnp.dtype("float32"))(
        config.learning_rate,
        config.weight_decay,
        direction=DIRECTIONS[config.name](config),
        mask=functools.partial(matching, pattern=config.weight_decay_mask),
    )
    share = relative_rate(config, total_steps=total_steps, warmup_steps=warmup_steps, decay_steps=decay_steps)
    clip, scale = optax.clip_by_global_norm(config.grad_clip_norm), optax.scale_by_schedule(share)
    transformation = optax.chain(clip, descent, scale)

    def learning_rate(state: Any) -> Float[Array, ""]:
        return state[1].hyperparams["learning_rate"] * share(state[2].count)

    return Optimizer(*transformation, learning_rate)


def relative_rate(
    config: OptimizerConfig, *, total_steps: int, warmup_steps: int, decay_steps: int = 0
) -> optax.Schedule:
    """The learning rate at a step, relative to its peak: linear warm-up to 1, then the schedule of the settings.

    - cosine: half a cosine to `end_lr_ratio` at the last step (Loshchilov and Hutter 2017, without restarts).
    - linear: a line to `end_lr_ratio` at the last step.
    - wsd: 1, then a line to `end_lr_ratio` in the last `decay_steps` (warmup-stable-decay, Hu et al. 2024, section 4,
      which leaves the form of the decay open).
    - constant: 1.
    """
    warmup = optax.linear_schedule(1 / (warmup_steps + 1), 1.0, warmup_steps)
    after = SCHEDULES[config.schedule](max(total_steps - warmup_steps, 1), decay_steps, config.end_lr_ratio)
    return optax.join_schedules([warmup, after], [warmup_steps])


# schedules by name, made from steps after the warm-up, steps of the decay, and relative rate at the end
SCHEDULES: dict[str, Callable[[int, int, float], optax.Schedule]] = {
    "cosine": lambda steps, decay, end: optax.cosine_decay_schedule(1.0, steps, end),
    "linear": lambda steps, decay, end: optax.linear_schedule(1.0, end, steps),
    "wsd": lambda steps, decay, end: optax.linear_schedule(1.0, end, decay, transition_begin=steps - decay),
    "constant": lambda steps, decay, end: optax.constant_schedule(1.0),
}


def matching(params: dict, pattern: str) -> dict:
    """A tree of bools: True if the path of a parameter, such as "block_0/attention/out/kernel", matches the pattern."""

    def matches(path: Any, _: Any) -> bool:
        return re.fullmatch(pattern, "/".join(str(part.key) for part in path)) is not None

    return jax.tree_util.tree_map_with_path(matches, params)


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """The mean of gradients over the root of their mean square (Kingma and Ba 2015, Loshchilov and Hutter 2019)."""
    return optax.scale_by_adam(config.b1, config.b2, config.eps)


def lion(config: OptimizerConfig) -> optax.GradientTransformation:
    """The sign of the mean of gradients (Chen et al. 2023)."""
    return optax.scale_by_lion(config.b1, config.b2)


def muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Orthogonalized momentum for hidden matrices (Jordan et al. 2024), and AdamW for all other parameters.

    The momentum is 0.95, with Nesterov's step. Updates are scaled to the root mean square of AdamW's, 0.2, so that both
    parts have one learning rate and one weight decay (Liu et al. 2025, section 2.2).
    """

    def labels(params: dict) -> dict:
        return jax.tree.map(lambda hidden: "muon" if hidden else "adamw", matching(params, HIDDEN))

    # All hidden kernels are matrices [in, out]. The AdamW of optax.contrib.muon is not used: it adds Nesterov's step.
    matrices = optax.chain(optax.contrib.muon(1.0, consistent_rms=0.2), optax.scale(-1.0))
    return optax.partition({"muon": matrices, "adamw": adamw(config)}, labels)


def adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam's direction from row and column means of squared gradients (Shazeer and Stern 2018), without momentum.

    Means are factored for matrices of at least 128 x 128, and the root mean square of an update is clipped at 1. The
    learning rate is relative to the root mean square of each parameter, at least 0.001 (section 8 of the paper).
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


# the direction of ascent of each optimizer, by its name in the settings
DIRECTIONS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {
    "adamw": adamw,
    "lion": lion,
    "muon": muon,
    "adafactor": adafactor,
}


def _descent(
    learning_rate: Any, weight_decay: Any, direction: optax.GradientTransformation, mask: Callable[[dict], dict]
) -> optax.GradientTransformation:
    decay, scale = optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(learning_rate)
    return optax.chain(direction, decay, scale)
