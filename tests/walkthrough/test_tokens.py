"""Tokens and ids of a sentence."""

import subprocess
import sys
import unicodedata

import numpy as np
import pytest

from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough import tokens
from tests.walkthrough.conftest import PIECES, SENTENCE


def test_given_tokens_are_numbered_as_first_seen():
    found = tokens.given(["a", "b", "a"], "a b a")
    assert (found.pieces, found.ids, found.vocab_size) == (("a", "b", "a"), (0, 1, 0), 30522)


def test_given_tokens_make_up_for_a_sentence_that_is_not_given():
    assert tokens.given(PIECES).sentence == "나는 사과를좋아해"


def test_given_tokens_must_spell_the_sentence():
    with pytest.raises(ConfigError, match=r"must spell the sentence.*# starts a comment"):
        tokens.given(["나"], SENTENCE)  # the rest is a comment in a shell
    assert tokens.given(["i", "like", "cafe"], "I like Café").pieces == (
        "i",
        "like",
        "cafe",
    )  # case and accents may differ


def test_without_a_corpus_pieces_that_occur_once_are_single_characters():
    assert tokens.wordpieces(SENTENCE).pieces == ("나", "##는", "사", "##과", "##를", "좋", "##아", "##해")
    assert tokens.wordpieces("apples, apples!").pieces == ("apples", ",", "apples", "!")


def test_a_corpus_teaches_longer_pieces(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("사과를 먹는다\n사과를 판다\n", encoding="utf-8")
    assert "사과를" in tokens.wordpieces(SENTENCE, corpus).pieces


def test_ids_of_wordpieces_are_the_same_in_every_process():
    code = "from posenc_jax.walkthrough import tokens; print(tokens.wordpieces('the cat sat on that other mat').ids)"
    seen = {subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)}
    assert seen == {f"{tokens.wordpieces('the cat sat on that other mat').ids}\n".encode()}


def test_decomposed_hangul_is_composed():
    assert tokens.wordpieces(unicodedata.normalize("NFD", SENTENCE)).sentence == SENTENCE


def test_bytes_are_their_own_ids():
    found = tokens.utf8_bytes("나!")
    assert found.ids == (0xEB, 0x82, 0x98, 0x21)
    assert found.pieces == ("EB", "82", "98", "21")
    assert found.vocab_size == 256


def test_one_hot_rows_have_a_one_at_the_id():
    rows = tokens.one_hot(tokens.given(["a", "b", "a"]))
    assert rows.shape == (3, 30522)
    np.testing.assert_array_equal(rows.argmax(1), [0, 1, 0])
    np.testing.assert_array_equal(rows.sum(1), 1)


@pytest.mark.parametrize("make", [tokens.wordpieces, tokens.utf8_bytes])
@pytest.mark.parametrize("sentence", ["", "   ", "\n\t\x00"])
def test_an_empty_sentence_is_refused(make, sentence):
    with pytest.raises(ConfigError, match="sentence = '': must not be empty"):
        make(sentence)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tokens.wordpieces("x" * 100_000), "at most 2,000 characters, and has 100,000"),
        (lambda: tokens.utf8_bytes("x" * 129), "at most 128 tokens, and has 129"),
        (lambda: tokens.wordpieces("a\udc80b"), "must be UTF-8 text"),
        (lambda: tokens.wordpieces("abc def", vocab_size=3), "--vocab-size = 3: must be at least"),
        (lambda: tokens.utf8_bytes("abc", vocab_size=255), "--vocab-size = 255: must be at least 256"),
        (lambda: tokens.given(["a", "b", "c"], vocab_size=2), "--vocab-size = 2: must be at least 3"),
        (lambda: tokens.given(["a", " "]), "--tokens = '': must not be empty"),
    ],
)
def test_what_cannot_be_shown_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_corpus_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--corpus.*cannot be read: No such file"):
        tokens.wordpieces(SENTENCE, tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match="must be UTF-8 text; byte 3 is not"):
        tokens.wordpieces(SENTENCE, tmp_path / "latin.txt")
