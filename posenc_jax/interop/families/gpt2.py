"""GPT-2: learned positions, layer norm, GELU and biases. Its linear layers store kernels as [in, out].

Source: Hugging Face transformers, whose defaults stand for absent fields.
"""

from collections.abc import Iterator
from typing import Any

from posenc_jax.interop.family import (
    GELU,
    Architecture,
    Names,
    Tensor,
    concatenated,
    layer_norm,
    same,
    transposed,
    widths,
)
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.writing import check_widths, theirs

NAMES = Names(
    prefix="transformer.",
    copies=(("lm_head.weight", "transformer.wte.weight"),),
    unused=(".attn.bias", ".attn.masked_bias"),  # the causal mask
)


def read(fields: Fields) -> Architecture:
    fields.rename(hidden_size="n_embd", num_hidden_layers="n_layer", num_attention_heads="n_head")
    fields.rename(max_position_embeddings="n_positions")
    fields.expect(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    fields.ignore("n_ctx", "reorder_and_upcast_attn")
    model = widths(fields, "n_embd", "n_head") | {
        "num_layers": fields.count("n_layer"),
        "activation": fields.choose("activation_function", GELU, "gelu_new"),
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "tied_embeddings": fields.take("tie_word_embeddings", bool, True),
        "scale_embeddings": False,
        "use_bias": True,
    }
    model["d_ff"] = fields.count("n_inner", 4 * model["d_model"])
    return Architecture(model, {"name": "learned"}, fields.count("n_positions"), fields.count("vocab_size"))


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    yield same("transformer.wte.weight", "embedding")
    yield same("transformer.wpe.weight", "encoding_0/table")
    for i in range(architecture.model["num_layers"]):
        theirs, ours = f"transformer.h.{i}", f"block_{i}"
        yield from layer_norm(f"{theirs}.ln_1", f"{ours}/attention_norm")
        for kind, stored in (("kernel", "weight"), ("bias", "bias")):
            fused = tuple(f"{ours}/attention/{part}/{kind}" for part in "qkv")
            yield concatenated(f"{theirs}.attn.c_attn.{stored}", fused, -1)
            yield same(f"{theirs}.attn.c_proj.{stored}", f"{ours}/attention/out/{kind}")
            yield same(f"{theirs}.mlp.c_fc.{stored}", f"{ours}/feed_forward/up/{kind}")
            yield same(f"{theirs}.mlp.c_proj.{stored}", f"{ours}/feed_forward/down/{kind}")
        yield from layer_norm(f"{theirs}.ln_2", f"{ours}/feed_forward_norm")
    yield from layer_norm("transformer.ln_f", "norm")
    if not architecture.model["tied_embeddings"]:
        yield transposed("lm_head.weight", "unembedding/kernel")


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    model = check_widths(architecture.model)
    return {
        "vocab_size": architecture.vocab_size,
        "n_positions": architecture.pretrained_length,
        "n_embd": model["d_model"],
        "n_layer": model["num_layers"],
        "n_head": model["num_heads"],
        "n_inner": model["d_ff"],
        "activation_function": theirs({"gelu_new": "gelu", "gelu": "gelu_exact"}, model["activation"]),
        "layer_norm_epsilon": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
    }
