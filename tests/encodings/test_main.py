"""The command that lists and describes encodings."""

import functools

import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread

from posenc_jax import encodings
from posenc_jax.catalogue import DIMS, EncodingInfo, equal_token_weights, main
from posenc_jax.schema import ConfigError
from tests.encodings.test_contract import one_of_each_kind


@pytest.fixture(scope="module", autouse=True)
def facts_once():
    """Find the facts of each encoding once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EncodingInfo, "of", functools.cache(EncodingInfo.of))
        yield


def test_the_table_has_a_row_for_every_encoding(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main([])
    rows = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert tuple(rows) == encodings.names()


@one_of_each_kind
def test_one_encoding_is_shown_with_docstring_settings_and_picture(name, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    main([name])
    shown = capsys.readouterr().out
    assert encodings.load(name).__doc__.strip().splitlines()[0] in shown
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


def test_settings_change_what_is_shown(capsys, tmp_path):
    main(["alibi", "max_exponent=4", "--output", str(tmp_path / "steep.png")])
    assert "max_exponent = 8.0  (here 4)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="Did you mean 'max_exponent'"):
        main(["alibi", "max_exponant=4"])
    with pytest.raises(ConfigError, match="must be FIELD=VALUE"):
        main(["alibi", "4"])
