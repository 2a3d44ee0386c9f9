"""Reads the sentence with a trained model."""

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from posenc_jax.attention.dense import attention_weights, dense
from posenc_jax.evaluation.extrapolation import positions_fit
from posenc_jax.evaluation.generator import Generator
from posenc_jax.evaluation.scoring import evaluation_positions
from posenc_jax.models.transformer import Transformer
from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough.reading import MOVED, NEXT, Reading, Trained, to_previous
from posenc_jax.walkthrough.tokens import Tokens, piece


def read(name: str, generator: Generator, tokens: Tokens) -> Trained:
    """Read tokens of the model's tokenizer in three ways. Raises ConfigError for an unsuitable model or sentence."""
    model = generator.model
    if not isinstance(model, Transformer):
        raise ConfigError(
            "--model", name, f"must be a transformer: a model of kind {type(model).__name__} has no heads"
        )
    if any(model.encoding(layer).head_factor > 1 for layer in range(model.num_layers)):
        allowed = f"must not have encoding {generator.config.label!r}: layers without it have fewer attention heads"
        raise ConfigError("--model", name, allowed)
    T = len(tokens.ids)
    if T < 2:
        raise ConfigError("sentence", tokens.sentence, "must have at least 2 tokens with --model")
    if not positions_fit(generator.config, model.table_length, T):
        allowed = f"must have at most {model.table_length} tokens, for which {name} has positions"
        raise ConfigError("sentence", tokens.sentence, allowed)
    own = evaluation_positions(generator.config, T)
    places = jnp.arange(T)[None] if own is None else own
    fits = model.table_length is None or places.max() + MOVED < model.table_length
    plain = _read(generator, tokens, places)
    layer, head = np.unravel_index(to_previous(plain.weights).argmax(), plain.weights.shape[:2])
    ids = np.argsort(-plain.following, kind="stable")[:NEXT]
    return Trained(
        *(name, generator.config.label, int(layer), int(head)),
        *(tuple(piece(generator.bytes_of(int(i))) for i in ids), ids),
        *(plain, _read(generator, tokens, places, encoded=False)),
        _read(generator, tokens, places + MOVED) if fits else None,
    )


def _read(generator: Generator, tokens: Tokens, places: jnp.ndarray, encoded: bool = True) -> Reading:
    model, found = generator.model, []
    assert isinstance(model, Transformer)
    if not encoded:
        model.drop_encodings()

    def attend(*arguments):
        found.append(attention_weights(*arguments)[0])
        return dense(*arguments)

    model.remat = False  # jax.checkpoint would not let the weights out of a layer
    for layer in range(model.num_layers):
        model.block(layer).attention.attend = attend
    logits = model(jnp.array([tokens.ids]), places)[0, -1]
    return Reading(np.stack(found), softmax(np.asarray(logits, np.float64)).astype(np.float32))
