"""Attention beside the recurrence that it replaced: what it costs, what it remembers, and why it needs positions.

    python -m experiments.attention_vs_recurrence                     all five parts
    python -m experiments.attention_vs_recurrence order addition      some of them
    python -m experiments.attention_vs_recurrence table --models rope lstm encoder_none

- costs: time and memory of a training step and of inference, against the length;
- memory: how far back a loss reaches, before and after training, and recall of a key at a distance;
- order: what a model without positions can know of the order of words;
- addition: positions added to embeddings, beside them, or rotating queries and keys;
- table: loss and extrapolation of all models, at equal parameters and tokens.

Parts but the first train the models that they need, each a run of its recipe in a folder of --runs; the same command
goes on after an interruption. Each part writes its section and figures to --output, and report.md is all sections.
"""

import argparse
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import jax

from experiments.encoding_table import revisions
from experiments.recurrence import addition, costs, gradients, models, order, recall
from experiments.recurrence.study import RECIPES, Study
from posenc_jax import command
from posenc_jax.files import replace_text
from posenc_jax.schema import ConfigError

NAME = "attention_vs_recurrence"


def memory(study: Study) -> Iterable[str]:
    """The section on memory: how far back a loss reaches, and at what distance a key is recalled."""
    yield "## Fading memory"
    names = [name for name in study.models if RECIPES[name].startswith(("configs/recurrent", "configs/rope_extrap"))]
    names = [name for name in names if name != "elmo"]  # its forward half is an LSTM
    if not names:
        yield "None of the models chosen is measured here."
        return
    yield from gradients.part(study, names)
    yield from recall.part(study, names)


PARTS = {
    "costs": costs.part,
    "memory": memory,
    "order": order.part,
    "addition": addition.part,
    "table": models.part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="default: all")
    parser.add_argument("--models", nargs="+", default=list(RECIPES), help="default: all")
    parser.add_argument("--size", default="default", choices=("default", "smoke"))
    parser.add_argument("--runs", type=Path, help=f"default: runs/{NAME}, or {NAME}_smoke at that size")
    parser.add_argument("--output", type=Path, help=f"default: experiments/results/{NAME}, likewise")
    args = parser.parse_args()
    for field, names, known in (("part", args.parts, PARTS), ("--models", args.models, RECIPES)):
        for name in names:
            if name not in known:
                raise ConfigError(field, name, "must be one of: " + ", ".join(known), known)
    name = NAME if args.size == "default" else f"{NAME}_{args.size}"
    runs, output = args.runs or Path("runs", name), args.output or Path("experiments/results", name)
    study = Study(args.models, args.size, runs, output)
    sections = study.output / "sections"
    sections.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        replace_text(sections / f"{part}.md", "\n\n".join(PARTS[part](study)) + "\n")
    texts = [path.read_text(encoding="utf-8") for part in PARTS if (path := sections / f"{part}.md").exists()]
    made = (
        f"## How it was made\n\n    python -m experiments.attention_vs_recurrence --size={args.size}\n\n"
        f"jax {jax.__version__}, {jax.devices()[0].device_kind} ({os.cpu_count()} cores, {platform.machine()}), one "
        "seed. Each part may have been run on its own.\n\n"
        f"- git revision: {revisions(study.runs / model for model in study.models)}\n"
    )
    report = study.output / "report.md"
    replace_text(report, "\n".join(["# Attention and the recurrence before it\n", *texts, made]))
    print(f"report: {report}")


if __name__ == "__main__":
    command.run(main)
