r"""Fading memory: how much a loss depends on earlier inputs.

This is the norm of the gradient of the loss at position t with respect to the input embedding n tokens before. In a
recurrence it is a product of n Jacobians, and falls or grows exponentially with n. Attention reads any position in one
step. Source: Hochreiter 1991; Bengio, Simard and Frasconi 1994, section 3; Hochreiter and Schmidhuber 1997 for gated
cells.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from experiments.recurrence import figures
from experiments.recurrence.study import Study, table, test_windows, untrained
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.results import write_rows

STAGES = ("at initialisation", "after training")
WINDOWS = 16


def part(study: Study, names: Sequence[str]) -> Iterable[str]:
    found: dict[tuple[str, str], list[GradientNorm]] = {}
    for name in names:
        run = study.trained(name)
        windows = test_windows(run.config, run.config.training.length, WINDOWS)
        for stage, model in zip(STAGES, (untrained(run.config), run.model), strict=True):
            found[name, stage] = summary(name, stage, gradient_norms(model, windows))
    rows = [row for own in found.values() for row in own]
    write_rows(study.output / "gradient_norms.csv", GradientNorm, rows)
    yield (
        "The norm of the gradient of the loss at a position with respect to the input embedding n tokens before, as "
        f"the median over {WINDOWS} test windows and four positions each. *Reach*: the distance from which on it stays "
        "below a hundredth of that at distance 1."
    )
    beyond = f"beyond {max(row.distance for row in rows)}"
    reaches = [(name, *(str(reach(found[name, stage]) or beyond) for stage in STAGES)) for name in names]
    yield table(("model", *(f"reach {stage}" for stage in STAGES)), reaches)
    panels = {
        stage: {
            name: {row.distance: (row.value, row.ci_low, row.ci_high) for row in found[name, stage] if row.distance}
            for name in names
        }
        for stage in STAGES
    }
    figure = figures.fading_gradients(panels)
    yield study.save(figure, "fading_gradients", "How strongly a loss depends on earlier inputs")


@dataclass(frozen=True)
class GradientNorm:
    """How much the loss depends on the input embedding `distance` tokens before, at one stage of training.

    `value` is the median over windows and positions, in nats per unit of the embedding, whose entries start with
    standard deviation 1. The 95 % interval is by the bootstrap over windows. They must be of different documents, as
    the first few of `evaluation_windows` are. Norms spread over orders of magnitude. Neither one window that explodes
    nor norms that underflow to 0 determine the median, and it is also that of the logarithms.
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
    pass over all windows. Gradients that sum over all keys, such as that of a forget gate, are float32 rounding below
    about 1e-8 times the norm at n = 0.

    Args:
      model: predicts the next token.
      tokens: windows; the last token is only a target.
      positions: positions of the tokens but the last, in the form that the model takes.
      at: positions t; by default four, evenly spaced in the last quarter of the window.
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
    """Norms of the gradient of the loss at each position in `at` with respect to every input, also later ones."""
    model = nnx.merge(graphdef, state)

    def losses(x):
        logits = model.unembed(model.states(x, positions))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])

    # Windows are independent, so one backward pass gives the gradients of all their losses at t.
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
    """The distance from which on the norms stay below a share of the norm at distance 1. None if there is none.

    The norm at 0 is no reference, because the token itself also reaches its loss through the residual stream.
    """
    norms = {row.distance: row.value for row in rows if row.distance > 0}
    kept = [distance for distance, norm in norms.items() if norm >= share * norms[1]]
    return None if max(kept) == max(norms) else max(kept) + 1
