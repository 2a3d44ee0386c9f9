"""The comparison of any runs and studies: paired differences where windows are the same, and refusals."""

import csv
import io
from dataclasses import replace

import numpy as np
import pytest

from posenc_jax import compare
from posenc_jax.evaluation.window_sums import Key, Sums, write_sums
from posenc_jax.results import MemberRow, by_curve, write_rows
from posenc_jax.schema import ConfigError, plain
from tests.small import run_config

DOCUMENTS = ("a", "a", "b", "c")
LOSSES = {64: 2.0, 128: 1.5}  # bits per byte of each length
RECORD = {"data": {"name": "text", "fingerprint": "1234"}}
MEMBER = MemberRow("", 0, "", 1, 1.0, None, "cpu", "1234", "", 4, 4, 3, "")


def measured(loss, documents=DOCUMENTS):
    """Sums of windows whose losses differ much, and that are `loss` bits per byte worse than LOSSES everywhere."""
    easy = np.linspace(-1, 1, len(documents))
    of = {length: length * np.log(2) * (own + easy + loss) for length, own in LOSSES.items()}
    return {Key("none", "prefix", n): Sums(nats, *np.full((2, len(documents)), n)) for n, nats in of.items()}


def write(path, encoding="rope", loss=0.0, documents=DOCUMENTS, record=RECORD, **changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    config = run_config(encoding, evaluation__lengths=tuple(LOSSES), **changes)
    write_sums(path, measured(loss, documents), documents, record | {"config": plain(config)})
    return path.parent


@pytest.fixture
def rope(tmp_path):
    return write(tmp_path / "rope" / "windows.npz")


@pytest.fixture
def study(tmp_path):
    """A study of two seeds of alibi, of which another variant stopped."""
    folder, rows = tmp_path / "study", []
    for seed, loss in ((0, 0.5), (1, 0.7)):
        write(folder / "members" / f"{seed}.npz", "alibi", loss, seed=seed)
        rows.append(replace(MEMBER, variant="alibi, steep", seed=seed, run=f"{seed}"))
    write_rows(folder / "members.csv", MemberRow, [*rows, replace(MEMBER, variant="t5", stopped="not finite")])
    return folder


def value(results, metric, name, length=64):
    return by_curve(results, metric)[name][length]


def test_differences_are_paired(rope, tmp_path):
    alibi = write(tmp_path / "alibi" / "windows.npz", "alibi", 0.25)
    results, notes = compare.compared([rope, alibi])
    row = value(results, "difference_bits_per_byte", "alibi")
    assert (row.value, row.ci_low, row.ci_high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-6)
    own = value(results, "prefix_bits_per_byte", "alibi")
    assert own.ci_high - own.ci_low > 0.5
    assert "rope" not in by_curve(results, "difference_bits_per_byte")
    assert notes == ["Differences are to rope."]
    results, _ = compare.compared([rope, alibi], "alibi")
    assert value(results, "difference_bits_per_byte", "rope").value == pytest.approx(-0.25, abs=1e-6)


def test_seeds_are_averaged_in_studies_and_between_runs(rope, study, tmp_path):
    other = write(tmp_path / "other" / "windows.npz", loss=0.2, seed=1)
    results, _ = compare.compared([rope, study, other])
    assert value(results, "prefix_bits_per_byte", "rope").value == pytest.approx(2.1, abs=1e-6)
    assert value(results, "prefix_bits_per_byte", "alibi, steep").value == pytest.approx(2.6, abs=1e-6)
    assert value(results, "difference_bits_per_byte", "alibi, steep").value == pytest.approx(0.5, abs=1e-6)
    assert "t5" not in by_curve(results, "prefix_bits_per_byte")


def test_variants_of_one_name_have_their_folders_and_their_settings_are_told(rope, tmp_path):
    wide = write(tmp_path / "wide" / "windows.npz", loss=0.1, model__d_ff=64, encoding__base=500.0)
    again = write(tmp_path / "again" / "windows.npz", loss=0.3, model__d_ff=64, encoding__base=500.0, seed=1)
    results, notes = compare.compared([rope, wide, again])
    assert value(results, "prefix_bits_per_byte", "rope (wide)").value == pytest.approx(2.2, abs=1e-6)
    settings = run_config("rope")
    assert notes[1:] == [
        f"model.d_ff is {settings.model.d_ff}, but 64 for rope (wide).",
        "encoding.base is 10000.0, but 500.0 for rope (wide).",
    ]


def test_other_windows_of_the_text_have_no_difference(rope, tmp_path):
    fewer = write(tmp_path / "fewer" / "windows.npz", "alibi", 0.25, DOCUMENTS[1:])
    results, notes = compare.compared([rope, fewer])
    assert value(results, "prefix_bits_per_byte", "alibi").value == pytest.approx(2.25, abs=1e-6)
    assert not by_curve(results, "difference_bits_per_byte")
    assert "alibi was measured on other windows, so it has no difference." in notes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"record": {"data": {"name": "other", "fingerprint": "9"}}}, "text and tokenizer ('other', '9')"),
        ({"training__length": 16}, "training length 16"),
        ({"evaluation__tail": 3}, "evaluation.tail 3"),
        ({"model__causal": False}, "model.causal False"),
        ({}, "repeats rope with seed 0"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(changes, reason, rope, tmp_path):
    other = write(tmp_path / "other" / "windows.npz", **changes)
    with pytest.raises(ConfigError) as refused:
        compare.compared([rope, other])
    assert reason in str(refused.value)
    assert str(other) in str(refused.value)


def test_wrong_folders_and_names_are_refused(rope, study, tmp_path):
    with pytest.raises(ConfigError, match="must be the folder of a complete run or study"):
        compare.compared([rope, tmp_path])
    (study / "members" / "0.npz").unlink()
    with pytest.raises(ConfigError, match=r"lacks members/0.npz"):
        compare.compared([study])
    write_rows(study / "members.csv", MemberRow, [replace(MEMBER, stopped="not finite")])
    with pytest.raises(ConfigError, match="must have a run whose loss was finite"):
        compare.compared([study])
    with pytest.raises(ConfigError, match=r"--baseline = 'ropes'.*Did you mean 'rope'"):
        compare.compared([rope], "ropes")
    with pytest.raises(ConfigError, match=r"--metric = 'prefix'.*must be one of: prefix_bits_per_byte"):
        compare.main([str(rope), "--metric=prefix"])


def test_a_table_is_printed_in_each_form(rope, study, capsys):
    printed = {}
    for form in ("", "--markdown", "--latex", "--csv"):
        compare.main([*map(str, (rope, study)), *filter(None, [form])])
        printed[form] = capsys.readouterr()
    assert "│ rope  " in printed[""].out
    assert "Differences are to rope." in printed[""].out
    assert "| alibi, steep | 0.500 ± " in printed["--markdown"].out
    assert r"alibi, steep & 0.500 $\pm$ " in printed["--latex"].out
    assert printed["--latex"].out.count(r"\end{table}") == 2
    rows = list(csv.DictReader(io.StringIO(printed["--csv"].out)))
    assert {row["encoding"] for row in rows} == {"rope", "alibi, steep"}
    assert all("Differences are to rope." in own.err for form, own in printed.items() if form)
