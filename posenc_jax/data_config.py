"""The settings of the text and its tokens."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from posenc_jax.schema import ConfigError, Range


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
    corpus: Literal["stdlib", "enwik8", "text8", "wikitext103"]
    path: str
    field: str
    cache_dir: str
    validation_files: tuple[str, ...]
    test_files: tuple[str, ...]
    validation_fraction: Annotated[float, Range(above=0, below=0.5)]
    test_fraction: Annotated[float, Range(above=0, at_most=1)]
    tokenizer: Annotated[str, TokenizerName]
    tokenizer_sha256: str
    vocab_size: Annotated[int, Range(at_least=256, at_most=2**20)]
    packing: Literal["none", "documents"]

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
