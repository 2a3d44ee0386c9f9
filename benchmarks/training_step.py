"""Compares training speed with x-transformers in PyTorch at the same shape, in alternating blocks in one process.

    pip install -r requirements-dev.txt && python -m benchmarks.training_step
    python -m benchmarks.training_step --layers=10 --width=512 --heads=8 --context=1024 --batch=2

All peers train a decoder of the same shape with rotary positions, RMSNorm, GELU, tied embeddings and AdamW. A step goes
from tokens to updated parameters. Ours runs in float32. PyTorch uses fused attention and fused AdamW, and runs:

- in float32, eager;
- in float32, compiled;
- compiled with bfloat16 autocast, if the CPU supports bfloat16 (otherwise a step takes minutes).

Columns for each peer: tokens/s by wall-clock time and CPU seconds per 1,000 tokens, both in the best block; seconds
until the first step is complete; the loss after the last step (the random tokens are memorized); how many times faster
ours is (median over blocks); and the load average, which shows how busy the machine was.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from x_transformers import Decoder, TransformerWrapper

from benchmarks.alternate import alternate, load_average
from benchmarks.step import training_step
from benchmarks.tables import show
from configs import base
from posenc_jax import command
from posenc_jax.distributed import sharding
from posenc_jax.distributed.environment import keep_freed_memory

OURS = "posenc_jax"


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of a batch: `batch` windows of `context` tokens."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 256
    batch: int = 16


SHAPES = (  # models of 3.2 M and 31.6 M parameters
    Shape(),
    Shape(context=1024, batch=4),
    Shape(layers=10, width=512, heads=8, batch=8),
    Shape(layers=10, width=512, heads=8, context=1024, batch=2),
)
TINY = (Shape(layers=1, width=32, heads=1, context=16, batch=2),)


def rows(*, quick: bool) -> Iterator[dict[str, Any]]:
    """The comparison at every shape."""
    for shape in TINY if quick else SHAPES:
        yield from compare(shape, blocks=2 if quick else 5, steps=2, compiled=not quick)


def compare(shape: Shape, *, blocks: int, steps: int, compiled: bool = True) -> Iterator[dict[str, Any]]:
    """A row for each peer. `compiled` includes the compiled PyTorch peers. A block has `steps` steps."""
    tokens = np.random.default_rng(0).integers(0, 256, (shape.batch, shape.context + 1))
    peers = {OURS: lambda: ours(shape), "torch, eager": lambda: theirs(shape, tokens)}
    if compiled:
        peers["torch, compiled"] = lambda: theirs(shape, tokens, compiled=True)
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            peers["torch, compiled, bfloat16"] = lambda: theirs(shape, tokens, compiled=True, bfloat16=True)
    built, first = {}, {}
    for name, build in peers.items():
        begun = time.perf_counter()
        built[name] = build()
        built[name][1]()
        first[name] = time.perf_counter() - begun
    times = alternate({name: step for name, (_, step) in built.items()}, blocks=blocks, calls=steps)
    count = shape.batch * shape.context
    for name, (parameters, step) in built.items():
        yield {
            "peer": name,
            "parameters": parameters,
            "context": shape.context,
            "batch": shape.batch,
            "tokens_per_second": round(count / min(times[name].wall)),
            "processor_seconds_per_1k_tokens": round(1000 * min(times[name].processor) / count, 4),
            "first_step_seconds": round(first[name], 1),
            "loss": round(step(), 3),
            "ours_faster_by": round(times[name].relative_to(times[OURS]), 2),
            "load_average": load_average(),
        }


def ours(shape: Shape) -> tuple[int, Callable[[], float]]:
    """The number of parameters, and a function that runs a training step and returns the loss."""
    recipe = base.get_config()
    recipe.training.length, recipe.training.batch_size = shape.context, shape.batch
    recipe.evaluation.tail = 2
    model = recipe.model
    model.num_layers, model.d_model, model.d_ff = shape.layers, shape.width, 4 * shape.width
    model.num_heads, model.num_kv_heads, model.head_dim = shape.heads, shape.heads, shape.width // shape.heads
    model.activation = "gelu"
    step = training_step(recipe)
    return step.parameters, step.run


def theirs(
    shape: Shape, tokens: np.ndarray, *, compiled: bool = False, bfloat16: bool = False
) -> tuple[int, Callable[[], float]]:
    torch.manual_seed(0)
    head_dim = shape.width // shape.heads
    layers = Decoder(
        dim=shape.width,
        depth=shape.layers,
        heads=shape.heads,
        attn_dim_head=head_dim,
        rotary_pos_emb=True,
        rotary_emb_dim=head_dim,
        use_rmsnorm=True,
        attn_flash=True,
    )
    model = TransformerWrapper(
        num_tokens=256, max_seq_len=shape.context, use_abs_pos_emb=False, tie_embedding=True, attn_layers=layers
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    forward = torch.compile(model) if compiled else model
    batch = torch.from_numpy(tokens)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = forward(batch[:, :-1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return sum(p.numel() for p in model.parameters()), step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name}", type=command.count, default=default)
    parser.add_argument("--blocks", type=command.count, default=5)
    parser.add_argument("--steps", type=command.count, default=4, help="steps in a block")
    args = vars(parser.parse_args())
    blocks, steps = args.pop("blocks"), args.pop("steps")
    keep_freed_memory()  # as in launch.py; all peers benefit
    sharding.divide_cpu(base.get_config().training.cpu_devices, args["batch"])  # as in launch.py
    show(compare(Shape(**args), blocks=blocks, steps=steps))
    print(f"jax {jax.__version__}, torch {torch.__version__}, {os.cpu_count()} cores")


if __name__ == "__main__":
    command.run(main)
