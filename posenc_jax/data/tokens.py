"""Corpora as arrays of tokens. They are created once, cached, and verified and memory-mapped at every use."""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posenc_jax.config import DataConfig
from posenc_jax.data import cache, corpora, tokenizer_file, tokenizers
from posenc_jax.data.corpora import SPLITS, Corpus
from posenc_jax.data.pretrained_tokenizer import PretrainedTokenizer
from posenc_jax.data.tokenizers import Tokenizer
from posenc_jax.files import remove_abandoned, sha256, sha256_of
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

FORMAT = 1  # version of the cached files; files of other versions are not read


@dataclass(frozen=True)
class Split:
    """The concatenated tokens of documents. Document i is `tokens[offsets[i] : offsets[i + 1]]`."""

    name: str
    tokens: np.ndarray  # [N], unsigned; memory-mapped, read-only
    offsets: np.ndarray  # int64 [D + 1]
    names: tuple[str, ...]  # of the D documents
    num_bytes: int  # of text, over all documents


@dataclass(frozen=True)
class Dataset:
    """A tokenised corpus. The fingerprint covers the names, texts and splits of its documents, and the tokenizer."""

    name: str
    fingerprint: str
    tokenizer: Tokenizer
    splits: dict[str, Split]


def prepare(config: DataConfig, definition: str = "") -> Dataset:
    """The tokens of the configured corpus. They are read from the cache if they are intact there, and else created.

    The cache folder `tokens/KEY` contains `train.bin`, `validation.bin` and `test.bin`: little-endian unsigned integers
    of the smallest size that fits the vocabulary. `meta.json` describes them and is written last. Several processes may
    call this function at the same time. `definition` is that of the tokenizer of a trained model. By default, the
    settings name the tokenizer, and it is learned from the text or read from a file. Raises ConfigError.
    """
    if config.tokenizer_file and not definition:
        definition = tokenizer_file.read(config)
    corpus = corpora.load(config)
    kind = "file" if config.tokenizer_file else config.tokenizer
    tokenizer = [kind, config.vocab_size, *([sha256_of(definition)] if definition else ())]
    folder = config.cache_path / "tokens" / sha256_of([FORMAT, corpus.fingerprint, *tokenizer])[:32]
    remove_abandoned(folder)
    dataset = _read(folder, corpus.name, config)
    if dataset is None:
        _write(folder, corpus, config, definition)
        dataset = _read(folder, corpus.name, config)
    if dataset is None:
        raise ConfigError("config.data.cache_dir", str(folder), "must be a folder that keeps what is written to it")
    return dataset


def load_tokenizer(config: DataConfig, definition: str) -> Tokenizer:
    """Restore a tokenizer from its definition. Raises ConfigError for an invalid one."""
    if config.tokenizer_file or config.tokenizer == "init_from":
        return PretrainedTokenizer(definition, config.vocab_size, config.tokenizer)
    return tokenizers.load(config, definition)


def _read(folder: Path, name: str, config: DataConfig) -> Dataset | None:
    """The dataset in the folder. None if there is none. None, with a warning, if it is damaged."""
    if not (folder / "meta.json").is_file():
        return None
    try:
        record = json.loads((folder / "meta.json").read_bytes())
        meta = record["meta"]
        if record["sha256"] != sha256_of(meta):
            raise ValueError("meta.json is not as it was written")
        tokenizer = load_tokenizer(config, meta["tokenizer"])
        splits = {split: _map(folder, split, meta["splits"][split], _dtype(tokenizer)) for split in SPLITS}
        return Dataset(name, record["sha256"], tokenizer, splits)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        log.warning("the tokens in %s are damaged (%s), and are made again", folder, error)
        return None


def _map(folder: Path, split: str, meta: dict[str, Any], dtype: np.dtype) -> Split:
    """One split. Raises ValueError if its file has changed since it was written."""
    path = folder / f"{split}.bin"
    if sha256(path) != meta["sha256"]:
        raise ValueError(f"{path.name} is not as it was written")
    tokens = np.memmap(path, dtype, mode="r") if meta["names"] else np.empty(0, dtype)
    return Split(split, tokens, np.array(meta["offsets"], np.int64), tuple(meta["names"]), meta["num_bytes"])


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned little-endian integer type that fits the vocabulary."""
    return np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<")


def _write(folder: Path, corpus: Corpus, config: DataConfig, definition: str) -> None:
    if definition:
        tokenizer = load_tokenizer(config, definition)
    else:
        tokenizer = tokenizers.train(config, (document.text for document in corpus.splits["train"]))
    dtype = _dtype(tokenizer)
    log.info("tokenising %s into %s", corpus.name, folder)
    splits = {}
    for split in SPLITS:
        documents, digest, offsets = corpus.splits[split], hashlib.sha256(), [0]
        with cache.writing(folder / f"{split}.bin") as file:
            for document in documents:
                ids = tokenizer.encode(document.text)
                content = ids.astype(dtype).tobytes()
                file.write(content)
                digest.update(content)
                offsets.append(offsets[-1] + len(ids))
        names, num_bytes = [document.name for document in documents], sum(len(document.text) for document in documents)
        splits[split] = {"sha256": digest.hexdigest(), "offsets": offsets, "names": names, "num_bytes": num_bytes}
    meta = {"dtype": dtype.str, "tokenizer": tokenizer.definition, "splits": splits}
    with cache.writing(folder / "meta.json") as file:
        file.write(json.dumps({"sha256": sha256_of(meta), "meta": meta}).encode())
