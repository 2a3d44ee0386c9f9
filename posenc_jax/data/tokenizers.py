"""Tokenizers that give back every byte: bytes themselves, and byte-pair encoding trained on the corpus."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Int, UInt

from posenc_jax.data.files import write_atomically
from posenc_jax.schema import ConfigError


class Tokenizer(Protocol):
    """Text to token indices and back."""

    vocab_size: int
    fingerprint: str

    @property
    def token_bytes(self) -> Int[np.ndarray, "V"]:
        """How many bytes of text each token stands for, so that losses per byte are exact."""
        ...

    def encode(self, text: bytes) -> UInt[np.ndarray, "N"]: ...

    def decode(self, tokens: np.ndarray) -> bytes: ...


class Bytes:
    """One token per byte."""

    vocab_size = 256
    fingerprint = "bytes"

    @property
    def token_bytes(self) -> Int[np.ndarray, "V"]:
        return np.ones(256, np.int32)

    def encode(self, text: bytes) -> UInt[np.ndarray, "N"]:
        return np.frombuffer(text, np.uint8)

    def decode(self, tokens: np.ndarray) -> bytes:
        return np.asarray(tokens, np.uint8).tobytes()


class BPE:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; Radford et al. 2019, §2.2), of UTF-8 text.

    `vocab_size` is the one asked for, also where the corpus has too few different pairs to fill it.
    """

    def __init__(self, definition: str, vocab_size: int):
        import tokenizers

        self._tokenizer = tokenizers.Tokenizer.from_str(definition)
        self.vocab_size = vocab_size
        self.fingerprint = f"bpe-{vocab_size}-{hashlib.sha256(definition.encode()).hexdigest()[:16]}"

    @property
    def token_bytes(self) -> Int[np.ndarray, "V"]:
        sizes = np.zeros(self.vocab_size, np.int32)
        for token, index in self._tokenizer.get_vocab().items():
            sizes[index] = len(token)  # each character of a byte-level token stands for a byte
        return sizes

    def encode(self, text: bytes) -> UInt[np.ndarray, "N"]:
        ids = self._tokenizer.encode(text.decode("utf-8")).ids
        return np.asarray(ids, np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def decode(self, tokens: np.ndarray) -> bytes:
        return self._tokenizer.decode(np.asarray(tokens).tolist()).encode("utf-8")


def train_bpe(texts: list[bytes], vocab_size: int) -> str:
    """The definition, in JSON, of a byte-level BPE trained on `texts`."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator((text.decode("utf-8") for text in texts), trainer)
    return tokenizer.to_str()


def build(kind: str, vocab_size: int, texts: list[bytes], cache: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of a config; a trained one is kept in `cache`/tokenizers under the corpus's fingerprint."""
    if kind == "bytes":
        return Bytes()
    if vocab_size < 257:
        raise ConfigError("config.data.vocab_size", vocab_size, "must be at least 257 for the bpe tokenizer")
    path = cache / "tokenizers" / f"bpe-{vocab_size}-{fingerprint[:16]}.json"
    try:
        return BPE(json.loads(path.read_text(encoding="utf-8"))["definition"], vocab_size)
    except (OSError, ValueError, KeyError):
        definition = train_bpe(texts, vocab_size)
        write_atomically(path, json.dumps({"definition": definition}).encode())
        return BPE(definition, vocab_size)
