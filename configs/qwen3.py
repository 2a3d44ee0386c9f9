"""A decoder like Qwen3: grouped queries, normalized queries and keys, SwiGLU, RMSNorm, and RoPE with base 10^6.

python launch.py --config=configs/qwen3.py                         the width of the other recipes, for a laptop
python launch.py --config=configs/qwen3.py:size=0.6B               Qwen3-0.6B's shape, for an accelerator
python launch.py --config=configs/qwen3.py:size=smoke              less than a minute, to try everything

Qwen3-0.6B: 28 layers of width 1024, 16 query heads and 8 key heads of width 128, feed-forward width 3072, tied
embeddings, 151,936 tokens. Source: Qwen3 technical report (Yang et al. 2025) and the released configuration.
"""

from ml_collections import ConfigDict

from configs import base, rope_extrap


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(argument, size=("default", "smoke", "0.6B"))
    config = rope_extrap.get_config("size=" + {"0.6B": "base"}.get(chosen["size"], chosen["size"]))
    config.name, model = config.name.replace("rope_extrap", "qwen3"), config.model
    model.qk_norm, model.activation = True, "swiglu"
    model.num_kv_heads = model.num_heads // 2
    config.encoding.base = 1e6
    if chosen["size"] == "0.6B":
        config.data.vocab_size = 151936
        model.num_layers, model.d_model, model.d_ff = 28, 1024, 3072
        model.num_heads, model.num_kv_heads, model.head_dim = 16, 8, 128
    return config
