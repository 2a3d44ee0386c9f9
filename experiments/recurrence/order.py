"""Order blindness: what models can know of the order of words, with positions and without."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from configs import rope_extrap
from experiments.recurrence.study import Study, table, untrained
from posenc_jax.config import RunConfig
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.recurrent import ELMo
from posenc_jax.results import Result
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state

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
        cells = []
        for model in (untrained(run), run.model):
            change = reordering_change(model, tokens, orders)
            cells.append(f"{change.mean():.2g} ({change.max():.2g})")
        rows.append((name, *cells))
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
        model = shallow(study, layers)
        rows.append(
            (
                f"causal decoder without positions, {layers} layer{'s' * (layers > 1)}, untrained",
                last_change(model, tokens, earlier),
            )
        )
    for name in ("none", "encoder_none"):
        if name in study.models:
            rows.append((f"{name}, trained", last_change(study.trained(name).model, tokens, earlier)))
    yield table(("model", "change of the last word's representation"), rows)
    losses = {name: study.results(name) for name in study.models if name.startswith("encoder")}
    if losses:
        yield (
            "Loss on hidden tokens after the same training, bits per byte at the training length. Without positions a "
            "model knows how often each byte occurs in the window, and little more; positions that are added need more "
            "training than this before they are used (see configs/bert.py):"
        )
        yield table(
            ("model", "prefix"),
            [(name, f"{prefix(rows, rows[0].train_length):.3f}") for name, rows in losses.items()],
        )


def shallow(study: Study, layers: int) -> LanguageModel:
    """A causal decoder without positions, of so many layers, before training."""
    recipe = rope_extrap.get_config(f"size={study.size},encoding=none")
    recipe.model.num_layers = layers
    config = RunConfig.from_mapping(recipe.to_dict())
    state = initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))
    return nnx.merge(abstract_model(config)[0], state["params"], state["constants"])


def last_change(model: LanguageModel, tokens: jax.Array, earlier: np.ndarray) -> str:
    """Mean and largest change of the last word's last byte under orders of the words before it."""
    change = last_state_change(model, tokens, earlier)
    return f"{change.mean():.2g} ({change.max():.2g})"


def prefix(rows: Iterable[Result], length: int) -> float:
    """Bits per byte over windows of this length."""
    (value,) = (row.value for row in rows if (row.metric, row.eval_length) == ("prefix_bits_per_byte", length))
    assert value is not None
    return value


def word_orders(text: bytes) -> Int[np.ndarray, "orders T"]:
    """Every order of the words of a text, as the old index of each byte; a word takes the space before it along.

    The first row is the text as it is. Raises ValueError for more than 7 words, which have too many orders.
    """
    starts = [i for i in range(len(text)) if i == 0 or (text[i] == 32 and text[i - 1] != 32)]
    if len(starts) > 7:
        raise ValueError(f"a text of {len(starts)} words has too many orders; take at most 7")
    words = [np.arange(start, stop) for start, stop in itertools.pairwise([*starts, len(text)])]
    return np.stack([np.concatenate(order) for order in itertools.permutations(words)])


def representations(model: LanguageModel, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """What stands for each token in its context: the states of the last layer; ELMo's of both directions."""
    return model.representations(tokens) if isinstance(model, ELMo) else model.states(model.embed(tokens))


def reordering_change(
    model: LanguageModel, tokens: Int[Array, "T"], orders: Int[np.ndarray, "orders T"]
) -> Float[np.ndarray, "orders"]:
    """How much each order changes what represents the tokens, wherever they come to stand.

    The root mean square of the difference between the representation of reordered tokens and the representations in
    that order, relative to that of the representations: 0 (to rounding) for a model blind to order, about sqrt(2) for
    representations that have nothing in common.
    """
    straight = representations(model, tokens[None])[0]
    reordered = _in_rows(model, tokens[orders])
    return np.asarray(_rms(reordered - straight[orders], (1, 2)) / _rms(straight))


def last_state_change(
    model: LanguageModel, tokens: Int[Array, "T"], orders: Int[np.ndarray, "orders n"]
) -> Float[np.ndarray, "orders"]:
    """How much each order of the first n < T tokens changes the representation of the last, as `reordering_change`."""
    rest = np.arange(orders.shape[1], len(tokens))
    rows = np.concatenate([orders, np.broadcast_to(rest, (len(orders), len(rest)))], axis=1)
    last = _in_rows(model, tokens[rows])[:, -1]
    straight = representations(model, tokens[None])[0, -1]
    return np.asarray(_rms(last - straight, 1) / _rms(straight))


def _in_rows(model: LanguageModel, tokens: Int[Array, "rows T"]) -> Float[Array, "rows T D"]:
    return jax.jit(lambda tokens: representations(model, tokens))(tokens)


def _rms(x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    return jnp.sqrt((x.astype(jnp.float32) ** 2).mean(axis=axis))
