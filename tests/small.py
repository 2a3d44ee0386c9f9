"""Small runs and models for the tests, made from the smoke size of the main recipe."""

import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from configs import rope_extrap
from posenc_jax.config import EncodingConfig, LayersConfig, RunConfig
from posenc_jax.encodings.base import Constant, Dims
from posenc_jax.models.transformer import Transformer
from posenc_jax.training.step import forget_initializers

DIMS = Dims(d_model=32, num_heads=4, num_kv_heads=4, head_dim=8, max_length=32)


def run_config(encoding: str = "rope", **changes: Any) -> RunConfig:
    """A config of the smoke size. `changes` are dotted fields, with "__" for each dot: `model__dropout=0.1`."""
    config = rope_extrap.get_config(f"size=smoke,encoding={encoding}")
    for field, value in changes.items():
        section = config
        *path, last = field.split("__")
        for name in path:
            section = section[name]
        section[last] = value
    return RunConfig.from_mapping(config.to_dict())


def transformer(
    encoding: str, *, seed: int = 0, max_length: int = 32, dims: Dims = DIMS, **changes: Any
) -> Transformer:
    """A model of two layers of width 32.

    `changes` are fields of ModelConfig, the encoding's `hyperparameters`, and `layers`: sections of letters.
    """
    hyperparameters = tuple(changes.pop("hyperparameters", {}).items())
    layers = LayersConfig.parse(changes.pop("layers", {}), "config.layers")
    found = _transformer(encoding, seed, max_length, dims, tuple(changes.items()), hyperparameters, layers)
    return nnx.merge(*found, copy=True)  # else a test that writes to its model would change that of others


@functools.cache
def _transformer(encoding, seed, max_length, dims, changes, hyperparameters, layers):
    """The graphdef and arrays of a model, which are created once: each array takes a compiled program."""
    defaults = {"num_layers": 2, "d_model": dims.d_model, "num_heads": dims.num_heads, "d_ff": 48}
    defaults |= {"num_kv_heads": dims.num_kv_heads, "head_dim": dims.head_dim}
    changed = {f"model__{name}": value for name, value in (defaults | dict(changes)).items()}
    model = run_config(layers=layers.plain(), **changed).model
    own = EncodingConfig.of(encoding, **dict(hyperparameters))
    with jax.ensure_compile_time_eval():  # arrays, also where a test traces the creation
        built = Transformer(model, own, None, layers, vocab_size=64, max_length=max_length, rngs=nnx.Rngs(seed))
        return nnx.split(built)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """The graphdef, parameters and constants, in the form that training uses."""
    forget_initializers(model)
    graphdef, params, constants = nnx.split(model, nnx.Param, Constant)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(constants)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    graphdef: nnx.GraphDef, params: dict, constants: dict, *inputs: jax.Array, **named: jax.Array
) -> jax.Array:
    return nnx.merge(graphdef, params, constants)(*inputs, **named)


def forward(model: nnx.Module, *inputs: jax.Array, **named: jax.Array) -> jax.Array:
    """The output of the model. All models with the same structure share one compiled program."""
    return _forward(*split(model), *inputs, **named)


def tokens(batch: int = 2, length: int = 32, seed: int = 1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64)


def write_text(folder: Path) -> Path:
    """Write text to train on. Returns the folder, which also holds the cache of tokens."""
    random = np.random.default_rng(0)
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text("".join(random.choice(list("abcd \n"), 400)))
    return folder
