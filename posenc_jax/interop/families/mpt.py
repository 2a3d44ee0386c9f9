"""MPT: ALiBi, layer norm without biases, exact GELU, and no biases at all.

Source: Hugging Face transformers, whose defaults stand for absent fields. It ignores settings that the code of MPT's
authors reads: `alibi_bias_max`, biases, clipped queries, and norms of queries and keys. Values that would change the
output there are refused.
"""

from collections.abc import Iterator
from typing import Any

from posenc_jax.interop.family import Architecture, Names, Tensor, concatenated, layer_norm, linear, same, widths
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.writing import check_widths
from posenc_jax.schema import ConfigError

NAMES = Names(prefix="transformer.", copies=(("lm_head.weight", "transformer.wte.weight"),))


def read(fields: Fields) -> Architecture:
    fields.rename(hidden_size="d_model", num_hidden_layers="n_layers", num_attention_heads="n_heads")
    fields.expect(expansion_ratio=4, no_bias=True, logit_scale=None)
    fields.ignore("embedding_fraction", "emb_pdrop", "init_config", "learned_pos_emb", "norm_type", "verbose")
    attention = Fields(fields.take("attn_config", dict, {}), f"{fields.path}: attn_config")
    attention.expect(attn_type="multihead_attention", clip_qkv=None, softmax_scale=None, qk_ln=False, alibi=True)
    attention.expect(prefix_lm=False, attn_uses_sequence_id=False, alibi_bias_max=8)
    attention.ignore("attn_impl")
    attention.finish()
    model = widths(fields, "d_model", "n_heads") | {
        "num_layers": fields.count("n_layers"),
        "activation": "gelu_exact",
        "norm": "layer",
        "norm_eps": fields.take("layer_norm_epsilon", float, 1e-5),
        "tied_embeddings": fields.take("tie_word_embeddings", bool, True),
        "scale_embeddings": False,
    }
    model["d_ff"] = 4 * model["d_model"]
    return Architecture(model, {"name": "alibi"}, fields.count("max_seq_len", 2048), fields.count("vocab_size"))


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    yield same("transformer.wte.weight", "embedding")
    for i in range(architecture.model["num_layers"]):
        theirs, ours = f"transformer.blocks.{i}", f"block_{i}"
        yield from layer_norm(f"{theirs}.norm_1", f"{ours}/attention_norm", False)
        fused = tuple(f"{ours}/attention/{part}/kernel" for part in "qkv")
        yield concatenated(f"{theirs}.attn.Wqkv.weight", fused, 0, transpose=True)
        yield from linear(f"{theirs}.attn.out_proj", f"{ours}/attention/out", False)
        yield from layer_norm(f"{theirs}.norm_2", f"{ours}/feed_forward_norm", False)
        yield from linear(f"{theirs}.ffn.up_proj", f"{ours}/feed_forward/up", False)
        yield from linear(f"{theirs}.ffn.down_proj", f"{ours}/feed_forward/down", False)
    yield from layer_norm("transformer.norm_f", "norm", False)
    if not architecture.model["tied_embeddings"]:
        yield from linear("lm_head", "unembedding", False)


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    model, exponent = check_widths(architecture.model), architecture.encoding.get("max_exponent", 8.0)
    if exponent != 8:
        raise ConfigError("config.encoding.max_exponent", exponent, "must be 8, which transformers always takes")
    return {
        "vocab_size": architecture.vocab_size,
        "max_seq_len": architecture.pretrained_length,
        "d_model": model["d_model"],
        "n_layers": model["num_layers"],
        "n_heads": model["num_heads"],
        "layer_norm_epsilon": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
        "attn_config": {"alibi": True, "alibi_bias_max": 8},
    }
