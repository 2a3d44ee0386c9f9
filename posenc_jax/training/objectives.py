"""Objectives of training and evaluation: predict the next token, masked tokens, or tokens in both directions."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from posenc_jax.config import RunConfig
from posenc_jax.models.language_model import LanguageModel
from posenc_jax.models.recurrent import ELMo
from posenc_jax.tasks.base import PAD


def training_loss(
    config: RunConfig,
    model: LanguageModel,
    tokens: Int[Array, "B N"],
    positions: Array | None,
    key: Array,
    marks: Int[Array, "B N"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, "B N-1"]]:
    """Mean loss in nats of the scored tokens among the last N - 1 of each window, and the mask of scored tokens.

    - A causal model predicts each of the N - 1 tokens from the tokens before it.
    - An encoder predicts a random fraction of the tokens, `mask_ratio`, from all others. Their number is the same in
      every window. 80 % of these tokens are masked, 10 % are replaced by a random token, and 10 % are unchanged: Devlin
      et al. 2019, section 3.1.
    - ELMo predicts each of the N - 1 tokens from the tokens before it. Its backward direction predicts each token but
      the last from the tokens after it.

    If a window holds several documents (see `posenc_jax.documents`), `marks` are their numbers. Each token is then
    predicted from tokens of its own document. The first token of a document, and for ELMo's backward direction the
    last, is not scored. In samples of a task, `marks` are 1 for tokens that are scored; see `answer_states`.
    """
    dropout_key = key if config.model.dropout else None
    targets = tokens[:, 1:]
    if config.task.name:
        assert marks is not None
        scored = marks[:, 1:] > 0
        states = answer_states(model, tokens, scored if config.masks_tokens else None, positions, dropout_key)
        nats = model.cross_entropy(states, targets)
        return _mean(nats, scored), scored.astype(jnp.float32)
    documents = marks
    of_inputs, of_targets = (None, None) if documents is None else (documents[:, :-1], documents[:, 1:])
    if config.masks_tokens:
        choice_key, change_key = jax.random.split(jax.random.fold_in(key, 1))
        scored = chosen(choice_key, targets.shape, config.training.mask_ratio)
        read = corrupted(change_key, targets, scored, model.vocab_size)
        nats = jnp.where(scored, _nats(model, read, targets, positions, dropout_key, of_targets), 0)
        return nats.sum() / scored.sum(), scored.astype(jnp.float32)
    nats = _nats(model, tokens[:, :-1], targets, positions, dropout_key, of_inputs)
    if isinstance(model, ELMo):
        back_key = None if dropout_key is None else jax.random.fold_in(dropout_key, 2)
        back = model.backward_states(model.embed(targets), documents=of_targets, dropout_key=back_key)
        nats = (nats + model.cross_entropy(back, tokens[:, :-1])) / 2
    if documents is None:
        return nats.mean(), jnp.ones(targets.shape, jnp.float32)
    scored = of_inputs == of_targets
    return _mean(nats, scored), scored.astype(jnp.float32)


def token_losses(
    model: LanguageModel,
    tokens: Int[Array, "B N"],
    positions: Array | None = None,
    hidden: Bool[Array, "B N-1"] | None = None,
) -> Float[Array, "B N-1"]:
    """Loss in nats of each token after the first, predicted from the tokens before it, at the given `positions`.

    `hidden` is for bidirectional models: each hidden token is predicted from all others after the first. The loss of
    tokens that are not hidden is 0.
    """
    targets = tokens[:, 1:]
    if hidden is None:
        return _nats(model, tokens[:, :-1], targets, positions)
    read = jnp.where(hidden, model.vocab_size, targets)
    return jnp.where(hidden, _nats(model, read, targets, positions), 0)


def answer_states(
    model: LanguageModel,
    tokens: Int[Array, "B N"],
    hidden: Bool[Array, "B N-1"] | None = None,
    positions: Array | None = None,
    dropout_key: Array | None = None,
) -> Float[Array, "B N-1 D"]:
    """The states that predict each token after the first from those before it.

    `hidden` is for bidirectional models: the hidden tokens, which are answers in samples of a task, are predicted from
    all others but PAD.
    """
    if hidden is None:
        return model.states(model.embed(tokens[:, :-1]), positions, dropout_key=dropout_key)
    read, padding = jnp.where(hidden, model.vocab_size, tokens[:, 1:]), (tokens[:, 1:] == PAD).astype(jnp.int32)
    return model.states(model.embed(read), positions, documents=padding, dropout_key=dropout_key)


def last_predictions(
    model: LanguageModel,
    tokens: Int[Array, "B N"],
    positions: Array | None = None,
    hidden: Bool[Array, "B N-1"] | None = None,
    *,
    last: int,
) -> tuple[Float[Array, "B last"], Int[Array, "B last"]]:
    """Loss in nats of the last tokens, by `answer_states`, and the most likely token at the place of each."""
    states = answer_states(model, tokens, hidden, positions)[:, -last:]
    return model.cross_entropy(states, tokens[:, -last:]), model.unembed(states).argmax(axis=-1)


def evaluation_choice(config: RunConfig, windows: Int[np.ndarray, "W N"]) -> Bool[np.ndarray, "W N-1"]:
    """The mask of scored tokens in evaluation windows: all but the first or, for an encoder, a fixed random choice."""
    shape = (windows.shape[0], windows.shape[1] - 1)
    if not config.masks_tokens:
        return np.ones(shape, bool)
    return np.random.default_rng(0).random(shape) < config.training.mask_ratio


def chosen(key: Array, shape: tuple[int, ...], fraction: float) -> Bool[Array, "B T"]:
    """A random mask with the same number of True entries in every row, at least one."""
    count = max(1, round(fraction * shape[1]))
    return jax.random.uniform(key, shape).argsort(axis=1).argsort(axis=1) < count


def corrupted(key: Array, tokens: Int[Array, "B T"], scored: Bool[Array, "B T"], vocab_size: int) -> Int[Array, "B T"]:
    """Replace scored tokens: 80 % by the mask token (id V), 10 % by a random token. The other 10 % are unchanged."""
    share_key, token_key = jax.random.split(key)
    share = jax.random.uniform(share_key, tokens.shape)
    drawn = jax.random.randint(token_key, tokens.shape, 0, vocab_size)
    changed = jnp.where(share < 0.8, vocab_size, jnp.where(share < 0.9, drawn, tokens))
    return jnp.where(scored, changed, tokens)


def _mean(nats, scored):
    return jnp.where(scored, nats, 0).sum() / jnp.maximum(scored.sum(), 1)


def _nats(model, read, targets, positions, key=None, documents=None):
    states = model.states(model.embed(read), positions, documents=documents, dropout_key=key)
    return model.cross_entropy(states, targets)
