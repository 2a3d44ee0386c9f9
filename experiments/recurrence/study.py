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
from posenc_jax.training.step import initial_state

RECIPES = {  # name: recipe
    "rnn": "configs/recurrent.py:cell=rnn",
    "lstm": "configs/recurrent.py:cell=lstm",
    "gru": "configs/recurrent.py:cell=gru",
    "elmo": "configs/recurrent.py:cell=elmo",
    "none": "configs/rope_extrap.py:encoding=none",
    "sinusoidal": "configs/rope_extrap.py:encoding=sinusoidal",
    "rope": "configs/rope_extrap.py:encoding=rope",
    "alibi": "configs/rope_extrap.py:encoding=alibi",
    "fox": "configs/rope_extrap.py:encoding=fox",
    "qwen3": "configs/qwen3.py",
    "encoder_none": "configs/bert.py:tokens=bytes,positions=none",
    "encoder_learned": "configs/bert.py:tokens=bytes,positions=learned",
    "encoder_sinusoidal": "configs/bert.py:tokens=bytes,positions=sinusoidal",
    "encoder_rope": "configs/bert.py:tokens=bytes,positions=rope",
}


def run_recipe(recipe: str, workdir: Path) -> list[Result]:
    """The results of a recipe without scaling rules, from its workdir once it is complete; exits as the run does.

    A run has a process of its own, for it divides the CPU into devices, and the parts measure on an undivided one.
    """
    scalings = "--config.evaluation.rope_scalings=('none',)"
    arguments = [sys.executable, "launch.py", f"--config={recipe}", scalings, f"--workdir={workdir}"]
    print(f"{workdir.name}: {' '.join(arguments[1:])}", flush=True)
    ran = subprocess.run(arguments, check=False)
    if ran.returncode:
        sys.exit(ran.returncode)
    return read_results(workdir / "results.csv")


def revisions(workdirs: Iterable[Path]) -> str:
    """The git revisions that runs were made at, of those that are there."""
    records = (path / "config.json" for path in workdirs)
    found = (json.loads(path.read_text(encoding="utf-8"))["git_revision"] for path in records if path.exists())
    return "; ".join(dict.fromkeys(revision or "unknown" for revision in found))


@dataclasses.dataclass(frozen=True)
class Study:
    """What a part works with."""

    models: Sequence[str]
    size: str
    runs: Path
    output: Path

    def results(self, name: str) -> list[Result]:
        """Results of a model's run, named as the study names it; trains it if need be."""
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


def untrained(run: trained.Trained) -> LanguageModel:
    """The model of a run as it was before its first step."""
    state = initial_state(run.config, optimizers.build(run.config.optimizer, total_steps=1, warmup_steps=0))
    return nnx.merge(run.graphdef, state["params"], state["constants"])


def test_windows(config: RunConfig, length: int, count: int) -> np.ndarray:
    """Windows of the text that a run is evaluated on, int32 [count, length + 1]."""
    split = data.prepare(config.data).splits["test"]
    return pipeline.evaluation_windows(split, length=length, count=count).tokens


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return text_table(header, rows).markdown().rstrip()
