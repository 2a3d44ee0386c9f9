"""Tokenizes the sentence that the walkthrough follows."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Model
from tokenizers import models, normalizers, pre_tokenizers, trainers

from posenc_jax.data.tokenizers import ByteTokenizer, Tokenizer
from posenc_jax.files import read_regular
from posenc_jax.schema import ConfigError
from posenc_jax.untrusted import printable

VOCAB_SIZE = 30522  # BERT's
MAX_CHARACTERS = 2000  # of a sentence
MAX_TOKENS = 128  # with more, tables and pictures become unreadable
UNKNOWN = "[UNK]"


@dataclass(frozen=True)
class Tokens:
    """The tokens of a sentence, and their ids, which are rows of the embedding matrix."""

    sentence: str
    pieces: tuple[str, ...]
    ids: tuple[int, ...]
    vocab_size: int
    origin: str  # where pieces and ids come from: given, wordpiece, bytes or model


def given(pieces: Sequence[str], sentence: str | None = None, vocab_size: int = VOCAB_SIZE) -> Tokens:
    """These tokens, with ids in the order of first occurrence, because their own vocabulary is unknown."""
    pieces = tuple(_readable(piece, "--tokens") for piece in pieces)
    if sentence is None:
        sentence = " ".join(pieces).replace(" ##", "")
    number = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    ids = tuple(number[piece] for piece in pieces)
    if UNKNOWN not in pieces and _letters("".join(map(_without_mark, pieces))) != _letters(sentence):
        allowed = f"must spell the sentence, {sentence!r}; in a shell, # starts a comment unless it is quoted: 'a ##b'"
        raise ConfigError("--tokens", " ".join(pieces), allowed)
    return _checked(Tokens(_readable(sentence), pieces, ids, vocab_size, "given"))


def wordpieces(sentence: str, corpus: Path | None = None, vocab_size: int = VOCAB_SIZE) -> Tokens:
    """Cased BERT WordPiece. The vocabulary is learned from the sentence and, if given, from a corpus.

    The vocabulary contains all single characters, so no token is unknown, and pieces that occur at least twice.
    """
    sentence = _readable(sentence)
    texts = [sentence, *(_lines(corpus) if corpus else ())]
    model = _wordpiece()
    # The trainer numbers inner pieces in an order that differs between runs, unless they are special tokens.
    normalized = map(model.normalizer.normalize_str, texts)
    words = {word for text in normalized for word, _ in model.pre_tokenizer.pre_tokenize_str(text)}
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[UNKNOWN, *inner], show_progress=False, min_frequency=2
    )
    model.train_from_iterator(texts, trainer)
    vocabulary = model.get_vocab()
    if len(vocabulary) > vocab_size:
        allowed = f"must be at least {len(vocabulary)}, so that every character of the text is in the vocabulary"
        raise ConfigError("--vocab-size", vocab_size, allowed)
    found = _wordpiece(vocabulary).encode(sentence)  # a new model, without the trainer's special tokens
    return _checked(Tokens(sentence, tuple(found.tokens), tuple(found.ids), vocab_size, "wordpiece"))


def utf8_bytes(sentence: str, vocab_size: int = 256) -> Tokens:
    """One token for each byte of the UTF-8 sentence. The id is the value of the byte."""
    sentence = _readable(sentence)
    if vocab_size < ByteTokenizer.vocab_size:
        raise ConfigError("--vocab-size", vocab_size, f"must be at least {ByteTokenizer.vocab_size} for bytes")
    ids = ByteTokenizer().encode(sentence.encode()).tolist()
    return _checked(Tokens(sentence, tuple(f"{byte:02X}" for byte in ids), tuple(ids), vocab_size, "bytes"))


def of_model(sentence: str, tokenizer: Tokenizer) -> Tokens:
    """The tokens of a trained model."""
    sentence = _readable(sentence)
    try:
        ids = tokenizer.encode(sentence.encode())
    except ConfigError as error:  # the vocabulary lacks a character
        raise ConfigError("sentence", sentence, error.allowed) from error
    pieces = tuple(piece(tokenizer.decode(ids[i : i + 1])) for i in range(len(ids)))
    return _checked(Tokens(sentence, pieces, tuple(ids.tolist()), tokenizer.vocab_size, "model"))


def piece(text: bytes) -> str:
    """The text of a token, with "▁" for a space; bytes that are no complete characters are shown in hexadecimal."""
    try:
        return printable(text.decode()).replace(" ", "▁").replace("\n", "\\n").replace("\t", "\\t")
    except UnicodeDecodeError:
        return text.hex().upper()


def one_hot(tokens: Tokens) -> np.ndarray:
    """One row for each token: 1 in the column of its id, 0 elsewhere. Shape [T, V]."""
    rows = np.zeros((len(tokens.ids), tokens.vocab_size), np.float32)
    rows[np.arange(len(tokens.ids)), tokens.ids] = 1
    return rows


def _readable(sentence: str, field: str = "sentence") -> str:
    if len(sentence) > MAX_CHARACTERS:
        shown = sentence[:20] + "..."
        allowed = f"must have at most {MAX_CHARACTERS:,} characters, and has {len(sentence):,}"
        raise ConfigError(field, shown, allowed)
    try:
        sentence.encode()
    except UnicodeEncodeError:
        raise ConfigError(field, sentence, "must be UTF-8 text") from None
    # Some systems input Hangul as single letters (NFD). Control characters would move the cursor of the terminal.
    sentence = "".join(
        character if unicodedata.category(character) != "Cc" else " "
        for character in unicodedata.normalize("NFC", sentence)
    ).strip()
    if not sentence:
        raise ConfigError(field, sentence, "must not be empty")
    return sentence


def _checked(tokens: Tokens) -> Tokens:
    if not tokens.pieces:
        raise ConfigError("sentence", tokens.sentence, "must not be empty")
    if len(tokens.pieces) > MAX_TOKENS:
        allowed = f"must have at most {MAX_TOKENS} tokens, and has {len(tokens.pieces)}"
        raise ConfigError("sentence", tokens.sentence[:20] + "...", allowed)
    if max(tokens.ids) >= tokens.vocab_size:
        raise ConfigError("--vocab-size", tokens.vocab_size, f"must be at least {max(tokens.ids) + 1} for these tokens")
    return tokens


def _wordpiece(vocabulary: dict[str, int] | None = None) -> Model:
    """BERT's tokenizer without lowercasing, which would also decompose Hangul syllables."""
    model = Model(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=MAX_CHARACTERS))
    bert = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    model.normalizer = normalizers.Sequence([normalizers.NFC(), bert])
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return model


def _without_mark(piece: str) -> str:
    """A token without the marks that tokenizers put at the start or inside of words."""
    return piece.removeprefix("##").lstrip("▁Ġ")


def _letters(text: str) -> str:
    """The text without case, accents and spaces, as an uncased tokenizer sees it."""
    parts = unicodedata.normalize("NFKD", text).casefold()
    return "".join(c for c in parts if not c.isspace() and unicodedata.category(c) != "Mn")


def _lines(corpus: Path) -> list[str]:
    try:
        text = read_regular(corpus).decode()
    except UnicodeDecodeError as error:
        raise ConfigError("--corpus", str(corpus), f"must be UTF-8 text; byte {error.start} is not") from error
    except OSError as error:
        raise ConfigError("--corpus", str(corpus), f"cannot be read: {error.strerror}") from error
    return re.split(r"\s*[\r\n]\s*", text)
