r"""What a model still knows of earlier tokens: how its loss depends on them, and whether it recalls them.

- Fading gradients: the norm of the gradient of the loss at position t with respect to the input embedding n tokens
  before. In a recurrence it is a product of n Jacobians and falls, or grows, exponentially with n; attention reads any
  position in one step. Source: Hochreiter 1991; Bengio, Simard and Frasconi 1994, section 3; for gated cells
  Hochreiter and Schmidhuber 1997.
- Recall: a marker and a value stand next to each other, the marker comes again n tokens later, and the model must say
  the value. Source: associative recall as in Ba et al. 2016 and Olsson et al. 2022; several pairs in a text of which
  each is asked once, Arora et al. 2023 (MQAR). Differs from MQAR: fillers stand between pairs and questions, so that
  every question has a distance that is set, and the answer is not shown after the question.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from posenc_jax.config import RunConfig
from posenc_jax.evaluation.statistics import wilson_interval
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state


@dataclass(frozen=True)
class GradientNorm:
    """How much the loss depends on the input embedding so many tokens before, of one model at one stage of training.

    `value` is the median over windows and positions, in nats per unit of the embedding, whose entries start with
    standard deviation 1. Its 95 % interval is by the bootstrap over windows, which must be of different documents, as
    the first few of `evaluation_windows` are. The median, as norms spread over orders of magnitude: it is that of their
    logarithms too, and neither one window that explodes nor norms too small for float32, which are 0, decide it.
    """

    model: str
    stage: str
    distance: int
    value: float
    ci_low: float
    ci_high: float


def gradient_norms(
    model: LanguageModel,
    tokens: Int[Array, "W N"] | Int[np.ndarray, "W N"],
    positions: Real[Array, "..."] | None = None,
    *,
    at: Sequence[int] | None = None,
) -> Float[np.ndarray, "W a n"]:
    r"""Norms of the gradient of the loss at position t with respect to the input embedding n tokens before.

    .. math:: \left\| \partial \mathrm{loss}_t / \partial x_{t-n} \right\|_2, \quad
        \mathrm{loss}_t = -\ln p(\mathrm{token}_{t+1} \mid \mathrm{token}_{\le t})

    in nats per unit of the embedding x = `model.embed`, for n = 0 to the smallest t. Memory is that of one backward
    pass over all windows. In float32, what sums over all keys, as the gradient of a forget gate does, is rounding
    below about 1e-8 times the norm at n = 0.

    Args:
      model: predicts the next token.
      tokens: windows; the last token is predicted alone.
      positions: of the tokens but the last, as the model takes them.
      at: positions t; by default four, evenly from three quarters of the window to its end.
    """
    length = tokens.shape[1] - 1
    places = list(at or np.linspace(length * 3 // 4, length - 1, 4).astype(int))
    if not all(0 <= t < length for t in places):
        raise ValueError(f"at is {places}, must be positions of 0 to {length - 1}")
    graphdef, state = nnx.split(model)
    norms = np.asarray(norms_by_input(graphdef, state, jnp.asarray(tokens), positions, jnp.array(places)))
    behind = [norms[i][:, t - min(places) : t + 1][:, ::-1] for i, t in enumerate(places)]
    return np.stack(behind, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def norms_by_input(
    graphdef: nnx.GraphDef,
    state: Any,
    tokens: Int[Array, "W N"],
    positions: Real[Array, "..."] | None,
    at: Int[Array, "a"],
) -> Float[Array, "a W T"]:
    """Norms of the gradient of the loss at each of the positions `at` with respect to every input, those ahead too."""
    model = nnx.merge(graphdef, state)

    def losses(x):
        logits = model.unembed(model.states(x, positions))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    # Windows do not depend on each other, so that one backward pass gives the gradients of all their losses at t.
    nats, backward = jax.vjp(losses, model.embed(tokens[:, :-1]))

    def of_position(t):
        (gradient,) = backward(jnp.zeros_like(nats).at[:, t].set(1.0))
        # Scaled by the largest entry, so that the squares of small gradients stay within float32.
        largest = jnp.abs(gradient).max(axis=-1, keepdims=True).astype(jnp.float32)
        unit = gradient / jnp.where(largest > 0, largest, 1)
        return jnp.linalg.norm(unit.astype(jnp.float32), axis=-1) * largest[..., 0]

    return jax.lax.map(of_position, at)


def summary(model: str, stage: str, norms: Float[np.ndarray, "W a n"], *, resamples: int = 1000) -> list[GradientNorm]:
    """The median of `gradient_norms` by distance, as rows."""
    windows = norms.shape[0]
    drawn = np.random.default_rng(0).integers(windows, size=(resamples, windows))
    rows = []
    for n in range(norms.shape[2]):
        own = norms[:, :, n]
        low, high = np.quantile(np.median(own[drawn], axis=(1, 2)), [0.025, 0.975])
        rows.append(GradientNorm(model, stage, n, float(np.median(own)), float(low), float(high)))
    return rows


def reach(rows: Sequence[GradientNorm], share: float = 0.01) -> int | None:
    """The distance from which on the norms of one model and stage stay below a share of that at 1; None: no such.

    At 1, as the token itself (0) also reaches its loss past attention, by the residual stream.
    """
    norms = {row.distance: row.value for row in rows if row.distance > 0}
    kept = [distance for distance, norm in norms.items() if norm >= share * norms[1]]
    return None if max(kept) == max(norms) else max(kept) + 1


NOTHING_ASKED = -1


class Questions(NamedTuple):
    """Texts, and what is asked of them: `answers` is `NOTHING_ASKED`, and `distances` 0, where no marker returns."""

    tokens: Int[Array, "B T"]
    answers: Int[Array, "B T"]  # the token that is to come next
    distances: Int[Array, "B T"]  # tokens since the marker stood beside its value


@dataclass(frozen=True)
class RecallTask:
    """Pairs of marker and value among fillers, each asked once by its marker alone.

    Tokens are markers [0, markers), values after them, then fillers, so that none is taken for another. Values are
    drawn alike and independently. A model that ignores the text is right once in `values` times; one that knows which
    values were there, but not beside which marker, about once in `markers` times.

    Args:
      markers: each stands in each text once, if there is room, beside a value.
      values, fillers: how many tokens of each.
      length: tokens of a text.
      nearest, furthest: of the tokens from a marker to its return, 2 or more, whose logarithm is drawn uniformly.
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
    """A model of `config`, from its seed, after so many steps on fresh texts, and the loss of each step.

    A loss is the mean over questions, in nats; other tokens have none. The config's vocabulary must hold the task's.
    Texts follow from the config's seed and the step, so that all models of a seed read the same.
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
    """How often a model gave the value of a marker that stood `distance` tokens before, of so many questions.

    `trained` says whether training asked at such distances. The interval of the accuracy is Wilson's, of 95 %.
    """

    model: str
    distance: int
    trained: bool
    correct: int
    asked: int
    accuracy: float
    ci_low: float
    ci_high: float


def recall(
    name: str,
    predict: Callable[[Int[Array, "B T"]], Int[Array, "B T"]],
    task: RecallTask,
    distances: Sequence[int],
    *,
    questions: int = 2000,
    batch_size: int = 64,
    seed: int = 1,
) -> list[Recall]:
    """Accuracy by distance, on texts in which all questions have that distance.

    Args:
      name: of the model in the rows.
      predict: the token that follows each token, as of `greedy`.
      task: that of training. Texts are as long as there; for distances that it does not ask at, as much longer as these
        are.
      distances: tokens between a marker and its return.
      questions: at least so many for each distance.
      batch_size: texts at a time.
      seed: of the texts, which are others than those of training.
    """
    rows = []
    for distance in distances:
        beyond = max(0, distance - task.furthest)
        own = replace(task, nearest=distance, furthest=distance, length=task.length + beyond)
        key = jax.random.fold_in(jax.random.key(seed), distance)
        correct = asked = 0
        while asked < questions:
            key, batch_key = jax.random.split(key)
            batch = _draw(own, batch_key, batch_size)
            is_question = batch.answers != NOTHING_ASKED
            correct += int(((predict(batch.tokens) == batch.answers) & is_question).sum())
            asked += int(is_question.sum())
        trained = task.nearest <= distance <= task.furthest
        rows.append(Recall(name, distance, trained, correct, asked, correct / asked, *wilson_interval(correct, asked)))
    return rows


_draw = jax.jit(RecallTask.draw, static_argnums=(0, 2))


def greedy(model: LanguageModel) -> Callable[[Int[Array, "B T"]], Int[Array, "B T"]]:
    """The most likely next token after each token; compiled once per shape."""
    graphdef, state = nnx.split(model)
    compiled = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens).argmax(axis=-1))
    return lambda tokens: compiled(state, tokens)
