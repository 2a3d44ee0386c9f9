"""Strict conversion of plain mappings into frozen dataclasses. Errors say what is allowed. Types of settings."""

import ast
import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")

RENAMED = {  # fields of earlier releases (last part of the path) -> today's names
    "accumulation": "grad_accum_steps",
    "biases": "use_bias",
    "clip_norm": "grad_clip_norm",
    "decayed": "weight_decay_mask",
    "drop_encoding": "drope",
    "final_fraction": "end_lr_ratio",
    "hidden_fraction": "mask_ratio",
    "members": "parallel_runs",
    "repeat_chunk": "copy_chunk",
    "repeat_distances": "copy_distances",
    "scalings": "rope_scalings",
    "then": "continuations",
}

LARGEST = (2 - 2**-23) * 2.0**127  # the largest float32
LONGEST = 1e15  # units of a duration
SHOWN = 400  # characters of a value in an error


class ConfigError(ValueError):
    """An invalid setting. The message gives the field, its value, what is allowed, and the nearest valid name."""

    exit_code = 2

    def __init__(self, field: str, value: object, allowed: str, options: Iterable[str] = ()):
        nearest = difflib.get_close_matches(str(value), list(options), n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        stop = "" if allowed.endswith("?") else "."
        shown = repr(value)
        if len(shown) > SHOWN:
            shown = f"{shown[:SHOWN]}..."
        super().__init__(f"{field} = {shown}: {allowed}{stop}{hint}")
        self.field, self.value, self.allowed = field, value, allowed + (stop + hint if hint else "")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field allows: `at_least <= x <= at_most` and `above < x < below`. `why` explains the bound."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    why: str = ""

    def __contains__(self, x: float) -> bool:
        return self.at_least <= x <= self.at_most and self.above < x < self.below

    def __str__(self) -> str:
        bounds = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        text = " and ".join(f"{word} {_shown(bound)}" for word, bound in bounds if math.isfinite(bound))
        return f"must be {text}, {self.why}" if self.why else f"must be {text}"


@dataclasses.dataclass(frozen=True)
class Letters:
    """A text of letters, one per kind of layer. `known` maps each letter to its meaning."""

    known: tuple[tuple[str, str], ...]

    def __contains__(self, text: str) -> bool:
        return bool(text) and set(text) <= {letter for letter, _ in self.known}

    def __str__(self) -> str:
        return "must be letters: " + ", ".join(f"{letter} ({meaning})" for letter, meaning in self.known)


Count = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]


@dataclasses.dataclass(frozen=True)
class Duration:
    """A duration in the unit in which it was given: "700 steps", "3e6 tokens" or "2 epochs"."""

    amount: float
    unit: Literal["steps", "tokens", "epochs"]

    @classmethod
    def parse(cls, value: Any, path: str) -> "Duration":
        allowed = 'must be a string such as "700 steps", "3e6 tokens" or "2 epochs"'
        text = value if type(value) is str else ""
        match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) *(step|token|epoch)s?", text)
        if match is None:
            raise ConfigError(path, value, allowed)
        try:
            amount = float(match[1])
        except ValueError:
            raise ConfigError(path, value, allowed) from None
        if amount > LONGEST:
            raise ConfigError(path, value, f"{allowed}, of at most {LONGEST:g}")
        return cls(amount, match[2] + "s")  # type: ignore[arg-type]

    def plain(self) -> str:
        return f"{self.amount:.17g} {self.unit}"

    def steps(self, *, tokens_per_step: int, tokens_per_epoch: int) -> int:
        """Whole steps, rounded up."""
        tokens = {"steps": tokens_per_step, "tokens": 1, "epochs": tokens_per_epoch}[self.unit] * self.amount
        return math.ceil(tokens / tokens_per_step)


def convert(cls: type[T], mapping: Any, path: str = "config", *, complete: bool = False) -> T:
    """Build the dataclass `cls` from `mapping`, which has every field if `complete`. Raises ConfigError.

    Unknown fields, missing fields, values of the wrong type and values out of range are errors. An integer is accepted
    for a float field. Nothing else is cast: a bool is not an int, and NaN is not a float. Integers must fit into 32
    bits. Strings must be encodable as UTF-8 and contain no NUL, so that they can be file names.

    If the type of a field has a `parse(value, path)` classmethod, the method converts the value. If an `Annotated`
    annotation has such a method, it is called after the type of the value has been checked.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(path, mapping, f"must be a section with the fields of {cls.__name__}")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key, value in mapping.items():
        if key not in fields:
            raise unknown_field(f"{path}.{key}", value, fields)
    values = {name: _convert_value(hints[name], mapping[name], f"{path}.{name}") for name in fields if name in mapping}
    required = (name for name, field in fields.items() if complete or field.default is dataclasses.MISSING)
    missing = [f"{path}.{name}" for name in required if name not in mapping]
    if missing:
        others = f"; also missing: {', '.join(missing[1:])}" if len(missing) > 1 else ""
        raise ConfigError(missing[0], None, f"is missing{others}")
    return cls(**values)


def check_schema(cls: Any, path: str) -> None:
    """Raise TypeError or ConfigError unless `cls` is a frozen dataclass of settings with types and valid defaults."""
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        raise TypeError(f"{path} must be a frozen dataclass: write @dataclass(frozen=True) above it")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in vars(cls).items():
        if not (name in fields or name.startswith("_") or callable(value) or hasattr(value, "__get__")):
            hint = f"{name}: {type(value).__name__} = {value!r}"
            raise TypeError(f"{path}.{name} has no annotation, so it is not a setting: write {hint}")
    for name, field in fields.items():
        if field.default is dataclasses.MISSING:
            raise TypeError(f"{path}.{name} has no default: write one, such as {name}: float = 1.0")
    convert(cls, {name: field.default for name, field in fields.items()}, path)


def unknown_field(path: str, value: object, known: Iterable[str]) -> ConfigError:
    """The error for an unknown field. Its name is the last part of `path`, and `known` lists the valid names."""
    known, name = list(known), path.rpartition(".")[2]
    if RENAMED.get(name) in known:
        return ConfigError(path, value, f"this field is now named {RENAMED[name]!r}")
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f". Did you mean {nearest[0]!r}?" if nearest else ""
    return ConfigError(path, value, f"no such field; the fields here are: {', '.join(known) or 'none'}{hint}")


def _convert_value(hint: Any, value: Any, path: str) -> Any:
    if hasattr(hint, "parse"):
        return hint.parse(value, path)
    if dataclasses.is_dataclass(hint):
        return convert(typing.cast(type, hint), value, path)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        value = _convert_value(arguments[0], value, path)
        for allowed in arguments[1:]:
            if hasattr(allowed, "parse"):
                value = allowed.parse(value, path)
            elif value not in allowed:
                raise ConfigError(path, value, str(allowed))
        return value
    if origin is Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            names = [str(argument) for argument in arguments]
            raise ConfigError(path, value, "must be one of: " + ", ".join(names), names)
        return value
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ConfigError(path, value, f"must be a tuple of {type_name(arguments[0])}")
        return tuple(_convert_value(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _convert_value(hint, value, path)
    if hint is float and type(value) is int:
        value = float(value) if abs(value) < 1 << 1000 else math.inf
    if type(value) is not hint:
        raise ConfigError(path, value, f"must be {type_name(hint)}, not {type_name(type(value))}")
    if hint is float and not abs(value) <= LARGEST:
        raise ConfigError(path, value, f"must be a finite number, and at most {LARGEST:.2g}, the largest float32")
    if hint is int and not -(2**31) <= value < 2**31:
        raise ConfigError(path, value, "must fit into a signed 32-bit integer: at least -2^31 and below 2^31")
    if hint is str and ("\0" in value or any("\ud800" <= character <= "\udfff" for character in value)):
        raise ConfigError(path, value, "must be text that can be encoded as UTF-8, without NUL")
    return value


def _shown(bound: float) -> str:
    """A bound as text. Integers are shown with all their digits."""
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    names = {int: "an integer", float: "a number", bool: "True or False", str: "a string", tuple: "a tuple"}
    return "None" if hint is type(None) else names.get(hint, getattr(hint, "__name__", str(hint)))


def literal(text: str) -> Any:
    """Parse a Python literal. Other text is returned unchanged."""
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def plain(config: Any) -> Any:
    """The mapping of JSON types that `convert` turns back into `config`."""
    if hasattr(config, "plain"):
        return config.plain()
    if dataclasses.is_dataclass(config):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    if isinstance(config, tuple):
        return [plain(item) for item in config]
    return config


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Old and new value of each setting that differs; the arguments are results of `plain`."""
    left, right = flat(old), flat(new)
    values = {field: [left.get(field), right.get(field)] for field in sorted(left.keys() | right.keys())}
    return {field: value for field, value in values.items() if value[0] != value[1]}


def flat(mapping: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in mapping.items():
        items |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return items
