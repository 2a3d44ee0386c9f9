"""GPT-NeoX and Pythia: RoPE on a quarter of the channels, parallel residual, layer norm, GELU and biases.

Queries, keys and values of a head are next to each other in one kernel. Source: Hugging Face transformers, whose
defaults stand for absent fields.
"""

from collections.abc import Iterator
from typing import Any

from posenc_jax.interop import rope_scaling
from posenc_jax.interop.family import (
    GELU,
    Architecture,
    Names,
    Tensor,
    fused_heads,
    layer_norm,
    linear,
    same,
    widths,
    zeros,
)
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.writing import check_widths, theirs, write_rope

NAMES = Names(
    prefix="gpt_neox.",
    renamed=(("embed_out.", "lm_head."),),
    copies=(("lm_head.weight", "gpt_neox.embed_in.weight"),),
    unused=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)
ROPE_FIELDS: dict[str, Any] = {"base_field": "rotary_emb_base", "fraction_field": "rotary_pct"}


def read(fields: Fields) -> Architecture:
    fields.expect(is_decoder=False)
    model = widths(fields, "hidden_size", "num_attention_heads") | {
        "num_layers": fields.count("num_hidden_layers"),
        "d_ff": fields.count("intermediate_size"),
        "activation": fields.choose("hidden_act", GELU, "gelu"),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_eps", float, 1e-5),
        "parallel_residual": fields.take("use_parallel_residual", bool, True),
        "tied_embeddings": fields.take("tie_word_embeddings", bool, False),
        "scale_embeddings": False,
        "use_bias": True,
    }
    rope = rope_scaling.read(fields, model["head_dim"], fraction=0.25, **ROPE_FIELDS)
    own = {"attention_bias": fields.take("attention_bias", bool, True)}
    return Architecture(
        model, {"name": "rope"} | rope.settings, rope.pretrained_length, fields.count("vocab_size"), own
    )


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    model, biased = architecture.model, architecture.own.get("attention_bias", True)
    yield same("gpt_neox.embed_in.weight", "embedding")
    for i in range(model["num_layers"]):
        theirs, ours = f"gpt_neox.layers.{i}", f"block_{i}"
        yield from layer_norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
        fused = f"{theirs}.attention.query_key_value"
        yield from fused_heads(fused, f"{ours}/attention", model["num_heads"], biased)
        yield from linear(f"{theirs}.attention.dense", f"{ours}/attention/out", biased, True)
        if not biased:
            yield zeros(*(f"{ours}/attention/{part}/bias" for part in "qkv"))
        yield from layer_norm(f"{theirs}.post_attention_layernorm", f"{ours}/feed_forward_norm")
        yield from linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}/feed_forward/up", True)
        yield from linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}/feed_forward/down", True)
    yield from layer_norm("gpt_neox.final_layer_norm", "norm")
    if not model["tied_embeddings"]:
        yield from linear("lm_head", "unembedding", False)


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    model = check_widths(architecture.model)
    return {
        "vocab_size": architecture.vocab_size,
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "intermediate_size": model["d_ff"],
        "hidden_act": theirs({"gelu": "gelu_exact", "gelu_new": "gelu"}, model["activation"]),
        "layer_norm_eps": model["norm_eps"],
        "use_parallel_residual": model["parallel_residual"],
        "tie_word_embeddings": model["tied_embeddings"],
        "attention_bias": model["use_bias"] or model["qkv_bias"],
        **write_rope(architecture, partial=True, **ROPE_FIELDS),
    }
