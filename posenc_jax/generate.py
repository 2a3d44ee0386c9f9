"""Continues a prompt with a trained model, and prints the text while it is generated.

python -m posenc_jax.generate runs/NAME --prompt "def main("
python -m posenc_jax.generate runs/NAME --prompt "def main(" --temperature 0.8 --top_p 0.95 --seed 1 --tokens 500
python -m posenc_jax.generate runs/NAME --prompts FILE > generated.jsonl
python -m posenc_jax.generate smollm2 --prompt "The capital of France is" --tokens 20

A file of prompts has one per line. The output is then one line of JSON per prompt, with `prompt` and `text`.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from posenc_jax import command
from posenc_jax.errors import reason
from posenc_jax.schema import ConfigError, Range
from posenc_jax.untrusted import DamagedError, printable, read_text

if TYPE_CHECKING:  # jax is imported after its environment variables are checked
    from posenc_jax.evaluation.generator import Generator


def main(arguments: list[str]) -> int | None:
    """Raises ConfigError for an invalid argument or prompt, WorkdirError and CheckpointError."""
    args = _parser().parse_args(arguments)
    prompts = {"--prompt": args.prompt} if args.prompts is None else _lines(args.prompts)
    from posenc_jax import generation
    from posenc_jax.models.sampling import Sampling

    generator = generation.load(args.model, args.rope_scaling)
    ids = [generator.encode(text, field) for field, text in prompts.items()]
    for field, own in zip(prompts, ids, strict=True):
        generator.check_length(len(own), args.tokens, field, "--tokens")
    if not generator.model.cacheable:
        note = f"note: encoding {generator.config.label!r} cannot be cached: each token computes the whole text again"
        print(note, file=sys.stderr)
    speed = _Speed()
    steps = speed.measured(generator.generate(ids, args.tokens, Sampling(args.temperature, args.top_p), args.seed))
    try:
        if args.prompts is None:
            print(printable(args.prompt), end="", flush=True)
            for text in generation.decoded(generator.bytes_of(token) for step in steps for _, token in step):
                print(printable(text), end="", flush=True)
            print(flush=True)
        else:
            _write_all(generator, list(prompts.values()), steps)
    except KeyboardInterrupt:
        print()
        return 130
    print(speed, file=sys.stderr)


def _write_all(generator: "Generator", prompts: list[str], steps: Iterator[list[tuple[int, int]]]) -> None:
    """Write each prompt with its text, when all are complete."""
    texts = [b""] * len(prompts)
    for step in steps:
        for i, token in step:
            texts[i] += generator.bytes_of(token)
    for prompt, text in zip(prompts, texts, strict=True):
        print(json.dumps({"prompt": prompt, "text": text.decode(errors="replace")}, ensure_ascii=False))


class _Speed:
    """The number of tokens and, without the time up to the first ones, their rate."""

    tokens = after_first = 0
    started = stopped = 0.0

    def measured(self, steps: Iterator[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        """The same steps, counted and timed."""
        for step in steps:
            self.stopped = time.perf_counter()
            self.started = self.started or self.stopped
            self.after_first += len(step) if self.tokens else 0
            self.tokens += len(step)
            yield step

    def __str__(self) -> str:
        seconds = self.stopped - self.started
        rate = f", {self.after_first / seconds:,.1f} per second after the first" if seconds else ""
        return f"{self.tokens} new tokens{rate}"


def _lines(path: Path) -> dict[str, str]:
    """The lines of a file, by "FILE:LINE". Raises ConfigError."""
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError("--prompts", str(path), f"cannot be read: {reason(error)}") from error
    except DamagedError as error:
        raise ConfigError("--prompts", str(path), f"must be a text file in UTF-8: {error}") from error
    lines = text.removesuffix("\n").split("\n")
    return {f"{path}:{number}": line.removesuffix("\r") for number, line in enumerate(lines, 1)}


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m posenc_jax.generate", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("model", metavar="MODEL", help="a workdir, a Hugging Face folder, a .gguf file, or smollm2")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompts", type=Path, metavar="FILE", help="a UTF-8 file with one prompt per line")
    add("--tokens", type=command.count, default=128, help="the most new tokens; default: 128")
    note = "0, the default, always chooses the most likely token"
    add("--temperature", type=command.number(Range(at_least=0)), default=0.0, help=note)
    note = "draw only from the most likely tokens that together have this probability; default: 1"
    add("--top_p", type=command.number(Range(above=0, at_most=1)), default=1.0, help=note)
    add("--seed", type=command.whole(0, 2**31 - 1), default=0, help="of the random choices; default: 0")
    note = "a scaling rule for a long context, such as ntk; the default is the rule of the model"
    add("--rope_scaling", default="none", metavar="RULE", help=note)
    return parser


if __name__ == "__main__":
    command.run(main, sys.argv[1:])
