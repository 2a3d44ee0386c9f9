"""What the layers of a transformer may differ in: encoding, window, temperature and attention sinks."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, Literal

from posenc_jax import encodings
from posenc_jax.encodings import frequencies
from posenc_jax.model_config import TransformerConfig
from posenc_jax.schema import ConfigError, Count, Letters, NonNegative, Range, convert, plain

WITH_ENCODING, WITHOUT = ("E", "layers with the encoding"), ("N", "layers without")
ENCODING = "config.encoding"
MAIN = "encoding_0"  # the module of an encoding that layers share, if it is that of config.encoding
LETTERS = "ABCDEFGHIJKLMOPQRSTUVWXYZ"  # those that may have a section; N is always a layer without encoding


@dataclass(frozen=True)
class EncodingConfig:
    """The name of an encoding and its hyper-parameters, checked against its `Config`."""

    name: str
    hyperparameters: Any

    @classmethod
    def parse(cls, value: Any, path: str) -> "EncodingConfig":
        if not isinstance(value, Mapping) or "name" not in value:
            raise ConfigError(path, value, "must be a section with a name")
        own = {key: item for key, item in value.items() if key != "name"}
        schema = encodings.load(value["name"], f"{path}.name").Config
        for key in own:
            if key not in schema.__dataclass_fields__:
                known = ", ".join(schema.__dataclass_fields__) or "none"
                owner = f"no such field of encoding {value['name']!r}, whose fields are: {known}"
                switch = "to change the encoding with all its fields write --config=FILE.py:encoding=NAME"
                raise ConfigError(f"{path}.{key}", own[key], f"{owner}; {switch}")
        return cls(value["name"], convert(schema, own, path))

    @classmethod
    def of(cls, name: str, **hyperparameters: Any) -> "EncodingConfig":
        """An encoding with these hyper-parameters, the others at their defaults. Raises ConfigError."""
        return cls.parse({"name": name, **hyperparameters}, "encoding")

    def plain(self) -> dict[str, Any]:
        return {"name": self.name, **plain(self.hyperparameters)}

    def change(self, **hyperparameters: Any) -> "EncodingConfig":
        """The encoding with some other hyper-parameters."""
        return replace(self, hyperparameters=replace(self.hyperparameters, **hyperparameters))


@dataclass(frozen=True)
class LayerTemperature:
    form: Literal["none", "ssmax", "llama4", "logn"]
    scale: NonNegative
    floor: Count


@dataclass(frozen=True)
class TemperatureConfig(LayerTemperature):
    layers: Annotated[str, Letters((WITH_ENCODING, WITHOUT))]


@dataclass(frozen=True)
class LayerScalings:
    """Whether scaling rules of the evaluation apply to layers, and arguments that one rule has there."""

    applied: bool = True
    change: str = ""  # "RULE:ARGUMENT=NUMBER,..."; "": all rules are those of the evaluation

    @classmethod
    def parse(cls, value: Any, path: str) -> "LayerScalings":
        if type(value) is bool:
            return cls(value)
        if type(value) is not str or ":" not in value:
            allowed = 'must be True, False, or a rule with arguments, such as "yarn:temperature=0.2"'
            raise ConfigError(path, value, allowed)
        frequencies.parse(value, path)
        return cls(change=value)

    def plain(self) -> bool | str:
        return self.change or self.applied


@dataclass(frozen=True)
class LayerConfig:
    """What the layers of one letter have of their own. Fields that are None are those of the run."""

    encoding: EncodingConfig | None = None
    window: Annotated[int, Range(at_least=0)] | None = None
    temperature: LayerTemperature | None = None
    attention_sinks: bool | None = None
    rope_scalings: LayerScalings = LayerScalings()

    def plain(self) -> dict[str, Any]:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: plain(value) for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class LayersConfig:
    """The sections of letters, in the order of the alphabet."""

    sections: tuple[tuple[str, LayerConfig], ...] = ()

    @classmethod
    def parse(cls, value: Any, path: str) -> "LayersConfig":
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, "must be a section with the letters of config.model.pattern")
        for letter in value:
            if len(str(letter)) != 1 or str(letter) not in LETTERS:
                allowed = "must be named by one capital letter of config.model.pattern other than N"
                raise ConfigError(f"{path}.{letter}", plain(value[letter]), allowed)
        return cls(tuple((x, convert(LayerConfig, value[x], f"{path}.{x}")) for x in sorted(value)))

    def plain(self) -> dict[str, Any]:
        return {letter: section.plain() for letter, section in self.sections}


ALIKE = LayersConfig()  # no letter has a section


@dataclass(frozen=True)
class Layer:
    """How one layer attends.

    Attributes:
      letter: its letter in the pattern.
      module: the name of the module in the model that holds its encoding. Layers that share an encoding share the name.
      encoding: its encoding.
      window: the number of last tokens that it sees; 0: all.
      temperature: its attention temperature, None for none.
      attention_sinks: whether it has them.
      rope_scalings: whether scaling rules of the evaluation apply to its encoding.
      scaling_change: a rule with the arguments that replace those of the evaluation's rule of this name; "": none.
      path: the section of its encoding, for errors.
    """

    letter: str
    module: str
    encoding: EncodingConfig
    window: int
    temperature: LayerTemperature | None
    attention_sinks: bool
    rope_scalings: bool
    scaling_change: str
    path: str

    def rule(self, scaling: frequencies.Scaling) -> frequencies.Scaling:
        """A scaling rule of the evaluation, with the arguments that it has in this layer. Raises ConfigError."""
        rule, _, arguments = self.scaling_change.partition(":")
        if rule != scaling.rule:
            return scaling
        names = {argument.partition("=")[0] for argument in arguments.split(",")}
        kept = frequencies.Scaling(rule, tuple(given for given in scaling.parameters if given[0] not in names))
        return frequencies.parse(f"{kept}{',' if kept.parameters else ':'}{arguments}", self.scalings_path)

    @property
    def scalings_path(self) -> str:
        return f"config.layers.{self.letter}.rope_scalings"


def layers_of(
    model: TransformerConfig,
    encoding: EncodingConfig,
    temperature: TemperatureConfig | None = None,
    sections: LayersConfig = ALIKE,
) -> tuple[Layer, ...]:
    """The layers of a model. Raises ConfigError for a letter of the pattern without a meaning."""
    if not model.pattern:
        raise ConfigError("config.model.pattern", model.pattern, "must have at least one letter")
    own = dict(sections.sections)
    letters = itertools.islice(itertools.cycle(model.pattern), model.num_layers)
    return tuple(_layer(i, x, model, encoding, temperature, own.get(x)) for i, x in enumerate(letters))


def _layer(
    i: int,
    letter: str,
    model: TransformerConfig,
    encoding: EncodingConfig,
    temperature: TemperatureConfig | None,
    section: LayerConfig | None,
) -> Layer:
    if letter not in "EGN" and section is None:
        allowed = "must be letters: E (layers with the encoding), N (layers without), G (those with the encoding that "
        allowed += f"model.window does not cut), and those with a section; config.layers.{letter} is missing"
        raise ConfigError("config.model.pattern", model.pattern, allowed)
    own, without = section or LayerConfig(), EncodingConfig.of("none")
    sinks = model.attention_sinks if own.attention_sinks is None else own.attention_sinks
    window = own.window if own.window is not None else 0 if letter in "GN" else model.window
    used, path, scaled = own.encoding or encoding, ENCODING, own.rope_scalings.applied and letter != "N"
    shared, change = encodings.load(used.name).shared, own.rope_scalings.change
    module = f"encoding_{0 if shared else i}"
    scalable = hasattr(used.hyperparameters, "scaling")
    if letter == "N":
        used, module = without, "without"
    elif own.encoding is not None:
        module, path = module.replace("encoding_", f"encoding_{letter}"), f"config.layers.{letter}.encoding"
    elif letter == "E" and window and getattr(used.hyperparameters, "window_base", 0.0):
        module, scaled = "window_encoding" if shared else module, False
        used = used.change(base=used.hyperparameters.window_base, window_base=0.0, scaling="none")
    elif scalable and (not scaled or (change and shared)):
        module = module.replace("encoding_", f"encoding_{letter}")
    kind = "N" if letter == "N" or own.encoding == without else "E"
    common = temperature if temperature is not None and kind in temperature.layers else None
    chosen = common if own.temperature is None else own.temperature
    if chosen is not None and chosen.form == "none":
        chosen = None
    layer = Layer(letter, module, used, window, chosen, sinks, scaled and scalable, change, path)
    if change and not layer.rope_scalings:
        allowed = f"must be True or False, because scaling rules do not change encoding {used.name!r} in these layers"
        raise ConfigError(layer.scalings_path, change, allowed)
    return layer
