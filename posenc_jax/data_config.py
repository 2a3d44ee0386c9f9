"""The settings of the text and its tokens."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from posenc_jax.schema import ConfigError, Range, plain


class TokenizerName:
    """The name of a kind of tokenizer, or the path of a tokenizer.json."""

    known = ("bytes", "bpe", "wordpiece", "init_from")

    @classmethod
    def parse(cls, value: str, path: str) -> str:
        if value not in cls.known and not value.endswith(".json"):
            allowed = f"must be one of: {', '.join(cls.known)}, or the path of a tokenizer.json"
            raise ConfigError(path, value, allowed, cls.known)
        return value


@dataclass(frozen=True)
class DataConfig:
    """configs/base.py has the meaning of every field. Those with a default are not in the records of older runs."""

    corpus: Literal["stdlib", "enwik8", "text8", "wikitext103"]
    path: str
    cache_dir: str
    validation_files: tuple[str, ...]
    test_files: tuple[str, ...]
    validation_fraction: Annotated[float, Range(above=0, below=0.5)]
    test_fraction: Annotated[float, Range(above=0, at_most=1)]
    tokenizer: Annotated[str, TokenizerName]
    vocab_size: Annotated[int, Range(at_least=256, at_most=2**20)]
    tokenizer_sha256: str = ""
    field: str = "text"

    def plain(self) -> dict[str, Any]:
        """All settings but those at a default. Runs that were recorded without these keep their fingerprints."""
        own = {item.name: (getattr(self, item.name), item.default) for item in fields(self)}
        return {name: plain(value) for name, (value, default) in own.items() if value != default}

    @property
    def tokenizer_file(self) -> str:
        """The path of the tokenizer.json, "" if the tokenizer is of another kind."""
        return "" if self.tokenizer in TokenizerName.known else self.tokenizer

    @property
    def cache_path(self) -> Path:
        """The folder of downloads, tokens and compiled programs that runs share."""
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posenc_jax"
        try:
            return Path(self.cache_dir).expanduser() if self.cache_dir else default
        except RuntimeError as error:  # no such user
            raise ConfigError("config.data.cache_dir", self.cache_dir, str(error).rstrip(".")) from None
