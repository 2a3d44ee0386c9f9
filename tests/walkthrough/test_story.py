"""The content of the walkthrough, in both languages."""

import dataclasses
import re
import string

import pytest

from posenc_jax.walkthrough import story, tokens, trace
from posenc_jax.walkthrough.story import LANGUAGES, Picture, Shapes, Slip, Table, Text
from tests.walkthrough.conftest import PIECES, SENTENCE


def test_large_numbers_in_sentences_have_separators():
    many = tokens.given(PIECES, SENTENCE)
    settings = trace.Settings(width=1024, heads=8, positions="learned", table_length=2048)
    for language in LANGUAGES:
        text = " ".join(part.text for part in parts(trace.follow(many, settings), language, Text))
        assert {"30,522", "1,024", "2,048"} <= set(re.findall(r"\d+(?:,\d{3})+", text))
        assert not re.search(r"(?<!\N{SQUARE ROOT})\b\d{4,}", text)


def fields(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_every_language_says_the_same():
    english = LANGUAGES["en"]
    for words in LANGUAGES.values():
        assert list(words) == list(english)
        for key, text in words.items():
            assert fields(text) == fields(english[key]), key


def test_only_formulas_are_the_same_in_korean():
    same = {key for key, text in LANGUAGES["ko"].items() if text == LANGUAGES["en"][key]}
    assert {key for key in same if not key.endswith((".shapes", ".theta", ".between", ".plain", ".rope"))} <= {
        *("tokens.id", "label.product", "box.project", "box.attend")
    }
    for key in LANGUAGES["ko"].keys() - same:
        assert any("가" <= character <= "힣" for character in LANGUAGES["ko"][key]), key


def parts(followed, language, kind):
    return [part for section in story.sections(followed, language) for part in section.parts if isinstance(part, kind)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_story_names_the_shapes_of_the_example(followed, language):
    shapes = " ".join(part.text for part in parts(followed, language, Shapes))
    for shape in ("(5, 30522) @ W (30522, 512) = (5, 512)", "(5, 512) + (5, 512) = (5, 512)", "(5, 8, 64)"):
        assert shape in shapes


def test_slips_are_told_with_numbers_of_the_trace(followed):
    slips = {slip.told: slip.truth for slip in parts(followed, "en", Slip)}
    assert len(slips) == 5
    zero, added, place, angle, relative = slips.values()
    assert "sin 0 = 0" in zero
    assert "cos 0 = 1" in zero
    assert "0, 1, 0, 1, 0, 1" in zero
    for number in (followed.pair.added[0], followed.shifted.added[0]):
        assert story.number(number) in added
    for number in (followed.pair.turned_early[0], followed.shifted.turned_early[0]):
        assert story.number(number) in place
    assert "at position 11, pair 0 rotates by 11 radians and pair 31 by 0.0015" in angle
    worst = abs(followed.pair.product - followed.shifted.product).max()
    assert f"{worst:.2g}" in relative


def test_tables_hold_the_numbers_of_the_trace(followed):
    ids, embedded, positional, added, angles, _, products, weights, outputs = parts(followed, "en", Table)
    assert [row[1:] for row in ids.rows] == [(piece, str(i)) for i, piece in enumerate(PIECES)]
    for table, values in ((embedded, followed.embedded), (positional, followed.sinusoidal), (added, followed.added)):
        assert [row[2:] for row in table.rows] == [tuple(map(story.number, row[:6])) for row in values]
    assert angles.rows[1] == ("1", "0.749894", "8.38", "0.0000", "5.2493", "2.9996", "8.2488", "2.9996")
    assert products.rows[0][2] == products.rows[0][3] == story.number(followed.pair.product[0])
    assert products.rows[0][4] != products.rows[0][5]
    assert [row[3] for row in weights.rows] == [f"{weight:.4f}" for weight in followed.turned[0].weights]
    assert all(row[3] == row[4] for row in weights.rows)
    assert [row[1:] for row in outputs.rows[:2]] == 2 * [tuple(map(story.number, followed.turned[0].output[:6]))]
    assert outputs.rows[2][1:] != outputs.rows[3][1:]


def test_long_tables_skip_to_their_last_row():
    many = trace.follow(tokens.utf8_bytes("abcdefghijklmnopqrstuvwxyz"), trace.Settings(width=16, heads=2))
    rows = parts(many, "en", Table)[0].rows
    assert [row[0] for row in rows] == [*map(str, range(10)), "…", "25"]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (tokens.wordpieces("a b", vocab_size=64), "The vocabulary was learned from the sentence itself"),
        (tokens.utf8_bytes("a b"), "the bytes of the sentence in UTF-8"),
        (tokens.given(["a", "b"], vocab_size=64), "were given"),
    ],
)
def test_the_origin_of_ids_is_said(made, said):
    small = trace.follow(made, trace.Settings(width=16, heads=2))
    assert said in " ".join(part.text for part in parts(small, "en", Text))


def test_the_end_of_a_learned_table_is_said():
    settings = trace.Settings(width=16, heads=2, positions="learned", table_length=8)
    short = trace.follow(tokens.given(PIECES, SENTENCE, vocab_size=16), settings)
    assert "Position 8 has no row" in " ".join(part.text for part in parts(short, "en", Text))
    assert "the learned table ends at position 7" in parts(short, "en", Slip)[1].truth
    *_, products, weights, outputs = parts(short, "en", Table)
    assert products.rows[0][-1] == weights.rows[0][-1] == ""  # there is nothing to show
    assert len(outputs.rows) == 3
    longer = trace.follow(short.tokens, dataclasses.replace(settings, table_length=12))
    assert parts(longer, "en", Table)[-2].rows[0][-1]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_picture_has_a_caption(followed, language):
    shown = parts(followed, language, Picture)
    assert len({picture.file for picture in shown}) == len(shown) == 9
    assert all(len(picture.caption) > 20 for picture in shown)
