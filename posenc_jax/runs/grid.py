"""Run specifications: a base recipe, changed along the axes of a sweep, as in the files of experiments/.

An axis is a tuple of changes. The runs of the study are all combinations of one change per axis. Each change is a text
of fields and values, such as "seed=1" or "model.head_dim=32 model.num_heads=4". `encoding=NAME` replaces the recipe's
encoding section by that of NAME, at its defaults. A change may have a name, which tables then show:
"steep: encoding=alibi encoding.max_exponent=4". An axis may also be a section of such tuples, each under the title of
its panel in figures.

A study may have `continuations`, axes like those of `sweep`. Each run of the sweep is then continued by further runs,
one per combination of these changes. They otherwise keep its settings, start from its trained parameters, and inherit
its pretrained length. Their names give the training length if it differs.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.data import tokenizer_file
from posenc_jax.files import in_project
from posenc_jax.schema import ConfigError, convert, flat, literal, plain, unknown_field

LENGTH = "training.pretrained_length"
COMPARED_BY = (LENGTH, "data.corpus", "data.path", "data.field", "task.name")
COMPARED_BY += tuple(f"evaluation.{name}" for name in ("lengths", "windows", "tail", "copy_distances", "copy_chunk"))
COMPARED_BY += ("evaluation.long_perplexity",)
COMPARED_BY += tuple(f"evaluation.retrieval_{name}" for name in ("tasks", "lengths", "trials", "depths", "by"))


@dataclass(frozen=True)
class RunSpec:
    """One run. `variant` names what is compared: the runs of a variant differ only in their seeds.

    `group` is the title of the run's panel in figures; "" means no panel title. A run with a `parent` starts from the
    trained parameters of the parent.
    """

    variant: str
    group: str
    config: RunConfig
    parent: "RunSpec | None" = None

    @property
    def name(self) -> str:
        """The name of the run's folder. Other studies, and other sweeps of this one, use it only for the same run."""
        slug = re.sub(r"[^A-Za-z0-9.+-]+", "_", self.variant).strip("_")[:100]
        line = [self, self.parent] if self.parent else [self]
        return "-".join([slug, f"seed{self.config.seed}", *(spec.config.fingerprint for spec in line)])

    @property
    def root(self) -> "RunSpec":
        """The ancestor that starts from random parameters. It is the run itself if there is no parent."""
        return self.parent.root if self.parent else self


@dataclass(frozen=True)
class Study:
    """A question, and the runs that answer it: every variant with the first seed, then with the next.

    `question` may be "". `baseline` is the variant that differences refer to; "" means none. `costs` is the file of a
    table of the costs of encodings (see `python -m benchmarks encodings`); "" means none.
    """

    name: str
    question: str
    baseline: str
    runs: tuple[RunSpec, ...]
    costs: str = ""

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Study":
        """Convert nested settings, such as those of `ConfigDict.to_dict()`. Raises ConfigError.

        Without a `baseline`, it is the first variant.
        """
        settings = convert(_Settings, mapping)
        runs = tuple(sorted(_runs(settings), key=lambda spec: spec.config.seed))
        names = [spec.name for spec in runs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("config.sweep", name, "must not make one run twice")
        variants = dict.fromkeys(spec.variant for spec in runs)
        baseline = next(iter(variants), "") if settings.baseline is None else settings.baseline
        if baseline and baseline not in variants:
            allowed = "must be one of: " + ", ".join(variants)
            raise ConfigError("config.baseline", baseline, allowed, variants)
        compared = [flat(plain(spec.config)) | {LENGTH: spec.config.pretrained_length} for spec in runs]
        for field in COMPARED_BY:
            if len({str(settings.get(field)) for settings in compared}) > 1:
                raise ConfigError("config.sweep", field, "must be the same in all runs, which are compared by it")
        costs = str(in_project(settings.costs)) if settings.costs else ""
        if costs and not Path(costs).is_file():
            allowed = "must be a table of `python -m benchmarks encodings`, or ''"
            raise ConfigError("config.costs", settings.costs, allowed)
        return cls(settings.name, settings.question, baseline, runs, costs)

    @classmethod
    def of_run(cls, config: RunConfig) -> "Study":
        """A study of a single run."""
        return cls(config.name, "", "", (RunSpec(config.label, "", config),))

    @property
    def variants(self) -> dict[str, list[RunSpec]]:
        """The runs of each variant, in order."""
        found: dict[str, list[RunSpec]] = {}
        for spec in self.runs:
            found.setdefault(spec.variant, []).append(spec)
        return found


@dataclass(frozen=True)
class _Mapping:
    items: Mapping[str, Any]

    @classmethod
    def parse(cls, value: Any, path: str) -> "_Mapping":
        if not isinstance(value, Mapping):
            raise ConfigError(path, value, "must be a section")
        return cls(value)


@dataclass(frozen=True)
class _Settings:
    name: str
    base: _Mapping
    sweep: _Mapping
    question: str = ""
    baseline: str | None = None
    continuations: _Mapping = _Mapping({})
    costs: str = ""


def _runs(settings: _Settings) -> Iterator[RunSpec]:
    base = dict(settings.base.items) | {"name": settings.name}
    first = [RunSpec(name or settings.name, group, config) for name, group, config in _swept(base, settings, "sweep")]
    for spec in first:
        check_not_pretrained(spec.config)
    yield from first
    for parent in first if settings.continuations.items else ():
        inherited = plain(parent.config)
        inherited["training"]["pretrained_length"] = parent.config.pretrained_length
        for name, group, config in _swept(inherited, settings, "continuations"):
            _check_continues(config, parent.config)
            length = config.training.length
            told = "" if length == parent.config.training.length else f" ({length} tokens)"
            yield RunSpec(f"{parent.variant}, then {name}{told}", group or parent.group, config, parent)


def check_not_pretrained(config: RunConfig) -> None:
    """Raise ConfigError if a run that starts from random parameters claims to have been pretrained."""
    if (value := config.training.pretrained_length) and not config.init_from:
        raise ConfigError(f"config.{LENGTH}", value, "must be 0 in a run that does not continue another one")


def _check_continues(config: RunConfig, parent: RunConfig) -> None:
    """Raise ConfigError if the run changes a setting that its parent's parameters and constants depend on."""
    for field in (LENGTH, "positions.training", "positions.range"):
        own, inherited = (flat(plain(run))[field] for run in (config, parent))
        if own != (parent.pretrained_length if field == LENGTH else inherited):
            raise ConfigError(f"config.continuations: {field}", own, "must be that of the run it continues")


def _swept(base: Mapping[str, Any], settings: "_Settings", axes: str) -> Iterator[tuple[str, str, RunConfig]]:
    """Name, group and settings of every run: all combinations of one change per axis."""
    of_axes = getattr(settings, axes).items
    for chosen in itertools.product(*(_axis(f"config.{axes}.{name}", values) for name, values in of_axes.items())):
        mapping = copy.deepcopy(dict(base))
        fields = [field for change in chosen for field, _ in change.fields]
        for field, later in itertools.combinations(fields, 2):
            if f"{field}.".startswith(f"{later}."):
                raise ConfigError(f"config.{axes}", field, f"must be changed once, and not before {later} is")
        for change in chosen:
            for field, value in change.fields:
                _set(mapping, field, value)
        name = " ".join(change.name for change in chosen if change.name)
        group = " ".join(change.group for change in chosen if change.group)
        yield name, group, RunConfig.from_mapping(tokenizer_file.resolve(mapping))


@dataclass(frozen=True)
class _Change:
    """One change of an axis. `name` is empty if only the seed is changed."""

    name: str
    group: str
    fields: tuple[tuple[str, Any], ...]


def _axis(path: str, values: Any, group: str = "") -> list[_Change]:
    if isinstance(values, Mapping) and values:
        return [change for title, own in values.items() for change in _axis(f"{path}.{title}", own, title)]
    if not isinstance(values, tuple | list) or not values:
        raise ConfigError(path, values, 'must be a tuple of changes, such as ("seed=0", "seed=1")')
    return [_change(value, group, f"{path}[{i}]") for i, value in enumerate(values)]


_CHANGE = r"""(?:[^\s'"]|'[^']*'|"[^"]*")+"""  # no spaces, except in quotes


def _change(text: Any, group: str, path: str) -> _Change:
    allowed = 'must be fields and values, such as "encoding=rope encoding.base=5e5", with or without "NAME: " before'
    if not isinstance(text, str):
        raise ConfigError(path, text, allowed)
    named = re.fullmatch(r"(.+?): +(.*)", text)
    changes, fields = named[2] if named else text, []
    if re.sub(_CHANGE, "", changes).strip():
        raise ConfigError(path, text, f"{allowed}; a quotation mark is not closed")
    for part in re.findall(_CHANGE, changes):
        field, equals, value = part.partition("=")
        if not (field and equals and value):
            raise ConfigError(path, text, allowed)
        fields.append((field, literal(value)))
    name = named[1] if named else " ".join(_shown(field, value) for field, value in fields if field != "seed")
    if not (name + group).isprintable():
        raise ConfigError(path, name, "must have a name, and a title, of characters that can be shown")
    return _Change(name, group, tuple(fields))


def _shown(field: str, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return shown if field == "encoding" else f"{field.rpartition('.')[2]}={shown}"


def _set(mapping: Any, field: str, value: Any) -> None:
    """Change one field of nested settings. Raises ConfigError if the field does not exist."""
    path, section, names = "config.base", mapping, field.split(".")
    for name in names:
        known = section if isinstance(section, Mapping) else {}
        if name not in known:
            raise unknown_field(f"config.sweep: {path}.{name}", value, known)
        mapping, section, path = section, section[name], f"{path}.{name}"
    if field == "encoding":
        encodings.load(value, "config.base")
        value = {"name": value, **encodings.default_config(value)}
    mapping[names[-1]] = value
