"""The figures and findings of a study of RoPE bases."""

from dataclasses import replace

import numpy as np
import pytest

from posenc_jax.reporting.base_figures import base_map, findings
from posenc_jax.reporting.figures import save
from posenc_jax.results import Base
from tests.reporting.rows import row

BASES = [
    Base(f"base={base:g} d={width}", width, base, width // 2, 300.0 + base, attended, 81.5, 40.7, 20.4)
    for width in (32, 64)
    for base, attended in ((100.0, 10), (1e4, 100), (1e6, 400))
]


def results(metric="copy_gain_bits_per_byte", values=((1.0, 0.9, 0.1), (1.0, 0.2, 0.1), (1.0, 0.8, 0.9))):
    """The same results for both head dimensions: for each base, a row of values at 32, 128 and 512 tokens."""
    return [
        replace(row(metric, length, value, encoding=base.variant, train_length=128), seed=None)
        for base, own in zip(BASES, 2 * values, strict=True)
        for length, value in zip((32, 128, 512), own, strict=True)
    ]


def test_findings_count_what_the_bound_tells():
    """Copying contradicts the bound for base 100 at 128 and 10^6 at 512. It agrees for 10^4, which never copies."""
    first, second, bound = findings(results(), BASES)
    assert "Heads of 32 channels: of 6 pairs" in first
    assert "tells 4 right" in first
    assert "found: 1; holds, not found: 0; fails, found all the same: 2; fails, not found: 3" in first
    assert second == first.replace("32 channels", "64 channels")
    assert "0.73 to 1.07 times the published one" in bound


def test_there_are_no_findings_if_no_distance_was_asked_for():
    assert list(findings(results("prefix_bits_per_byte"), BASES)) == []


@pytest.mark.parametrize("metric", ["copy_gain_bits_per_byte", "prefix_bits_per_byte"])
def test_a_map_has_a_panel_for_each_width_with_all_values(metric, tmp_path):
    figure = base_map(results(metric), BASES, metric, "bits per byte")
    panels = [axes for axes in figure.axes if axes.get_title("left").startswith("heads of")]
    assert [axes.get_title("left") for axes in panels] == ["heads of 32 channels", "heads of 64 channels"]
    for axes in panels:
        (mesh,) = axes.collections
        np.testing.assert_allclose(
            np.reshape(mesh.get_array(), (3, 3)).T, [[1, 0.9, 0.1], [1, 0.2, 0.1], [1, 0.8, 0.9]]
        )
        (bound,) = (line for line in axes.get_lines() if "B_m" in str(line.get_label()))
        assert list(bound.get_ydata()) == [10, 100, 400]
    save(figure, tmp_path / "map")


def test_lengths_that_cannot_be_read_stay_empty():
    rows = [replace(r, value=None, ci_low=None, ci_high=None) if r.eval_length == 512 else r for r in results()]
    mesh = base_map(rows, BASES, "copy_gain_bits_per_byte", "bits per byte").axes[0].collections[0]
    assert np.ma.getmaskarray(np.ma.masked_invalid(mesh.get_array())).sum() == 3
