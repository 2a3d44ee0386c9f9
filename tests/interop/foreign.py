"""Small random models of transformers in folders, and models of this project that are made from such files."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.encodings.base import Constant
from posenc_jax.interop import families
from posenc_jax.interop.pretrained import Pretrained, open_pretrained
from posenc_jax.models.transformer import Transformer
from posenc_jax.training.step import forget_initializers
from tests.data.test_pretrained_tokenizer import byte_level

WIDTH, HIDDEN, VOCABULARY = 16, 24, 340
SETTINGS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}


def llama_folder(folder: Path) -> Path:
    """A Hugging Face folder of a random model of Llama's form, with a byte-level tokenizer."""
    folder.mkdir()
    draw, layer, attention = np.random.default_rng(0), "model.layers.0.", {"q": 16, "k": 8, "v": 8}
    shapes = {f"{layer}self_attn.{name}_proj.weight": (rows, WIDTH) for name, rows in attention.items()}
    shapes |= {f"{layer}self_attn.o_proj.weight": (WIDTH, WIDTH), "model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, HIDDEN)
    tensors = {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"
    save_file(tensors | {name: np.ones(WIDTH, np.float32) for name in norms}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    (folder / "tokenizer.json").write_text(byte_level())
    return folder


def random_model(model_type: str, **fields: Any):
    """A model of transformers with seeded weights. Norms and biases differ from 1 and 0, which would hide mistakes."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(model_type, **fields)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, families.TABLE[model_type][0])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * (0.2 if parameter.ndim == 1 else 1.2 / parameter.shape[-1] ** 0.5)
            parameter.add_(noise)
    return model


def loaded(source: str | Path, **changes: Any) -> tuple[Pretrained, nnx.Module]:
    """A model of this project with the weights of a folder or file. `changes` are fields of config.model."""
    found = open_pretrained(str(source))

    def create():
        config, encoding = TransformerConfig(**found.model | changes), EncodingConfig.parse(found.encoding, "encoding")
        sizes = {"vocab_size": found.vocab_size, "max_length": found.pretrained_length}
        return Transformer(config, encoding, **sizes, rngs=nnx.Rngs(0))

    @jax.jit
    def constants():
        return nnx.to_pure_dict(nnx.split(create(), nnx.Param, Constant)[2])

    model = nnx.eval_shape(create)
    forget_initializers(model)
    graphdef, abstract, _ = nnx.split(model, nnx.Param, Constant)
    return found, nnx.merge(graphdef, found.params(nnx.to_pure_dict(abstract)), constants())


@nnx.jit
def logits_and_loss(model: Transformer, tokens: jax.Array, targets: jax.Array):
    """Logits [B, T, V] of tokens [B, T], and the mean nats of targets [B, t] at the first t positions."""
    states = model.states(model.embed(tokens))
    return model.unembed(states), model.cross_entropy(states[:, : targets.shape[1]], targets).mean()


def tokens(vocab_size: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, (1, length), np.int32)
