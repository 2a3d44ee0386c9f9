"""Train on short contexts and evaluate on long ones: how RoPE extrapolates, unscaled and under each scaling rule.

python launch.py --config=configs/rope_extrap.py
python launch.py --config=configs/rope_extrap.py:encoding=alibi          any other encoding
python launch.py --config=configs/rope_extrap.py:size=small              about 30 M parameters, for a GPU or TPU
python launch.py --config=configs/rope_extrap.py:size=base               about 124 M, GPT-2's shape
python launch.py --config=configs/rope_extrap.py:size=smoke              less than a minute, to try everything

Expected bits per byte (`prefix`) at 1x, 2x, 4x and 8x the training length, for RoPE at the default size with one seed:
none 2.05, 2.10, 2.40, 2.88; ntk 2.05, 2.06, 2.16, 2.37; llama3 2.05, 2.06, 2.14, 2.30; linear 2.05, 3.08, 3.85, 4.24.
Other versions of Python have slightly different corpora. A run takes about 2 minutes on two cores of an x86-64 machine.
"""

from ml_collections import ConfigDict

from configs import base
from posenc_jax import encodings


def get_config(argument: str = "") -> ConfigDict:
    chosen = base.options(argument, size=("default", "smoke", "small", "base"), encoding=_names())
    config = base.get_config()
    config.name = "rope_extrap" if chosen["size"] == "default" else f"rope_extrap_{chosen['size']}"
    config.encoding = base.encoding(chosen["encoding"])
    model, training, optimizer, evaluation = config.model, config.training, config.optimizer, config.evaluation
    if chosen["size"] == "smoke":
        model.num_layers, model.d_model, model.num_heads, model.num_kv_heads, model.d_ff = 2, 64, 2, 2, 128
        model.head_dim = 32
        training.length, training.duration, training.warmup = 64, "60 steps", "10 steps"
        training.log_every, training.validate_every, training.checkpoint_every = "10 steps", "30 steps", "30 steps"
        evaluation.lengths, evaluation.windows, evaluation.tail = (32, 64, 128, 256, 512), 16, 16
        evaluation.validation_windows = 16
    elif chosen["size"] == "small":
        model.num_layers, model.d_model, model.num_heads, model.num_kv_heads, model.d_ff = 10, 512, 8, 8, 1408
        model.dtype = "bfloat16"
        training.length, training.batch_size = 1024, 64
        training.duration, training.warmup = "10000 steps", "500 steps"
        training.log_every, training.validate_every, training.checkpoint_every = "50 steps", "500 steps", "500 steps"
        optimizer.learning_rate = 1e-3
    elif chosen["size"] == "base":
        model.num_layers, model.d_model, model.num_heads, model.num_kv_heads, model.d_ff = 12, 768, 12, 12, 3072
        model.activation, model.dtype, model.remat = "gelu", "bfloat16", True
        config.data.tokenizer, config.data.vocab_size = "bpe", 50257
        training.length, training.batch_size, training.grad_accum_steps = 1024, 64, 4
        training.duration, training.warmup = "20000 steps", "700 steps"
        training.log_every, training.validate_every, training.checkpoint_every = "50 steps", "500 steps", "1000 steps"
        optimizer.learning_rate = 6e-4
    if chosen["size"] in ("small", "base"):
        evaluation.lengths, evaluation.windows, evaluation.tail = (512, 1024, 2048, 4096, 8192), 64, 128
    if "scaling" in config.encoding:
        # YaRN's published betas suit training lengths of 4096. Scaled to ours, they keep the same share of pairs.
        fast, slow = 32 * training.length / 4096, training.length / 4096
        evaluation.rope_scalings = (
            "none",
            "linear",
            "ntk",
            "dynamic_ntk",
            "by_parts",
            "yarn",
            f"yarn:beta_fast={fast:g},beta_slow={slow:g}",
            "llama3",
        )
    return config


def _names() -> tuple[str, ...]:
    """All encodings. RoPE is the first and the default."""
    return "rope", *(name for name in encodings.names() if name != "rope")
