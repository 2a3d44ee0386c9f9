"""Lossless conversion of text to token ids and back: single bytes, or subwords learned from the training split.

All tokenizers have `vocab_size`, `token_bytes`, `definition` and `fingerprint`. `token_bytes`, int32 [vocab_size], is
the number of bytes of each token. Its sum over an encoded text is the length of the text. `load` restores a tokenizer
from its `definition`. Tokenizers encode any bytes, and decode to exactly the same bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Model

from posenc_jax.config import DataConfig
from posenc_jax.errors import one_line
from posenc_jax.schema import ConfigError

INSIDE = "\N{FULLWIDTH NUMBER SIGN}" * 2  # prefix of a piece inside a word; not ASCII "##", which may begin a word
LONGEST_WORD = 64  # characters
_PIECE = 1 << 20  # characters encoded at a time, to bound memory; no token crosses a piece boundary


class ByteTokenizer:
    """One token per byte."""

    vocab_size = 256
    token_bytes = np.ones(256, np.int32)
    definition = ""
    fingerprint = "bytes"

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, uint8 [N]."""
        return np.frombuffer(text, np.uint8)

    def decode(self, ids: np.ndarray) -> bytes:
        return bytes(ids.tolist())


class SubwordTokenizer:
    """Byte-level subwords, with GPT-2's rule for word boundaries; no normalization and no special tokens.

    `bpe` merges byte pairs in the order in which they were learned. `wordpiece` takes the longest known piece, from
    left to right. Its pieces inside a word are different tokens from its pieces at the start of a word. `definition` is
    the JSON of the Hugging Face `tokenizers` library. If a small text has fewer pieces than requested, `vocab_size`
    stays as requested, and the last ids never occur (their `token_bytes` are 0).
    """

    def __init__(self, definition: str, vocab_size: int):
        self._model = Model.from_str(definition)
        self.vocab_size = vocab_size
        self.definition = definition
        self.fingerprint = hashlib.sha256(f"{vocab_size} {definition}".encode()).hexdigest()
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        self._text = [b""] * vocab_size
        for token, i in self._model.get_vocab().items():
            self._text[i] = bytes(byte_of[character] for character in token.removeprefix(INSIDE))
        self._byte_ids = np.array([self._model.token_to_id(character) for character in byte_of], np.uint32)
        self.token_bytes = np.array([len(text) for text in self._text], np.int32)

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, uint32 [N]. Each byte that is not UTF-8 is one token: a corpus may be cut inside a character."""
        ids = [np.empty(0, np.uint32)]
        for part, single in self._parts(text):
            for piece in _pieces(part):
                ids.append(np.array(self._model.encode(piece, add_special_tokens=False).ids, np.uint32))
            ids.append(self._byte_ids[list(single)])
        return np.concatenate(ids)

    def decode(self, ids: np.ndarray) -> bytes:
        return b"".join(self._text[i] for i in ids.tolist())

    def _parts(self, text: bytes) -> Iterator[tuple[str, bytes]]:
        """Parts of a text, each with the bytes after it that are encoded as single bytes."""
        return decoded(text)


Tokenizer = ByteTokenizer | SubwordTokenizer


def train(config: DataConfig, texts: Iterable[bytes]) -> Tokenizer:
    """The tokenizer of the settings. If it is learned, it is trained on the texts. Raises ConfigError."""
    if config.tokenizer == "init_from":
        raise ConfigError("config.data.tokenizer", "init_from", "needs a model in config.init_from")
    if config.tokenizer == "bytes":
        if config.vocab_size != 256:
            raise ConfigError("config.data.vocab_size", config.vocab_size, "must be 256 for the bytes tokenizer")
        return ByteTokenizer()
    wordpiece, alphabet = config.tokenizer == "wordpiece", pre_tokenizers.ByteLevel.alphabet()
    least = 513 if wordpiece else 257
    if config.vocab_size < least:
        allowed = f"must be at least {least} for the {config.tokenizer} tokenizer"
        raise ConfigError("config.data.vocab_size", config.vocab_size, allowed)
    model = Model(models.WordPiece(unk_token="") if wordpiece else models.BPE())
    options = {"vocab_size": config.vocab_size, "initial_alphabet": alphabet, "show_progress": False}
    if wordpiece:
        # Ties are broken by id. The ids of pieces inside words differ between processes unless they are given here.
        inside = [INSIDE + byte for byte in sorted(alphabet)]
        trainer = trainers.WordPieceTrainer(continuing_subword_prefix=INSIDE, special_tokens=inside, **options)
    else:
        trainer = trainers.BpeTrainer(**options)
    model.pre_tokenizer = _words(wordpiece)
    model.train_from_iterator((piece for text in texts for piece in _pieces(text.decode(errors="replace"))), trainer)
    if wordpiece:
        model = _wordpiece(model.get_vocab(), config.vocab_size)
    return SubwordTokenizer(model.to_str(), config.vocab_size)


def _words(wordpiece: bool) -> pre_tokenizers.PreTokenizer:
    """The rule for word boundaries. WordPiece also cuts long words, in which its search for pieces is slow."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if not wordpiece:
        return words
    return pre_tokenizers.Sequence([words, pre_tokenizers.Split(Regex(f".{{1,{LONGEST_WORD}}}"), "isolated")])


def _wordpiece(learned: dict[str, int], vocab_size: int) -> Model:
    """WordPiece with every byte, both at the start of a word and inside, and as many learned pieces as fit."""
    single = [prefix + byte for prefix in ("", INSIDE) for byte in sorted(byte_characters())]
    known = set(single)
    pieces = [piece for piece in sorted(learned, key=learned.__getitem__) if piece not in known]
    vocabulary = {piece: i for i, piece in enumerate((single + pieces)[:vocab_size])}
    options = {"unk_token": "", "max_input_chars_per_word": LONGEST_WORD, "continuing_subword_prefix": INSIDE}
    model = Model(models.WordPiece(vocabulary, **options))
    model.pre_tokenizer = _words(wordpiece=True)
    return model


def load(config: DataConfig, definition: str) -> Tokenizer:
    """Restore the tokenizer that `train` made from its definition. Raises ConfigError for an invalid definition."""
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    try:
        tokenizer = SubwordTokenizer(definition, config.vocab_size)
        whole = bytes(range(256)) + b"a few words: \xed\x95\x9c"
        if tokenizer.decode(tokenizer.encode(whole)) != whole:
            raise ValueError("text does not come back from its tokens")
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are not Exceptions
        problem = f"needs a definition that it was trained to: {one_line(error)}"
        raise ConfigError("config.data.tokenizer", config.tokenizer, problem) from error


def decoded(text: bytes) -> Iterator[tuple[str, bytes]]:
    """Parts of the text decoded as UTF-8, each with the invalid bytes that follow it."""
    while text:
        try:
            yield text.decode(), b""
            return
        except UnicodeDecodeError as error:
            start, end = error.start, error.end
        yield text[:start].decode(), text[start:end]
        text = text[end:]


def _pieces(text: str) -> Iterator[str]:
    return (text[start : start + _PIECE] for start in range(0, len(text), _PIECE))


def byte_characters() -> list[str]:
    """The character by which the library writes each byte: itself if printable in Latin-1, else one from 256 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]
