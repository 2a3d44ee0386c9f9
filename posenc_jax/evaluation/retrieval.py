"""The answers of a model to retrieval tasks, at every length and under every scaling rule.

`retrieval_tasks` makes the texts. Answers are scored by teacher forcing or, if `config.evaluation.retrieval_by` is
"generation", in the text that the model generates greedily. A generated part is right if the text contains it, as in
RULER's `string_match_all` (Hsieh et al. 2024). For an answer of one part, both are the same, unless the model splits it
into other tokens.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import Tokenizer
from posenc_jax.evaluation import extrapolation
from posenc_jax.evaluation.retrieval_tasks import Source, Trial, right_items, trials
from posenc_jax.evaluation.scoring import ScoredModel, evaluation_positions
from posenc_jax.evaluation.window_sums import Key, Recall, WindowSums
from posenc_jax.models.decoding import Decoder, continuations
from posenc_jax.models.sampling import Sampling


def measure_tasks(model: ScoredModel, windows: Int[np.ndarray, "W N"], tokenizer: Tokenizer) -> WindowSums:
    """The answers to every task of `config.evaluation`, under every scaling rule, at every length.

    They are None at lengths that the model cannot read. The windows give the text that surrounds the answers. Raises
    ConfigError if a length or the text is too small for a task.
    """
    evaluation, measured = model.config.evaluation, {}
    by_generation = evaluation.retrieval_by == "generation"
    for task, length, asked in all_trials(model.config, windows, tokenizer):
        readable, by_rule = extrapolation.can_read(model, length), {}
        for scaling in evaluation.rope_scalings:
            rule = extrapolation.rule_at(model.config, scaling, length)
            if readable and rule not in by_rule:
                own = extrapolation.scaled(model, rule)
                by_rule[rule] = _generated(own, asked, tokenizer) if by_generation else _forced(own, asked)
            measured[Key(scaling, task, length)] = by_rule.get(rule)
    return measured


def all_trials(
    config: RunConfig, windows: Int[np.ndarray, "W N"], tokenizer: Tokenizer
) -> Iterator[tuple[str, int, list[Trial]]]:
    """Each task with each length and its trials, the same for all models with the same tokenizer and text."""
    evaluation = config.evaluation
    if not evaluation.retrieval_tasks:
        return
    source, asked = Source(tokenizer, windows), (evaluation.retrieval_trials, evaluation.retrieval_depths)
    field = f"config.evaluation.{'retrieval_lengths' if evaluation.retrieval_lengths else 'lengths'}"
    for task in evaluation.retrieval_tasks:
        for length in evaluation.task_lengths:
            yield task, length, trials(task, source, length, *asked, field)


def _forced(model: ScoredModel, asked: Sequence[Trial]) -> Recall:
    tokens = np.stack([trial.tokens for trial in asked])
    last = tokens.shape[1] - min(trial.items[0][0] for trial in asked)
    places = evaluation_positions(model.config, tokens.shape[1] - 1)
    found = model.scorer.predictions(model.params, model.constants, tokens, places, last=last)
    nats, predicted = (np.pad(own, [(0, 0), (tokens.shape[1] - last, 0)]) for own in found)
    of_answers = [sum(own[slice(*item)].sum() for item in trial.items) for trial, own in zip(asked, nats, strict=True)]
    return _recall(asked, of_answers, [right_items(trial, own) for trial, own in zip(asked, predicted, strict=True)])


def _generated(model: ScoredModel, asked: Sequence[Trial], tokenizer: Tokenizer) -> Recall:
    """One trial after the other: caches of long texts are large. The nats are NaN."""
    right = []
    for trial in asked:
        start = trial.items[0][0]
        new = len(trial.tokens) - start
        places = evaluation_positions(model.config, start + new)
        on_host = None if places is None else np.asarray(places)
        arrays = model.scorer.graphdef, model.params, model.constants
        decoder = Decoder(*arrays, start + new, on_host, Sampling())
        steps = continuations(decoder, [trial.tokens[:start]], new, jax.random.split(jax.random.key(0), 1))
        text = tokenizer.decode(np.array([token for (token,) in steps]))
        parts = [tokenizer.decode(trial.tokens[slice(*item)]).strip() for item in trial.items]
        right.append(sum(part in text for part in parts))
    return _recall(asked, [math.nan] * len(asked), right)


def _recall(asked: Sequence[Trial], nats: Sequence[float], right: Sequence[int]) -> Recall:
    return Recall(*(np.array(own, np.float64) for own in (nats, right, [len(trial.items) for trial in asked])))
