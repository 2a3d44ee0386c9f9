"""A plain PyTorch decoder of our shape: RoPE, RMSNorm, GELU, tied embeddings, PyTorch's fused attention, no biases."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, gelu, linear, rms_norm, scaled_dot_product_attention


class Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ParameterList(torch.ones(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        norms = [norm.to(x.dtype) for norm in self.norms]
        qkv = self.qkv(rms_norm(x, (width,), norms[0]))
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(gelu(self.up(rms_norm(x, (width,), norms[1])), approximate="tanh"))


class Decoder(nn.Module):
    """Returns the mean cross-entropy in nats per token of windows [B, T + 1], without the first token."""

    def __init__(self, vocab_size: int, layers: int, width: int, heads: int, length: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab_size, width) / width**0.5)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.Parameter(torch.ones(width))
        pairs = torch.arange(0, width // heads, 2) / (width // heads)
        angles = torch.arange(length)[:, None] * 10000.0**-pairs
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, dim=-1))
        self.register_buffer("sin", torch.cat([-angles.sin(), angles.sin()], dim=-1))

    def forward(self, tokens: Tensor) -> Tensor:
        width = self.embedding.shape[1]
        x = embedding(tokens[:, :-1], self.embedding) * width**0.5
        if torch.is_autocast_enabled(x.device.type):  # as in our model, activations between layers are cast, too
            x = x.to(torch.get_autocast_dtype(x.device.type))
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = linear(rms_norm(x, (width,), self.norm.to(x.dtype)), self.embedding)
        return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of channels of x [B, H, T, d] by its angle."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)
