"""Fonts that can draw a text, and the placeholder if there is none."""

import warnings

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from posenc_jax.walkthrough import fonts
from posenc_jax.walkthrough.fonts import DEFAULT, MISSING, lettering
from tests.walkthrough.conftest import SENTENCE

HARD = "a$b$c <b>&amp; \\frac שלום नमस्ते 👍🏽 \u200d\ufe0f \u200f ⁂ 한글 \U000f0000"


def pixels(text):
    chosen = lettering([text])
    with matplotlib.rc_context({"font.family": list(chosen.families), "text.parse_math": False}):
        figure = Figure(figsize=(1, 1), dpi=50)
        figure.text(0.2, 0.2, chosen.shown(text), fontsize=30)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()


def needs_korean():
    if lettering([SENTENCE]).missing:
        pytest.skip("no installed font has Hangul: on Debian, apt-get install fonts-noto-cjk")


def test_latin_takes_the_default_font_alone():
    assert lettering(["θ √ abc"]).families == (DEFAULT,)


def test_hangul_syllables_differ_when_drawn():
    needs_korean()
    drawn = {pixels(syllable).tobytes() for syllable in "나는사과를좋아해"}
    assert len(drawn) == 8  # placeholder boxes would all be the same
    assert pixels(MISSING).tobytes() not in drawn


def test_any_text_is_drawn_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(HARD).std() > 0


def test_missing_characters_are_named_and_replaced(monkeypatch):
    monkeypatch.setattr(fonts, "_families", lambda: [DEFAULT])
    monkeypatch.setattr(fonts, "_find_new_fonts", lambda: None)
    found = lettering([SENTENCE])
    assert found.families == (DEFAULT,)
    assert found.shown("a나b") == f"a{MISSING}b"
    assert "나 (U+B098)" in found.warning()
    assert "fonts-noto-cjk" in found.warning()


def test_fonts_installed_since_matplotlib_made_its_list_are_found(monkeypatch):
    needs_korean()
    manager = matplotlib.font_manager.fontManager
    own = [entry for entry in manager.ttflist if "matplotlib" in entry.fname]
    fonts.characters.cache_clear()
    monkeypatch.setattr(manager, "ttflist", own)
    assert not lettering([SENTENCE]).missing
    fonts.characters.cache_clear()
