"""Compares attention with recurrent models: cost, memory over distance, and why attention needs positions.

    python -m experiments.attention_vs_recurrence                     all five parts
    python -m experiments.attention_vs_recurrence order addition      some parts
    python -m experiments.attention_vs_recurrence table --models rope lstm encoder_none

- costs: time and memory of a training step and of inference, against the sequence length;
- memory: how far back a loss depends on the input, before and after training, and associative recall at a distance;
- order: what a model without positions can know about the order of words;
- addition: positions added to embeddings, concatenated with them, or used to rotate queries and keys;
- table: loss and extrapolation of all models, with the same number of parameters and tokens.

All parts except the first train the models that they need. Each model is a run of its recipe in a folder of --runs.
After an interruption, the same command continues. Each part writes its section and figures to --output. report.md
contains all sections.
"""

import argparse
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import jax

from experiments.recurrence import addition, costs, gradients, order, recall
from experiments.recurrence.study import RECIPES, Study, revisions
from posenc_jax import command
from posenc_jax.files import atomic_write_text
from posenc_jax.reporting import figures
from posenc_jax.reporting.summary import READING, summary
from posenc_jax.results import write_results
from posenc_jax.schema import ConfigError

NAME = "attention_vs_recurrence"
GROUPS: dict[str, tuple[str, ...]] = {  # of the figure: title, and the recipes of its models
    "recurrent": ("configs/recurrent",),
    "causal transformers": ("configs/rope_extrap", "configs/qwen3"),
    "encoders (hidden tokens)": ("configs/bert",),
}


def memory(study: Study) -> Iterable[str]:
    """The section on memory: how far back a loss depends on the input, and recall at a distance."""
    yield "## Fading memory"
    names = [name for name in study.models if RECIPES[name].startswith(("configs/recurrent", "configs/rope_extrap"))]
    names = [name for name in names if name != "elmo"]  # its forward half is an LSTM
    if not names:
        yield "None of the selected models is measured here."
        return
    yield from gradients.part(study, names)
    yield from recall.part(study, names)


def comparison(study: Study) -> Iterable[str]:
    """The section on loss and extrapolation of all models, in the standard table."""
    yield "## All models, trained alike"
    results = {name: study.results(name) for name in study.models}
    every = [row for rows in results.values() for row in rows]
    write_results(study.output / "results.csv", every)
    yield READING + (
        " Models have 0.83 to 0.89 million parameters and read 2 million tokens at the default size. The encoders "
        "predict hidden tokens from both sides, which is another task, and learn from 15 % of the tokens: compare them "
        "with each other alone. ELMo is read by its forward half."
    )
    yield summary(every, {}).markdown().rstrip()
    groups = {
        title: [row for name, rows in results.items() if RECIPES[name].startswith(recipes) for row in rows]
        for title, recipes in GROUPS.items()
    }
    figure = figures.extrapolation_panels({title: rows for title, rows in groups.items() if rows})
    yield study.save(figure, "extrapolation", "Bits per byte over evaluation length")


PARTS = {"costs": costs.part, "memory": memory, "order": order.part, "addition": addition.part, "table": comparison}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help="default: all")
    parser.add_argument("--models", nargs="+", default=list(RECIPES), help="default: all")
    parser.add_argument("--size", default="default", choices=("default", "smoke"))
    parser.add_argument(
        "--runs", type=Path, help=f"folder of the trained runs; default: runs/{NAME}, or runs/{NAME}_smoke"
    )
    parser.add_argument(
        "--output", type=Path, help=f"folder of the report; default: experiments/results/{NAME}, or {NAME}_smoke there"
    )
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
        atomic_write_text(sections / f"{part}.md", "\n\n".join(PARTS[part](study)) + "\n")
    texts = [path.read_text(encoding="utf-8") for part in PARTS if (path := sections / f"{part}.md").exists()]
    made = (
        f"## How it was made\n\n    python -m experiments.attention_vs_recurrence --size={args.size}\n\n"
        f"jax {jax.__version__}, {jax.devices()[0].device_kind} ({os.cpu_count()} cores, {platform.machine()}), one "
        "seed. Each part may have been run on its own.\n\n"
        f"- git revision: {revisions(study.runs / model for model in study.models)}\n"
    )
    report = study.output / "report.md"
    atomic_write_text(report, "\n".join(["# Attention and recurrent models\n", *texts, made]))
    print(f"report: {report}")


if __name__ == "__main__":
    command.run(main)
