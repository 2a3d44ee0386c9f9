"""The content of the figures, read from their axes, and that figure files are reproducible."""

import itertools
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

from posenc_jax.reporting import figures
from tests.reporting.rows import BITS, LENGTHS, learned_results, results, row

SPECTRA = {
    "none": 10000.0 ** (-np.arange(16) / 16),
    "linear": 10000.0 ** (-np.arange(16) / 16) / 4,
    "proportional": np.where(np.arange(16) < 4, 1.0, 0.0),
}


def lines(figure):
    """The curves of the metric itself, by label."""
    return {line.get_label(): line for line in curves(figure.axes[0])}


def curves(axes):
    return [line for line in axes.get_lines() if not line.get_label().startswith("_")]


def legend(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def labels(axes):
    """The labels at the ends of the curves, from top to bottom."""
    ends = {line.get_label() for line in curves(axes)}
    return [text.get_text() for text in sorted(axes.texts, key=lambda own: -own.xy[1]) if text.get_text() in ends]


ALL = {
    "extrapolation": lambda: figures.extrapolation_curve(results()),
    "perplexity": lambda: figures.extrapolation_curve(results(), "prefix_perplexity"),
    "learned": lambda: figures.extrapolation_curve(learned_results()),
    "costs": lambda: figures.cost_against_quality(results(), {"rope": 1.0}),
    "panels": lambda: figures.extrapolation_panels({"none": results(), "by content": learned_results()}),
    "context_gain": lambda: figures.extrapolation_curve(results(), "context_gain_bits_per_byte"),
    "loss_by_position": lambda: figures.extrapolation_curve(results(), "by_position_bits_per_byte"),
    "training": lambda: figures.training_curve([{"step": 1, "bits_per_byte": 8.0}, {"step": 2, "bits_per_byte": 4.0}]),
    "rotation": lambda: figures.rotation_frequencies(SPECTRA, 256),
}


@pytest.mark.parametrize("name", ALL)
def test_a_figure_is_written_as_png_and_svg_with_the_same_bytes_every_time(name, tmp_path):
    figures.save(ALL[name](), tmp_path / "first.v1")
    figures.save(ALL[name](), tmp_path / "second.v1")
    for suffix in ("png", "svg"):
        first = (tmp_path / f"first.v1.{suffix}").read_bytes()
        assert first == (tmp_path / f"second.v1.{suffix}").read_bytes()
    assert b"<dc:date>" not in first
    with Image.open(tmp_path / "first.v1.png") as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1)


@pytest.mark.parametrize("name", ALL)
def test_axes_are_labelled_and_nothing_overlaps(name):
    figure = ALL[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()

    def box(artist):
        return artist.get_window_extent(renderer)

    inside = [figure.legends[0]] if figure.legends else []
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert any(axes.get_xlabel() for axes in shown) or figure.get_supxlabel()
    for axes in shown:
        assert axes.get_ylabel() or axes is not shown[0]
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=False)  # upper panels show no labels
        boxes = [box(text) for position, text in ticks if low <= position <= high and text.get_visible()]
        assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
        ends = [text for text in axes.texts if text.get_text() in labels(axes)]
        heights = sorted(map(box, ends), key=lambda own: own.y0)
        assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(heights))
        inside += [axes, *ends]
    for own in map(box, inside):
        assert min(own.x0, own.y0) >= 0
        assert own.x1 <= figure.bbox.x1
        assert own.y1 <= figure.bbox.y1


def test_extrapolation_has_a_line_per_curve_with_its_values():
    figure = figures.extrapolation_curve(results())
    assert set(lines(figure)) == set(BITS)
    for name, line in lines(figure).items():
        np.testing.assert_array_equal(line.get_xdata(), LENGTHS)
        np.testing.assert_array_equal(line.get_ydata(), BITS[name])


def test_extrapolation_draws_the_metric_asked_for():
    figure = figures.extrapolation_curve(results(), "tail_perplexity")
    np.testing.assert_allclose(lines(figure)["ntk"].get_ydata(), 2 ** np.array(BITS["ntk"]) / 1.1)
    assert figure.axes[0].get_ylabel() == "perplexity per token (log scale)"


def test_a_curve_alone_has_bars_as_long_as_its_intervals():
    (axes,) = figures.extrapolation_curve([row(length=512), row(length=1024)]).axes
    for path in axes.collections[0].get_paths():
        assert path.vertices[:, 1] == pytest.approx([1.99, 2.01])


def test_paired_differences_stand_beside_losses_and_have_the_bars():
    figure = figures.extrapolation_curve(results())
    losses, differences = figure.axes
    assert not losses.collections
    assert {line.get_label() for line in curves(differences)} == {"ntk", "linear"}
    assert differences.get_title(loc="left") == "below 0: better than no scaling"
    linear = next(line for line in curves(differences) if line.get_label() == "linear")
    np.testing.assert_allclose(linear.get_ydata(), np.array(BITS["linear"]) - BITS["none"])
    assert len(differences.collections) == 2
    baseline = [
        replace(r, metric="difference_bits_per_byte") if r.metric == "prefix_change_bits_per_byte" else r
        for r in results()
    ]
    assert figures.extrapolation_curve(baseline).axes[1].get_title(loc="left") == "below 0: better than the baseline"


def test_a_panel_has_at_most_six_curves():
    figure = figures.extrapolation_curve([row(length=n, encoding=f"e{i}") for i in range(14) for n in (512, 1024)])
    panels = [[line.get_label() for line in curves(axes)] for axes in figure.axes if axes.get_visible()]
    assert [len(names) for names in panels] == [5, 5, 4]
    assert list(itertools.chain(*panels)) == [f"e{i}" for i in range(14)]


def test_lengths_are_the_ticks_of_an_axis_in_powers_of_two():
    axes = figures.extrapolation_curve(results()).axes[0]
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["128", "256", "512", "1024"]
    assert axes.get_xlabel() == "evaluation length (tokens)"
    assert axes.get_ylabel() == "bits per byte (log scale)"


@pytest.mark.parametrize("name", ["extrapolation", "context_gain", "loss_by_position"])
def test_the_training_length_is_marked(name):
    figure = ALL[name]()
    assert "training length" in texts(figure)
    assert any(
        list(line.get_xdata()) == [256, 256] and line.get_linestyle() == "--" for line in figure.axes[0].get_lines()
    )


def test_an_exploding_curve_leaves_the_others_room():
    """All values from 1.84 to 7.9 are visible, and the curves below 3 get a third of the height."""
    axes = figures.extrapolation_curve(results()).axes[0]
    low, high = axes.get_ylim()
    assert low < 1.84
    assert high > 7.9
    height = axes.transAxes.inverted().transform(axes.transData.transform((512, 3)))[1]
    assert height > 0.3
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert 4 <= len(ticks) <= 8


def test_ticks_stay_readable_over_several_decades():
    rows = [row("prefix_perplexity", length, value) for length, value in zip(LENGTHS, (3, 3, 90, 3000), strict=True)]
    (axes,) = figures.extrapolation_curve(rows, "prefix_perplexity").axes
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert {10, 100, 1000} <= set(ticks)
    assert len(ticks) <= 12


def test_panels_hold_the_curves_of_their_group_on_the_same_axes():
    groups = {"first": learned_results(), "second": learned_results()[:4], "third": learned_results()}
    figure = figures.extrapolation_panels(groups)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == list(groups)
    assert list(map(labels, panels)) == [["learned (ends at 512)", "none"], ["none"], ["learned (ends at 512)", "none"]]
    assert [bool(axes.get_xlabel()) for axes in panels] == [False, True, True]  # the lowest panel of each column
    assert len({axes.get_ylim() for axes in panels}) == 1


def test_costs_are_drawn_from_the_training_length_on_and_only_of_what_was_measured():
    figure = figures.cost_against_quality(learned_results(), {"none": 1.0, "learned": 1.02, "fire": 1.35})
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "256 tokens (1x)",
        "512 tokens (2x)",
        "1024 tokens (4x)",
    ]
    points = [{line.get_label(): line.get_xydata().tolist() for line in own} for own in map(curves, figure.axes)]
    assert points[0] == {"none": [[1.0, 1.9]], "learned": [[1.02, 1.85]]}
    assert points[2] == {"none": [[1.0, 2.5]]}  # learned positions cannot read this length
    assert legend(figure) == ["none", "learned"]


def test_a_curve_that_ends_early_says_so():
    figure = figures.extrapolation_curve(learned_results())
    np.testing.assert_array_equal(lines(figure)["learned (ends at 512)"].get_ydata(), [1.85, 1.85, 2.6])
    assert figure.axes[0].get_xlim()[1] > 1024


def test_an_encoding_without_any_value_has_no_line():
    figure = figures.extrapolation_curve([row(), row(value=None, encoding="learned")])
    assert set(lines(figure)) == {"rope"}


def test_labels_follow_the_ends_of_the_curves_from_top_to_bottom():
    assert labels(figures.extrapolation_curve(results()).axes[0]) == ["linear", "none", "ntk"]
    gains = figures.extrapolation_curve(results(), "context_gain_bits_per_byte")
    assert labels(gains.axes[0]) == ["ntk", "none", "linear"]


def test_labels_stay_in_order_and_apart():
    heights, sizes = [0.5, 0.3, 0.505, 0.9, 0.01, float("nan")], [0.1, 0.1, 0.2, 0.1, 0.1, 0.1]
    places = figures._apart(heights, sizes)
    order = [4, 1, 0, 2, 3]
    assert places[4] == pytest.approx(0.05)  # within the axes
    assert places[1] == pytest.approx(0.3)
    assert places[3] == pytest.approx(0.9)
    assert all(places[j] - places[i] >= (sizes[i] + sizes[j]) / 2 - 1e-12 for i, j in itertools.pairwise(order))
    assert np.isnan(places[5])


def test_a_curve_looks_the_same_in_every_figure():
    whole = [*results(), row(length=512, scaling="yarn")]
    without_first = [r for r in whole if (r.scaling, r.metric) != ("none", "context_gain_bits_per_byte")]
    for name, line in lines(figures.extrapolation_curve(without_first, "context_gain_bits_per_byte")).items():
        other = lines(figures.extrapolation_curve(whole))[name]
        assert (line.get_color(), line.get_marker()) == (other.get_color(), other.get_marker())


def test_no_two_of_many_curves_look_alike_even_without_colour():
    panels = figures.extrapolation_curve([row(scaling=f"rule{i}") for i in range(30)]).axes
    many = [line for axes in panels for line in curves(axes)]
    assert len({(line.get_color(), line.get_marker()) for line in many}) == 30
    few = many[:8]
    assert len({line.get_marker() for line in few}) == len({to_hex(line.get_color()) for line in few}) == 8


def test_context_gain_has_a_zero_line_inside_and_says_what_the_sign_means():
    for rows in (
        results(),
        [row("context_gain_bits_per_byte", 512, 0.3), row("context_gain_bits_per_byte", 1024, 0.4)],
    ):
        (axes,) = figures.extrapolation_curve(rows, "context_gain_bits_per_byte").axes
        assert axes.get_ylim()[0] <= -0.05
        assert axes.get_ylim()[1] > max(0.04, *(r.value for r in rows if r.metric.startswith("context_gain")))
        assert any(list(line.get_ydata()) == [0, 0] for line in axes.get_lines())
        assert axes.get_title(loc="left") == "above 0: uses the added context;  below 0: breaks"
        assert "bits per byte" in axes.get_ylabel()


def test_context_gain_shows_small_gains_beside_a_collapse():
    figure = figures.extrapolation_curve(results(), "context_gain_bits_per_byte")
    (axes,) = figure.axes
    assert axes.get_ylim()[0] < 1.905 - 7.9
    np.testing.assert_allclose(lines(figure)["ntk"].get_ydata(), [0.005, -0.255])
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(512, 0), (512, 0.05)]))[:, 1]
    assert heights[1] - heights[0] > 0.08


def test_loss_by_position_is_drawn_at_the_middle_of_each_bin():
    figure = figures.extrapolation_curve(results(), "by_position_bits_per_byte")
    np.testing.assert_array_equal(lines(figure)["none"].get_xdata(), np.arange(15) * 64 + 32)
    assert lines(figure)["none"].get_ydata()[-1] == BITS["none"][3]
    assert figure.axes[0].get_xlim() == (0, 960)
    assert list(figure.axes[0].get_xticks()) == [0, 256, 512, 768]


def test_training_and_validation_loss_are_drawn_against_the_step():
    figure = figures.training_curve(
        [
            {"step": 1, "bits_per_byte": 8.0},
            {"step": 2, "bits_per_byte": 4.0},
            {"step": 2, "validation_bits_per_byte": 3.5},
        ]
    )
    assert list(lines(figure)) == ["training", "validation"]
    np.testing.assert_array_equal(lines(figure)["training"].get_xydata(), [[1, 8], [2, 4]])
    np.testing.assert_array_equal(lines(figure)["validation"].get_xydata(), [[2, 3.5]])


def test_rotation_counts_full_turns_within_the_training_length():
    figure = figures.rotation_frequencies(SPECTRA, 256)
    curves = lines(figure)
    assert curves["none"].get_ydata()[0] == pytest.approx(256 / (2 * np.pi))
    np.testing.assert_allclose(curves["linear"].get_ydata() * 4, curves["none"].get_ydata())
    assert np.isnan(curves["proportional"].get_ydata()[4:]).all()
    horizontal = [line.get_ydata()[0] for line in figure.axes[0].get_lines() if line.get_label().startswith("_")]
    assert horizontal == [1, 32]
    assert [text[:2] for text in texts(figure)][:2] == ["1 ", "32"]
    assert figure.axes[0].get_yscale() == "log"


def test_a_dollar_sign_in_a_name_is_no_formula(tmp_path):
    figures.save(figures.extrapolation_curve([row(), row(scaling=r"$\frac$")]), tmp_path / "dollar")


def test_figures_leave_the_settings_of_matplotlib_as_they_were():
    before = dict(matplotlib.rcParams)
    for make in ALL.values():
        make()
    assert dict(matplotlib.rcParams) == before
