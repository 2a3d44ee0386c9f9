"""The table and the figure of a model past its context, pooled over runs on several texts."""

import math

import numpy as np
import pytest
from matplotlib.text import Text

from experiments import past_context, pretrained_extension
from posenc_jax.evaluation.window_sums import Key, read_sums
from posenc_jax.results import by_curve
from posenc_jax.schema import ConfigError
from tests.interop.foreign import llama_folder
from tests.runs.run_helpers import launch
from tests.runs.test_init_from_pretrained import resolved

pytestmark = pytest.mark.usefixtures("undrawn")
RULES = ("none", "linear", "yarn")
LONGEST = 512


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a random model of 32 tokens: two texts without retrieval tasks, and one text with the passkey."""
    model = llama_folder(tmp_path_factory.mktemp("hub") / "model")
    folders = []
    for name, text in (("seen", "It was the best of times. "), ("read", "Call me Ishmael! "), ("asked", "Call me! ")):
        book = model.parent / name
        book.mkdir()
        for part in (1, 2):
            (book / f"{part}.txt").write_text(text * 200)
        settings = pretrained_extension.get_config()
        settings.evaluation.lengths, settings.evaluation.tail = (32, LONGEST), 8
        settings.evaluation.rope_scalings, settings.evaluation.long_perplexity = RULES, False
        if name == "asked":
            settings.evaluation.retrieval_tasks, settings.evaluation.retrieval_lengths = ("passkey",), (LONGEST,)
            settings.evaluation.retrieval_trials, settings.evaluation.retrieval_depths = 4, 2
        config = resolved(model, model, settings, data__path=str(book), evaluation__windows=2)
        launch(config, model.parent / "runs" / name)
        folders.append(model.parent / "runs" / name)
    return folders


@pytest.fixture(scope="module")
def pooled(runs):
    return past_context.pooled(runs)


def test_losses_are_those_of_all_windows_of_all_texts(runs, pooled):
    _, results = pooled
    for rule in RULES:
        parts = [read_sums(folder / "windows.npz")[0][Key(rule, "prefix", LONGEST)] for folder in runs[:2]]
        nats, num_bytes = (sum(part[i].sum() for part in parts) for i in (0, 1))
        row = by_curve(results, "prefix_bits_per_byte")[rule][LONGEST]
        assert row.value == pytest.approx(nats / num_bytes / math.log(2))
        assert row.ci_low < row.value < row.ci_high  # over the two documents of each text
        assert row.tokens == 4 * LONGEST


def test_bins_of_the_loss_by_position_are_joined(runs, pooled, monkeypatch):
    _, results = pooled
    assert set(by_curve(results, past_context.BY_POSITION)["yarn"]) == {past_context.BIN}
    monkeypatch.setattr(past_context, "BIN", 128)
    _, results = past_context.pooled(runs)
    bins = by_curve(results, past_context.BY_POSITION)["yarn"]
    assert list(bins) == [128, 256, 384, 512]
    assert {row.tokens for row in bins.values()} == {4 * 128}
    mean = np.mean([row.value for row in bins.values()])  # of about as many bytes
    assert mean == pytest.approx(by_curve(results, "prefix_bits_per_byte")["yarn"][LONGEST].value, rel=1e-4)


def test_the_table_has_a_row_for_each_rule(pooled):
    table = past_context.table(pooled[1])
    assert table.header[:4] == ("rule", "prefix, 512", "minus none", "context_gain")
    assert table.header[-2:] == ("passkey, 512", "effective length")
    assert [row[0].text for row in table.rows] == list(RULES)
    assert {row[-2].text for row in table.rows} <= {f"{right}/4" for right in range(5)}
    assert table.rows[0][2].text == ""  # none minus itself


def test_the_figure_has_a_labelled_line_for_each_rule_and_marks_the_training_length(pooled):
    config, results = pooled
    figure = past_context.figure(results, config)
    axes, *panels = (axes for axes in figure.axes if axes.get_visible())
    texts = {text.get_text(): text for text in axes.findobj(Text)}
    assert {*RULES, "trained on 32"} <= set(texts)
    assert "bound of Men et al.: 32" not in texts
    assert [panel.get_title("left") for panel in panels] == list(RULES)
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    heights = dict(zip(RULES, (line.get_ydata()[-1] for line in lines), strict=True))
    by_height = sorted(RULES, key=heights.get)
    assert by_height == sorted(RULES, key=lambda name: texts[name].xy[1])


def test_runs_that_do_not_belong_together_are_refused(runs, tmp_path):
    with pytest.raises(ConfigError, match="without retrieval tasks"):
        past_context.pooled(runs[2:])
    other = tmp_path / "other"
    other.mkdir()
    text = (runs[0] / "config.json").read_text()
    (other / "config.json").write_text(text.replace('"tail": 8', '"tail": 4'))
    with pytest.raises(ConfigError, match="must be the folder of a complete run"):
        past_context.pooled([runs[0], other])
    (other / "windows.npz").write_bytes((runs[0] / "windows.npz").read_bytes())
    with pytest.raises(ConfigError, match=r"tail of .*other") as caught:
        past_context.pooled([runs[0], other])
    assert "must be 8" in str(caught.value)
