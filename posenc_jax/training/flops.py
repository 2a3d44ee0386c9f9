"""Model FLOPs: what a training step must compute, for FLOP/s and for the share of a device's peak (MFU)."""

from posenc_jax.config import RunConfig, TransformerConfig

# Dense bfloat16 FLOP/s of a device by JAX's name for its kind. NVIDIA's data sheets give H100, H200, A100, L4 and RTX
# 4090 (accumulating in float32), those with sparsity halved; T4 and V100, which have no bfloat16, are float16.
# Google's pages on TPU versions give a chip, which is a device from v4 on.
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "Tesla T4": 65e12,
    "Tesla V100-SXM2-16GB": 125e12,
    "Tesla V100-SXM2-32GB": 125e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}

# the number of matrices of a recurrent cell over the input; it has as many over the state
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def peak(device_kind: str, devices: int) -> float | None:
    """The peak FLOP/s of these devices. None for a kind that is not in the table, such as a CPU."""
    return devices * PEAK[device_kind] if device_kind in PEAK else None


def per_token(config: RunConfig) -> float:
    """Model FLOPs of a training step, per token: forward, and twice that backward.

    Counted are products of matrices, at 2 FLOPs per multiplication and addition: with those of every layer and of the
    output layer (6 FLOPs per parameter in all; Kaplan et al. 2020, section 2.1), and in attention the logits and the
    sums of values, over the pairs that the mask leaves: (T + 1) / 2 keys for a token of a causal model on average, and
    fewer with a window. Not counted are embeddings, norms and activations, what is computed anew to save memory, and
    what an encoding does: encodings compare by one number, and a costly one has the lower MFU.
    """
    model, D, output = config.model, config.model.d_model, config.data.vocab_size * config.model.d_model
    if not isinstance(model, TransformerConfig):
        stacks, cell = (2, "lstm") if model.architecture == "elmo" else (1, model.architecture)
        return 6 * stacks * (model.num_layers * GATES[cell] * 2 * D * D + output)
    heads, width = model.num_heads, model.head_dim
    attention = 2 * D * width * (heads + model.num_kv_heads)
    feed_forward = (3 if model.activation == "swiglu" else 2) * D * model.d_ff
    head = 0 if model.causal else D * D
    products = sum(2 * heads * width * _keys(config, layer) for layer in range(model.num_layers))
    return 6 * (model.num_layers * (attention + feed_forward) + head + output + products)


def _keys(config: RunConfig, layer: int) -> float:
    """The mean number of keys that a token sees in a layer, at the training length."""
    model, T = config.model, config.training.length
    assert isinstance(model, TransformerConfig)
    if not model.causal:
        return T
    windowed = model.window and model.pattern[layer % len(model.pattern)] == "E"
    w = min(model.window, T) if windowed else T
    return w - w * (w - 1) / (2 * T)
