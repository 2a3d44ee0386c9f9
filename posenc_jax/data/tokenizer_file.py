"""The tokenizer.json that config.data.tokenizer names. Its checksum identifies it, so a run continues after a move."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posenc_jax.data_config import DataConfig, TokenizerName
from posenc_jax.errors import reason
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import read_bytes


def resolve(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of a run, with the size and the checksum of its tokenizer.json. Other settings are returned unchanged.

    A `vocab_size` of 256 or None stands for that of the file. Raises ConfigError for other sizes and checksums than
    those of the file, and for a tokenizer that may lose text.
    """
    data = settings.get("data")
    name = data.get("tokenizer") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(name, str) or settings.get("init_from"):
        return settings
    if name in TokenizerName.known or not name.endswith(".json"):
        return settings
    definition = _read(name)
    found = {"vocab_size": _size(definition, name), "tokenizer_sha256": _sha256(definition)}
    for field, unset in (("vocab_size", (None, 256)), ("tokenizer_sha256", (None, ""))):
        if data.get(field) not in (*unset, found[field]):
            raise ConfigError(f"config.data.{field}", data[field], f"must be {found[field]!r}, as {name} has")
    return {**settings, "data": {**data, **found}}


def read(config: DataConfig) -> str:
    """The definition in the tokenizer.json of the settings. Raises ConfigError if it is another one than before."""
    definition = _read(config.tokenizer)
    if _sha256(definition) != config.tokenizer_sha256:
        problem = f"must have the sha256 {config.tokenizer_sha256}; it has {_sha256(definition)}"
        raise ConfigError("config.data.tokenizer", config.tokenizer, problem)
    return definition


def _read(name: str) -> str:
    from posenc_jax.data.pretrained_tokenizer import MAX_CHARACTERS

    try:
        return read_bytes(Path(name).expanduser(), MAX_CHARACTERS).decode()
    except (OSError, RuntimeError, ValueError) as error:  # a missing, damaged or special file, or an unknown user
        problem = f"cannot be read: {reason(error)}; a run keeps a copy, WORKDIR/tokenizer.json"
        raise ConfigError("config.data.tokenizer", name, problem) from error


@functools.lru_cache(maxsize=8)  # the runs of a study share few tokenizers
def _size(definition: str, name: str) -> int:
    from posenc_jax.data.pretrained_tokenizer import PretrainedTokenizer

    return PretrainedTokenizer(definition, None, name).vocab_size


def _sha256(definition: str) -> str:
    return hashlib.sha256(definition.encode()).hexdigest()
