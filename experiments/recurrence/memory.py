"""Fading memory: how far back a loss reaches, and at what distance a key is recalled."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from configs import base, rope_extrap
from experiments.recurrence import figures, memory_measures
from experiments.recurrence.study import RECIPES, Study, table, test_windows, untrained
from posenc_jax.config import RECURRENT, RunConfig
from posenc_jax.results import write_rows

STAGES = ("at initialisation", "after training")
WINDOWS = 16
# Of the recall task: widths that give every model 131,000 to 144,000 parameters.
WIDTHS = {"rnn": 160, "lstm": 84, "gru": 96}
LEARNING_RATES = {"rnn": 1e-3}  # others 3e-3: a vanilla recurrence does not bear it
DISTANCES = (2, 3, 5, 8, 16, 32, 48, 64, 96, 128, 256)


@dataclass(frozen=True)
class Effort:
    """Steps of training on the recall task, questions for each distance, and the distances."""

    steps: int
    questions: int
    distances: Sequence[int]


EFFORTS = {"default": Effort(1000, 2000, DISTANCES), "smoke": Effort(20, 200, (2, 64, 96))}


def part(study: Study) -> Iterable[str]:
    yield "## Fading memory"
    names = [name for name in study.models if RECIPES[name].startswith(("configs/recurrent", "configs/rope_extrap"))]
    names = [name for name in names if name != "elmo"]  # its forward half is an LSTM
    if not names:
        yield "None of the models chosen is measured here."
        return
    yield from _gradients(study, names)
    yield from _recall(study, names)


def _gradients(study: Study, names: Sequence[str]) -> Iterable[str]:
    rows: list[memory_measures.GradientNorm] = []
    for name in names:
        run = study.trained(name)
        windows = test_windows(run.config, run.config.training.length, WINDOWS)
        for stage, model in zip(STAGES, (untrained(run), run.model), strict=True):
            rows += memory_measures.summary(name, stage, memory_measures.gradient_norms(model, windows))
    write_rows(study.output / "gradient_norms.csv", memory_measures.GradientNorm, rows)
    yield (
        "The norm of the gradient of the loss at a position with respect to the input embedding n tokens before, as "
        f"the median over {WINDOWS} test windows and four positions each. *Reach*: the distance from which on it stays "
        "below a hundredth of that at distance 1."
    )
    found = {
        (name, stage): [row for row in rows if (row.model, row.stage) == (name, stage)]
        for name in names
        for stage in STAGES
    }
    longest = max(row.distance for row in rows)

    def reach(name: str, stage: str) -> str:
        distance = memory_measures.reach(found[name, stage])
        return f"beyond {longest}" if distance is None else str(distance)

    header = ("model", *(f"reach {stage}" for stage in STAGES))
    yield table(header, [(name, *(reach(name, stage) for stage in STAGES)) for name in names])
    panels = {
        stage: {
            name: {row.distance: (row.value, row.ci_low, row.ci_high) for row in found[name, stage] if row.distance}
            for name in names
        }
        for stage in STAGES
    }
    figure = figures.fading_gradients(panels)
    yield study.save(figure, "fading_gradients", "How strongly a loss depends on earlier inputs")


def _recall(study: Study, names: Sequence[str]) -> Iterable[str]:
    task, effort, rows = memory_measures.RecallTask(), EFFORTS[study.size], []
    for name in names:
        model, losses = memory_measures.train_recall(_small(name), task, steps=effort.steps, batch_size=32)
        print(f"recall: {name}, loss {losses[0]:.2f} to {np.mean(losses[-20:]):.3f}", flush=True)
        rows += memory_measures.recall(
            name, memory_measures.greedy(model), task, effort.distances, questions=effort.questions
        )
    write_rows(study.output / "recall.csv", memory_measures.Recall, rows)
    yield (
        f"Recall: {task.markers} markers stand beside a value each, among fillers; a marker comes again n tokens "
        f"later, and the model is to say its value (1 of {task.values}). Models of 131,000 to 144,000 parameters, "
        f"trained for {effort.steps} steps of 32 texts at distances {task.nearest} to {task.furthest}, whose logarithm "
        "is drawn evenly, and asked at longer ones too. Knowing which values stood in the text, but not beside which "
        f"marker, makes right about once in {task.markers}. Accuracy in %:"
    )
    accuracy = {(row.model, row.distance): f"{100 * row.accuracy:.0f}" for row in rows}
    lines = [(name, *(accuracy[name, n] for n in effort.distances)) for name in names]
    yield table(("model", *map(str, effort.distances)), lines)
    curves = {
        name: {row.distance: (row.accuracy, row.ci_low, row.ci_high) for row in rows if row.model == name}
        for name in names
    }
    figure = figures.recall_by_distance(curves, task.chance, (task.nearest, task.furthest))
    yield study.save(figure, "recall", "Values recalled, by distance")


def _small(name: str) -> RunConfig:
    """The model of the recall task: two layers, of a cell or of attention with an encoding."""
    cell = name in RECURRENT
    recipe = rope_extrap.get_config(f"size=smoke,encoding={'none' if cell else name}")
    recipe.evaluation.rope_scalings, recipe.training.length = ("none",), 128
    recipe.optimizer.learning_rate = LEARNING_RATES.get(name, 3e-3)
    model = recipe.model
    model.d_model, model.num_heads, model.num_kv_heads, model.head_dim, model.d_ff = 64, 4, 4, 32, 128
    if cell:
        recipe.model = base.recurrent(name, model)
        recipe.model.d_model = WIDTHS[name]
    return RunConfig.from_mapping(recipe.to_dict())
