"""report.md and the terminal summary, made from the files of a run."""

import ast
import copy
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import posenc_jax.reporting
from posenc_jax.reporting import figures, findings, report
from posenc_jax.reporting.metrics_log import MetricsLog
from posenc_jax.reporting.tables import format_value
from posenc_jax.results import write_results
from tests.reporting.rows import learned_results, results, row

RECORD = {
    "format": 2,
    "command": "python launch.py --config=configs/rope_extrap.py '--config.name=a`b'",
    "config": {
        "name": "rope_extrap",
        "seed": 5,
        "model": {"architecture": "transformer", "causal": True},
        "encoding": {"name": "rope", "base": 10000.0},
        "training": {"duration": "500 steps", "length": 256, "batch_size": 32},
        "evaluation": {
            "lengths": [128, 256, 512, 1024],
            "tail": 64,
            "rope_scalings": ["none", "ntk", "linear"],
            "copy_distances": [64, 512],
        },
        "data": {},
    },
    "versions": {"python": "3.11.7", "jax": "0.10.2", "posenc-jax": None},
    "device": "TPU v5 lite x1",
    "git_revision": "0123abcd",
    "windows": {"asked": 64, "found": 57, "documents": 31},
    "data": {
        "name": "stdlib",
        "fingerprint": "f00dfeed",
        "splits": {"train": {"documents": 1234, "tokens": 5678901, "bytes": 6789012}},
    },
    "parameters": 3141592,
    "sessions": [
        {
            "step": 0,
            "total_steps": 700,
            "versions": {"python": "3.11.7", "jax": "0.10.2"},
            "device": "TPU v5 lite x1",
            "git_revision": "0123abcd",
            "changed": {},
        }
    ],
}
METRICS = [
    {"step": 1, "tokens": 8192, "loss": 5.5, "bits_per_byte": 8.0},
    {
        "step": 350,
        "tokens": 2867200,
        "loss": 1.7,
        "bits_per_byte": 2.45,
        "tokens_per_second": 90.0,
        "step_seconds": 1.0,
    },
    {
        "step": 650,
        "tokens": 5324800,
        "loss": 1.6,
        "bits_per_byte": 2.3,
        "tokens_per_second": 50000.4,
        "step_seconds": 0.2,
    },
    {
        "step": 700,
        "tokens": 5734400,
        "loss": 1.5,
        "bits_per_byte": 2.1641,
        "tokens_per_second": 50002,
        "step_seconds": 0.2,
    },
    {"step": 700, "validation_loss": 1.55, "validation_bits_per_byte": 2.2362},
]


@pytest.fixture
def workdir(tmp_path):
    return make_workdir(tmp_path, results())


def make_workdir(path, rows, record=RECORD, metrics=METRICS):
    (path / "config.json").write_text(json.dumps(record), encoding="utf-8")
    with MetricsLog(path / "metrics.jsonl", 0) as log:
        for line in metrics:
            log.write(line)
    write_results(path / "results.csv", rows)
    return path


def text_of(workdir, **arguments):
    return report.write_report(workdir, **arguments).read_text(encoding="utf-8")


def summary_of(workdir):
    console = Console(width=120)
    with console.capture() as capture:
        report.print_summary(workdir, console)
    return capture.get()


def test_the_report_holds_every_number_of_the_tables(workdir):
    text = text_of(workdir)
    for result in results():
        if result.metric != "by_position_bits_per_byte":
            assert format_value(result) in text, result


def test_the_report_says_how_it_was_made(workdir):
    text = text_of(workdir)
    for expected in (
        "    " + RECORD["command"] + "\n",
        "device: TPU v5 lite x1",
        "versions: python 3.11.7, jax 0.10.2\n",
        "git revision: 0123abcd",
        "encoding: rope (base = 10000.0)",
        "parameters: 3,141,592",
        "data: stdlib, fingerprint f00dfeed",
        "train split: 1,234 documents, 5,678,901 tokens, 6,789,012 bytes",
        "training: 5,734,400 tokens in batches of 32 windows of 256 tokens, seed 5",
        "final training loss: 2.1641 bits per byte",
        "final validation loss: 2.2362 bits per byte",
        "speed: 50,000 tokens per second",
        "last 64 positions",
    ):
        assert expected in text


def test_the_report_tells_the_starts_of_a_run_and_where_they_differ(tmp_path):
    (first,) = RECORD["sessions"]
    changed = {"training.duration": ["700 steps", "900 steps"], "training.keep_last": [2, 3]}
    versions = {"python": "3.11.7", "jax": "0.11.0"}
    second = {**first, "step": 350, "total_steps": 900, "versions": versions, "changed": changed}
    text = text_of(make_workdir(tmp_path, results(), RECORD | {"sessions": [first, second]}))
    assert "- start 1: from step 0 of 700; jax 0.10.2\n" in text
    told = "from step 350 of 900; training.duration changed from 700 steps to 900 steps; training.keep"
    assert f"- start 2: {told}" in text
    assert "last changed from 2 to 3; jax 0.11.0\n" in text
    second["learning_rates"] = [2e-4, 1e-3]
    text = text_of(make_workdir(tmp_path, results(), RECORD | {"sessions": [first, second]}))
    assert "the learning rate jumped from 0.0002 to 0.001, as in no run of one duration" in text


def test_a_run_of_one_start_tells_of_none(workdir):
    assert "start 1" not in text_of(workdir)


def test_the_report_names_damaged_lines_of_the_log(workdir, caplog):
    log = workdir / "metrics.jsonl"
    log.write_text(log.read_text().replace("50002", "60002"))
    text, lost = text_of(workdir), "metrics.jsonl: 1 damaged line left out, between step 650 and step 700"
    assert f"- log: {lost}\n" in text
    assert [record.getMessage() for record in caplog.records] == [lost]
    assert "final training loss: 2.3000 bits per byte" in text
    assert "final validation loss: 2.2362 bits per byte" in text


def test_the_question_names_encoding_and_lengths(workdir):
    question = text_of(workdir).split("\n\n")[1]
    assert "**rope**" in question
    assert "windows of 256 tokens" in question
    assert "up to 1024 tokens" in question


def test_the_question_tells_layers_that_differ(tmp_path):
    record = copy.deepcopy(RECORD)
    record["config"]["model"]["pattern"] = "LLG"
    record["config"]["layers"] = {"L": {"encoding": {"name": "fire"}, "window": 8}}
    question = text_of(make_workdir(tmp_path, results(), record)).split("\n\n")[1]
    assert "Its layers follow the pattern LLG; L: encoding.name fire, window 8. How well" in question
    assert "pattern" not in text_of(make_workdir(tmp_path, results())).split("\n\n")[1]


def test_every_figure_of_the_report_exists_and_every_figure_is_in_it(workdir):
    text = text_of(workdir, spectra={"none": np.array([1.0, 0.1])})
    shown = set(re.findall(r"\]\((figures/.*?)\)", text))
    written = {f"figures/{path.name}" for path in (workdir / "figures").glob("*.png")}
    names = {"extrapolation", "context_gain", "loss_by_position", "rotation_frequencies", "training"}
    assert shown == written == {f"figures/{name}.png" for name in names}
    assert {path.stem for path in (workdir / "figures").glob("*.svg")} == names


def test_without_spectra_or_longer_windows_their_figures_are_left_out(tmp_path):
    text = text_of(make_workdir(tmp_path, [row(length=128), row(length=256)]))
    assert "rotation_frequencies" not in text
    assert "context_gain" not in text
    assert "Context gain" not in text


def test_the_report_is_written_after_all_else(workdir, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(figures, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(workdir)
    assert not (workdir / "report.md").exists()


def test_scaling_rules_are_ranked_by_their_paired_difference_to_none():
    values = {"none": 2.0, "ntk": 1.9, "yarn": 2.3, "by_parts": 2.005}
    rows = [row(value=value, half_width=0.5, scaling=scaling) for scaling, value in values.items()]
    changes = {scaling: value - 2.0 for scaling, value in values.items() if scaling != "none"}
    rows += [row("prefix_change_bits_per_byte", value=value, scaling=scaling) for scaling, value in changes.items()]
    rows += [row("prefix_change_bits_per_byte", 1024, 2 * value, scaling=scaling) for scaling, value in changes.items()]
    reading, table = findings.rules_ranking(rows)
    assert "Bold: better than no scaling." in reading
    assert table.splitlines() == [
        "| scaling rule | 512 (2x) | 1024 (4x) |",
        "| --- | ---: | ---: |",
        "| ntk | **-0.100 ± 0.010** | **-0.200 ± 0.010** |",
        "| by_parts | 0.005 ± 0.010 | 0.010 ± 0.010 |",
        "| yarn | 0.300 ± 0.010 | 0.600 ± 0.010 |",
    ]
    assert not list(findings.rules_ranking(rows[:4]))


def of_one_document(rows):
    return [replace(result, ci_low=None, ci_high=None) for result in rows]


def test_from_one_document_there_is_no_verdict(tmp_path):
    """The report does not say which is best, better or worse than none, or whether added context is used."""
    assert list(findings.findings(of_one_document(results()))) == [findings.NO_INTERVALS]
    assert list(findings.findings(of_one_document(learned_results()))) == [findings.NO_INTERVALS]
    record = {**RECORD, "windows": {"asked": 64, "found": 2, "documents": 1}}
    workdir = make_workdir(tmp_path, of_one_document(results()), record)
    text, summary = text_of(workdir), summary_of(workdir)
    assert findings.NO_INTERVALS in text
    assert (
        "- evaluation: windows of 1024 tokens of the test split: 64 windows asked for, 2 found, from 1 document\n"
        in text
    )
    assert "2 found, from 1 document: there are no intervals, and nothing can be said about other texts" in summary
    assert "*" not in summary  # nothing is marked as the best
    for verdict in ("better", "worse", "breaks at", "uses it", "survives"):
        assert verdict not in text.split("## What the numbers say")[1].split("## Tables")[0]
    assert "| 1.850 |" in text
    assert "±" not in text.split("## Tables")[1].split("### ")[1]


def test_of_few_documents_the_report_and_the_terminal_warn(tmp_path):
    for documents, warned in ((9, True), (10, False)):
        record = {**RECORD, "windows": {"asked": 64, "found": 57, "documents": documents}}
        workdir = make_workdir(tmp_path, results(), record)
        for text in (text_of(workdir), summary_of(workdir)):
            assert ("so few documents say little about other texts" in text) == warned


def test_windows_and_documents_are_told_against_those_asked_for(workdir):
    expected = (
        "- evaluation: windows of 1024 tokens of the test split: 64 windows asked for, 57 found, from 31 documents\n"
    )
    assert expected in text_of(workdir)


def test_that_nothing_was_shown_again_for_want_of_a_second_window_is_said(tmp_path):
    said = "- text found again: not measured, as it needs a second window"
    for found in (1, 2):
        record = {**RECORD, "windows": {"asked": 64, "found": found, "documents": 1}}
        assert (said in text_of(make_workdir(tmp_path, of_one_document(results()), record))) == (found == 1)


def test_a_gain_without_an_interval_among_others_has_no_verdict():
    rows = [row("context_gain_bits_per_byte", 512, 0.5), row("context_gain_bits_per_byte", 1024, 0.5)]
    (sentence,) = findings.findings([rows[0], *of_one_document(rows[1:])])
    assert sentence.endswith("uses it at 512 tokens; without an interval at 1024 tokens.")


def test_findings_say_where_the_model_breaks_survives_or_uses_context():
    gains = {"a": (-0.5, 0.005), "b": (0.02, 0.5), "c": (0.02, 0.5), "d": (-0.02, -0.011), "e": (-0.009, None)}
    rows = [
        row("context_gain_bits_per_byte", length, value, encoding=name)
        for name, values in gains.items()
        for length, value in zip((512, 1024), values, strict=True)
    ]
    assert list(findings.findings(rows)) == [
        "**a**, given more context than in training: breaks at 512 tokens; survives at 1024 tokens.",
        "**b** and **c**, given more context than in training: uses it at 512 and 1024 tokens.",
        "**d**, given more context than in training: breaks at 512 and 1024 tokens.",
        "**e**, given more context than in training: survives at 512 tokens; beyond its table at 1024 tokens.",
    ]


def test_a_length_past_the_table_is_named_so_in_report_and_summary(tmp_path):
    workdir = make_workdir(tmp_path, learned_results())
    assert "| beyond its table |" in text_of(workdir)
    assert "beyond its table" in summary_of(workdir)


def test_names_are_escaped_for_markdown(tmp_path):
    record = json.loads(json.dumps(RECORD))
    record["config"]["name"] = "a|b<script>`c`"
    record["config"]["encoding"] = {"name": "<b>rope</b>"}
    record |= {"device": "<i>gpu</i>", "git_revision": None}
    rows = [
        replace(result, encoding="<b>rope</b>", scaling="x|<img>" if result.scaling == "ntk" else result.scaling)
        for result in results()
    ]
    text = text_of(make_workdir(tmp_path, rows, record))
    assert text.startswith("# a\\|b&lt;script&gt;\\`c\\`\n")
    assert "| x\\|&lt;img&gt; |" in text
    assert "device: &lt;i&gt;gpu&lt;/i&gt;" in text
    assert "git revision: unknown" in text
    assert not re.search(r"<\w", text)


def test_a_run_without_validation_or_speed_leaves_them_out(tmp_path):
    text = text_of(make_workdir(tmp_path, results(), metrics=METRICS[:1]))
    assert "final training loss: 8.0000 bits per byte" in text
    assert "validation loss:" not in text
    assert "speed" not in text


def test_the_summary_prints_the_tables_and_where_the_rest_is(workdir):
    text = summary_of(workdir)
    for result in results():
        if result.metric in ("prefix_bits_per_byte", "context_gain_bits_per_byte"):
            assert format_value(result) in text
    for name in ("report.md", "results.csv", "tensorboard"):
        assert str(workdir / name) in text


def test_reporting_imports_neither_jax_nor_the_rest_of_the_package():
    own = (
        "posenc_jax.reporting",
        "posenc_jax.results",
        "posenc_jax.files",
        "posenc_jax.untrusted",
        "posenc_jax.schema",
        "posenc_jax.errors",
    )
    allowed = {"PIL", "matplotlib", "numpy", "rich", "tensorboard", "wandb", *sys.stdlib_module_names}
    for path in Path(posenc_jax.reporting.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.startswith(own) or name.split(".")[0] in allowed, (
                    path.name,
                    name,
                )
