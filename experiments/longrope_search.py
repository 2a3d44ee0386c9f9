"""Searches LongRoPE factors for a trained run: how much to slow down each pair of RoPE to read longer windows.

    python -m experiments.longrope_search runs/rope_extrap-rope-... --length=2048

The search evaluates factors on windows of the validation split. The printed table compares the result on the test split
with the rules that the search started from. The last line is the rule found, as a value for
`--config.evaluation.rope_scalings`.
"""

import argparse
import dataclasses
from pathlib import Path

import rich

from posenc_jax import command
from posenc_jax.data import pipeline, tokens
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation import extrapolation, longrope
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.reporting.tables import extrapolation_table
from posenc_jax.runs import trained
from posenc_jax.schema import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path, help="workdir of a complete run with RoPE")
    parser.add_argument(
        "--length", type=command.whole(2), help="window length in tokens; default: the run's longest evaluation length"
    )
    parser.add_argument(
        "--windows", type=command.count, default=5, help="validation windows to evaluate each candidate on"
    )
    parser.add_argument(
        "--population", type=command.whole(2, 4096), default=64, help="candidates in the first generation"
    )
    parser.add_argument("--iterations", type=command.whole(0, 10_000), default=10, help="generations after the first")
    search(parser.parse_args())


def search(args: argparse.Namespace) -> None:
    """Search, evaluate and print. Raises ConfigError, WorkdirError and CheckpointError."""
    config = trained.read_config(args.workdir)
    encoding = config.encoding
    if encoding.name != "rope" or config.training.drope.amount:
        allowed = "must be rope, without config.training.drope, because the search changes RoPE's frequencies"
        raise ConfigError("config.encoding.name", encoding.name, allowed)
    own = encoding.hyperparameters
    length, reach = args.length or config.evaluation.lengths[-1], config.pretrained_reach
    if length < config.evaluation.tail:
        raise ConfigError("--length", length, f"must be at least config.evaluation.tail = {config.evaluation.tail}")
    rows = config.training.batch_size // config.training.grad_accum_steps
    sharding.divide_cpu(config.training.cpu_devices, rows)
    mesh = sharding.make_mesh(rows)
    run = trained.load(args.workdir, mesh)
    scorer = Scorer(run.graphdef, mesh, config.evaluation.batch_tokens)
    dataset = tokens.prepare(config.data)
    splits, field = dataset.splits, "--length"
    windows = pipeline.evaluation_windows(splits["validation"], length=length, count=args.windows, field=field)
    loss = longrope.model_loss(config, scorer, run.params, run.constants, windows.tokens)
    factor = max(1.0, length / reach)
    factors, best = longrope.search(
        loss,
        longrope.initial_factors(int(own.fraction * config.model.head_dim), own.base, reach, factor),
        largest=2 * factor,
        population=args.population,
        iterations=args.iterations,
        seed=config.seed,
    )
    print(f"validation: {best:.4f} nats per token with the factors found")

    rule = str(frequencies.Scaling("longrope", (("factors", factors), ("factor", factor))))
    scalings = ("none", "linear", "ntk", "yarn", rule)
    lengths = (*(n for n in config.evaluation.lengths if n < length), length)
    evaluation = dataclasses.replace(config.evaluation, lengths=lengths, rope_scalings=scalings)
    test = pipeline.evaluation_windows(splits["test"], length=length, count=evaluation.windows, field=field)
    config, token_bytes = dataclasses.replace(config, evaluation=evaluation), dataset.tokenizer.token_bytes
    measured = extrapolation.measure(config, scorer, run.params, run.constants, test.tokens, token_bytes)
    results = extrapolation.results(config, measured, test.documents)
    shown = [dataclasses.replace(row, scaling="longrope") if row.scaling == rule else row for row in results]
    rich.print(extrapolation_table(shown, "prefix_bits_per_byte").rich())
    print(rule)


if __name__ == "__main__":
    command.run(main)
