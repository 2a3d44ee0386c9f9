"""Tokenizers from a tokenizer.json, of a pretrained model or a file of your own, encoded and decoded without loss."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Model

from posenc_jax.data.tokenizers import SubwordTokenizer, byte_characters, decoded
from posenc_jax.errors import one_line
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

MAX_CHARACTERS = 1 << 26  # of a definition; Gemma's has 33 million
MAX_TOKENS = 1 << 20  # of a definition, as config.data.vocab_size
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in place of a space in SentencePiece's tokens
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # SentencePiece's tokens of single bytes
# Pre-tokenizers that only divide a text. Those with a `behavior` must not remove what they divide it by.
DIVIDERS = ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts")


class PretrainedTokenizer(SubwordTokenizer):
    """BPE over bytes (GPT-2, Llama 3, Qwen), or SentencePiece's BPE, with a token for every byte (Llama 2, Gemma).

    `definition` is the JSON of the Hugging Face `tokenizers` library. The ids are those of the library, with these
    differences, which keep every byte of a text and add none:

    - No special token is added, and no space before the text.
    - A text is not normalized. NFC is skipped, so a text in another Unicode form has other ids.
    - Added tokens do not include the spaces beside them.
    - SentencePiece writes a space as U+2581. The character U+2581 itself is encoded as three bytes.

    Special tokens that occur in a text, such as `<|endoftext|>`, have their own ids. If the vocabulary has fewer tokens
    than `vocab_size`, the last ids never occur (their `token_bytes` are 0). SmolLM has no tokens for some control
    characters, and refuses a text that contains them.

    Raises ConfigError for a tokenizer that may lose text, and for one with more than `vocab_size` tokens. `encode`
    raises it for a text that does not come back from its tokens.
    """

    def __init__(self, definition: str, vocab_size: int | None, name: str = "init_from"):
        """`vocab_size` is None for the number of tokens in the definition. Errors name the tokenizer as `name`."""
        self.definition, self._name = definition, name
        try:
            spec = _parsed(definition)
            self.vocab_size = _size(spec) if vocab_size is None else vocab_size
            self._load(_lossless(spec, self.vocab_size))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are not Exceptions
            problem = f"the tokenizer cannot be used: {one_line(error)}"
            raise ConfigError("config.data.tokenizer", name, problem) from error
        self.fingerprint = hashlib.sha256(f"{self.vocab_size} {definition}".encode()).hexdigest()

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, uint32 [N]. Each byte that is not UTF-8 is one token. Raises ConfigError if text is lost."""
        if lost := self._missing & set(text):
            self._refuse(text, text.index(min(lost)), f"has no token for the byte {min(lost):#04x}")
        ids = super().encode(text)
        found = self.decode(ids)
        if found != text:
            pairs = enumerate(zip(found, text, strict=False))
            self._refuse(text, next((i for i, (a, b) in pairs if a != b), len(found)), "loses text")
        return ids

    def _refuse(self, text: bytes, at: int, problem: str) -> None:
        shown = f"the tokenizer {problem} in {text[max(at - 20, 0) : at + 20]!r}"
        raise ConfigError("config.data.tokenizer", self._name, shown)

    def _parts(self, text: bytes) -> Iterator[tuple[str, bytes]]:
        for part, invalid in decoded(text):
            *before, last = part.split(SPACE) if self._spaced else [part]
            yield from ((own, SPACE.encode()) for own in before)
            yield last, invalid

    def _load(self, spec: dict[str, Any]) -> None:
        self._model = Model.from_str(json.dumps(spec))
        vocabulary = self._model.get_vocab(with_added_tokens=False)
        self._spaced = not _uses(spec, "ByteLevel")
        byte_tokens = BYTES if self._spaced else {token: byte for byte, token in enumerate(byte_characters())}
        self._byte_ids = np.array([vocabulary.get(token, 0) for token in byte_tokens], np.uint32)
        self._missing = {byte for token, byte in byte_tokens.items() if token not in vocabulary}
        if self._missing and self._spaced:
            raise ValueError(f"it has no token for the byte {min(self._missing):#04x}")
        text_of = _spaced_bytes if self._spaced else functools.partial(_mapped_bytes, byte_tokens)
        added = {token["id"]: token["content"].encode() for token in spec["added_tokens"]}
        texts = {i: text_of(token) for token, i in vocabulary.items()} | added
        self._text = [texts.get(i, b"") for i in range(self.vocab_size)]
        self.token_bytes = np.array([len(text) for text in self._text], np.int32)


def _spaced_bytes(token: str) -> bytes:
    return bytes([BYTES[token]]) if token in BYTES else token.replace(SPACE, " ").encode()


def _mapped_bytes(byte_of: dict[str, int], token: str) -> bytes:
    """The bytes whose characters are in a token. A token with other characters never occurs in a text."""
    return bytes(byte_of[character] for character in token) if byte_of.keys() >= set(token) else token.encode()


def _parsed(definition: str) -> dict[str, Any]:
    if len(definition) > MAX_CHARACTERS:
        raise ValueError(f"it has more than {MAX_CHARACTERS} characters")
    spec = json.loads(definition)
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError("it is not the JSON of a tokenizer")
    kind = spec["model"].get("type", "BPE" if "merges" in spec["model"] else None)
    if kind != "BPE":
        raise ValueError(f"its model is {kind}, which may lose text; a lossless one is BPE over bytes")
    return spec


def _size(spec: dict[str, Any]) -> int:
    """The number of ids up to the largest one, with those of added tokens."""
    added = (token["id"] for token in spec.get("added_tokens") or ())
    size = 1 + max((*spec["model"]["vocab"].values(), *added), default=0)
    if size > MAX_TOKENS:
        raise ValueError(f"it has {size} tokens, more than {MAX_TOKENS}")
    return size


def _lossless(spec: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """The definition without what changes a text. Raises ValueError if the tokenizer needs such a change."""
    model = spec["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"its {name} = {model[name]!r} is not supported")
    size = max(model["vocab"].values(), default=0) + 1
    if size > vocab_size:
        raise ValueError(f"it has {size} tokens, more than the {vocab_size} rows of the embedding")
    normalizers = [own for step in _steps(spec, "normalizer", "normalizers") for own in _normalizer(step)]
    dividers = [_divider(step) for step in _steps(spec, "pre_tokenizer", "pretokenizers")]
    kept = {
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": dividers} if dividers else None,
        "added_tokens": list(_added_tokens(spec.get("added_tokens") or (), vocab_size)),
        "model": model | {"dropout": None},
    }
    over_bytes = _uses(kept, "ByteLevel") or (model.get("byte_fallback") and (normalizers or _uses(kept, "Metaspace")))
    if not over_bytes:
        raise ValueError("it has no tokens of single bytes, so it loses characters that it does not know")
    return spec | kept | dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))


def _steps(spec: dict[str, Any], name: str, items: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""
    own = spec.get(name)
    if own is None:
        return []
    if own["type"] != "Sequence":
        return [own]
    return [step for part in own[items] for step in _steps({name: part}, name, items)]


def _normalizer(step: dict[str, Any]) -> list[dict[str, Any]]:
    """The normalizer if it only writes spaces as U+2581; none for one that may be skipped."""
    if step["type"] == "Replace" and step["content"] == SPACE and step["pattern"] == {"String": " "}:
        return [step]
    if step["type"] == "NFC" or (step["type"] == "Prepend" and step["prepend"] == SPACE):
        return []
    raise ValueError(f"its normalizer {step['type']} changes the text")


def _divider(step: dict[str, Any]) -> dict[str, Any]:
    """The pre-tokenizer, adding no space. Raises ValueError if it removes characters."""
    if step["type"] not in DIVIDERS or step.get("behavior") == "Removed":
        raise ValueError(f"its pre-tokenizer {step['type']} removes characters")
    if step["type"] == "Metaspace":
        return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": step.get("split", True)}
    return step | {"add_prefix_space": False} if step["type"] == "ByteLevel" else step


def _added_tokens(tokens: Any, vocab_size: int) -> Iterator[dict[str, Any]]:
    """The added tokens that have a row in the embedding. They take no spaces from the text beside them.

    Special tokens without a row are left out, with a warning. Raises ValueError for other tokens without a row.
    """
    for token in tokens:
        if token["id"] < vocab_size:
            yield token | {"lstrip": False, "rstrip": False}
        elif token["special"]:
            log.warning("the tokenizer's special token %r has no embedding; it is not used", token["content"])
        else:
            found = f"its token {token['content']!r} has id {token['id']}"
            raise ValueError(f"{found}, beyond the {vocab_size} rows of the embedding")


def _uses(spec: dict[str, Any], kind: str) -> bool:
    return any(step["type"] == kind for step in _steps(spec, "pre_tokenizer", "pretokenizers"))
