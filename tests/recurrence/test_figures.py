"""The content of the figures on attention and recurrence, read from their axes."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from experiments.recurrence import figures as recurrence_figures
from posenc_jax.reporting import figures

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
NAMES = ("transformer", "dense attention", "rnn", "lstm", "gru", "elmo")


def growth():
    times = {name: {n: 1e-8 * n**2 + 3e-5 * n * (i + 1) for n in LENGTHS} for i, name in enumerate(NAMES)}
    times["dense attention"] = {n: time for n, time in times["dense attention"].items() if n <= 2048}
    panels = {"training step": times, "inference": {name: times[name] for name in reversed(NAMES)}}
    return recurrence_figures.growth(panels, "seconds", {title: dict.fromkeys(NAMES, 1.5) for title in panels})


def fading():
    curves = {
        name: {n: (2 * rate**n, rate**n, 3 * rate**n) if rate or n > 1 else (1.0, 1.0, 1.0) for n in range(60)}
        for name, rate in FACTORS.items()
    }
    return recurrence_figures.fading_gradients({"at initialisation": curves, "after training": curves})


FACTORS = {"rnn": 0.5, "lstm": 0.8, "none": 0.99, "exploding": 1.05, "zero": 0.0}  # "zero" is 0 from distance 2 on


def recall():
    curves = {name: dict.fromkeys((2, 4, 8, 64, 128), (0.9, 0.85, 0.95)) for name in ("rnn", "transformer")}
    return recurrence_figures.recall_by_distance(curves, 1 / 16, (2, 64))


ALL = {"growth": growth, "fading": fading, "recall": recall}


def curves(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


@pytest.mark.parametrize("name", ALL)
def test_a_figure_has_the_same_bytes_every_time(name, tmp_path):
    figures.save(ALL[name](), tmp_path / "first")
    figures.save(ALL[name](), tmp_path / "second")
    for suffix in ("png", "svg"):
        assert (tmp_path / f"first.{suffix}").read_bytes() == (tmp_path / f"second.{suffix}").read_bytes()


@pytest.mark.parametrize("name", ALL)
def test_nothing_leaves_the_figure_or_covers_a_curve(name):
    figure = ALL[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    assert legends
    for axes in figure.axes:
        assert axes.get_xlabel()
        for legend in legends:
            box = legend.get_window_extent(renderer)
            assert box.x1 <= figure.bbox.x1
            for line in axes.get_lines():
                if line.get_label().startswith("_"):
                    continue
                points = axes.transData.transform(line.get_xydata())
                assert not any(box.contains(*point) for point in points if np.isfinite(point).all())
    assert figure.axes[0].get_ylabel()


def test_growth_has_the_exponents_in_its_legends_and_one_style_per_model():
    left, right = growth().axes
    assert set(curves(left)) == {f"{name}: n^1.50" for name in NAMES}
    for label, line in curves(left).items():
        assert curves(right)[label].get_color() == line.get_color()
        assert curves(right)[label].get_marker() == line.get_marker()
    assert list(curves(left)["dense attention: n^1.50"].get_xdata()) == list(LENGTHS[:6])
    assert left.get_xscale() == left.get_yscale() == "log"


def test_gradients_are_relative_to_those_of_the_token_before():
    left, _ = fading().axes
    np.testing.assert_allclose(curves(left)["rnn"].get_ydata(), 0.5 ** np.arange(-1, 59))
    assert np.isnan(curves(left)["zero"].get_ydata()[2:]).all()  # a logarithmic axis cannot show 0
    assert left.get_ylim()[0] == pytest.approx(1e-10)
    curve = {0: (4.0, 3.0, 5.0), 1: (2.0, 1.0, 3.0)}
    absolute = recurrence_figures.fading_gradients({"trained": {"rnn": curve}}, relative_to=None)
    assert list(curves(absolute.axes[0])["rnn"].get_ydata()) == [4.0, 2.0]


def test_recall_marks_chance_and_the_distances_of_training():
    (axes,) = recall().axes
    assert [text.get_text() for text in axes.texts] == ["chance", "trained on 2 to 64", "beyond"]
    unnamed = [line for line in axes.get_lines() if line.get_label().startswith("_")]
    assert [line.get_ydata()[0] for line in unnamed[:1]] == [1 / 16]
    assert unnamed[1].get_xdata()[0] == 64
