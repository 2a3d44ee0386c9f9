"""Gemma 1, 2 and 3 (text): RoPE, RMSNorm that multiplies by 1 + weight, GEGLU and scaled embeddings.

Gemma 2 normalizes the output of each branch too, has soft caps, and windows in every other layer. Gemma 3 normalizes
queries and keys, and its layers with a window have their own base. Both scale attention by query_pre_attn_scalar^-0.5:
here the factor to head_dim^-0.5 is part of the queries. Source: Hugging Face transformers, whose defaults stand for
absent fields.
"""

import math
from collections.abc import Iterator
from typing import Any

from posenc_jax.interop import family, rope_scaling
from posenc_jax.interop.family import Architecture, Names, Tensor, linear, rescaled, same
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.rope_scaling import ORIGINAL
from posenc_jax.interop.writing import check_widths, layer_types, windowed, write_rope

NAMES = Names(
    prefix="model.", copies=(("lm_head.weight", "model.embed_tokens.weight"),), unused=(".rotary_emb.inv_freq",)
)
TANH = "gelu_pytorch_tanh"


def read(fields: Fields) -> Architecture:
    kind, num_layers = fields.take("model_type", str), fields.count("num_hidden_layers")
    head_dim = fields.count("head_dim", 256)
    model: dict[str, Any] = {
        "num_layers": num_layers,
        "d_model": fields.count("hidden_size"),
        "num_heads": fields.count("num_attention_heads"),
        "num_kv_heads": fields.count("num_key_value_heads"),
        "head_dim": head_dim,
        "d_ff": fields.count("intermediate_size"),
        "activation": "geglu",
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "qk_norm": kind == "gemma3_text",
        "branch_norm": kind != "gemma",
        "tied_embeddings": fields.take("tie_word_embeddings", bool, True),
        "use_bias": fields.take("attention_bias", bool, False),
    }
    fields.expect(use_bidirectional_attention=False, hidden_activation=TANH)
    if kind == "gemma":
        fields.choose("hidden_act", {TANH: "", "gelu": ""}, TANH)  # its first files say gelu and mean this one
        rope = rope_scaling.read(fields, head_dim)
        return Architecture(model, {"name": "rope"} | rope.settings, rope.pretrained_length, fields.count("vocab_size"))
    fields.expect(hidden_act=TANH)
    fields.ignore("sliding_window_size", "_sliding_window_pattern")
    every = fields.count("sliding_window_pattern", 6) if kind == "gemma3_text" else 2
    windowed = family.layer_windows(fields, [(i + 1) % every != 0 for i in range(num_layers)])
    window = fields.count("sliding_window", 4096)
    model |= {"pattern": family.layer_pattern(windowed, [True] * num_layers), "window": window if any(windowed) else 0}
    capped = kind == "gemma2"
    model["logit_softcap"] = fields.take("final_logit_softcapping", float, 30.0 if capped else 0.0, 0.0)
    if capped:
        model["attention_softcap"] = fields.take("attn_logit_softcapping", float, 50.0, 0.0)
    else:
        fields.expect(attn_logit_softcapping=None)
    own = {"query_scale": math.sqrt(head_dim / fields.take("query_pre_attn_scalar", float, 256.0))}
    if capped:
        rope = rope_scaling.read(fields, head_dim)
        encoding, length = {"name": "rope"} | rope.settings, rope.pretrained_length
    else:
        encoding, length = _two_bases(fields, head_dim, any(windowed))
    return Architecture(model, encoding, length, fields.count("vocab_size"), own)


def _two_bases(fields: Fields, head_dim: int, windowed: bool) -> tuple[dict[str, Any], int]:
    """RoPE of Gemma 3, whose scaling rule does not change the layers with a window, and its context in tokens."""
    sections, path = fields.take("rope_parameters", dict, {}), f"{fields.path}: rope_parameters"
    kinds, longest = Fields(sections, path), fields.count("max_position_embeddings")
    full = kinds.take("full_attention", dict, {}) | fields.take("rope_scaling", dict, {})
    local = kinds.take("sliding_attention", dict, {})
    kinds.finish()
    base, local_base = fields.take("rope_theta", float, 1e6), fields.take("rope_local_base_freq", float, 1e4)
    rope = rope_scaling.read_section(full, f"{path}.full_attention", head_dim, longest, base=base)
    in_window = rope_scaling.read_section(local, f"{path}.sliding_attention", head_dim, longest, base=local_base)
    if windowed and (in_window.scaling, in_window.fraction) != ("none", rope.fraction):
        raise kinds.error("sliding_attention", local, "must rotate all channels, without a scaling rule")
    return {"name": "rope"} | rope.settings | {
        "window_base": in_window.base if windowed else 0.0
    }, rope.pretrained_length


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    model, scale = architecture.model, architecture.own.get("query_scale", 1.0)
    biased, qk_norm = model["use_bias"], model["qk_norm"]

    def norm(name: str, param: str, by: float = 1.0) -> Tensor:
        return rescaled(same(f"{name}.weight", f"{param}/scale"), by, 1.0)

    yield same("model.embed_tokens.weight", "embedding")
    for i in range(model["num_layers"]):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        queries = linear(f"{theirs}.self_attn.q_proj", f"{ours}/attention/q", biased)
        yield from queries if qk_norm or scale == 1 else (rescaled(tensor, scale) for tensor in queries)
        for name in "kv":
            yield from linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/attention/{name}", biased)
        if qk_norm:
            yield norm(f"{theirs}.self_attn.q_norm", f"{ours}/attention/q_norm", scale)
            yield norm(f"{theirs}.self_attn.k_norm", f"{ours}/attention/k_norm")
        yield from linear(f"{theirs}.self_attn.o_proj", f"{ours}/attention/out", biased)
        yield norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm")
        if model["branch_norm"]:
            yield norm(f"{theirs}.post_attention_layernorm", f"{ours}/attention_out_norm")
            yield norm(f"{theirs}.pre_feedforward_layernorm", f"{ours}/feed_forward_norm")
            yield norm(f"{theirs}.post_feedforward_layernorm", f"{ours}/feed_forward_out_norm")
        else:
            yield norm(f"{theirs}.post_attention_layernorm", f"{ours}/feed_forward_norm")
        for name in ("gate", "up", "down"):
            yield from linear(f"{theirs}.mlp.{name}_proj", f"{ours}/feed_forward/{name}", False, biased)
    yield norm("model.norm", "norm")
    if not model["tied_embeddings"]:
        yield from linear("lm_head", "unembedding", False)


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    encoding = architecture.encoding
    model = architecture.model if model_type == "gemma" else check_widths(architecture.model)
    fields: dict[str, Any] = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["head_dim"],
        "intermediate_size": model["d_ff"],
        "hidden_activation": TANH,
        "rms_norm_eps": model["norm_eps"],
        "attention_bias": model["use_bias"] or model["qkv_bias"],
        "tie_word_embeddings": model["tied_embeddings"],
    }
    fields |= write_rope(architecture)
    if model_type == "gemma3_text":
        fields.pop(ORIGINAL, None)  # it is in the section too
    if model_type == "gemma":
        return fields | {"hidden_act": TANH}
    fields |= {
        "query_pre_attn_scalar": model["head_dim"],
        "sliding_window": model["window"] or architecture.pretrained_length,  # transformers demands a number
        "layer_types": layer_types(architecture),
        "final_logit_softcapping": model["logit_softcap"] or None,
    }
    if model_type == "gemma2":
        return fields | {"attn_logit_softcapping": model["attention_softcap"] or None}
    base = encoding.get("window_base") or fields["rope_theta"]
    return fields | ({"rope_local_base_freq": base} if any(windowed(architecture)) else {})
