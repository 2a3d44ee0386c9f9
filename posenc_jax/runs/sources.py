"""The model that a run starts from, `config.init_from`: a run of this project, or a model of another one.

`resolve` fills in the settings that such a model decides. A run of this project decides its encoding, positions,
temperature and layers, besides the fields of config.model. What it did not train with, such as its dropout, may change.
"""

import copy
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from posenc_jax.config import RunConfig
from posenc_jax.data import tokens
from posenc_jax.data.pretrained_tokenizer import PretrainedTokenizer
from posenc_jax.data.tokens import Dataset
from posenc_jax.distributed import sharding
from posenc_jax.errors import reason
from posenc_jax.runs import trained
from posenc_jax.runs import workdir as workdirs
from posenc_jax.schema import ConfigError, Duration, flat, plain
from posenc_jax.training import checkpoint
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import initial_state
from posenc_jax.untrusted import DamagedError, check_form, read_json

logger = logging.getLogger(__name__)

FIELD = "config.init_from"
SHA256, PRETRAINED = "init_sha256", "training.pretrained_length"
TOKENIZER, TOKENIZER_SHA256 = "data.tokenizer", "data.tokenizer_sha256"
# Values that stand for those of the model, as None does.
OPEN = {SHA256: "", TOKENIZER: "init_from", TOKENIZER_SHA256: "", PRETRAINED: 0}
# Settings of the model that a run may change.
FREE = ("model.dropout", "model.dtype", "model.remat", "encoding.scaling")
OWN_SECTIONS = ("model", "encoding", "temperature", "layers")
OWN_FIELDS = ("positions.training", "positions.range", "data.vocab_size")
# How the model was trained. A run that evaluates only describes that training.
AS_TRAINED = ("training.length", "training.drope")
TEXT = {"data.corpus": "stdlib", "data.path": "", "data.field": "text"}
TEXT |= {"data.validation_files": (), "data.test_files": ()}
TEXT |= {"data.validation_fraction": 0.05, "data.test_fraction": 0.05}
# Settings of a run that starts from a model of another project, where the user leaves them open.
DEFAULTS = {
    "model.dropout": 0.0,
    "model.dtype": "float32",
    "model.remat": False,
    "positions.range": 2048,
    "positions.per_layer": False,
    "positions.evaluation": "contiguous",
    "temperature.scale": 0.1,
    "temperature.floor": 8192,
    "temperature.layers": "EN",
    "training.drope": "0 steps",
    "evaluation.windows": 2,
    "evaluation.copy_distances": (),
    "evaluation.copy_chunk": 32,
    "evaluation.retrieval_tasks": (),
    "evaluation.retrieval_lengths": (),
    "evaluation.retrieval_trials": 10,
    "evaluation.retrieval_depths": 5,
    "evaluation.retrieval_by": "teacher_forcing",
}
RULES = ("none", "yarn")  # scaling rules of evaluation for a model of another project
LONGEST = 16384  # of the lengths that such a model reads by default, in tokens


@dataclass(frozen=True)
class Source:
    """A model that runs can start from.

    Attributes:
      name: where it is, as in the settings.
      sha256: checksum of its weights.
      fixed: the settings that it decides, by names such as "model.num_layers".
      usual: the values of settings that are left open, by the same names.
      tokenizer: the definition of its tokenizer, "" for bytes.
      end_tokens: tokens that end a text. A run has those of the model that it started from.
      load: given settings and a mesh, the "params" of the model on its devices, and the "constants" if no setting can
        change them. Both are nested dicts of arrays.
    """

    name: str
    sha256: str
    fixed: dict[str, Any]
    usual: dict[str, Any]
    tokenizer: str
    end_tokens: frozenset[int]
    load: Callable[[RunConfig, Mesh], dict[str, Any]]

    @property
    def record(self) -> dict[str, Any]:
        """What config.json of a run says about its initial weights."""
        return {"source": self.name, "sha256": self.sha256, "end_tokens": sorted(self.end_tokens)}


def resolve(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with an `init_from`, in which those that are open (None) are filled in from this model.

    Raises ConfigError for a setting that contradicts the model.
    """
    resolved, source = copy.deepcopy(dict(settings)), open_source(settings["init_from"])
    given = {field: None if value == OPEN.get(field) else value for field, value in flat(settings).items()}
    evaluates = Duration.parse(given.get("training.duration"), "config.training.duration").amount == 0
    fixed = source.fixed | {SHA256: source.sha256}
    _check(given, source, evaluates)
    values = source.usual | _text(given, source, evaluates) | fixed
    for field, value in values.items():
        *path, name = field.split(".")
        own = resolved
        for section in path:
            if isinstance(own, dict):
                own = own.setdefault(section, {}) if path[0] == "layers" else own.get(section)
        decided = field in given or field in fixed or path == ["encoding"]
        if isinstance(own, dict) and decided and given.get(field) is None:
            own[name] = value
    for section in ("model", "encoding"):  # leave out open settings that this model does not have
        own = resolved.get(section)
        if isinstance(own, dict):
            resolved[section] = {field: value for field, value in own.items() if value is not None}
    return resolved


def of_run(config: RunConfig) -> Source | None:
    """The model that a run starts from, None for random weights. Raises ConfigError if it contradicts the settings."""
    if not config.init_from:
        return None
    source = _opened.get((config.init_from, config.init_sha256)) or open_source(config.init_from)
    _check(flat(plain(config)), source, config.evaluates_only)
    return source


def prepare_text(config: RunConfig) -> Dataset:
    """The tokens of a run's text, made by the tokenizer of its settings or of its `init_from`. Raises ConfigError."""
    source = of_run(config)
    return tokens.prepare(config.data, source.tokenizer if source else "")


def open_source(name: str) -> Source:
    """The model in a workdir, a Hugging Face folder, a .gguf file, or "smollm2".

    Raises ConfigError, which names `config.init_from`, for anything that is missing, damaged or not supported.
    """
    try:
        path = Path(name).expanduser()
        if (path / "members").is_dir():
            raise ConfigError(FIELD, name, f"must be one run of this study, which are in {path / 'runs'}")
        source = open_run(name, path) if is_run(path) else _open_pretrained(name)
    except (workdirs.WorkdirError, checkpoint.CheckpointError, DamagedError) as error:
        raise ConfigError(FIELD, name, f"cannot be used: {error}") from error
    except ConfigError as error:
        raise error_of(FIELD, name, error) from error
    except (OSError, RuntimeError) as error:  # for example, the name is too long, or names an unknown user
        raise ConfigError(FIELD, name, f"cannot be read: {reason(error)}") from error
    _opened.clear()  # the weights of the last one are enough
    _opened[name, source.sha256] = source
    return source


def error_of(field: str, name: str, error: ConfigError) -> ConfigError:
    """An error of a model, or of a field in its files, as the error of the setting or argument that names the model."""
    told = error.allowed if error.field == FIELD else f"cannot be used: {str(error).removesuffix('.')}"
    return ConfigError(field, name, told)


_opened: dict[tuple[str, str], Source] = {}  # the last source, so that one command reads its files once


def open_run(name: str, workdir: Path) -> Source:
    """The model of a run at its newest intact checkpoint. Raises ConfigError, WorkdirError and CheckpointError."""

    def tell(step: int, cause: str) -> None:
        logger.warning("checkpoint %d of %s is damaged (%s); an older one is used", step, workdir, cause)

    config, checkpoints = trained.read_config(workdir), workdir / "checkpoints"
    if config.evaluates_only:
        allowed = f"must have been trained; it only evaluated the model of {config.init_from!r}"
        raise ConfigError(FIELD, name, allowed)
    step = checkpoint.newest_intact(checkpoints, tell)
    if step is None:
        raise ConfigError(FIELD, name, "must hold a checkpoint")
    sha256, tokenizer = checkpoint.checksum(checkpoints, step), trained.read_tokenizer(workdir)
    usual = flat(plain(config)) | {PRETRAINED: config.pretrained_length}
    sections = tuple(f"{section}." for section in OWN_SECTIONS)
    names = [field for field in usual if field.startswith(sections) and field not in FREE]
    fixed = {field: usual[field] for field in (*names, *OWN_FIELDS, PRETRAINED, TOKENIZER, TOKENIZER_SHA256)}

    def load(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
        found = trained.load(workdir, mesh, step)
        if hasattr(config.encoding.hyperparameters, "scaling"):
            return {"params": found.params}
        return {"params": found.params, "constants": found.constants}

    return Source(name, sha256, fixed, usual, tokenizer, trained.read_end_tokens(workdir), load)


def _open_pretrained(name: str) -> Source:
    """A model of another project. Raises ConfigError and DamagedError."""
    from posenc_jax.interop.pretrained import open_pretrained

    found = open_pretrained(name)
    tokenizer = found.tokenizer
    try:
        PretrainedTokenizer(tokenizer, found.vocab_size)
    except ConfigError as error:
        raise ConfigError(FIELD, name, error.allowed) from error
    fixed = {f"model.{field}": value for field, value in found.model.items()}
    fixed |= {f"encoding.{field}": value for field, value in found.encoding.items() if field != "scaling"}
    fixed |= {"positions.training": "contiguous", "temperature.form": "none", PRETRAINED: found.pretrained_length}
    fixed |= {"data.vocab_size": found.vocab_size, TOKENIZER: "init_from", TOKENIZER_SHA256: ""}
    longest = min(2 * found.pretrained_length, LONGEST)
    lengths = tuple(longest // part for part in (8, 4, 2, 1) if longest >= 2 * part)
    usual = DEFAULTS | {"training.length": found.pretrained_length, "evaluation.lengths": lengths}
    usual |= {"evaluation.tail": min(64, lengths[0]), "evaluation.rope_scalings": ("none",)}
    if "scaling" in found.encoding:
        usual |= {"encoding.scaling": found.encoding["scaling"], "evaluation.rope_scalings": RULES}

    def load(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
        optimizer = optimizers.build(config.optimizer, total_steps=1, warmup_steps=0)
        abstract = jax.eval_shape(lambda: initial_state(config, optimizer))["params"]
        return {"params": found.params(abstract, sharding.placement(abstract, mesh))}

    return Source(name, found.sha256, fixed, usual, tokenizer, found.end_tokens, load)


def is_run(path: Path) -> bool:
    """Whether the folder has the record of a run of this project. Other projects' folders have a config.json too."""
    try:
        check_form(read_json(path / "config.json"), {"format": int, "config": dict})
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:
        return (path / "checkpoints").is_dir()
    return True


def _check(given: Mapping[str, Any], source: Source, evaluates: bool) -> None:
    """Raise ConfigError for the first setting, of those that are given, that contradicts the model."""
    if given.get(SHA256) not in (None, source.sha256):
        allowed = f"must be the checksum of the weights in {FIELD} = {source.name!r}, which is {source.sha256}"
        raise ConfigError(f"config.{SHA256}", given[SHA256], allowed)
    for field, value in (source.fixed | {name: source.usual[name] for name in AS_TRAINED if evaluates}).items():
        own = given.get(field)
        free = _adjusts_rules(field, own) and _adjusts_rules(field, value)
        if own is not None and _listed(own) != _listed(value) and not free:
            raise ConfigError(f"config.{field}", own, f"must be {value!r}, as in {FIELD} = {source.name!r}")
    for field, own in given.items():
        known = own is None or field in source.fixed or _adjusts_rules(field, own)
        if field.startswith("layers.") and not known:
            raise ConfigError(f"config.{field}", own, f"must not be given: {FIELD} = {source.name!r} does not have it")


def _adjusts_rules(field: str, value: Any) -> bool:
    """Whether this is a setting of layers that applies scaling rules, with any arguments. Parameters are the same."""
    return re.fullmatch(r"layers\.\w\.rope_scalings", field) is not None and value is not False


def _text(given: Mapping[str, Any], source: Source, evaluates: bool) -> dict[str, Any]:
    """Values of open settings of the text: that of the source, or the one given, whose test split is then all of it."""
    whole = {"data.test_fraction": 1.0} if evaluates else {}
    if given.get("data.corpus") is None and given.get("data.path") is None:
        return TEXT | whole | {field: source.usual[field] for field in TEXT if field in source.usual}
    return TEXT | whole


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
