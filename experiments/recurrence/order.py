"""Order blindness: what models can know of the order of words, with positions and without."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from configs import rope_extrap
from experiments.recurrence.study import Study, table, untrained
from posenc_jax.config import RunConfig
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.recurrent import ELMo

SENTENCE = b" I love you so much"


def part(study: Study) -> Iterable[str]:
    yield "## Order blindness"
    yield (
        f'The words of "{SENTENCE.decode().strip()}" in all 120 orders. *Change*: the root mean square of the '
        "difference between what represents each token after reordering and what represented it before, relative to "
        "the latter, mean over orders (and largest). 0 means that the model cannot tell the orders apart."
    )
    tokens, orders = jnp.asarray(np.frombuffer(SENTENCE, np.uint8), jnp.int32), word_orders(SENTENCE)[1:]
    rows = []
    for name in study.models:
        run = study.trained(name)
        changes = (reordering_change(model, tokens, orders) for model in (untrained(run.config), run.model))
        rows.append((name, *map(_mean_and_largest, changes)))
    yield table(("model", "at initialisation", "after training"), rows)
    yield (
        "An encoder without positions gives every token the same representation wherever it stands, to rounding: "
        "attention sums over a set. A causal decoder without positions does not, since token i sees i tokens: the "
        "mask itself tells order. But one layer tells only which tokens came before, not how they stood; from the "
        "second on, states of earlier tokens, which differ by what each of them saw, carry their order on. Change "
        "of the last word's representation under the 24 orders of the four words before it:"
    )
    earlier = word_orders(SENTENCE[: SENTENCE.rindex(b" ")])[1:]
    rows = []
    for layers in (1, 2, 4):
        recipe = rope_extrap.get_config(f"size={study.size},encoding=none")
        recipe.model.num_layers = layers
        change = last_state_change(untrained(RunConfig.from_mapping(recipe.to_dict())), tokens, earlier)
        name = f"causal decoder without positions, {layers} layer{'s' * (layers > 1)}, untrained"
        rows.append((name, _mean_and_largest(change)))
    for name in ("none", "encoder_none"):
        if name in study.models:
            change = last_state_change(study.trained(name).model, tokens, earlier)
            rows.append((f"{name}, trained", _mean_and_largest(change)))
    yield table(("model", "change of the last word's representation"), rows)
    losses = [
        (name, f"{row.value:.3f}")
        for name in study.models
        if name.startswith("encoder")
        for row in study.results(name)
        if (row.metric, row.eval_length) == ("prefix_bits_per_byte", row.train_length)
    ]
    if losses:
        yield (
            "Loss on hidden tokens after the same training, bits per byte at the training length. Without positions a "
            "model knows how often each byte occurs in the window, and little more; positions that are added need more "
            "training than this before they are used (see configs/bert.py):"
        )
        yield table(("model", "prefix"), losses)


def _mean_and_largest(change: Float[np.ndarray, "orders"]) -> str:
    return f"{change.mean():.2g} ({change.max():.2g})"


def word_orders(text: bytes) -> Int[np.ndarray, "orders T"]:
    """All orders of the words of a text, as the old index of each byte. A word moves with the space before it.

    The first row is the original order. Raises ValueError for more than 7 words, which have too many orders.
    """
    starts = [i for i in range(len(text)) if i == 0 or (text[i] == 32 and text[i - 1] != 32)]
    if len(starts) > 7:
        raise ValueError(f"a text of {len(starts)} words has too many orders; take at most 7")
    words = [np.arange(start, stop) for start, stop in itertools.pairwise([*starts, len(text)])]
    return np.stack([np.concatenate(order) for order in itertools.permutations(words)])


def representations(model: LanguageModel, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The states of the last layer, of both directions for ELMo."""
    return model.representations(tokens) if isinstance(model, ELMo) else model.states(model.embed(tokens))


def reordering_change(
    model: LanguageModel, tokens: Int[Array, "T"], orders: Int[np.ndarray, "orders T"]
) -> Float[np.ndarray, "orders"]:
    """How much each order changes the representations of the tokens, wherever they move.

    The root mean square of the difference between the representations of the reordered tokens and the reordered
    representations, relative to that of the representations. It is 0, to rounding, for a model that ignores order, and
    about sqrt(2) for representations that have nothing in common.
    """
    straight = representations(model, tokens[None])[0]
    reordered = _in_rows(model, tokens[orders])
    return np.asarray(_rms(reordered - straight[orders], (1, 2)) / _rms(straight))


def last_state_change(
    model: LanguageModel, tokens: Int[Array, "T"], orders: Int[np.ndarray, "orders n"]
) -> Float[np.ndarray, "orders"]:
    """How much each order of the first n < T tokens changes the representation of the last; see `reordering_change`."""
    rest = np.arange(orders.shape[1], len(tokens))
    rows = np.concatenate([orders, np.broadcast_to(rest, (len(orders), len(rest)))], axis=1)
    last = _in_rows(model, tokens[rows])[:, -1]
    straight = representations(model, tokens[None])[0, -1]
    return np.asarray(_rms(last - straight, 1) / _rms(straight))


def _in_rows(model: LanguageModel, tokens: Int[Array, "rows T"]) -> Float[Array, "rows T D"]:
    return jax.jit(lambda tokens: representations(model, tokens))(tokens)


def _rms(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    return jnp.sqrt((x.astype(jnp.float32) ** 2).mean(axis=axis))
