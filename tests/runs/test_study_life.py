"""Studies with damaged measurements and tables, changed texts, deleted runs, and unfinished members."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from configs import rope_extrap
from posenc_jax.evaluation.window_sums import read_sums, write_sums
from posenc_jax.files import read_sealed, write_sealed
from posenc_jax.results import MemberRow, read_results, read_rows
from posenc_jax.runs import driver
from posenc_jax.runs.grid import RunSpec, Study
from posenc_jax.runs.program import Stack
from posenc_jax.runs.study import run_study
from posenc_jax.runs.train import NonFiniteLoss
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import ConfigError
from tests.runs.run_helpers import BRIEF, content, empty, flip, refuse_to_begin, remove, truncate
from tests.small import write_text

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of four runs that share one program."""
    folder = write_text(tmp_path_factory.mktemp("data"))
    base = rope_extrap.get_config("size=smoke,encoding=none").to_dict()
    data = {"data__path": str(folder / "text"), "data__cache_dir": str(folder / "cache")}
    for field, value in (BRIEF | data | {"training__checkpoint_every": "12 steps"}).items():
        section, name = field.split("__")
        base[section][name] = value
    sweep = {"rate": ("optimizer.learning_rate=0.002", "optimizer.learning_rate=0.02"), "seed": ("seed=0", "seed=1")}
    return Study.from_mapping({"name": "lives", "question": "?", "baseline": "", "base": base, "sweep": sweep})


@pytest.fixture(scope="module")
def whole(study, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "study"
    run_study(study, workdir, launched=0.0)
    return workdir


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "study")


def kept(workdir, study, i=0):
    return workdir / "members" / f"{study.runs[i].name}.npz"


def flip_data(path):
    """Flip a bit of the first array, because some bits of an archive have no meaning."""
    flip(path, 100 / path.stat().st_size)


def assert_shown_unchanged(study, workdir, monkeypatch):
    refuse_to_begin(monkeypatch)
    before = content(workdir)
    run_study(study, workdir, launched=0.0)
    assert {name for name, own in content(workdir).items() if before.get(name) != own} <= {"lock"}


def test_a_study_that_is_done_is_shown_and_not_touched(study, whole, monkeypatch):
    assert_shown_unchanged(study, whole, monkeypatch)


@pytest.mark.parametrize("harm", [flip_data, truncate, empty])
def test_damaged_measurements_are_made_again_from_the_run(harm, study, whole, copy, monkeypatch, caplog):
    harm(kept(copy, study))
    damaged = kept(copy, study).read_bytes()
    with monkeypatch.context() as patch:
        refuse_to_begin(patch)
        run_study(study, copy, launched=0.0)
    assert kept(copy, study).read_bytes() == kept(whole, study).read_bytes()
    (aside,) = (copy / "damaged").iterdir()
    assert aside.read_bytes() == damaged
    (line,) = (record.getMessage() for record in caplog.records)
    assert kept(copy, study).name in line
    assert str(aside) in line
    assert_shown_unchanged(study, copy, monkeypatch)


def test_damaged_measurements_of_a_run_that_is_gone_are_made_by_training(study, whole, copy):
    shutil.rmtree(copy / "runs")
    flip_data(kept(copy, study, 2))
    before = {i: kept(copy, study, i).stat().st_mtime_ns for i in (0, 1, 3)}
    run_study(study, copy, launched=0.0)
    assert [path.name for path in (copy / "runs").iterdir()] == [study.runs[2].name]
    assert {i: kept(copy, study, i).stat().st_mtime_ns for i in (0, 1, 3)} == before
    found, expected = (read_sums(kept(folder, study, 2))[0] for folder in (copy, whole))
    for key, sums in expected.items():
        np.testing.assert_array_equal(found[key], sums)


@pytest.mark.parametrize("name", ["results.csv", "members.csv"])
@pytest.mark.parametrize("harm", [flip, remove])
def test_damaged_tables_are_made_again(name, harm, study, whole, copy, monkeypatch, caplog):
    harm(copy / name)
    refuse_to_begin(monkeypatch)
    run_study(study, copy, launched=0.0)
    assert (copy / name).read_bytes() == (whole / name).read_bytes()
    assert name in caplog.text
    assert (copy / "damaged").exists() == (harm is flip)


def test_a_report_follows_its_measurements_and_its_discussion(study, copy, monkeypatch):
    refuse_to_begin(monkeypatch)
    (copy / "discussion.md").write_text("A person says so.")
    run_study(study, copy, launched=0.0)
    assert "A person says so." in (copy / "report.md").read_text()
    measured, documents, record = read_sums(kept(copy, study))
    write_sums(kept(copy, study), measured, documents, record | {"parameters": 123456789})
    run_study(study, copy, launched=0.0)
    assert "123,456,789" in (copy / "report.md").read_text()


def test_a_report_that_lacks_a_run_is_written_anew(study, whole, copy, monkeypatch):
    """This happens if two cluster jobs end at the same time, and one writes results while the other reads them."""
    refuse_to_begin(monkeypatch)
    ended = read_sealed(copy / "complete.json")
    del ended["sources"][f"members/{study.runs[3].name}.npz"]
    write_sealed(copy / "complete.json", ended)
    (copy / "report.md").write_text("of three runs")
    run_study(study, copy, launched=0.0)
    assert (copy / "report.md").read_text() == (whole / "report.md").read_text()


def of_another_text(path):
    measured, documents, record = read_sums(path)
    versions = record["versions"] | {"python": "3.99.1"}
    write_sums(
        path, measured, documents, record | {"versions": versions, "data": record["data"] | {"fingerprint": "beef"}}
    )


def test_members_of_another_text_are_refused_though_nothing_is_left_to_train(study, copy):
    of_another_text(kept(copy, study, 3))
    with pytest.raises(WorkdirError, match=r"text has changed.*fingerprint \w+ \(Python 3.*beef \(Python 3.99.1\)"):
        run_study(study, copy, launched=0.0)


def test_members_of_another_text_are_refused_before_more_are_trained(study, copy, monkeypatch):
    """They are recognized by their measurements or, in the second case, by a run that was started."""
    begun = copy / "runs" / study.runs[0].name
    record = json.loads((begun / "config.json").read_text())
    for i in range(3):
        of_another_text(kept(copy, study, i))
    kept(copy, study, 3).unlink()
    shutil.rmtree(copy / "runs")
    refuse_to_begin(monkeypatch)
    with pytest.raises(WorkdirError, match=r"beef \(Python 3.99.1\), this machine has \w+ \(Python 3"):
        run_study(study, copy, launched=0.0)
    shutil.rmtree(copy / "members")
    begun.mkdir(parents=True)
    record["data"]["fingerprint"], record["versions"]["python"] = "beef", "3.99.1"
    (begun / "config.json").write_text(json.dumps(record))
    with pytest.raises(WorkdirError, match=r"beef \(Python 3.99.1\), this machine has \w+ \(Python 3"):
        run_study(study, copy, launched=0.0)


def test_only_members_that_are_left_are_trained_together(study, copy, monkeypatch):
    """Both if runs/ was deleted and if it exists."""
    together, train = [], driver.train

    def told(stack, runs, folder, **options):
        if stack.size > 1:
            together.append([path.name for path in runs])
        return train(stack, runs, folder, **options)

    monkeypatch.setattr(driver, "train", told)
    kept(copy, study, 1).unlink()
    run_study(study, copy, launched=0.0, stack_runs=True)
    assert together == []
    for i in (1, 3):
        kept(copy, study, i).unlink()
    shutil.rmtree(copy / "runs")
    run_study(study, copy, launched=0.0, stack_runs=True)
    assert together == [[study.runs[i].name for i in (1, 3)]]


def test_members_whose_states_were_not_all_left_go_on_together(study, tmp_path, monkeypatch):
    """If the study is killed while it writes the second run's checkpoint, the checkpoint of all runs is used again."""
    from posenc_jax.runs import train

    class Killed(BaseException):
        pass

    leave, calls = train._save_alone, []

    def leave_one(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        leave(*arguments)

    monkeypatch.setattr(train, "_save_alone", leave_one)
    two = dataclasses.replace(study, runs=study.runs[:2])
    with pytest.raises(Killed):
        run_study(two, tmp_path / "study", launched=0.0, stack_runs=True)
    monkeypatch.setattr(train, "_save_alone", leave)
    trained = []
    reader = Stack.reader

    def told(self, seeds, start_step):
        trained.append((self.size, start_step))
        return reader(self, seeds, start_step)

    monkeypatch.setattr(Stack, "reader", told)
    run_study(two, tmp_path / "study", launched=0.0, stack_runs=True)
    assert trained == [(2, 12), (1, 12), (1, 12)]


def test_each_start_of_a_run_is_told_in_the_table_of_members(study, copy, monkeypatch):
    measured, documents, record = read_sums(kept(copy, study))
    (start,) = record["sessions"]
    record["sessions"] = [start, start | {"git_revision": "feedbeef", "device": start["device"]}]
    write_sums(kept(copy, study), measured, documents, record)
    refuse_to_begin(monkeypatch)
    run_study(study, copy, launched=0.0)
    rows = {row.run: row for row in read_rows(copy / "members.csv", MemberRow)}
    row = rows[study.runs[0].name]
    assert row.git_revision == f"{start['git_revision']}; feedbeef"
    assert row.device == start["device"]


def test_a_study_that_cannot_begin_leaves_nothing(study, tmp_path):
    first = study.runs[0]
    longer = dataclasses.replace(first.config.evaluation, lengths=(16, 10**6))
    spec = dataclasses.replace(first, config=dataclasses.replace(first.config, evaluation=longer))
    for shard in (None, 1):
        with pytest.raises(ConfigError, match="the longest document of the test split"):
            run_study(dataclasses.replace(study, runs=(spec,)), tmp_path / "study", launched=0.0, shard=shard)
        assert not (tmp_path / "study").exists()


def diverging(spec):
    absurd = dataclasses.replace(spec.config.optimizer, learning_rate=1e38)
    return RunSpec("hot", "", dataclasses.replace(spec.config, optimizer=absurd))


def test_a_run_that_diverges_and_one_that_continues_it_are_reported_and_the_others_go_on(study, tmp_path):
    first, workdir = study.runs[0], tmp_path / "study"
    hot = diverging(first)
    child = RunSpec("hot, then more", "", first.config, hot)
    run_study(dataclasses.replace(study, runs=(hot, child, first)), workdir, launched=0.0)
    stopped = {row.variant: row.stopped for row in read_rows(workdir / "members.csv", MemberRow)}
    assert stopped[first.variant] == ""
    assert re.match(r"loss .* at step", stopped["hot"])
    assert stopped["hot, then more"] == stopped["hot"]
    assert "**hot**, seed 0, stopped and is left out" in (workdir / "report.md").read_text()
    assert {row.encoding for row in read_results(workdir / "results.csv")} == {first.variant}


def test_a_study_of_which_no_run_ends_well_says_so(study, tmp_path):
    with pytest.raises(NonFiniteLoss, match="no run ended well"):
        run_study(dataclasses.replace(study, runs=(diverging(study.runs[0]),)), tmp_path / "study", launched=0.0)
