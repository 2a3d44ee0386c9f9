"""Llama 2 and 3, SmolLM2 (a Llama), SmolLM3, Qwen2 and Qwen3: RoPE, RMSNorm, SwiGLU and grouped queries.

Qwen2 has biases of queries, keys and values. Qwen3 normalizes queries and keys. SmolLM3 has layers without RoPE: its
`no_rope_layers` is 1 for layers with RoPE. Source: Hugging Face transformers, whose defaults stand for absent fields.
"""

from collections.abc import Iterator
from typing import Any

from posenc_jax.interop.family import Architecture, Tensor, linear, period, same
from posenc_jax.interop.fields import Fields

WITHOUT_ROPE_EVERY = 4  # layers of SmolLM3


def read(fields: Fields) -> Architecture:
    kind = fields.take("model_type", str)
    heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    model: dict[str, Any] = {
        "num_layers": fields.count("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": fields.count("num_key_value_heads", heads),
        "head_dim": fields.count("head_dim", width // heads),
        "d_ff": fields.count("intermediate_size"),
        "activation": fields.choose("hidden_act", {"silu": "swiglu"}, "silu"),
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "qk_norm": kind == "qwen3",
        "tied_embeddings": fields.take("tie_word_embeddings", bool, kind == "smollm3"),
        "scale_embeddings": False,
        "qkv_bias": kind == "qwen2",
    }
    if kind != "qwen2":  # one flag for all four projections; feed-forward biases that are absent are zeros
        model["use_bias"] = fields.take("attention_bias", bool, False)
    if kind in ("llama", "smollm3"):
        model["use_bias"] |= fields.take("mlp_bias", bool, False)
    model |= layers(fields, model["num_layers"], kind)
    encoding, length = rope(fields)
    return Architecture(model, encoding, length, fields.count("vocab_size"))


def layers(fields: Fields, num_layers: int, kind: str) -> dict[str, Any]:
    """The pattern of layers, and the window of those that have one."""
    windowed = fields.take("use_sliding_window", bool, False)
    window = fields.count("sliding_window") if windowed else 0
    fields.take("sliding_window", int, 0)
    full = "full_attention"
    given = fields.take("layer_types", list, None)
    if given is None:
        first = fields.take("max_window_layers", int, 0) if windowed else num_layers
        given = [full if i < first else "sliding_attention" for i in range(num_layers)]
    known = {full: "G" if windowed else "E", "sliding_attention": "E"}
    letters = "".join(known.get(kind, "?") for kind in given)
    if "?" in letters or len(letters) != num_layers or (not windowed and set(given) != {full}):
        raise fields.error("layer_types", given, f"must be full_attention or sliding_attention for {num_layers} layers")
    if kind == "smollm3":
        every = fields.count("no_rope_layer_interval", WITHOUT_ROPE_EVERY)
        default = [int((i + 1) % every != 0) for i in range(num_layers)]
        rotated = fields.take("no_rope_layers", list, default)
        if len(rotated) != num_layers or not set(rotated) <= {0, 1}:
            raise fields.error("no_rope_layers", rotated, f"must be 0 or 1 for each of {num_layers} layers")
        letters = "".join(letter if own else "N" for letter, own in zip(letters, rotated, strict=True))
        if any(a == "sliding_attention" and b == "N" for a, b in zip(given, letters, strict=True)):
            raise fields.error("no_rope_layers", rotated, "must be 1 in layers of sliding_attention")
    return {"pattern": period(letters), "window": window}


def rope(fields: Fields) -> tuple[dict[str, Any], int]:
    """The encoding, and the context of the first training in tokens."""
    fields.expect(rope_scaling=None)
    rope = fields.take("rope_parameters", dict, {})
    base = rope.get("rope_theta", fields.take("rope_theta", float, 10000.0))
    return {"name": "rope", "base": base, "pairing": "half"}, fields.count("max_position_embeddings")


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    model = architecture.model
    yield same("model.embed_tokens.weight", "embedding")
    for i in range(model["num_layers"]):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield same(f"{theirs}.input_layernorm.weight", f"{ours}/attention_norm/scale")
        for name in "qkv":
            bias = model["use_bias"] or model["qkv_bias"]
            yield from linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/attention/{name}", bias)
        yield from linear(f"{theirs}.self_attn.o_proj", f"{ours}/attention/out", model["use_bias"])
        if model["qk_norm"]:
            yield same(f"{theirs}.self_attn.q_norm.weight", f"{ours}/attention/q_norm/scale")
            yield same(f"{theirs}.self_attn.k_norm.weight", f"{ours}/attention/k_norm/scale")
        yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")
        for name in ("gate", "up", "down"):
            yield from linear(f"{theirs}.mlp.{name}_proj", f"{ours}/feed_forward/{name}", model["use_bias"])
    yield same("model.norm.weight", "norm/scale")
    if not model["tied_embeddings"]:
        yield from linear("lm_head", "unembedding", False)
