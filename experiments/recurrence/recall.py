r"""Fading memory: how well a model recalls a value at a distance.

A marker and a value stand next to each other, the marker comes again n tokens later, and the model must say the value.
Source: associative recall as in Ba et al. 2016 and Olsson et al. 2022; several pairs in a text, each asked once, as in
Arora et al. 2023 (MQAR). It differs from MQAR: fillers stand between pairs and questions, so that the distance of every
question is set, and the answer is not shown after the question.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
from flax import nnx
from jaxtyping import Array, Int

from configs import base, rope_extrap
from experiments.recurrence import figures
from experiments.recurrence.study import Study, table
from posenc_jax.config import RunConfig
from posenc_jax.model_config import RECURRENT
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.results import write_rows
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state

# Widths that give every model 131,000 to 144,000 parameters.
WIDTHS = {"rnn": 160, "lstm": 84, "gru": 96}
LEARNING_RATES = {"rnn": 1e-3}  # others 3e-3: a vanilla recurrence does not bear it
DISTANCES = (2, 3, 5, 8, 16, 32, 48, 64, 96, 128, 256)


class Effort(NamedTuple):
    """Steps of training on the recall task, questions for each distance, and the distances."""

    steps: int
    questions: int
    distances: Sequence[int]


EFFORTS = {"default": Effort(1000, 2000, DISTANCES), "smoke": Effort(20, 200, (2, 64, 96))}


def part(study: Study, names: Sequence[str]) -> Iterable[str]:
    task, effort, rows = RecallTask(), EFFORTS[study.size], []
    for name in names:
        model, losses = train_recall(_small(name), task, steps=effort.steps, batch_size=32)
        print(f"recall: {name}, loss {losses[0]:.2f} to {np.mean(losses[-20:]):.3f}", flush=True)
        rows += accuracy_by_distance(name, greedy(model), task, effort.distances, questions=effort.questions)
    write_rows(study.output / "recall.csv", Recall, rows)
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


NOTHING_ASKED = -1


class Questions(NamedTuple):
    """Texts and questions. Where no marker returns, `answers` is `NOTHING_ASKED` and `distances` is 0."""

    tokens: Int[Array, "B T"]
    answers: Int[Array, "B T"]  # the next token
    distances: Int[Array, "B T"]  # tokens since the first appearance of the marker, beside its value


@dataclass(frozen=True)
class RecallTask:
    """Pairs of a marker and a value among fillers. The marker alone returns later and asks for its value.

    Tokens are markers [0, markers), then values, then fillers. Values are drawn uniformly and independently. A model
    that ignores the text is right once in `values` times. A model that knows the values of the text, but not their
    markers, is right about once in `markers` times.

    Args:
      markers: number of markers. Each appears in each text once, beside a value, if there is room.
      values, fillers: number of tokens of each kind.
      length: tokens of a text.
      nearest, furthest: range of the distance (tokens) of a marker to its return, at least 2. The logarithm of the
        distance is drawn uniformly.
    """

    markers: int = 8
    values: int = 16
    fillers: int = 32
    length: int = 128
    nearest: int = 2
    furthest: int = 64

    def __post_init__(self):
        if not 2 <= self.nearest <= self.furthest < self.length:
            allowed = "must be 2 or more, increasing, and below length"
            raise ValueError(f"nearest, furthest are {self.nearest}, {self.furthest}, {allowed} = {self.length}")

    @property
    def vocab_size(self) -> int:
        return self.markers + self.values + self.fillers

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / self.values

    def draw(self, key: Array, rows: int) -> Questions:
        """Texts that follow from the key alone."""
        return jax.vmap(self._text)(jax.random.split(key, rows))

    def _text(self, key: Array) -> Questions:
        filler_key, value_key, distance_key, place_key = jax.random.split(key, 4)
        T, markers = self.length, jnp.arange(self.markers)
        first_filler = self.markers + self.values
        fillers = jax.random.randint(filler_key, (T,), first_filler, self.vocab_size)
        values = jax.random.randint(value_key, markers.shape, self.markers, first_filler)
        share, ratio = jax.random.uniform(distance_key, markers.shape), math.log((self.furthest + 1) / self.nearest)
        drawn = jnp.floor(self.nearest * jnp.exp(share * ratio)).astype(jnp.int32)
        distances = jnp.clip(drawn, self.nearest, self.furthest)  # whatever the logarithm rounds to

        def place(carry, pair):
            text, free = carry
            marker, value, distance, key = pair
            start = jnp.arange(T)
            possible = (start + distance < T) & free & jnp.roll(free, -1) & jnp.roll(free, -distance)
            p = jax.random.categorical(key, jnp.where(possible, 0.0, -jnp.inf))
            fits = possible.any()
            q = p + distance
            where, tokens = jnp.array([p, p + 1, q]), jnp.array([marker, value, marker])
            placed = Questions(
                text.tokens.at[where].set(tokens), text.answers.at[q].set(value), text.distances.at[q].set(distance)
            )
            kept = jax.tree.map(lambda new, old: jnp.where(fits, new, old), placed, text)
            return (kept, jnp.where(fits, free.at[where].set(False), free)), None

        nothing = Questions(fillers, jnp.full(T, NOTHING_ASKED), jnp.zeros(T, jnp.int32))
        pairs = (markers, values, distances, jax.random.split(place_key, self.markers))
        (text, _), _ = jax.lax.scan(place, (nothing, jnp.ones(T, bool)), pairs)
        return text


def train_recall(
    config: RunConfig, task: RecallTask, *, steps: int, batch_size: int
) -> tuple[LanguageModel, list[float]]:
    """The model of `config` after training on fresh texts, and the loss of each step: nats, the mean over questions.

    The texts depend on the config's seed and the step only, so all models with one seed read the same texts.
    """
    if config.data.vocab_size < task.vocab_size:
        raise ValueError(f"data.vocab_size is {config.data.vocab_size}, must be at least {task.vocab_size}")
    optimizer = optimizers.build(config.optimizer, total_steps=steps, warmup_steps=max(1, steps // 10))
    graphdef, _ = abstract_model(config)
    state = initial_state(config, optimizer)

    def loss(params, constants, questions):
        model = nnx.merge(graphdef, params, constants)
        asked = questions.answers != NOTHING_ASKED
        nats = optax.softmax_cross_entropy_with_integer_labels(
            model(questions.tokens), jnp.where(asked, questions.answers, 0)
        )
        return jnp.where(asked, nats, 0).sum() / asked.sum()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        key = jax.random.fold_in(jax.random.key(state["seed"]), state["step"])
        questions = task.draw(key, batch_size)
        nats, gradient = jax.value_and_grad(loss)(state["params"], state["constants"], questions)
        updates, own = optimizer.update(gradient, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return state | {"params": params, "optimizer": own, "step": state["step"] + 1}, nats

    losses = []
    for _ in range(steps):
        state, nats = step(state)
        losses.append(nats)
    return nnx.merge(graphdef, state["params"], state["constants"]), [float(x) for x in losses]


@dataclass(frozen=True)
class Recall:
    """How often a model gave the value of a marker that appeared `distance` tokens before.

    `trained` tells whether training has such distances. The 95 % interval of the accuracy is Wilson's.
    """

    model: str
    distance: int
    trained: bool
    correct: int
    asked: int
    accuracy: float
    ci_low: float
    ci_high: float


def accuracy_by_distance(
    name: str,
    predict: Callable[[Int[Array, "B T"]], Int[Array, "B T"]],
    task: RecallTask,
    distances: Sequence[int],
    *,
    questions: int = 2000,
    batch_size: int = 64,
) -> list[Recall]:
    """Accuracy by distance, on texts in which all questions have that distance.

    Args:
      name: of the model in the rows.
      predict: gives the token that follows each token, as `greedy`.
      task: that of training. For a distance beyond those of training, texts are longer by the difference.
      distances: tokens between a marker and its return.
      questions: least number of questions for each distance.
      batch_size: texts at a time.
    """
    rows = []
    for distance in distances:
        beyond = max(0, distance - task.furthest)
        own = replace(task, nearest=distance, furthest=distance, length=task.length + beyond)
        key = jax.random.fold_in(jax.random.key(1), distance)  # not the seed of training
        correct = asked = 0
        while asked < questions:
            key, batch_key = jax.random.split(key)
            batch = _draw(own, batch_key, batch_size)
            is_question = batch.answers != NOTHING_ASKED
            correct += int(((predict(batch.tokens) == batch.answers) & is_question).sum())
            asked += int(is_question.sum())
        trained = task.nearest <= distance <= task.furthest
        low, high = map(float, scipy.stats.binomtest(correct, asked).proportion_ci(method="wilson"))
        rows.append(Recall(name, distance, trained, correct, asked, correct / asked, low, high))
    return rows


_draw = jax.jit(RecallTask.draw, static_argnums=(0, 2))


def greedy(model: LanguageModel) -> Callable[[Int[Array, "B T"]], Int[Array, "B T"]]:
    """The most likely next token after each token; compiled once per shape."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).argmax(axis=-1))
    return lambda tokens: compiled(state, tokens)
