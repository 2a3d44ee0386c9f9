"""Tokenised corpora: token files in the cache, written once, verified and memory-mapped."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt

from posenc_jax.config import DataConfig
from posenc_jax.data import corpora, tokenizers
from posenc_jax.data.corpora import SPLITS, Corpus, Document
from posenc_jax.data.tokenizers import Tokenizer
from posenc_jax.schema import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 1


@dataclass(frozen=True)
class Split:
    """Documents one after another: document i is tokens[offsets[i] : offsets[i + 1]]."""

    tokens: UInt[np.ndarray, "N"]
    offsets: Int[np.ndarray, "D"]
    names: tuple[str, ...]
    num_bytes: int


@dataclass(frozen=True)
class Dataset:
    """A tokenised corpus; its fingerprint covers names, texts, splits and the tokenizer."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    splits: dict[str, Split]


def prepare(config: DataConfig) -> Dataset:
    """Load, tokenise and cache the corpus of a config, or read it from the cache. Raises ConfigError."""
    corpus = corpora.load(config)
    cache = config.cache_path
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        content = _fingerprint(corpus)
        texts = [document.text for document in corpus.splits["train"]]
        tokenizer = tokenizers.build(config.tokenizer, config.vocab_size, texts, cache, content)
        fingerprint = hashlib.sha256(f"{FORMAT} {content} {tokenizer.fingerprint}".encode()).hexdigest()[:16]
        folder = cache / "tokens" / fingerprint
        if not _intact(folder):
            _write(folder, corpus, tokenizer)
    except OSError as error:
        raise ConfigError("config.data.cache_dir", str(cache), f"cannot be written: {error}") from None
    return Dataset(corpus.name, fingerprint, tokenizer, {split: _read(folder, split) for split in SPLITS})


def _fingerprint(corpus: Corpus) -> str:
    digest = hashlib.sha256()
    for split in SPLITS:
        for document in corpus.splits[split]:
            name = document.name.encode("utf-8", "surrogateescape")
            for part in (split.encode(), name, hashlib.sha256(document.text).digest()):
                digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _write(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Into a temporary folder first, so that another process sees all files or none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        meta = {split: _write_split(built, split, corpus.splits[split], tokenizer) for split in SPLITS}
        (built / "meta.json").write_text(json.dumps(meta))
        try:
            built.rename(folder)
        except OSError:
            if not _intact(folder):  # else another process was first
                shutil.rmtree(folder)
                built.rename(folder)


def _write_split(folder: Path, split: str, documents: list[Document], tokenizer: Tokenizer) -> dict:
    parts = [tokenizer.encode(document.text) for document in documents]
    path = folder / f"{split}.bin"
    np.concatenate(parts).tofile(path)
    return {
        "dtype": str(parts[0].dtype),
        "offsets": np.cumsum([0, *map(len, parts)]).tolist(),
        "names": [document.name for document in documents],
        "bytes": sum(len(document.text) for document in documents),
        "sha256": _sha256(path),
    }


def _intact(folder: Path) -> bool:
    if not folder.exists():
        return False
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if all(_sha256(folder / f"{split}.bin") == meta[split]["sha256"] for split in SPLITS):
            return True
    except (OSError, ValueError, KeyError):
        pass
    logger.warning("the token files in %s are damaged; they are made anew", folder)
    return False


def _read(folder: Path, split: str) -> Split:
    meta = json.loads((folder / "meta.json").read_text())[split]
    path = folder / f"{split}.bin"
    empty = os.path.getsize(path) == 0  # which cannot be mapped
    tokens = np.zeros(0, meta["dtype"]) if empty else np.memmap(path, meta["dtype"], mode="r")
    return Split(tokens, np.asarray(meta["offsets"], np.int64), tuple(meta["names"]), meta["bytes"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
