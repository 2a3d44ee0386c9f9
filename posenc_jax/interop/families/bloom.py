"""BLOOM: ALiBi, a norm of the embeddings, layer norm, GELU and biases.

Queries, keys and values of a head are next to each other in one kernel. A config.json does not always give the context
of the training, which was 2,048 tokens. Source: Hugging Face transformers, whose defaults stand for absent fields.
"""

from collections.abc import Iterator
from typing import Any

from posenc_jax.interop.family import Architecture, Names, Tensor, fused_heads, layer_norm, linear, same, widths
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.writing import check_widths

NAMES = Names(prefix="transformer.", copies=(("lm_head.weight", "transformer.word_embeddings.weight"),))
CONTEXT = 2048  # tokens
IGNORED = ("attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "n_inner", "offset_alibi")
IGNORED += ("skip_bias_add", "skip_bias_add_qkv", "unk_token_id")  # not read by transformers


def read(fields: Fields) -> Architecture:
    fields.rename(num_hidden_layers="n_layer", num_attention_heads="n_head", n_embed="hidden_size")
    fields.expect(apply_residual_connection_post_layernorm=False)
    fields.ignore(*IGNORED)
    model = widths(fields, "hidden_size", "n_head") | {
        "num_layers": fields.count("n_layer"),
        "activation": "gelu",
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "embedding_norm": True,
        "tied_embeddings": fields.take("tie_word_embeddings", bool, True),
        "scale_embeddings": False,
        "use_bias": True,
    }
    model["d_ff"] = 4 * model["d_model"]
    return Architecture(model, {"name": "alibi"}, fields.count("seq_length", CONTEXT), fields.count("vocab_size"))


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    model = architecture.model
    yield same("transformer.word_embeddings.weight", "embedding")
    yield from layer_norm("transformer.word_embeddings_layernorm", "embedding_norm")
    for i in range(model["num_layers"]):
        theirs, ours = f"transformer.h.{i}", f"block_{i}"
        yield from layer_norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
        fused = f"{theirs}.self_attention.query_key_value"
        yield from fused_heads(fused, f"{ours}/attention", model["num_heads"], True)
        yield from linear(f"{theirs}.self_attention.dense", f"{ours}/attention/out", True)
        yield from layer_norm(f"{theirs}.post_attention_layernorm", f"{ours}/feed_forward_norm")
        yield from linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}/feed_forward/up", True)
        yield from linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}/feed_forward/down", True)
    yield from layer_norm("transformer.ln_f", "norm")
    if not model["tied_embeddings"]:
        yield from linear("lm_head", "unembedding", False)


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    model = check_widths(architecture.model)
    return {
        "vocab_size": architecture.vocab_size,
        "seq_length": architecture.pretrained_length,
        "hidden_size": model["d_model"],
        "n_layer": model["num_layers"],
        "n_head": model["num_heads"],
        "layer_norm_epsilon": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
    }
