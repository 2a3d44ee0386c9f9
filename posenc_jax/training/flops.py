"""Model FLOPs of a training step, for FLOP/s and for the model FLOPs utilization (MFU) of a device."""

from posenc_jax import encodings
from posenc_jax.config import RunConfig, TransformerConfig

# Dense bfloat16 peak FLOP/s of a device, by JAX's name of the device kind. Source for GPUs: NVIDIA's data sheets, with
# values for sparsity halved. The value of RTX 4090 is for float32 accumulation. T4 and V100 have no bfloat16, so their
# values are for float16. Source for TPUs: Google's pages on TPU versions, per chip. From v4 on, one chip is one device.
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

# the number of input matrices of a recurrent cell; it has the same number of state matrices
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def peak(device_kind: str, devices: int) -> float | None:
    """The total peak FLOP/s of these devices. None for a kind that is not in the table, such as a CPU."""
    return devices * PEAK[device_kind] if device_kind in PEAK else None


def per_token(config: RunConfig) -> float:
    """Model FLOPs of a training step, per token. The backward pass counts as twice the forward pass.

    Only matrix products are counted, at 2 FLOPs per multiplication and addition:

    - Matrices of every layer and of the output layer: 6 FLOPs per parameter in total (Kaplan et al. 2020, section 2.1).
    - Attention: the logits and the weighted sums of values, over the pairs that the mask keeps. In a causal model, a
      token has (T + 1) / 2 keys on average, and fewer with a window.

    Embeddings, norms, activations, recomputation and the work of an encoding are not counted. All encodings with the
    same number of attention heads thus have the same model FLOPs, and a costly encoding has a lower MFU.
    """
    model, D, output = config.model, config.model.d_model, config.vocab_size * config.model.d_model
    if not isinstance(model, TransformerConfig):
        stacks, cell = (2, "lstm") if model.architecture == "elmo" else (1, model.architecture)
        return 6 * stacks * (model.num_layers * GATES[cell] * 2 * D * D + output)
    heads, width = model.num_heads, model.head_dim
    attended = [heads * encodings.load(layer.encoding.name).head_factor for layer in config.model_layers]
    outputs = 2 if model.attention_gate else 1  # matrices with the heads' outputs
    attention = D * width * sum(heads + 2 * model.num_kv_heads + outputs * own for own in attended)
    feed_forward = (3 if model.gated else 2) * D * model.d_ff
    head = 0 if model.causal else D * D
    products = sum(2 * own * width * _keys(config, layer) for layer, own in enumerate(attended))
    return 6 * (attention + model.num_layers * feed_forward + head + output + products)


def _keys(config: RunConfig, layer: int) -> float:
    """The mean number of keys that a token attends to in a layer, at the training length."""
    model, T = config.model, config.training.length
    assert isinstance(model, TransformerConfig)
    if not model.causal:
        return T
    w = min(config.model_layers[layer].window or T, T)
    return w - w * (w - 1) / (2 * T)
