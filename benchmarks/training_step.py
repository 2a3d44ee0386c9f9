"""Training speed beside x-transformers in PyTorch, the same shape, in alternating runs on one machine.

    pip install -r requirements-dev.txt && python -m benchmarks.training_step
    python -m benchmarks.training_step --width=128 --heads=2 --context=1024 --batch=4 --encoding=alibi

Both train a decoder of the same shape with rotary positions (or --encoding), RMSNorm, GELU, tied embeddings, float32
and AdamW, from tokens to updated parameters; PyTorch with fused attention and AdamW, compiled and eager. Printed per
peer: tokens/s in the best block (wall clock), processor seconds per 1,000 tokens, and seconds to the end of the first
step. Wall clock means little on a busy machine: the load average is printed with it.
"""

import argparse
import math
import os
import resource
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from x_transformers import Decoder, TransformerWrapper

from configs import base
from posenc_jax.allocator import keep_freed_memory
from posenc_jax.config import RunConfig
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training import sharding
from posenc_jax.training.step import abstract_model, initial_state, make_train_step

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 4), ("width", 256), ("heads", 4), ("context", 256), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--encoding", default="rope")
    parser.add_argument("--blocks", type=int, default=6, help="alternating blocks of steps, of which the best counts")
    parser.add_argument("--steps", type=int, default=4, help="steps in a block")
    args = parser.parse_args()
    keep_freed_memory()  # as launch.py does; serves all peers here
    sharding.divide_cpu(base.get_config().training.cpu_devices, args.batch)  # as it does too
    tokens = np.random.default_rng(0).integers(0, 256, (args.batch, args.context + 1))

    peers, first = {}, {}
    for name, build in {
        "posenc_jax": ours,
        "torch, compiled": lambda args, tokens: theirs(args, tokens, compiled=True),
        "torch, eager": lambda args, tokens: theirs(args, tokens, compiled=False),
    }.items():
        begun = time.monotonic()
        peers[name] = build(args, tokens)
        peers[name]()
        first[name] = time.monotonic() - begun

    wall = dict.fromkeys(peers, math.inf)
    processor = dict.fromkeys(peers, math.inf)
    for _ in range(args.blocks):
        for name, step in peers.items():
            begun, used = time.monotonic(), processor_seconds()
            for _ in range(args.steps):
                step()
            wall[name] = min(wall[name], time.monotonic() - begun)
            processor[name] = min(processor[name], processor_seconds() - used)

    count = args.steps * args.batch * args.context
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"{'':16} {'tokens/s':>10} {'CPU s/1k tokens':>16} {'first step s':>13} {'ours is faster by':>18}")
    for name in peers:
        ratio = wall[name] / wall["posenc_jax"]
        speed, used = count / wall[name], 1000 * processor[name] / count
        print(f"{name:16} {speed:10,.0f} {used:16.4f} {first[name]:13.1f} {ratio:17.2f}x")


def ours(args: argparse.Namespace, tokens: np.ndarray) -> Step:
    recipe = base.get_config()
    recipe.encoding = base.encoding(args.encoding)
    recipe.training.length, recipe.training.batch_size = args.context, args.batch
    recipe.evaluation.tail = 2
    recipe.evaluation.lengths = (args.context,)
    model = recipe.model
    model.num_layers, model.d_model, model.d_ff, model.activation = args.layers, args.width, 4 * args.width, "gelu"
    model.num_heads, model.num_kv_heads, model.head_dim = args.heads, args.heads, args.width // args.heads
    config = RunConfig.from_mapping(recipe.to_dict())
    graphdef, parameters = abstract_model(config)
    print(f"posenc_jax: {parameters:,} parameters, jax {jax.__version__}")
    optimizer = optimizers.build(config.optimizer, total_steps=1000, warmup_steps=10)
    share = optimizers.schedule(config.optimizer, total_steps=1000, warmup_steps=10)
    train_step = jax.jit(
        make_train_step(config, graphdef, optimizer, share, jnp.ones(256, jnp.int32)), donate_argnums=0
    )
    mesh = sharding.make_mesh(args.batch)
    state = sharding.replicate(initial_state(config, optimizer), mesh)
    batch = sharding.shard_rows(tokens.astype(np.int32), mesh)

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, batch)
        jax.block_until_ready(metrics)

    return step


def theirs(args: argparse.Namespace, tokens: np.ndarray, *, compiled: bool) -> Step:
    torch.manual_seed(0)
    layers = Decoder(
        dim=args.width,
        depth=args.layers,
        heads=args.heads,
        attn_dim_head=args.width // args.heads,
        rotary_pos_emb=True,
        rotary_emb_dim=args.width // args.heads,
        use_rmsnorm=True,
        attn_flash=True,
    )
    model = TransformerWrapper(
        num_tokens=256, max_seq_len=args.context, use_abs_pos_emb=False, tie_embedding=True, attn_layers=layers
    )
    print(f"x-transformers: {sum(p.numel() for p in model.parameters()):,} parameters, torch {torch.__version__}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    forward = torch.compile(model) if compiled else model
    batch = torch.from_numpy(tokens)

    def step() -> None:
        optimizer.zero_grad()
        logits = forward(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
