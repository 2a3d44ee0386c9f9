"""Random models of this project, and what transformers and this project read from their exported folders."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from posenc_jax.config import RunConfig
from posenc_jax.interop import hf_writer
from posenc_jax.interop.family import Architecture
from posenc_jax.interop.hf_writer import Plan
from posenc_jax.models.transformer import Transformer
from posenc_jax.runs import workdir as workdirs
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import Checkpoints
from posenc_jax.training.step import initial_state
from tests.small import DIMS, split, transformer

LENGTH, VOCAB = 32, 64  # of `tests.small.transformer`


def random_model(encoding: str = "rope", *, zeros: str = "", **changes: Any) -> tuple[Transformer, Architecture]:
    """A model of `tests.small.transformer` with random norms and biases, except for parameters named `zeros`."""
    graphdef, params, constants = split(transformer(encoding, **changes))
    keys = iter(jax.random.split(jax.random.key(7), 200))
    moved = {
        path: x if path[-1] == zeros else x + 0.1 * jax.random.normal(next(keys), x.shape)
        for path, x in sorted(flatten_dict(params).items())
    }
    model = {"num_layers": 2, "d_model": DIMS.d_model, "num_heads": DIMS.num_heads, "d_ff": 48}
    model |= {"num_kv_heads": DIMS.num_kv_heads, "head_dim": DIMS.head_dim}
    hyperparameters = changes.pop("hyperparameters", {})
    architecture = Architecture(model | changes, {"name": encoding, **hyperparameters}, LENGTH, VOCAB)
    return nnx.merge(graphdef, unflatten_dict(moved), constants), architecture


def params_of(model: nnx.Module) -> dict[str, Any]:
    return flatten_dict(split(model)[1], sep="/")


def write(folder: Path, model: Transformer, architecture: Architecture, **options: Any) -> Plan:
    """Write the model, with a tokenizer of no use."""
    params = params_of(model)
    plan = hf_writer.plan(architecture, params)
    hf_writer.write(folder, plan, architecture, params, ("{}", {}), **options)
    return plan


def tokens(length: int, vocab_size: int = VOCAB) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, vocab_size, (2, length)))


def transformers_logits(folder: Path, ids: jax.Array, **fields: Any) -> np.ndarray:
    """The logits of the first V tokens. `fields` of config.json are changed."""
    import torch
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    options = {"attn_implementation": "eager", "output_loading_info": True, "dtype": torch.float32}
    model, info = getattr(transformers, architecture).from_pretrained(folder, **options, **fields)
    # transformers counts an untied output bias of BERT, which is in the file, as missing under a second name.
    wrong = {name for names in info.values() for name in names} - {"cls.predictions.bias"}
    assert not wrong, wrong
    with torch.no_grad():
        return model(torch.asarray(np.array(ids))).logits.numpy()[..., :VOCAB]


def save_run(workdir: Path, config: RunConfig) -> None:
    """A workdir with one checkpoint, of random weights."""
    record = {"windows": {"asked": 2, "found": 2, "documents": 1}, "versions": {"python": "3.11.7"}}
    record |= {"data": {"fingerprint": "f00d", "tokenizer": "bytes"}}
    with workdirs.claim(workdir, config, record):
        pass
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    keys = iter(jax.random.split(jax.random.key(3), 200))
    state["params"] = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), state["params"])
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=2)
    checkpoints.save(1, state, {})
    checkpoints.close()
