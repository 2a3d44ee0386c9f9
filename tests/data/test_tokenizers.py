"""Tokenizers reproduce every byte, and know the number of bytes of each token."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from posenc_jax.data import tokenizers
from posenc_jax.schema import ConfigError
from tests.data.settings import settings

ROOT = Path(__file__).parent.parent.parent
SIZES = {"bytes": 256, "bpe": 300, "wordpiece": 560}
ENGLISH = b"It was the best of times, it was the worst of times; it was the age of wisdom.\n" * 40


@pytest.fixture(params=["bytes", "bpe", "wordpiece"])
def tokenizer(request, tmp_path):
    return tokenizers.train(settings(tmp_path, tokenizer=request.param, vocab_size=SIZES[request.param]), [ENGLISH])


TEXTS = {
    "english": ENGLISH[:1000],
    "empty": b"",
    "mixed line ends": b"\r\n\n\r \r\n\t\n",
    "NUL": b"a\0b\0\0",
    "spaces": b"  leading, trailing and   many   ",
    "four-byte characters": "añ€😀\u200d한국어 e\u0301".encode(),
    "a byte order mark inside": "a\ufeffb".encode(),
    "every byte": bytes(range(256)),
    "a cut character": "é".encode()[1:] + b" text " + "😀".encode()[:3],
    "what marks a piece inside a word elsewhere": b"##a # a##a \xef\xbc\x83\xef\xbc\x83a",
    "a long word": b"times" * 400,
    "noise": random.Random(0).randbytes(2000),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_any_bytes_come_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert np.all(ids < tokenizer.vocab_size)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_token_bytes_sum_to_the_length_of_the_text(tokenizer, text):
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_pieces_shorten_text_like_that_they_learned_from(tmp_path, kind):
    tokenizer = tokenizers.train(settings(tmp_path, tokenizer=kind, vocab_size=SIZES[kind]), [ENGLISH])
    assert len(tokenizer.encode(ENGLISH)) < len(ENGLISH) / 2


def test_wordpiece_takes_the_longest_piece_from_the_left(tmp_path):
    tokenizer = tokenizers.train(settings(tmp_path, tokenizer="wordpiece", vocab_size=560), [ENGLISH])
    pieces = {tokenizer.decode(np.array([i])) for i in range(tokenizer.vocab_size)}
    first = tokenizer.decode(tokenizer.encode(b" worstest")[:1])
    assert first == max((piece for piece in pieces if b" worstest".startswith(piece)), key=len)
    assert len(first) > 2
    inside, at_the_start = tokenizer.encode(b" wq")[-1], tokenizer.encode(b"q")[0]
    assert inside != at_the_start
    assert tokenizer.decode(np.array([inside])) == tokenizer.decode(np.array([at_the_start])) == b"q"


def test_a_long_text_is_encoded_in_pieces_and_comes_back(tmp_path, monkeypatch):
    tokenizer = tokenizers.train(settings(tmp_path, tokenizer="bpe", vocab_size=300), [ENGLISH])
    whole = tokenizer.encode(ENGLISH)
    monkeypatch.setattr(tokenizers, "_PIECE", 50)
    ids = tokenizer.encode(ENGLISH)
    assert len(ids) > len(whole)
    assert tokenizer.decode(ids) == ENGLISH


def test_a_text_with_few_pairs_keeps_the_vocabulary_size_asked_for(tmp_path):
    tokenizer = tokenizers.train(settings(tmp_path, tokenizer="bpe", vocab_size=1000), [b"abab abab"])
    assert tokenizer.vocab_size == 1000
    assert tokenizer.token_bytes.shape == (1000,)
    assert tokenizer.token_bytes[-1] == 0
    assert tokenizer.decode(np.array([999])) == b""


def test_learning_is_deterministic_and_a_definition_makes_the_tokenizer_again(tmp_path):
    config = settings(tmp_path, tokenizer="bpe", vocab_size=320)
    first, second = tokenizers.train(config, [ENGLISH]), tokenizers.train(config, [ENGLISH])
    again = tokenizers.load(config, first.definition)
    assert first.fingerprint == second.fingerprint == again.fingerprint
    assert np.array_equal(first.encode(ENGLISH), again.encode(ENGLISH))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_processes_learn_the_same_tokenizer(tmp_path, kind):
    """The hash tables of the library have a different order in each process."""
    program = f"""
from pathlib import Path
from posenc_jax.data import tokenizers
from tests.data.settings import settings
from tests.data.test_tokenizers import ENGLISH
config = settings(Path({str(tmp_path)!r}), tokenizer={kind!r}, vocab_size=600)
print(tokenizers.train(config, [ENGLISH, bytes(range(256)) * 3]).fingerprint)
"""
    found = {
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(3)
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda definition: "",
        lambda definition: definition[:-1],
        lambda definition: definition.replace('"a":', '"a longer piece":'),
        lambda definition: json.dumps(json.loads(definition) | {"normalizer": {"type": "Lowercase"}}),
        lambda definition: json.dumps(json.loads(definition) | {"truncation": {"max_length": 3}}),
        lambda definition: definition.replace('"continuing_subword_prefix":null', '"continuing_subword_prefix":"long"'),
    ],
)
def test_a_definition_that_learning_did_not_make_is_refused(tmp_path, change):
    config = settings(tmp_path, tokenizer="bpe", vocab_size=300)
    with pytest.raises(ConfigError, match=r"config.data.tokenizer = 'bpe': needs a definition that it was trained to"):
        tokenizers.load(config, change(tokenizers.train(config, [ENGLISH]).definition))


def test_fingerprints_of_different_tokenizers_differ(tmp_path):
    made = [
        tokenizers.train(settings(tmp_path), []),
        tokenizers.train(settings(tmp_path, tokenizer="bpe", vocab_size=300), [ENGLISH]),
        tokenizers.train(settings(tmp_path, tokenizer="bpe", vocab_size=301), [ENGLISH]),
        tokenizers.train(settings(tmp_path, tokenizer="bpe", vocab_size=300), [ENGLISH[::-1]]),
    ]
    assert len({tokenizer.fingerprint for tokenizer in made}) == len(made)


@pytest.mark.parametrize(
    ("kind", "vocab_size", "allowed"),
    [("bytes", 512, "256 for"), ("bpe", 256, "at least 257"), ("wordpiece", 512, "at least 513")],
)
def test_a_vocabulary_that_cannot_be_is_refused(tmp_path, kind, vocab_size, allowed):
    with pytest.raises(ConfigError, match=f"config.data.vocab_size = {vocab_size}: must be {allowed}"):
        tokenizers.train(settings(tmp_path, tokenizer=kind, vocab_size=vocab_size), [ENGLISH])
