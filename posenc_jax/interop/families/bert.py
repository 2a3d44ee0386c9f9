"""BERT with its head for masked tokens: an encoder with learned positions, a norm after each sum, GELU and biases.

All tokens have token type 0, whose embedding is added to the positions. A masked token has the embedding of [MASK]
here, as its own token after all others. Source: Hugging Face transformers, whose defaults stand for absent fields.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from posenc_jax.interop.family import GELU, Architecture, Names, Tensor, layer_norm, linear, same, widths
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.writing import check_widths, theirs

MASK_TOKEN = 103  # its id in the vocabularies of BERT's authors
TOKEN_TYPES = 2
WORDS, HEAD = "bert.embeddings.word_embeddings.weight", "cls.predictions"
UNUSED = ("bert.pooler.dense", "cls.seq_relationship")  # they predict whether a sentence follows another
NAMES = Names(
    renamed=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    copies=((f"{HEAD}.decoder.weight", WORDS), (f"{HEAD}.decoder.bias", f"{HEAD}.bias")),
    unused=(".position_ids", *(f"{name}.{kind}" for name in UNUSED for kind in ("weight", "bias")), f"{HEAD}.bias"),
)


def read(fields: Fields) -> Architecture:
    fields.expect(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    fields.count("type_vocab_size", TOKEN_TYPES)
    model = widths(fields, "hidden_size", "num_attention_heads") | {
        "causal": False,
        "num_layers": fields.count("num_hidden_layers"),
        "d_ff": fields.count("intermediate_size"),
        "activation": fields.choose("hidden_act", GELU, "gelu"),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", float, 1e-12),
        "post_norm": True,
        "tied_embeddings": fields.take("tie_word_embeddings", bool, True),
        "scale_embeddings": False,
        "use_bias": True,
    }
    length, vocab_size = fields.count("max_position_embeddings"), fields.count("vocab_size")
    mask = fields.take("mask_token_id", int, MASK_TOKEN)
    if not 0 <= mask < vocab_size:
        raise fields.error("mask_token_id", mask, f"must be a token: at least 0 and below vocab_size = {vocab_size}")
    return Architecture(model, {"name": "learned"}, length, vocab_size, {"mask_token": mask})


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    mask, tied = architecture.own.get("mask_token", MASK_TOKEN), architecture.model["tied_embeddings"]
    yield Tensor((WORDS,), ("embedding",), lambda x: (np.concatenate([x, x[mask : mask + 1]]),), _without_mask(mask))
    tables = tuple(f"bert.embeddings.{kind}_embeddings.weight" for kind in ("position", "token_type"))
    yield Tensor(tables, ("encoding_0/table",), lambda positions, types: (positions + types[0],), _with_types)
    yield from layer_norm("bert.embeddings.LayerNorm", "norm")
    for i in range(architecture.model["num_layers"]):
        theirs, ours = f"bert.encoder.layer.{i}", f"block_{i}"
        for name in ("query", "key", "value"):
            yield from linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name[0]}", True)
        yield from linear(f"{theirs}.attention.output.dense", f"{ours}/attention/out", True)
        yield from layer_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention_norm")
        yield from linear(f"{theirs}.intermediate.dense", f"{ours}/feed_forward/up", True)
        yield from linear(f"{theirs}.output.dense", f"{ours}/feed_forward/down", True)
        yield from layer_norm(f"{theirs}.output.LayerNorm", f"{ours}/feed_forward_norm")
    yield from linear(f"{HEAD}.transform.dense", "head/hidden", True)
    yield from layer_norm(f"{HEAD}.transform.LayerNorm", "head/norm")
    yield same(f"{HEAD}.bias" if tied else f"{HEAD}.decoder.bias", "head/bias")
    if not tied:
        yield from linear(f"{HEAD}.decoder", "unembedding", False)


def _without_mask(mask: int):
    """The inverse: the row of the mask token is where its id says. Its own row would only predict it."""

    def pack(table):
        words = np.array(table[:-1])
        words[mask] = table[-1]
        return (words,)

    return pack


def _with_types(table):
    return table, np.zeros((TOKEN_TYPES, table.shape[-1]), np.float32)


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    model = check_widths(architecture.model)
    return {
        "vocab_size": architecture.vocab_size + 1,  # with the mask token
        "mask_token_id": architecture.vocab_size,
        "max_position_embeddings": architecture.pretrained_length,
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": model["d_ff"],
        "hidden_act": theirs({"gelu": "gelu_exact", "gelu_new": "gelu"}, model["activation"]),
        "layer_norm_eps": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
    }
