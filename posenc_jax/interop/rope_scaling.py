"""RoPE in a Hugging Face config.json: read into the settings of encoding `rope`, and written back.

A file has RoPE's fields in one of two forms. In the older form, `rope_theta` and `partial_rotary_factor` stand beside
the section `rope_scaling`. transformers 5 writes all of them into the section `rope_parameters`, which may hold one
section per layer type instead: see `read_section`.

Source: `modeling_rope_utils.py` of transformers 5.24. Fields that are missing in a section have its defaults: base
10,000, all channels rotated, `beta_fast` 32, `beta_slow` 1, `truncate` true, `factor` 1 for "proportional", and
`original_max_position_embeddings` equal to `max_position_embeddings`. An unknown rule, an unknown field of a section,
and a value outside its range are ConfigErrors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from posenc_jax.encodings import frequencies
from posenc_jax.encodings.frequencies import Scaling
from posenc_jax.interop.fields import Fields
from posenc_jax.schema import ConfigError, NonNegative, Positive, Range, convert
from posenc_jax.training_config import Length

BASE, SHARE = Range(above=1), Range(above=0, at_most=1)
Factor = Annotated[float, Range(at_least=1)]
PerPair = tuple[Annotated[float, Range(at_least=1e-3)], ...]
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Rope:
    """Settings of encoding `rope`, and the context length (tokens) that its scaling rule starts from."""

    base: float
    fraction: float
    scaling: str
    pretrained_length: int

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of config.encoding."""
        return {"base": self.base, "fraction": self.fraction, "scaling": self.scaling}


@dataclass(frozen=True, kw_only=True)
class _Section:
    """The fields of rule "default", which all rules have."""

    starts_from_original: ClassVar[bool] = False  # whether the rule has original_max_position_embeddings

    rope_type: str = "default"
    type: str | None = None  # the older name of rope_type
    rope_theta: Annotated[float, BASE] = 10000.0
    partial_rotary_factor: Annotated[float, SHARE] = 1.0

    def rule(self, width: int, longest: int, path: str) -> tuple[Scaling, int]:
        """The rule of `frequencies`, and the context length (tokens) that it starts from."""
        return Scaling("none"), longest


@dataclass(frozen=True, kw_only=True)
class _Linear(_Section):
    factor: Factor

    def rule(self, width, longest, path):
        return Scaling("linear", (("factor", self.factor),)), longest


@dataclass(frozen=True, kw_only=True)
class _Dynamic(_Section):
    factor: Factor
    original_max_position_embeddings: Length | None = None  # transformers does not read it

    def rule(self, width, longest, path):
        if self.original_max_position_embeddings not in (None, longest):
            allowed = f'must be max_position_embeddings = {longest} for "dynamic", which starts from that length'
            raise ConfigError(f"{path}.{ORIGINAL}", self.original_max_position_embeddings, allowed)
        return Scaling("dynamic_ntk", (("factor", self.factor),)), longest


@dataclass(frozen=True, kw_only=True)
class _Proportional(_Section):
    factor: Factor = 1.0

    def rule(self, width, longest, path):
        return Scaling("proportional", (("fraction", self.partial_rotary_factor), ("factor", self.factor))), longest


@dataclass(frozen=True, kw_only=True)
class _Original(_Section):
    starts_from_original = True

    original_max_position_embeddings: Length


@dataclass(frozen=True, kw_only=True)
class _Llama3(_Original):
    factor: Factor
    low_freq_factor: Positive
    high_freq_factor: Positive

    def rule(self, width, longest, path):
        low, high = self.low_freq_factor, self.high_freq_factor
        if not low < high:
            raise ConfigError(f"{path}.low_freq_factor", low, f"must be below high_freq_factor = {high:g}")
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return Scaling(
            "llama3", tuple((name, getattr(self, name)) for name in names)
        ), self.original_max_position_embeddings


@dataclass(frozen=True, kw_only=True)
class _Yarn(_Original):
    factor: Factor | None  # null: max_position_embeddings / original_max_position_embeddings
    attention_factor: Positive | None = None
    mscale: NonNegative | None = None
    mscale_all_dim: NonNegative | None = None
    beta_fast: NonNegative | None = None  # 0 and null: the default
    beta_slow: NonNegative | None = None
    truncate: bool = True

    def rule(self, width, longest, path):
        original = self.original_max_position_embeddings
        factor = longest / original if self.factor is None else self.factor
        if factor < 1:
            allowed = f"stands for max_position_embeddings / {ORIGINAL} = {factor:g}, which must be at least 1"
            raise ConfigError(f"{path}.factor", None, allowed)
        given: dict[str, Any] = {"factor": factor, "truncate": self.truncate}
        given |= {"beta_fast": self.beta_fast or 32.0, "beta_slow": self.beta_slow or 1.0}
        if not given["beta_slow"] < given["beta_fast"]:
            raise ConfigError(
                f"{path}.beta_slow", given["beta_slow"], f"must be below beta_fast = {given['beta_fast']:g}"
            )
        if self.attention_factor is not None:
            given["attention_factor"] = self.attention_factor
        elif self.mscale and self.mscale_all_dim:
            over, under = (0.1 * scale * math.log(factor) + 1.0 for scale in (self.mscale, self.mscale_all_dim))
            given["attention_factor"] = over / under
        # The range of pairs that transformers mixes, also where no pair or every pair should be interpolated.
        released, own = _ranges(width, self.rope_theta, original, given)
        return Scaling("yarn", tuple((given | {"always_cut": released != own}).items())), original


@dataclass(frozen=True, kw_only=True)
class _LongRope(_Original):
    short_factor: PerPair
    long_factor: PerPair
    factor: Factor | None = None  # null: max_position_embeddings / original_max_position_embeddings
    attention_factor: Positive | None = None

    def rule(self, width, longest, path):
        for name in ("short_factor", "long_factor"):
            value = getattr(self, name)
            if len(value) != width // 2:
                allowed = (
                    f"must be {width // 2} numbers, one per pair of the {width} rotated channels, not {len(value)}"
                )
                raise ConfigError(f"{path}.{name}", value, allowed)
        original = self.original_max_position_embeddings
        factor = max(longest / original, 1.0) if self.factor is None else self.factor
        given: dict[str, Any] = {"factors": self.long_factor, "factor": factor}
        if self.short_factor != self.long_factor:
            given["short"] = self.short_factor
        if self.attention_factor is not None:
            given["attention_factor"] = self.attention_factor
        return Scaling("longrope", tuple(given.items())), original


TYPES: dict[str, type[_Section]] = {
    "default": _Section,
    "linear": _Linear,
    "dynamic": _Dynamic,
    "yarn": _Yarn,
    "longrope": _LongRope,
    "llama3": _Llama3,
    "proportional": _Proportional,
}


def read(
    fields: Fields,
    head_dim: int,
    *,
    base: float = 10000.0,
    fraction: float | None = None,
    base_field: str = "rope_theta",
    fraction_field: str = "partial_rotary_factor",
) -> Rope:
    """RoPE's settings from the fields of a config.json whose layers all have one rule. Raises ConfigError.

    Args:
      fields: the fields, of which all that are about RoPE are taken.
      head_dim: channels of a head.
      base: the base of the family where no field gives it.
      fraction: the rotated share of the channels where no field gives it; None for families that rotate all of them.
        transformers ignores the field there, or fails, so it is refused.
      base_field: the field beside the section that holds the base ("rotary_emb_base" in GPT-NeoX).
      fraction_field: that of the rotated share ("rotary_pct" in GPT-NeoX).
    """
    given = {name: fields.take(name, dict, {}) for name in ("rope_scaling", "rope_parameters")}
    name = "rope_scaling" if given["rope_scaling"] else "rope_parameters"  # transformers reads the first that it finds
    own, path, longest = dict(given[name]), f"{fields.path}: {name}", fields.count("max_position_embeddings")
    if nested := [name for name, value in own.items() if isinstance(value, Mapping)]:
        raise ConfigError(path, nested, "has a section per layer type, where this model has one for all layers")
    beside: dict[str, Any] = {"rope_theta": _number(fields, base_field, BASE, base)}
    if fraction is None:
        fields.expect(**{fraction_field: 1.0})
    else:
        beside["partial_rotary_factor"] = _number(fields, fraction_field, SHARE, fraction)
    original = fields.take(ORIGINAL, int, None)
    if original is not None and _type(own, path).starts_from_original:
        own[ORIGINAL] = original
    found = _read(beside | own, path, head_dim, longest)
    if fraction is None and found.fraction != 1:
        raise ConfigError(f"{path}.partial_rotary_factor", found.fraction, "must be 1 for this family")
    return found


def read_section(section: Mapping[str, Any], path: str, head_dim: int, longest: int, *, base: float = 10000.0) -> Rope:
    """RoPE's settings from the section of one layer type, such as "full_attention". Raises ConfigError.

    Args:
      section: the fields of the section.
      path: the name of the section in errors.
      head_dim: channels of a head.
      longest: `max_position_embeddings`, in tokens.
      base: the base if the section has no `rope_theta`.
    """
    if section.get("truncate", True) is not True:
        allowed = "must be true in the section of a layer type, where transformers does not read it"
        raise ConfigError(f"{path}.truncate", section["truncate"], allowed)
    return _read({"rope_theta": base} | dict(section), path, head_dim, longest)


def section(rope: Rope, head_dim: int, field: str = "config.encoding") -> tuple[dict[str, Any], int]:
    """The fields of a section of `rope_parameters`, and max_position_embeddings (tokens). The inverse of `read`.

    A rule that only changes the base is written as another `rope_theta`. A factor that is not given is 1, as in
    training. Raises ConfigError, with a name of a setting that begins with `field`, if transformers has no such rule.
    """
    scaling = frequencies.parse(rope.scaling, f"{field}.scaling")
    values, width, rule = scaling.values, int(rope.fraction * head_dim), scaling.rule
    length = int(values.get("original_length", rope.pretrained_length))
    own: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.fraction != 1:
        own["partial_rotary_factor"] = rope.fraction
    if rule in ("none", "rebased", "ntk") or (rule == "dynamic_ntk" and values["read"]):
        return own | {"rope_theta": _raised_base(rope.base, width, length, rule, values)}, rope.pretrained_length
    own["factor"] = factor = values["factor"]
    if rule == "linear":
        return own | {"rope_type": "linear"}, rope.pretrained_length
    if rule == "dynamic_ntk":
        return own | {"rope_type": "dynamic"}, length
    if rule == "proportional":
        if rope.fraction != 1:
            allowed = "must be 1 for proportional, which has its own fraction"
            raise ConfigError(f"{field}.fraction", rope.fraction, allowed)
        own |= {"rope_type": rule, "partial_rotary_factor": values["fraction"]}
        return {name: x for name, x in own.items() if (name, x) != ("factor", 1.0)}, rope.pretrained_length
    usual = 1.0  # the attention factor that transformers computes
    if rule == "longrope":
        long = list(values["factors"])
        own |= {"rope_type": rule, "short_factor": list(values["short"]) or long, "long_factor": long}
        usual = math.sqrt(1 + math.log(factor) / math.log(length))
    elif rule == "llama3" or values["paper_ramp"]:
        low, high = ("low_freq_factor", "high_freq_factor") if rule == "llama3" else ("beta_slow", "beta_fast")
        own |= {"rope_type": "llama3", "low_freq_factor": values[low], "high_freq_factor": values[high]}
    else:
        own |= {"rope_type": "yarn", "beta_fast": values["beta_fast"], "beta_slow": values["beta_slow"]}
        own |= {} if values["truncate"] else {"truncate": False}
        released, ours = _ranges(width, rope.base, length, values)
        if released != ours and not values["always_cut"]:
            allowed = "has no counterpart in transformers, which mixes other pairs here; always_cut=1 mixes the same"
            raise ConfigError(f"{field}.scaling", rope.scaling, allowed)
        usual = 0.1 * math.log(factor) + 1
    _, attention = scaling.frequencies(width, rope.base, rope.pretrained_length)
    if attention != usual:
        if own["rope_type"] == "llama3":
            allowed = "has no counterpart in transformers, whose rule with this ramp does not scale attention"
            raise ConfigError(f"{field}.scaling", rope.scaling, allowed)
        own["attention_factor"] = attention
    return own | {ORIGINAL: length}, round(length * factor)


def write(
    rope: Rope,
    head_dim: int,
    field: str = "config.encoding",
    *,
    partial: bool = False,
    base_field: str = "rope_theta",
    fraction_field: str = "partial_rotary_factor",
) -> dict[str, Any]:
    """The fields of config.json for these settings, in the older form, which transformers 4 and 5 read.

    `partial` says that the family has `fraction_field`. The other arguments are those of `read`, and errors those of
    `section`.
    """
    own, longest = section(rope, head_dim, field)
    written = {"max_position_embeddings": longest, base_field: own.pop("rope_theta")}
    if not partial and rope.fraction != 1:
        raise ConfigError(f"{field}.fraction", rope.fraction, "must be 1 for this family")
    if partial and own["rope_type"] != "proportional":
        written[fraction_field] = own.pop("partial_rotary_factor", 1.0)
    if own["rope_type"] == "longrope":  # transformers 4 reads it here only
        written[ORIGINAL] = own[ORIGINAL]
    return written | {"rope_scaling": None if own["rope_type"] == "default" else own}


def _raised_base(base: float, width: int, length: int, rule: str, values: Mapping[str, Any]) -> float:
    """The base of a rule that changes nothing else."""
    if rule in ("none", "rebased"):
        return values.get("to", base)
    growth = values["factor"]
    if rule == "dynamic_ntk":
        growth = max(1.0, growth * values["read"] / length - (growth - 1))
    return base * growth ** (width / (width - 2))


def _number(fields: Fields, name: str, allowed: Range, default: float) -> float:
    value: float = fields.take(name, float, default)
    if value not in allowed:
        raise fields.error(name, value, str(allowed))
    return value


def _type(own: Mapping[str, Any], path: str) -> type[_Section]:
    """The fields of a section's rule."""
    name = "rope_type" if "rope_type" in own or "type" not in own else "type"
    found = own.get(name, "default")
    if not isinstance(found, str) or found not in TYPES:
        raise ConfigError(f"{path}.{name}", found, "must be one of: " + ", ".join(TYPES), TYPES)
    return TYPES[found]


def _read(own: dict[str, Any], path: str, head_dim: int, longest: int) -> Rope:
    """RoPE's settings from a section."""
    schema = _type(own, path)
    if schema.starts_from_original:
        own.setdefault(ORIGINAL, longest)
    found = convert(schema, own, path)
    proportional, share = isinstance(found, _Proportional), found.partial_rotary_factor
    width = head_dim if proportional else int(share * head_dim)
    if width % 2 or width < 4:
        allowed = f"must rotate an even number of channels, at least 4, not {width} of head_dim = {head_dim}"
        raise ConfigError(f"{path}.partial_rotary_factor", share, allowed)
    scaling, length = found.rule(width, longest, path)
    checked = frequencies.parse(str(scaling), path)
    checked.check(width, found.rope_theta, length, (), path)
    return Rope(found.rope_theta, 1.0 if proportional else share, str(checked), length)


def _ranges(width: int, base: float, length: int, values: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The pairs between which YaRN mixes: as transformers cuts the range, and as `yarn` does by default."""
    betas, truncate = (values["beta_fast"], values["beta_slow"]), bool(values["truncate"])
    options = ({"truncate": truncate, "always_cut": cut} for cut in (True, False))
    return [frequencies.correction_range(width, base, length, *betas, **option) for option in options]
