"""The pictures show the values of the trace."""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from posenc_jax.walkthrough import fonts, pictures, rotation, tokens, trace
from posenc_jax.walkthrough.fonts import Labels
from tests.walkthrough.test_fonts import HARD, needs_korean

SMALL = trace.Settings(width=32, heads=2)


@pytest.fixture
def english_labels(followed):
    labels = pictures.labels_of(followed, "en")
    with matplotlib.rc_context(pictures.style(labels)):
        yield labels


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_every_picture_is_written_as_png_and_svg(english, name):
    drawn = imread(english.folder / f"{name}.png")
    assert drawn.shape[1] >= (750 if name.endswith("narrow") else 1500)
    assert drawn.std() > 0.02
    assert "<svg" in (english.folder / f"{name}.svg").read_text(encoding="utf-8")


def test_the_animation_moves_and_repeats(english):
    with Image.open(english.folder / "rotation.gif") as animation:
        assert animation.n_frames == rotation.TOKENS * rotation.FRAMES_PER_TOKEN
        assert animation.info["loop"] == 0
        frames = []
        for frame in (0, 1, animation.n_frames - 1):
            animation.seek(frame)
            frames.append(np.asarray(animation.convert("RGB")).copy())
    assert (frames[0] != frames[1]).any()
    assert (frames[1] != frames[2]).any()
    assert (english.folder / "rotation.gif").stat().st_size < 600_000


def test_the_dot_products_of_sinusoids_depend_on_the_distance_alone(followed, english_labels):
    _, products, *_ = pictures.sinusoidal(followed, english_labels).axes
    curves = [np.asarray(line.get_ydata()) for line in products.get_lines()]
    assert len(curves) == 3
    for curve in curves:
        np.testing.assert_allclose(curve, curves[0], atol=0.05)
        np.testing.assert_allclose(curve, curve[::-1], atol=0.05)
    assert curves[0].max() == pytest.approx(followed.settings.width / 2, rel=1e-4)


def test_wavelengths_run_from_two_pi_to_two_pi_times_the_base(followed, english_labels):
    _, lengths = pictures.wavelengths(followed, english_labels).axes
    sinusoids, rope = (np.asarray(line.get_ydata()) for line in lengths.get_lines())
    assert len(sinusoids) == 256
    assert len(rope) == 32
    for curve, width in ((sinusoids, 512), (rope, 64)):
        np.testing.assert_allclose(curve[[0, -1]], [2 * np.pi, 2 * np.pi * 10000 ** (1 - 2 / width)], rtol=1e-5)


def test_products_lie_on_each_other_under_rope_only(followed, english_labels):
    rope, added = pictures.products(followed, english_labels).axes
    points = [[np.asarray(line.get_ydata()) for line in axes.get_lines()[1:]] for axes in (rope, added)]
    np.testing.assert_allclose(points[0][0], points[0][1], atol=1e-4)
    assert np.abs(points[1][0] - points[1][1]).max() > 0.1


def test_equal_vectors_match_less_far_away_and_least_under_small_bases(followed, english_labels):
    equal, bound = pictures.decay(followed, english_labels).axes
    for axes in (equal, bound):
        means = [np.asarray(line.get_ydata()) for line in axes.get_lines() if not line.get_label().startswith("_")]
        assert len(means) == len(pictures.BASES)
        for curve in means:
            assert curve[0] > 0.9
            assert curve[-1] < 0.4
        middle = [curve[len(curve) // 2] for curve in means]
        assert middle == sorted(middle)


def test_biases_are_those_of_their_encodings(followed, english_labels):
    figure = pictures.biases(followed, english_labels)
    shown = {axes.get_title(loc="left"): axes.images[0].get_array() for axes in figure.axes[:4]}
    distance = np.subtract.outer(np.arange(64), np.arange(64))
    seen = distance >= 0
    np.testing.assert_allclose(shown["ALiBi"][seen], -distance[seen] / 2)  # 1/2 is the slope of the first of 8 heads
    for values in shown.values():
        assert np.ma.getmaskarray(values)[~seen].all() or np.isnan(values[~seen]).all()
    t5, fox = shown["T5"], shown["FoX"]
    assert t5[20, 3] == t5[20, 2] == t5[40, 23]  # distances 17, 18 and 17 share a bucket
    np.testing.assert_allclose(np.diagonal(fox), 0, atol=1e-5)
    assert len({round(float(fox[i + 1, i]), 3) for i in range(5)}) == 5  # the gates depend on the tokens


def test_arrows_turn_at_the_rates_of_their_planes(followed):
    rope = trace.build("rope", followed.settings, pairing=trace.PAIRING)
    for pair in rotation.pairs(followed):
        at = [rotation._plane(trace.rotated(rope, followed.q[0], m)[0], pair) for m in (0, 0.25)]
        assert rotation._angle(*at) == pytest.approx(0.25 * 10000 ** (-2 * pair / 64), abs=1e-5)


@pytest.mark.parametrize("text", [HARD, "$", "a" * 60, "x " * 60])
def test_any_sentence_can_be_drawn(tmp_path, text):
    hard = trace.follow(tokens.wordpieces(text, vocab_size=200), SMALL)
    labels = pictures.labels_of(hard, "en")
    with matplotlib.rc_context(pictures.style(labels)):
        pictures.save(pictures.added(hard, labels), tmp_path / "sum")
    assert imread(tmp_path / "sum.png").std() > 0.02


def test_labels_are_korean_where_a_font_is(followed):
    needs_korean()
    assert pictures.labels_of(followed, "ko")("position") == "위치"


def test_labels_are_english_where_no_font_has_the_language(followed, monkeypatch):
    monkeypatch.setattr(fonts, "_families", lambda: [fonts.DEFAULT])
    monkeypatch.setattr(fonts, "_find_new_fonts", lambda: None)
    labels = pictures.labels_of(followed, "ko")
    assert labels("position") == "position"
    assert labels.token(0) == fonts.MISSING
    assert labels.lettering.missing


def test_long_tokens_are_cut_on_axes():
    long = trace.follow(tokens.given(["a" * 40, "b"], vocab_size=8), SMALL)
    assert len(Labels(long, "en").token(0)) == 14
    assert Labels(long, "en").token(1) == "b"
