"""One training step, as a pure function of the state and a batch."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import Array, Float, Int, Shaped, UInt

from posenc_jax import positions
from posenc_jax.config import EncodingConfig, RunConfig, TransformerConfig
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Constant
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.recurrent import ELMo, Recurrent
from posenc_jax.models.transformer import Transformer
from posenc_jax.schema import ConfigError
from posenc_jax.training import objectives
from posenc_jax.training.optimizer import Optimizer

# {"params", "constants": nested dicts of arrays; "optimizer": optax's state; "step", "seed": int32 and uint32 scalars;
#  "finite": bool scalar}. "finite" becomes False at the first non-finite loss or gradient; the state is then frozen.
State = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]
# Tokens or, if `config.marks_tokens`, tokens and a number for each: its document or, of a task, 1 if it is scored. If
# `config.positions.of_task`, also its place.
Batch = Int[Array, "B N"] | Int[Array, "B P N"]
TrainStep = Callable[[State, Batch], tuple[State, Metrics]]
# (state, batches [K, B, N] or [K, B, P, N], count) -> (state, metrics [K])
TrainSteps = Callable[[State, Int[Array, "K B *N"], int | Int[Array, ""]], tuple[State, dict[str, Shaped[Array, "K"]]]]


def abstract_model(config: RunConfig, *, dropped: bool = False) -> tuple[nnx.GraphDef, int]:
    """The structure of a run's model and its number of parameters. No array is created. Raises ConfigError.

    A `dropped` model has the same arrays, but no layer uses the encoding: DroPE, Gelberg et al. 2025.
    """
    model = nnx.eval_shape(lambda: build_model(config, jnp.zeros((), jnp.uint32)))
    reach, table = config.positions.reach(config.training.length), getattr(model, "table_length", None)
    if table is not None and reach > table:
        allowed = f"must be at most {table}, the positions in the table of encoding {config.encoding.name!r}"
        raise ConfigError("config.training.length", config.training.length, allowed)
    if isinstance(model, Transformer):
        _check_packable(model, config)
    if dropped and isinstance(model, Transformer):
        model.drop_encodings()
    forget_initializers(model)
    graphdef, params, _ = nnx.split(model, nnx.Param, Constant)
    return graphdef, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check_packable(model: Transformer, config: RunConfig) -> None:
    """Raise ConfigError for an encoding that does not keep documents, or a sample of a task and padding, apart."""
    hides_padding = bool(config.task.name) and config.masks_tokens
    for layer in range(model.num_layers) if config.packed or hides_padding else ():
        encoding = model.encoding(layer)
        if not encoding.packable:
            told = f"for {type(encoding).__name__} with these settings, which reads"
            if config.packed:
                raise ConfigError("config.data.packing", "documents", f"must be 'none' {told} other documents")
            raise ConfigError("config.model.causal", False, f"must be True {told} padding")


def forget_initializers(model: nnx.Module) -> None:
    """Delete the initializers that layers of flax 0.11 keep. They never compare equal, so no two structures would."""
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.Linear):
            for name in {"kernel_init", "bias_init"} & vars(module).keys():
                delattr(module, name)


def initial_state(config: RunConfig, optimizer: Optimizer, mesh: Mesh | None = None) -> State:
    """The state before the first step, on the devices of a mesh, or on the first device without a mesh.

    It is created one operation at a time. Each operation is compiled once per shape, whatever the settings. Many runs
    thus start in the time of one, and each gets the same bits as if it were alone. If the mesh divides parameters, one
    compiled program creates each shard on its device.
    """

    def create(seed):
        _, params, constants = nnx.split(build_model(config, seed), nnx.Param, Constant)
        own = functools.partial(jax.tree.map, jnp.copy)  # a step donates its state, so no two parameters are one array
        params, constants = own(nnx.to_pure_dict(params)), own(nnx.to_pure_dict(constants))
        state = {"params": params, "constants": constants, "optimizer": optimizer.init(params)}
        return state | {"step": jnp.zeros((), jnp.int32), "seed": seed, "finite": jnp.ones((), bool)}

    seed = jnp.asarray(config.seed, jnp.uint32)
    if mesh is None:
        return create(seed)
    placed = sharding.placement(jax.eval_shape(create, seed), mesh)
    if mesh.size == mesh.shape["data"]:
        return jax.device_put(create(seed), placed)
    return jax.jit(create, out_shardings=placed)(seed)


def initial_constants(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """The constants of `initial_state` on the devices of a mesh. No parameter is created."""

    def create(seed):
        _, _, constants = nnx.split(build_model(config, seed), nnx.Param, Constant)
        return nnx.to_pure_dict(constants)

    seed = jnp.asarray(config.seed, jnp.uint32)
    placed = sharding.placement(jax.eval_shape(create, seed), mesh)
    return jax.jit(create, out_shardings=placed)(seed)


def abstract_state(config: RunConfig, optimizer: Optimizer, mesh: Mesh | None) -> State:
    """Shapes and shardings of the state on a mesh, or on the first device without one. No array is created."""
    state, first = jax.eval_shape(lambda: initial_state(config, optimizer)), SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: first, state) if mesh is None else sharding.placement(state, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, placed)


def build_model(config: RunConfig, seed: UInt[Array, ""]) -> LanguageModel:
    """The model of a run. The seed determines its weights."""
    options = {"vocab_size": config.vocab_size, "rngs": nnx.Rngs(jax.random.key(seed))}
    if isinstance(config.model, TransformerConfig):
        reach, encoding = config.pretrained_reach, trained_encoding(config)
        return Transformer(config.model, encoding, config.temperature, config.layers, max_length=reach, **options)
    return (ELMo if config.model.architecture == "elmo" else Recurrent)(config.model, **options)


def trained_encoding(config: RunConfig) -> EncodingConfig:
    """The encoding of a run in training. Its own scaling rule may follow the length of the training windows."""
    own = config.encoding.hyperparameters
    if not hasattr(own, "scaling"):
        return config.encoding
    read = config.positions.reach(config.training.length)
    scaling = str(frequencies.parse(own.scaling).own_at(read, config.pretrained_reach))
    return config.encoding.change(scaling=scaling)


def make_train_step(
    config: RunConfig, graphdef: nnx.GraphDef, optimizer: Optimizer, token_bytes: Int[Array, "V"] | None
) -> TrainStep:
    """The function `(state, batch) -> (state, metrics)`, to be compiled. Seed and step determine the dropout keys.

    The loss is the mean over all scored tokens of the batch. If `training.grad_accum_steps` is above 1, the batch is
    processed in that many parts, and their gradients are averaged. Only `state["finite"]` changes if the loss or
    gradient is not finite. Tokens of a task have no `token_bytes`, and its metrics no bits per byte.
    """

    def loss(params, constants, batch, key):
        tokens, marks, *rest = jnp.moveaxis(batch, 1, 0) if config.marks_tokens else (batch, None)
        model = nnx.merge(graphdef, params, constants)
        position_key, dropout_key = jax.random.split(key)
        length, num_layers = tokens.shape[1] - 1, config.model.num_layers
        if config.positions.of_task:
            read = rest[0][:, 1:] if config.masks_tokens else rest[0][:, :-1]
            places = positions.of_samples(config.positions, read, position_key)
        else:
            places = positions.in_training(config.positions, length, num_layers, position_key)
        nats, scored = objectives.training_loss(config, model, tokens, places, dropout_key, marks)
        count = jnp.maximum(scored.sum(), 1) if config.marks_tokens else scored.sum()
        num_bytes = 1.0 if token_bytes is None else (scored * token_bytes[tokens[:, 1:]]).sum() / count
        return nats, (num_bytes, count)

    loss_and_gradient = jax.value_and_grad(loss, has_aux=True)

    def gradients(state, batch):
        """The loss, the mean bytes of scored tokens, and the gradient."""
        parts = config.training.grad_accum_steps
        key = jax.random.fold_in(jax.random.key(state["seed"]), state["step"])
        if parts == 1:
            (nats, (bytes_per_token, _)), gradient = loss_and_gradient(state["params"], state["constants"], batch, key)
            return nats, bytes_per_token, gradient

        def add_part(total, part):
            (nats, (bytes_per_token, count)), gradient = loss_and_gradient(state["params"], state["constants"], *part)
            own = nats, bytes_per_token, gradient
            if config.marks_tokens:  # parts have different numbers of scored tokens
                own = jax.tree.map(lambda x: x * count, own)
            return jax.tree.map(jnp.add, total, own), count

        # Each part takes rows from every device, so no rows of a sharded batch move between devices.
        rows = batch.reshape(-1, parts, *batch.shape[1:]).swapaxes(0, 1)
        nothing = jnp.zeros((), jnp.float32)
        zero = nothing, nothing, jax.tree.map(jnp.zeros_like, state["params"])
        total, counts = jax.lax.scan(add_part, zero, (rows, jax.random.split(key, parts)))
        whole = counts.sum() if config.marks_tokens else parts
        return jax.tree.map(lambda x: x / whole, total)

    def train_step(state: State, batch: Batch) -> tuple[State, Metrics]:
        nats, bytes_per_token, gradient = gradients(state, batch)
        gradient_norm = optax.tree.norm(gradient)
        finite = state["finite"] & jnp.isfinite(nats) & jnp.isfinite(gradient_norm)

        def update(state, gradient):
            updates, optimizer_state = optimizer.update(gradient, state["optimizer"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            new = state | {"params": params, "optimizer": optimizer_state, "step": state["step"] + 1}
            return new, optax.tree.norm(updates)

        def freeze(state, gradient):
            return state | {"finite": finite}, jnp.zeros((), jnp.float32)

        new, update_norm = jax.lax.cond(finite, update, freeze, state, gradient)
        metrics = {
            "loss": nats,
            "learning_rate": optimizer.learning_rate(state["optimizer"]),
            "gradient_norm": gradient_norm,
            "update_norm": update_norm,
            "parameter_norm": optax.tree.norm(new["params"]),
            "finite": finite,
        }
        if token_bytes is not None:
            metrics["bits_per_byte"] = nats / bytes_per_token / math.log(2)
        return new, metrics

    return train_step


def repeated(train_step: TrainStep) -> TrainSteps:
    """A function, to be compiled, that takes one step on each of the first `count` batches and returns all metrics.

    `count` is an argument of the compiled program, so the number of steps per call does not change any bit. Batches
    after the first `count` are not read, and their metrics are zeros.
    """
    train_step = jax.jit(train_step)  # one trace, for both the shapes of the metrics and the loop

    def train_steps(state, batches, count):
        def step(i, carry):
            state, metrics = carry
            state, own = train_step(state, batches[i])
            return state, jax.tree.map(lambda of_all, value: of_all.at[i].set(value), metrics, own)

        _, shapes = jax.eval_shape(train_step, state, batches[0])
        metrics = jax.tree.map(lambda value: jnp.zeros(len(batches), value.dtype), shapes)
        return jax.lax.fori_loop(0, count, step, (state, metrics))

    return train_steps
