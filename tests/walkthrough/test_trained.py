"""A trained model in the walkthrough, against a model that is called in the ordinary way."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.schema import ConfigError
from posenc_jax.walkthrough import command, pictures, story, terminal, tokens, trace, trained
from posenc_jax.walkthrough.story import LANGUAGES, Table
from tests.runs.tiny_runs import tiny
from tests.test_generation import generator

SENTENCE = "ABBA ABBA"
SMALL = trace.Settings(width=16, heads=2)


def reading(encoding, sentence=SENTENCE, **changes):
    own = generator(encoding, **changes)
    return own, trained.read("a run", own, tokens.of_model(sentence, own.tokenizer))


@pytest.fixture(scope="module")
def rope():
    return reading("rope")


def test_the_reading_is_that_of_the_model(rope):
    own, found = rope
    ids = jnp.array([list(SENTENCE.encode())])
    for seen, places in ((found.plain, jnp.arange(9)[None]), (found.moved, 1000 + jnp.arange(9)[None])):
        expected = jax.nn.softmax(own.model(ids, places)[0, -1])
        np.testing.assert_allclose(seen.following, expected, atol=1e-5)
        np.testing.assert_allclose(seen.weights.sum(axis=-1), 1, atol=1e-5)
        assert not np.triu(seen.weights, 1).any()
    assert found.likely == tuple(tokens.piece(bytes([i])) for i in found.likely_ids)
    assert (np.diff(found.plain.following[found.likely_ids]) <= 0).all()
    assert found.plain.following.argmax() == found.likely_ids[0]


def test_with_rope_a_head_does_not_notice_that_all_positions_moved(rope):
    _, found = rope
    np.testing.assert_allclose(found.moved.weights, found.plain.weights, atol=1e-3)
    assert np.abs(found.without.weights - found.plain.weights).max() > 0.05


def test_without_its_encoding_a_model_is_that_without_positions(rope):
    own, found = rope
    none = dataclasses.replace(own, config=tiny("none"))
    model = none.model
    model.drop_encodings()
    expected = jax.nn.softmax(model(jnp.array([list(SENTENCE.encode())]), 7 + jnp.arange(9)[None])[0, -1])
    np.testing.assert_allclose(found.without.following, expected, atol=1e-5)


def test_the_head_is_the_one_that_looks_most_at_the_previous_token(rope):
    _, found = rope
    weights = found.plain.weights
    mean = np.array([[[head[t, t - 1] for t in range(1, 9)] for head in layer] for layer in weights]).mean(axis=-1)
    assert mean[found.layer, found.head] == mean.max() == pytest.approx(found.previous(found.plain))
    np.testing.assert_array_equal(found.weights(found.plain), weights[found.layer, found.head])


def test_a_table_of_positions_ends_the_moved_reading():
    _, found = reading("learned")
    assert found.moved is None
    with pytest.raises(ConfigError, match=r"sentence = '.*': must have at most 16 tokens, for which a run has"):
        reading("learned", "A" * 17)


def test_a_distance_bias_is_a_reading_too():
    _, found = reading("alibi")
    np.testing.assert_allclose(found.moved.weights, found.plain.weights, atol=1e-4)


def test_a_model_with_fewer_heads_without_its_encoding_is_refused():
    with pytest.raises(ConfigError, match="--model = 'a run': must not have encoding 'rope_pp': layers without"):
        reading("rope_pp")


def test_one_token_has_no_previous_one():
    with pytest.raises(ConfigError, match="sentence = 'A': must have at least 2 tokens with --model"):
        reading("rope", "A")


def test_pieces_show_spaces_and_bytes():
    assert [tokens.piece(text) for text in (b" a", "나".encode(), b"\xeb\x82", b"\n")] == ["▁a", "나", "EB82", r"\n"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("encoding", ["rope", "learned"])
def test_the_last_section_tells_the_numbers_of_the_model(encoding, language):
    own, found = reading(encoding)
    given = tokens.of_model(SENTENCE, own.tokenizer)
    followed = dataclasses.replace(trace.follow(given, SMALL), trained=found)
    sections = story.sections(followed, language)
    assert sections[-1].title == LANGUAGES[language]["trained.title"]
    text = terminal.plain("", sections[-1:], language, 100)
    assert "a run" in text
    assert f"{found.previous(found.plain):.2f}" in text
    assert f"{found.previous(found.without):.2f}" in text
    table = sections[-1].parts[-1]
    assert isinstance(table, Table)
    assert [row[1] for row in table.rows] == [f"{found.plain.following[i]:.4f}" for i in found.likely_ids]
    assert all((row[3] == "") == (encoding == "learned") for row in table.rows)
    figure = pictures.trained(followed, pictures.labels_of(followed, "en"))
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == (2 if encoding == "learned" else 3)
    seen = np.tri(9, dtype=bool)
    np.testing.assert_array_equal(np.asarray(shown[0])[seen], found.weights(found.plain)[seen])


def test_the_command_takes_a_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("posenc_jax.generation.load", lambda name, field: generator("rope"))
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda followed, *_: drawn.append(followed) or pictures.Lettering(()))
    monkeypatch.setattr("posenc_jax.walkthrough.command.page", lambda *_: "page")
    command.main([SENTENCE, "--model", "a run", "--width", "16", "--heads", "2", "--output", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Step 11 shows what a run has learned." in re.sub(r"\s+", " ", printed)
    assert "The tokenizer of a run splits the sentence" in re.sub(r"\s+", " ", printed)
    assert drawn[0].trained.model == "a run"
