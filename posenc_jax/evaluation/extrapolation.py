r"""Length extrapolation: the loss of a model at each length, and how much the added context reduces it.

All lengths are scored on the same windows, as long as the longest length. For each length L (tokens), in bits per byte:

- prefix: the mean loss over positions [0, L), as if a text were cut into pieces of L (the non-overlapping protocol);
- tail: the mean loss over the last k positions before L, as if a window of L slid by k (the sliding protocol);
- context gain: the loss of these last k tokens with only the context length of the model's first training, minus their
  loss with L tokens. Positive: the model uses the added context. Zero: it merely survives. Negative: it breaks;
- prefix change: the prefix loss with a scaling rule minus the prefix loss without one, on the same windows;
- long: the loss of the key tokens among the last k, if it is asked for. See `long_perplexity`.

Without a scaling rule of the evaluation, a model keeps its own rule. Dynamic NTK, and LongRoPE with short factors, then
follow the length L, also for the short context of the context gain.

The curve `by_position` is the loss at every position of the longest length. For an encoder (bidirectional), all of
these losses are over the hidden tokens only. The same tokens are hidden at every length. Source: Press et al. 2022,
appendix B, for the two protocols and why they differ.
"""

import functools
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from posenc_jax import encodings, positions
from posenc_jax.config import RunConfig, TransformerConfig
from posenc_jax.distributed import hosts
from posenc_jax.encodings import frequencies
from posenc_jax.encodings.base import Constant
from posenc_jax.encodings.mapped import Mapped
from posenc_jax.encodings.position_maps import METHODS
from posenc_jax.evaluation import long_perplexity
from posenc_jax.evaluation.scoring import ScoredModel, evaluation_positions
from posenc_jax.evaluation.window_sums import Key, Sums, WindowSums
from posenc_jax.layer_config import ENCODING, MAIN
from posenc_jax.models.transformer import encoding_dims
from posenc_jax.training import objectives

CURVE_BINS = 64  # the most bins of the loss by position; all have the same width except the last
LOGGED_SECONDS = 60  # passes over the windows that take longer are logged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Losses:
    """Nats and bytes of each token, [W, L], and which tokens are scored. The other tokens have 0 nats and bytes."""

    nats: Float[np.ndarray, "W L"]
    bytes: Int[np.ndarray, "W L"]
    scored: Bool[np.ndarray, "W L"]

    def part(self, start: int, stop: int) -> "Losses":
        """A copy of the positions [start, stop)."""
        return Losses(*(x[:, start:stop].copy() for x in (self.nats, self.bytes, self.scored)))

    def between(self, start: int, stop: int, *, where: Bool[np.ndarray, "W T"] | bool = True) -> Sums:
        """Sums over the positions [start, stop) of each window, or over some of them, chosen by `where`."""
        parts = (x[:, start:stop].sum(1, np.float64, where=where) for x in (self.nats, self.bytes, self.scored))
        return Sums(*parts)

    @property
    def nats_per_token(self) -> float:
        return float(self.nats.sum() / self.scored.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / math.log(2) / self.bytes.sum())


def measure_lengths(
    model: ScoredModel, windows: Int[np.ndarray, "W N"], token_bytes: Int[np.ndarray, "V"]
) -> WindowSums:
    """Score one trained model under every scaling rule at every length of `config.evaluation`.

    Lengths with the same frequencies share one pass over the windows. The sums are None at lengths that the model
    cannot read.
    """
    config = model.config
    lengths, pretrained_length, tail = config.evaluation.lengths, config.pretrained_length, config.evaluation.tail
    reachable = [length for length in lengths if can_read(model, length)]
    # The key of a pass over the windows: the rule with its factor, and the length if the losses depend on it.
    by_length = config.masks_tokens or positions.depend_on_length(config.positions)
    passes = {
        (scaling, length): (rule_at(config, scaling, length), length if by_length else None)
        for scaling in config.evaluation.rope_scalings
        for length in reachable
    }
    longest = {own: max(length for key, length in passes if passes[key, length] == own) for own in passes.values()}
    scored = objectives.evaluation_choice(config, windows)

    def score_range(rule: str, start: int, stop: int) -> Losses:
        return score_scaled(model, rule, windows[:, start : stop + 1], token_bytes, scored[:, start:stop])

    losses = {own: score_range(own[0], 0, length) for own, length in longest.items()}
    unscaled_short = rule_at(config, "none", pretrained_length)
    short = {
        length: score_range(unscaled_short, length - pretrained_length, length).part(
            pretrained_length - tail, pretrained_length
        )
        for length in reachable
        if length > pretrained_length
    }
    keys, context = {}, config.short_window
    for length in reachable if config.evaluation.long_perplexity else ():
        if length > context:
            judged = short.get(length) or losses[passes["none", length]].part(length - tail, length)
            with_little = score_range(rule_at(config, "none", context), length - context, length)
            keys[length] = long_perplexity.key_tokens(judged.nats, with_little.nats[:, -tail:])
    measured: WindowSums = {}
    for scaling in config.evaluation.rope_scalings:
        key = functools.partial(Key, scaling)
        for length in reachable:
            at_length = losses[passes[scaling, length]]
            whole, end = at_length.between(0, length), at_length.between(length - tail, length)
            measured[key("prefix", length)] = whole
            if scaling != "none":
                unscaled = losses[passes["none", length]].between(0, length)
                measured[key("prefix_change", length)] = whole._replace(nats=whole.nats - unscaled.nats)
            measured[key("tail", length)] = end
            if length > pretrained_length:
                gain = short[length].between(0, tail).nats - end.nats
                measured[key("context_gain", length)] = end._replace(nats=gain)
            if length in keys:
                measured[key("long", length)] = at_length.between(length - tail, length, where=keys[length])
        for length in lengths[len(reachable) :]:
            metrics = "prefix", "tail", "context_gain", *(["long"] if config.evaluation.long_perplexity else [])
            measured |= dict.fromkeys(key(metric, length) for metric in metrics)
        if reachable:
            at_longest, width = losses[passes[scaling, reachable[-1]]], math.ceil(lengths[-1] / CURVE_BINS)
            for start in range(0, reachable[-1], width):
                stop = min(start + width, reachable[-1])  # the last bin may be narrower
                sums = at_longest.between(start, stop)
                if sums.tokens.any():  # an encoder may have no hidden token in a bin
                    measured[key("by_position", stop)] = sums
    return measured


def score(
    model: ScoredModel,
    windows: Int[np.ndarray, "W N"],
    token_bytes: Int[np.ndarray, "V"],
    scored: Bool[np.ndarray, "W N-1"] | None = None,
) -> Losses:
    """Losses of windows at the evaluation positions of the run. `scored` defaults to `objectives.evaluation_choice`."""
    config, scorer, params, constants = model
    if scored is None:
        scored = objectives.evaluation_choice(config, windows)
    places = evaluation_positions(config, windows.shape[1] - 1)
    nats = scorer(params, constants, windows, places, scored if config.masks_tokens else None)
    return Losses(nats, np.where(scored, token_bytes[windows[:, 1:]], 0), scored)


def score_scaled(
    model: ScoredModel,
    rule: str,
    windows: Int[np.ndarray, "W N"],
    token_bytes: Int[np.ndarray, "V"],
    scored: Bool[np.ndarray, "W N-1"] | None = None,
) -> Losses:
    """Losses under a rule of `rule_at`. A pass of more than `LOGGED_SECONDS` is logged."""
    begun = time.monotonic()
    losses = score(scaled(model, rule), windows, token_bytes, scored)
    seconds, (count, length) = time.monotonic() - begun, losses.nats.shape
    if seconds > LOGGED_SECONDS and hosts.is_leader():
        log.info("scored %d windows of %d tokens with the scaling rule %s in %.0f s", count, length, rule, seconds)
    return losses


def can_read(model: ScoredModel, length: int) -> bool:
    """Whether windows of this length fit the table of the encoding and the range that positions are drawn from."""
    config, scorer, params, constants = model
    return positions_fit(config, nnx.merge(scorer.graphdef, params, constants).table_length, length)


def positions_fit(config: RunConfig, table_length: int | None, length: int) -> bool:
    """Whether the positions of windows of this length fit the table of an encoding and the range of random positions.

    `table_length` is None if the encoding has no table.
    """
    own = config.positions
    if own.evaluation == "drawn" and own.training in ("offset", "randomized") and length > own.range:
        return False
    places = evaluation_positions(config, length)
    last = length - 1 if places is None else float(places.max())
    return table_length is None or last <= table_length - 1


def rule_at(config: RunConfig, scaling: str, length: int) -> str:
    """The rule with which windows of `length` tokens are read under `scaling`, with all numbers that follow the length.

    Where `scaling` changes nothing at this length, the result is "none": the constants of training. It is the model's
    own rule instead if that follows the length.
    """
    reach = config.pretrained_reach
    rule = frequencies.parse(scaling).at(length, reach)
    own = frequencies.parse(getattr(config.encoding.hyperparameters, "scaling", "none"))
    return str(own.own_at(length, reach) if rule.rule == "none" and own.own_follows_length else rule)


def scaled(model: ScoredModel, rule: str) -> ScoredModel:
    """The model with a rule of `rule_at` in place of that of its training."""
    config, scorer, params, constants = model
    graphdef, constants = structure_under(config, scorer.graphdef, params, constants, rule)
    own = scorer if graphdef is scorer.graphdef else scorer.of(graphdef, rule)
    return model._replace(scorer=own, constants=constants)


def structure_under(
    config: RunConfig, graphdef: nnx.GraphDef, params: Any, constants: Any, rule: str
) -> tuple[nnx.GraphDef, Any]:
    """The structure and the constants of a model under a rule of `rule_at`. Parameters stay the same."""
    scaling = frequencies.parse(rule)
    if scaling.rule not in METHODS:
        return graphdef, scaled_constants(config, constants, rule)
    model = nnx.merge(graphdef, params, constants)
    for name, layer in {layer.module: layer for layer in config.model_layers if layer.rope_scalings}.items():
        setattr(model, name, Mapped(getattr(model, name), layer.rule(scaling), config.pretrained_reach))
    graphdef, _, found = nnx.split(model, nnx.Param, Constant)
    return graphdef, nnx.to_pure_dict(found)


def scaled_constants(config: RunConfig, constants: Any, rule: str) -> Any:
    """The model's constants, with those of its encoding computed for a rule of `rule_at`. Unchanged for "none"."""
    if rule == "none" or frequencies.parse(rule).rule in METHODS:
        return constants
    assert isinstance(config.model, TransformerConfig)  # only transformers have an encoding to scale
    dims, own = encoding_dims(config.model, config.pretrained_reach), {}
    scaling = frequencies.parse(rule)
    layers = (layer for layer in config.model_layers if layer.rope_scalings)
    scaled = {layer.module: (layer.encoding, str(layer.rule(scaling))) for layer in layers}
    shared = {MAIN: (config.encoding, rule)} if encodings.load(config.encoding.name).shared else {}
    for name, (encoding, own_rule) in (shared | scaled).items():
        hyperparameters = vars(encoding.hyperparameters) | {"scaling": own_rule}
        built = encodings.build(encoding.name, dims, nnx.Rngs(0), **hyperparameters)
        own[name] = nnx.to_pure_dict(nnx.state(built, Constant))
    return constants | own


def spectra(config: RunConfig, constants: Any) -> dict[str, Float[np.ndarray, "r"]]:
    """The inverse frequencies (radians per token) of each scaling rule at the longest length."""
    longest, arrays, main = config.evaluation.lengths[-1], {}, MAIN
    if not encodings.load(config.encoding.name).shared:
        own_encoding = [layer for layer in config.model_layers if layer.path == ENCODING and layer.letter != "N"]
        main = max(own_encoding, key=lambda layer: (layer.rope_scalings, not layer.scaling_change)).module
    for scaling in config.evaluation.rope_scalings:
        if frequencies.parse(scaling).rule in METHODS:
            continue
        own = scaled_constants(config, constants, rule_at(config, scaling, longest))
        arrays[scaling] = np.asarray(own[main]["inverse_frequencies"])
    return arrays
