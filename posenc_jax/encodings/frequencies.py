r"""RoPE scaling rules: how the inverse frequencies change so that a model reads past its training length.

RoPE's inverse frequencies are theta_m = base^(-2m/d) radians per token, m = 0 .. d/2 - 1, where d is the rotated width.
A rule is a pure function `(head_dim, base, length, **parameters) -> (inverse_frequencies [d/2], attention_factor)` in
float64 on the host. `length` (tokens) is the context that the weights were first trained on, also in runs that continue
another run. The attention factor multiplies rotated queries and keys.

A scaling is written as a rule with parameters: "none", "yarn", "yarn:factor=8,beta_fast=2". The default factor is
(length read) / (training length). A parameter with one number per pair has "|" between the numbers:
"longrope:factors=1|1.5|2|4". A rule depends only on its arguments, so no state of an earlier, longer sequence can
remain (a defect of several dynamic-NTK implementations with a cache).

A rule that a model is trained with is its own rule. It keeps the constants of training at every length, and a factor
that is not given is 1. Two own rules follow the length read instead: "dynamic_ntk" without `read`, and "longrope" with
`short`.

At evaluation a scaling may also be one of the METHODS of `position_maps`, which keep the frequencies and change the
positions of pairs of tokens.

Each scaling has one text. It has the parameters in the order of the rule, without those at their defaults, and the
shortest form of each number. A setting of type `Text` is converted to it, so that "yarn:factor=4.0,beta_fast=32" and
"yarn:factor=4" are one run.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from posenc_jax.encodings.position_maps import METHODS, WHOLE, Maps
from posenc_jax.schema import ConfigError

Frequencies = tuple[np.ndarray, float]
Parameter = Any  # a number, or a tuple with one number per pair


def none(head_dim: int, base: float, length: int) -> Frequencies:
    """RoPE without scaling: Su et al. 2021, §3.2.2."""
    return base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim), 1.0


def linear(head_dim: int, base: float, length: int, *, factor=1.0) -> Frequencies:
    """Position interpolation: theta_m / s. Chen et al. 2023, §2.3."""
    return none(head_dim, base, length)[0] / factor, 1.0


def ntk(head_dim: int, base: float, length: int, *, factor=1.0) -> Frequencies:
    """NTK-aware: base' = base s^(d/(d-2)), which keeps the fastest pair and interpolates the slowest.

    Peng et al. 2023 (YaRN), Definition 1.
    """
    return none(head_dim, base * factor ** (head_dim / (head_dim - 2)), length)


def rebased(head_dim: int, base: float, length: int, *, to=1e6) -> Frequencies:
    """Another base, also within the training length: Rozière et al. 2023 (Code Llama), §2.3, without its tuning."""
    return none(head_dim, to, length)


def dynamic_ntk(head_dim: int, base: float, length: int, *, factor=2.0, read=0.0) -> Frequencies:
    """Dynamic NTK: past the training length L, base' = base (s l/L - s + 1)^(d/(d-2)) for `read` = l tokens.

    Peng et al. 2023, §3.3. s = 2 is the usual factor. s = 1 is NTK-aware scaling with factor l/L.
    """
    growth = max(1.0, factor * read / length - (factor - 1))
    return ntk(head_dim, base, length, factor=growth)


def proportional(head_dim: int, base: float, length: int, *, fraction=1.0, factor=1.0) -> Frequencies:
    """The fastest pairs, a `fraction` of all, turn at theta_m / s. The others do not turn. With s = 1 it is `p_rope`.

    Barbero et al. 2024 (p-RoPE); the factor is that of Hugging Face's rule of this name.
    """
    theta, _ = linear(head_dim, base, length, factor=factor)
    return np.where(np.arange(head_dim // 2) < int(fraction * head_dim / 2), theta, 0), 1.0


def by_parts(
    head_dim: int,
    base: float,
    length: int,
    *,
    factor=1.0,
    beta_fast=32.0,
    beta_slow=1.0,
    paper_ramp=False,
    truncate=True,
    always_cut=False,
) -> Frequencies:
    """NTK-by-parts: keeps pairs that turn more than beta_fast times in L, interpolates those below beta_slow turns.

    Peng et al. 2023, Definition 2. Pairs in between are mixed. The released code, and this default, mix linearly in the
    index of the pair, over `correction_range`, which takes `truncate` and `always_cut`. `paper_ramp=True` mixes
    linearly in the number of turns, as the paper's equation does.
    """
    theta, _ = none(head_dim, base, length)
    if paper_ramp:
        turns = length * theta / (2 * math.pi)
        kept = np.clip((turns - beta_slow) / (beta_fast - beta_slow), 0, 1)
    else:
        options = {"truncate": truncate, "always_cut": always_cut}
        low, high = correction_range(head_dim, base, length, beta_fast, beta_slow, **options)
        kept = 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)
    return kept * theta + (1 - kept) * theta / factor, 1.0


def yarn(
    head_dim: int,
    base: float,
    length: int,
    *,
    factor=1.0,
    beta_fast=32.0,
    beta_slow=1.0,
    paper_ramp=False,
    temperature=0.1,
    truncate=True,
    always_cut=False,
    attention_factor=0.0,
    resonant=False,
) -> Frequencies:
    """YaRN: `by_parts`, with queries and keys each multiplied by (temperature ln s) + 1. Peng et al. 2023, §3.4.

    An `attention_factor` other than 0 replaces (temperature ln s) + 1. If `resonant`, frequencies are those of
    `resonance` (Resonance YaRN).

    The published beta_fast = 32 assumes contexts of thousands of tokens. In 256 tokens, with base 10^4 and d = 64, only
    one pair turns that often. The paper's ramp then interpolates nearly all others, and the code's ramp far fewer. A
    beta_fast in proportion to the training length, 32 L / 4096, keeps more of them.
    """
    theta, _ = by_parts(
        head_dim,
        base,
        length,
        factor=factor,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        paper_ramp=paper_ramp,
        truncate=truncate,
        always_cut=always_cut,
    )
    theta = _whole_wavelengths(theta) if resonant else theta
    return theta, attention_factor or temperature * math.log(max(factor, 1.0)) + 1


def resonance(head_dim: int, base: float, length: int) -> Frequencies:
    """Resonance RoPE: wavelengths 2 pi / theta_m rounded to whole tokens, so that pairs repeat the same angles.

    Wang et al. 2024, section 4. It changes all lengths. The paper trains with it; here it can be set in both.
    """
    return _whole_wavelengths(none(head_dim, base, length)[0]), 1.0


def _whole_wavelengths(theta: np.ndarray) -> np.ndarray:
    return 2 * math.pi / np.round(2 * math.pi / theta)


def llama3(
    head_dim: int, base: float, length: int, *, factor=1.0, low_freq_factor=1.0, high_freq_factor=4.0
) -> Frequencies:
    """Llama 3: keeps wavelengths below L/high, interpolates those above L/low, and mixes the two in between.

    This is `by_parts` with the paper's ramp. From Llama 3.1's released code, where L is 8192 and the factor 8.
    """
    fast, slow = high_freq_factor, low_freq_factor
    return by_parts(head_dim, base, length, factor=factor, beta_fast=fast, beta_slow=slow, paper_ramp=True)


def longrope(
    head_dim: int,
    base: float,
    length: int,
    *,
    factors: tuple[float, ...] = (),
    short: tuple[float, ...] = (),
    factor=1.0,
    attention_factor=0.0,
) -> Frequencies:
    """LongRoPE: theta_m / lambda_m, with given lambda [d/2]. Queries and keys are multiplied by sqrt(1 + ln s / ln L).

    `short`, if given, is lambda within the training length. `Scaling.at` leaves it out past that length, where lambda
    is `factors`. An `attention_factor` other than 0 replaces sqrt(1 + ln s / ln L).

    Ding et al. 2024; `experiments.longrope_search` searches lambda for a trained model. The paper's first tokens,
    which keep their frequencies, are left out: a rule would have to depend on more than the length.
    """
    theta, _ = none(head_dim, base, length)
    own = math.sqrt(1 + math.log(max(factor, 1.0)) / math.log(length))
    return theta / np.asarray(short or factors), attention_factor or own


def correction_range(
    head_dim: int,
    base: float,
    length: int,
    beta_fast: float,
    beta_slow: float,
    *,
    truncate: bool = True,
    always_cut: bool = False,
) -> tuple[float, float]:
    """Indices low < high between which by_parts mixes. Pairs up to low are kept, those from high on are interpolated.

    These are the indices at which a pair turns beta_fast and beta_slow times in `length`, rounded down and up unless
    `truncate` is False, and cut to [0, d - 1] as in YaRN's released code. Differs from that code if no pair turns
    beta_slow times, or all turn beta_fast times. Cutting then gives low >= high, and the code (also Hugging Face
    transformers) keeps pairs that it should interpolate, or the reverse. Here the range is then not cut, so that all
    pairs are interpolated, or all kept. With `always_cut` it is cut as in that code, where low = high becomes low <
    high by adding 0.001 to high, and low > high remains.
    """
    low, high = (pair_index(head_dim, base, length, turns) for turns in (beta_fast, beta_slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    cut_low, cut_high = max(low, 0), min(high, head_dim - 1)
    if always_cut:
        return cut_low, cut_high + (0.001 if cut_low == cut_high else 0)
    return (cut_low, cut_high) if cut_low < cut_high else (low, high)


def pair_index(head_dim: int, base: float, length: int, turns: float) -> float:
    """The index m, not always whole, at which length theta_m = 2 pi turns.

    It is rounded to 9 decimals, so that rounding errors of the logarithm do not change its floor and ceiling.
    """
    return round(head_dim * math.log(length / (2 * math.pi * turns)) / (2 * math.log(base)), 9)


RULES: dict[str, Callable[..., Frequencies]] = {
    rule.__name__: rule
    for rule in (none, linear, ntk, rebased, dynamic_ntk, proportional, by_parts, yarn, resonance, llama3, longrope)
}


@dataclass(frozen=True)
class Scaling:
    """A rule and the parameters that were given. `original_length` replaces the length of the first training."""

    rule: str
    parameters: tuple[tuple[str, Parameter], ...] = ()

    def __str__(self) -> str:
        written = (f"{name}={_written(x)}" for name, x in self.parameters)
        return self.rule + ":" * bool(self.parameters) + ",".join(written)

    def at(self, read: int, training_length: int) -> "Scaling":
        """This scaling for reading `read` tokens, with the factor that follows from that length unless one is given.

        A rule whose factor follows the length read is "none" within the training length, or has its `short` factors.
        """
        given = dict(self.parameters)
        length, follows = given.get("original_length", training_length), _follows_length_read(self.rule)
        fixed = follows is None or follows in given
        if read <= length:
            return self if fixed or "short" in given else Scaling("none")
        if fixed and "short" not in given:
            return self
        given.pop("short", None)
        if follows is not None and not fixed:
            given[follows] = float(read) if follows == "read" else read / length
        return _ordered(self.rule, given)

    @property
    def values(self) -> dict[str, Parameter]:
        """All parameters of the rule, with the defaults of those that were not given."""
        return _parameters(self.rule) | dict(self.parameters)

    @property
    def own_follows_length(self) -> bool:
        """Whether a model with this as its own rule has other frequencies past the training length than within it."""
        given = dict(self.parameters)
        return "short" in given or (self.rule == "dynamic_ntk" and "read" not in given)

    def own_at(self, read: int, training_length: int) -> "Scaling":
        """This scaling as the model's own rule, for reading `read` tokens. Unchanged within the training length."""
        within = read <= dict(self.parameters).get("original_length", training_length)
        return self if within or not self.own_follows_length else self.at(read, training_length)

    def check(self, head_dim: int, base: float, training_length: int, lengths: Iterable[int], field: str) -> None:
        """Raise ConfigError, naming `field`, if the parameters do not fit a head that reads these lengths.

        A parameter with one number per pair must have d/2 numbers, and the frequencies must be finite at all lengths.
        """
        if self.rule in METHODS:
            try:
                self.maps(training_length)
            except ValueError as error:
                raise ConfigError(field, str(self), str(error)) from error
            return
        pairs = head_dim // 2
        for name, value in self.parameters:
            if isinstance(value, tuple) and len(value) != pairs:
                raise ConfigError(field, str(self), f"{name} must be {pairs} numbers, one per pair, not {len(value)}")
        for scaling in (self, *(self.at(length, training_length) for length in lengths)):
            try:
                with np.errstate(all="ignore"):
                    found = np.append(*scaling.frequencies(head_dim, base, training_length))
            except (ArithmeticError, ValueError):  # the math module refuses numbers that are too large
                found = np.array(np.nan)
            if not np.all(np.isfinite(found) & (found >= 0)):
                found = f"{scaling} produces others for {head_dim} rotated channels and base {base:g}"
                allowed = f"must give finite frequencies; {found}"
                raise ConfigError(field, str(self), allowed)

    def maps(self, training_length: int) -> Maps:
        """The maps of positions of a method. Raises ValueError for numbers that do not fit the training length."""
        values = dict(self.parameters)
        length = int(values.pop("original_length", training_length))
        return METHODS[self.rule](length, **values)

    def frequencies(self, head_dim: int, base: float, training_length: int) -> Frequencies:
        """Inverse frequencies [head_dim/2] and attention factor."""
        values = dict(self.parameters)
        length = int(values.pop("original_length", training_length))
        defaults = _parameters(self.rule)
        return RULES[self.rule](head_dim, base, length, **{name: type(defaults[name])(x) for name, x in values.items()})


def parse(text: str, field: str = "scaling", known: Collection[str] = (*RULES, *METHODS)) -> Scaling:
    """Read "RULE" or "RULE:PARAMETER=NUMBER,...", with one of the `known` rules. Raises ConfigError, naming `field`."""
    rule, colon, rest = text.partition(":")
    if rule not in known:
        raise ConfigError(field, text, "must begin with a rule: " + ", ".join(known), known)
    defaults = _parameters(rule)
    allowed = [*defaults, "original_length"] if defaults else []
    given: dict[str, Parameter] = {}
    for part in rest.split(",") if colon else ():
        name, _, number = part.partition("=")
        if name not in allowed or name in given:
            known = ", ".join(allowed) or "nothing"
            nearest = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(field, text, f"{rule} takes, each once: {known}{hint}")
        per_pair = defaults.get(name) == ()
        try:
            numbers = tuple(map(float, number.split("|") if per_pair else [number]))
        except ValueError:
            expected = 'numbers with "|" between them' if per_pair else "a number"
            raise ConfigError(field, text, f"{name} must be {expected}") from None
        least = {"factor": 1, "factors": 1e-3, "short": 1e-3, "original_length": 2, "to": 1.5}.get(name, 0)
        most = 1 if name == "fraction" else math.inf
        if not all(least <= x <= most and math.isfinite(x) for x in numbers):
            allowed = f"between {least} and {most}" if math.isfinite(most) else f"of at least {least}"
            raise ConfigError(field, text, f"{name} must be a finite number {allowed}")
        if name in ("original_length", *WHOLE) and numbers[0] % 1:
            raise ConfigError(field, text, f"{name} must be an integer number of tokens")
        if isinstance(defaults.get(name), bool) and numbers[0] not in (0, 1):
            raise ConfigError(field, text, f"{name} must be 0 or 1")
        given[name] = numbers if per_pair else numbers[0]
    values = defaults | given
    if values.get("factors") == ():
        raise ConfigError(field, text, f'{rule} needs factors, numbers with "|" between them, one per pair')
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in values and not 0 < values[low] < values[high]:
            raise ConfigError(field, text, f"must have 0 < {low} ({values[low]:g}) < {high} ({values[high]:g})")
    return _ordered(rule, given)


@dataclass(frozen=True)
class _OneText:
    known: tuple[str, ...]

    def parse(self, value: str, path: str) -> str:
        return str(parse(value, path, self.known))


# The types of settings that are a scaling: of a model, and in its evaluation.
Text = Annotated[str, _OneText((*RULES,))]
EvaluationText = Annotated[str, _OneText((*RULES, *METHODS))]


def _ordered(rule: str, given: dict[str, Parameter]) -> Scaling:
    """A scaling in its shortest form: without defaults, except of the parameter that may follow the length read."""
    defaults, follows = _parameters(rule), _follows_length_read(rule)
    names = [name for name in (*defaults, "original_length") if name in given]
    kept = [name for name in names if name == follows or given[name] != defaults.get(name)]
    return Scaling(rule, tuple((name, given[name]) for name in kept))


def _follows_length_read(rule: str) -> str | None:
    """The parameter of a rule whose value follows the length read unless it is given."""
    return next((name for name in ("read", "factor") if name in _parameters(rule)), None)


def _written(parameter: Parameter) -> str:
    if isinstance(parameter, tuple):
        return "|".join(map(_written, parameter))
    return repr(float(parameter)).removesuffix(".0")


def _parameters(rule: str) -> dict[str, Parameter]:
    """The keyword parameters of a rule, with their defaults."""
    signature = inspect.signature((RULES | METHODS)[rule]).parameters.values()
    return {parameter.name: parameter.default for parameter in signature if parameter.kind is parameter.KEYWORD_ONLY}
