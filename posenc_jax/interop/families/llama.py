"""Llama 2 and 3, SmolLM2 (a Llama), SmolLM3, Qwen2 and Qwen3: RoPE, RMSNorm, SwiGLU and grouped queries.

Qwen2 has biases of queries, keys and values. Qwen3 normalizes queries and keys. SmolLM3 has layers without RoPE: its
`no_rope_layers` is 1 for layers with RoPE. Source: Hugging Face transformers, whose defaults stand for absent fields.
"""

from collections.abc import Iterator
from typing import Any

from posenc_jax.interop import family, rope_scaling
from posenc_jax.interop.family import Architecture, Names, Tensor, linear, same
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.writing import check_widths, layer_types, theirs, windowed, write_rope

NAMES = Names(
    prefix="model.", copies=(("lm_head.weight", "model.embed_tokens.weight"),), unused=(".rotary_emb.inv_freq",)
)
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
WITHOUT_ROPE_EVERY, SMOLLM3_BASE = 4, 2e6
WINDOW, FIRST_WINDOW = 4096, 28  # tokens, and the first layer with a window, in Qwen
QWEN3_HEAD_DIM = 128


def read(fields: Fields) -> Architecture:
    kind = fields.take("model_type", str)
    heads, width = fields.count("num_attention_heads"), fields.count("hidden_size")
    head_dim = fields.count("head_dim", QWEN3_HEAD_DIM if kind == "qwen3" else max(1, width // heads))
    if "head_dim" not in fields and width % heads:
        raise fields.error("num_attention_heads", heads, f"must divide hidden_size = {width}")
    shared = {"default": heads} if kind == "llama" else {}
    own = {
        "attention_bias": kind != "qwen2" and fields.take("attention_bias", bool, False),
        "mlp_bias": kind in ("llama", "smollm3") and fields.take("mlp_bias", bool, False),
    }
    model: dict[str, Any] = {
        "num_layers": fields.count("num_hidden_layers"),
        "d_model": width,
        "num_heads": heads,
        "num_kv_heads": fields.count("num_key_value_heads", **shared, null=heads),
        "head_dim": head_dim,
        "d_ff": fields.count("intermediate_size"),
        "activation": fields.choose("hidden_act", ACTIVATIONS, "silu"),
        "norm_eps": fields.take("rms_norm_eps", float, 1e-6),
        "qk_norm": kind == "qwen3",
        "tied_embeddings": fields.take("tie_word_embeddings", bool, kind == "smollm3"),
        "scale_embeddings": False,
        "qkv_bias": kind == "qwen2",
        "use_bias": any(own.values()),
    }
    if kind != "llama":
        model |= _layers(fields, model["num_layers"], kind)
    rope = rope_scaling.read(fields, head_dim, base=SMOLLM3_BASE if kind == "smollm3" else 10000.0)
    encoding = {"name": "rope"} | rope.settings
    if model.get("pattern") == "N":
        model["pattern"], encoding = "E", {"name": "none"}
    return Architecture(model, encoding, rope.pretrained_length, fields.count("vocab_size"), own)


def _layers(fields: Fields, num_layers: int, kind: str) -> dict[str, Any]:
    """The pattern of layers, and the window of those that have one."""
    allowed, encoded = fields.take("use_sliding_window", bool, False), [True] * num_layers
    if kind == "smollm3":
        every = fields.count("no_rope_layer_interval", WITHOUT_ROPE_EVERY)
        given = fields.take("no_rope_layers", list, [int((i + 1) % every != 0) for i in range(num_layers)])
        if len(given) != num_layers or any(x not in (0, 1) for x in given):
            raise fields.error("no_rope_layers", given, f"must be 0 or 1 for each of {num_layers} layers")
        encoded = [x == 1 for x in given]
        default = [allowed and "sliding_window" in fields and not x for x in encoded]
    else:
        first = fields.take("max_window_layers", int, FIRST_WINDOW)
        default = [allowed and i >= first for i in range(num_layers)]
    windowed = family.layer_windows(fields, default)
    if any(windowed) and not allowed:
        raise fields.error("use_sliding_window", allowed, "must be true, as layer_types has sliding_attention")
    if any(window and not own for window, own in zip(windowed, encoded, strict=True)):
        raise fields.error("use_sliding_window", allowed, "must be false, as layers without RoPE would have a window")
    width = {"default": WINDOW} if kind != "smollm3" else {}
    window = fields.count("sliding_window", **width) if any(windowed) else 0
    fields.ignore("sliding_window")
    return {"pattern": family.layer_pattern(windowed, encoded), "window": window}


def tensors(architecture: Architecture) -> Iterator[Tensor]:
    model = architecture.model
    attention, mlp = (architecture.own.get(name, model["use_bias"]) for name in ("attention_bias", "mlp_bias"))
    yield same("model.embed_tokens.weight", "embedding")
    for i in range(model["num_layers"]):
        theirs, ours = f"model.layers.{i}", f"block_{i}"
        yield same(f"{theirs}.input_layernorm.weight", f"{ours}/attention_norm/scale")
        for name in "qkv":
            stored = attention or model["qkv_bias"]
            yield from linear(f"{theirs}.self_attn.{name}_proj", f"{ours}/attention/{name}", stored, model["use_bias"])
        yield from linear(f"{theirs}.self_attn.o_proj", f"{ours}/attention/out", attention, model["use_bias"])
        if model["qk_norm"]:
            yield same(f"{theirs}.self_attn.q_norm.weight", f"{ours}/attention/q_norm/scale")
            yield same(f"{theirs}.self_attn.k_norm.weight", f"{ours}/attention/k_norm/scale")
        yield same(f"{theirs}.post_attention_layernorm.weight", f"{ours}/feed_forward_norm/scale")
        for name in ("gate", "up", "down"):
            yield from linear(f"{theirs}.mlp.{name}_proj", f"{ours}/feed_forward/{name}", mlp, model["use_bias"])
    yield same("model.norm.weight", "norm/scale")
    if not model["tied_embeddings"]:
        yield from linear("lm_head", "unembedding", False)


def write(architecture: Architecture, model_type: str) -> dict[str, Any]:
    model = check_widths(architecture.model) if model_type == "llama" else architecture.model
    fields: dict[str, Any] = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": model["d_model"],
        "num_hidden_layers": model["num_layers"],
        "num_attention_heads": model["num_heads"],
        "num_key_value_heads": model["num_kv_heads"],
        "head_dim": model["head_dim"],
        "intermediate_size": model["d_ff"],
        "hidden_act": theirs(ACTIVATIONS, model["activation"]),
        "rms_norm_eps": model["norm_eps"],
        "tie_word_embeddings": model["tied_embeddings"],
        **write_rope(architecture),
    }
    if model_type != "qwen2":
        fields["attention_bias"] = model["use_bias"] or model["qkv_bias"]
    if model_type in ("llama", "smollm3"):
        fields["mlp_bias"] = model["use_bias"]
    if model_type == "smollm3":
        without = architecture.encoding["name"] == "none"
        fields["no_rope_layers"] = [int(letter != "N" and not without) for letter in model["pattern"]]
    if model_type != "llama":
        fields |= {"use_sliding_window": any(windowed(architecture)), "sliding_window": model["window"] or None}
        fields["layer_types"] = layer_types(architecture)
    return fields
