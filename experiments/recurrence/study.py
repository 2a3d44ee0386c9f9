"""What the parts of the study of attention and recurrence share: its models, their runs, and where results go."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from posenc_jax.config import RunConfig
from posenc_jax.data import pipeline
from posenc_jax.data import tokens as data
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.reporting import figures
from posenc_jax.reporting.tables import text_table
from posenc_jax.results import Result, read_results
from posenc_jax.runs import trained
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state

RECIPES = {  # name: recipe
    **{cell: f"configs/recurrent.py:cell={cell}" for cell in ("rnn", "lstm", "gru", "elmo")},
    **{name: f"configs/rope_extrap.py:encoding={name}" for name in ("none", "sinusoidal", "rope", "alibi", "fox")},
    "qwen3": "configs/qwen3.py",
    **{
        f"encoder_{name}": f"configs/bert.py:tokens=bytes,positions={name}"
        for name in ("none", "learned", "sinusoidal", "rope")
    },
}


def run_recipe(recipe: str, workdir: Path) -> list[Result]:
    """The results of a recipe without scaling rules. Completes the run first, and exits with its code if it fails.

    The run has a separate process, because it divides the CPU into devices, and the parts measure on an undivided CPU.
    """
    scalings = "--config.evaluation.rope_scalings=('none',)"
    arguments = [sys.executable, "launch.py", f"--config={recipe}", scalings, f"--workdir={workdir}"]
    print(f"{workdir.name}: {' '.join(arguments[1:])}", flush=True)
    ran = subprocess.run(arguments, check=False)
    if ran.returncode:
        sys.exit(ran.returncode)
    return read_results(workdir / "results.csv")


def revisions(workdirs: Iterable[Path]) -> str:
    """The git revisions of the runs that exist."""
    records = (path / "config.json" for path in workdirs)
    found = (json.loads(path.read_text(encoding="utf-8"))["git_revision"] for path in records if path.exists())
    return "; ".join(dict.fromkeys(revision or "unknown" for revision in found))


@dataclasses.dataclass(frozen=True)
class Study:
    """The models of the study and its folders."""

    models: Sequence[str]
    size: str
    runs: Path
    output: Path

    def results(self, name: str) -> list[Result]:
        """Results of a model's run, with the study's name for it. Trains the model if necessary."""
        recipe = RECIPES[name] + ("," if ":" in RECIPES[name] else ":") + f"size={self.size}"
        rows = run_recipe(recipe, self.runs / name)
        return [dataclasses.replace(row, run="attention_vs_recurrence", encoding=name) for row in rows]

    def trained(self, name: str) -> trained.Trained:
        self.results(name)
        return trained.load(self.runs / name)

    def save(self, figure: Figure, name: str, caption: str) -> str:
        """Write a figure; returns the Markdown that shows it."""
        (self.output / "figures").mkdir(parents=True, exist_ok=True)
        figures.save(figure, self.output / "figures" / name)
        return f"![{caption}](figures/{name}.png)\n\n*{caption}*"


def untrained(config: RunConfig) -> LanguageModel:
    """The model of a run before its first step."""
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    return nnx.merge(abstract_model(config)[0], state["params"], state["constants"])


def test_windows(config: RunConfig, length: int, count: int) -> np.ndarray:
    """Windows of the test split of a run, int32 [count, length + 1]."""
    split = data.prepare(config.data).splits["test"]
    return pipeline.evaluation_windows(split, length=length, count=count).tokens


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return text_table(header, rows).markdown().rstrip()
