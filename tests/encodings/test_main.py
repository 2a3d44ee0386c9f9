"""The command that lists and describes encodings."""

import inspect
import io

import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from rich.console import Console

from posenc_jax import encodings
from posenc_jax.catalogue import DIMS, EncodingInfo, equal_token_weights, equations, gallery, main, readable, table
from posenc_jax.schema import ConfigError
from tests.encodings.test_contract import one_of_each_kind


def test_the_table_has_a_row_for_every_encoding(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main([])
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert tuple(rows) == encodings.names()


def test_no_name_is_cut_in_a_narrow_terminal():
    written = io.StringIO()
    table().print(Console(file=written, width=80, force_terminal=True, color_system=None))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split("│")[1].strip() for line in lines if line.startswith("│")]
    assert set(encodings.names()) <= set(rows)
    assert "…" not in written.getvalue()


@pytest.mark.parametrize("name", encodings.names())
def test_a_docstring_is_readable_text(name):
    shown = readable(inspect.getdoc(encodings.load(name)), 80)
    assert "\\" not in shown
    assert "math::" not in shown
    paragraphs = [line for line in shown.splitlines() if not line.startswith("    ")]
    assert max(map(len, paragraphs)) <= 80
    assert any(line.startswith("    ") for line in shown.splitlines())  # an equation


@pytest.mark.parametrize(
    ("tex", "expected"),
    [
        (r"z_{ij} = q_i \cdot k_j / \sqrt{d} - m_h (i - j)", ["z_ij = q_i · k_j / √(d) - m_h (i - j)"]),
        (r"\zeta_m = \frac{2m/d + \theta}{1 + \theta}, \quad x = 1", ["ζ_m = (2m/d + θ)/(1 + θ),", "x = 1"]),
        (r"e^{P_{ic} - P_{jc}} / \sqrt{d}", ["e^{P_ic - P_jc} / √(d)"]),
        (r"\frac{1}{\sqrt{d}} \sum_{l \le t} \psi_l", ["1/√(d) ∑_{l ≤ t} ψ_l"]),
    ],
)
def test_equations_are_plain_text(tex, expected):
    assert list(equations(tex)) == expected


@one_of_each_kind
def test_one_encoding_is_shown_with_docstring_settings_and_picture(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    main([name])
    shown = capsys.readouterr().out
    assert encodings.load(name).__doc__.strip().splitlines()[0] in " ".join(shown.split())
    for field, value in encodings.default_config(name).items():
        assert f"  {field} = {value!r}" in shown
    assert "█" in shown
    pixels = imread(tmp_path / f"encoding_{name}.png")
    assert pixels.shape[0] > 300
    assert pixels.std() > 0.05


@pytest.mark.parametrize("name", encodings.names())
def test_facts_are_those_of_the_code(name):
    facts = EncodingInfo.of(name)
    assert facts.source.rstrip(")")[-4:].isdigit()
    assert facts.source.count("(") == facts.source.count(")")
    assert facts.relative == encodings.load(name).relative
    assert bool(facts.learns) == bool(nnx.to_flat_state(nnx.state(encodings.build(name, DIMS, nnx.Rngs(0)), nnx.Param)))


def test_facts_of_some():
    assert (EncodingInfo.of("none").acts_on, EncodingInfo.of("none").data_dependent) == ("nothing", False)
    assert (EncodingInfo.of("sinusoidal").acts_on, EncodingInfo.of("rope").acts_on) == (
        "embeddings",
        "queries and keys",
    )
    assert (EncodingInfo.of("t5").acts_on, EncodingInfo.of("t5").learns) == ("logits", "64 shared")
    assert EncodingInfo.of("fox").data_dependent
    assert not EncodingInfo.of("t5").data_dependent


def test_equal_tokens_are_attended_alike_without_an_encoding():
    weights = equal_token_weights(encodings.build("none", DIMS, nnx.Rngs(0)), length=8)
    np.testing.assert_allclose(weights, np.tile(np.tri(8) / np.arange(1, 9)[:, None], (2, 1, 1)), rtol=1e-5)


def test_the_gallery_has_a_map_for_each_name_and_no_empty_panel():
    panels = gallery(("none", "hard_alibi", "rope"), length=8, columns=2).axes
    assert [axes.get_title() for axes in panels if axes.images] == ["none", "hard_alibi", "rope"]
    assert len(panels) == 4  # with the colour bar
    weights = equal_token_weights(encodings.build("hard_alibi", DIMS, nnx.Rngs(0)), length=8)[0]
    np.testing.assert_array_equal(panels[1].images[0].get_array().filled(0), np.tril(weights))


def test_settings_change_what_is_shown(capsys, tmp_path):
    main(["alibi", "max_exponent=4", "--output", str(tmp_path / "steep.png")])
    assert "max_exponent = 8.0  (here 4)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Did you mean 'max_exponent'"):
        main(["alibi", "max_exponant=4"])
    with pytest.raises(ConfigError, match="must be FIELD=VALUE"):
        main(["alibi", "4"])
