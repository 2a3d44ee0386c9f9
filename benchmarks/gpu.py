"""Benchmarks for one GPU: training against PyTorch, attention biases against RoPE, stacked against separate runs.

    pip install torch && python -m benchmarks.gpu                  a few minutes on an H100 or H200
    python -m benchmarks.gpu encodings members                     only these parts
    python -m benchmarks.gpu --quick                               tiny sizes on any device, to check that all works

- training: RoPE in bfloat16 at 124 M and 350 M parameters, with contexts of 1,024 and 8,192 tokens. Compares tokens/s
  and model FLOPs utilization (MFU, with the count of `posenc_jax.training.flops`) with a compiled PyTorch decoder of
  the same shape that uses PyTorch's fused attention. The two run in alternating blocks.
- encodings: the training step of ALiBi, T5, FIRE and FoX relative to that of RoPE, at 124 M parameters.
- members: 24 runs of the smoke size (8 RoPE bases x 3 seeds), stacked in one program and one by one.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # of the GPU memory; the rest is for PyTorch

import jax
import torch
from ml_collections import ConfigDict

from benchmarks import members
from benchmarks.alternate import alternate
from benchmarks.step import training_step
from benchmarks.tables import show, write
from benchmarks.torch_decoder import Decoder
from configs import base
from posenc_jax import command
from posenc_jax.config import RunConfig
from posenc_jax.training import flops


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocab_size: int = 50257


SMALL, MEDIUM = (12, 768, 12), (24, 1024, 16)  # the sizes of GPT-2 with 124 M and 350 M parameters
SHAPES = (Shape(*SMALL, 1024, 32), Shape(*SMALL, 8192, 4), Shape(*MEDIUM, 1024, 16), Shape(*MEDIUM, 8192, 2))
TINY = (Shape(1, 32, 2, 32, 2, vocab_size=256),)


def training(*, quick: bool) -> Iterator[dict[str, Any]]:
    for shape in TINY if quick else SHAPES:
        recipe = recipe_of(shape, "rope")
        ours = training_step(recipe)
        ours.run()
        times = alternate({"ours": ours.run, "torch": torch_step(shape, compiled=not quick)}, **repeats(quick))
        needed = flops.per_token(RunConfig.from_mapping(recipe.to_dict()))
        peak = flops.peak(jax.devices()[0].device_kind, 1)
        for name, own in times.items():
            speed = shape.batch * shape.context / min(own.wall)
            yield {
                "program": name,
                "parameters": ours.parameters,
                "context": shape.context,
                "batch": shape.batch,
                "tokens_per_second": round(speed),
                "mfu": "" if peak is None else round(speed * needed / peak, 3),
                "ours_faster_by": round(own.relative_to(times["ours"]), 2),
            }


def encodings(*, quick: bool) -> Iterator[dict[str, Any]]:
    shape = TINY[0] if quick else SHAPES[0]
    rope = training_step(recipe_of(shape, "rope"))
    rope.run()
    for name in ("alibi", "t5", "fire", "fox"):
        own = training_step(recipe_of(shape, name))
        own.run()
        times = alternate({"rope": rope.run, name: own.run}, **repeats(quick))
        yield {
            "encoding": name,
            "context": shape.context,
            "step_time_to_rope": round(times[name].relative_to(times["rope"]), 3),
            "temporary_mib": round(own.temporary_bytes / 2**20),
        }


def repeats(quick: bool) -> dict[str, int]:
    return {"blocks": 1, "calls": 1} if quick else {"blocks": 5, "calls": 4}


def recipe_of(shape: Shape, encoding: str) -> ConfigDict:
    recipe = base.get_config()
    recipe.encoding = base.encoding(encoding)
    recipe.data.tokenizer, recipe.data.vocab_size = "bpe", shape.vocab_size
    recipe.training.length, recipe.training.batch_size = shape.context, shape.batch
    recipe.evaluation.tail = 2
    model = recipe.model
    model.num_layers, model.d_model, model.d_ff = shape.layers, shape.width, 4 * shape.width
    model.num_heads, model.num_kv_heads, model.head_dim = shape.heads, shape.heads, shape.width // shape.heads
    model.activation, model.dtype = "gelu", "bfloat16"
    return recipe


def torch_step(shape: Shape, *, compiled: bool) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = Decoder(shape.vocab_size, shape.layers, shape.width, shape.heads, shape.context).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    forward = torch.compile(model) if compiled else model
    tokens = torch.randint(shape.vocab_size, (shape.batch, shape.context + 1), device=device)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = forward(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()  # synchronizes after every step, as our step does

    step()
    return step


PARTS = {"training": training, "encodings": encodings, "members": members.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--output", type=Path, help="folder of the CSV files")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; must be one of: {', '.join(PARTS)}")
    if len(jax.devices()) > 1:
        parser.error(f"must run on one device, but {len(jax.devices())} are visible; set CUDA_VISIBLE_DEVICES=0")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, torch {torch.__version__}")
    for part in args.parts or PARTS:
        print(f"\n{part}", flush=True)
        measured = show(PARTS[part](quick=args.quick))
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            write(args.output / f"{part}.csv", measured)


if __name__ == "__main__":
    command.run(main)
