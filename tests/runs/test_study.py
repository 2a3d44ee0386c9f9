"""A study as a user runs it: its files, with and without interruptions, a run that diverges, and its plan."""

import contextlib
import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from posenc_jax.distributed import sharding
from posenc_jax.evaluation.window_sums import read_sums
from posenc_jax.runs.cluster import submit
from posenc_jax.runs.grid import RunSpec, Study
from posenc_jax.runs.program import shards
from posenc_jax.runs.run import run
from posenc_jax.runs.study import divide_cpu, run_study
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import ConfigError
from posenc_jax.training.checkpoint import Checkpoints
from tests.small import run_config
from tests.test_launch import ROOT, command, environment, launch

TINY = """
from ml_collections import ConfigDict
from configs import rope_extrap

def get_config(argument=""):
    config = ConfigDict()
    config.name, config.question, config.baseline = "tiny", "Which of two?", "none"
    config.costs = "experiments/results/benchmarks/encodings.csv"
    config.base = recipe = rope_extrap.get_config("size=smoke,encoding=none")
    recipe.model.num_layers, recipe.evaluation.resamples = 1, 100
    recipe.training.duration, recipe.training.warmup = "12 steps", "2 steps"
    recipe.training.log_every, recipe.training.checkpoint_every = "2 steps", "4 steps"
    recipe.training.steps_per_dispatch = 2
    recipe.evaluation.lengths, recipe.evaluation.windows = (32, 64, 128), 6
    recipe.evaluation.copy_distances, recipe.evaluation.copy_chunk = (16, 100), 8
    if argument:
        config.continuations = ConfigDict({"way": ("longer: training.length=128 training.batch_size=8",)})
    config.sweep = ConfigDict({
        "encoding": {
            "nothing": ("encoding=none",),
            "rotations": ("rope: encoding=rope evaluation.rope_scalings=('none','ntk')",),
        },
        "seed": ("seed=0", "seed=1"),
    })
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiments") / "tiny.py"
    path.write_text(TINY)
    return f"--config={path}"


def test_the_runs_of_a_study_share_their_batches_over_as_many_devices(monkeypatch):
    asked = []
    monkeypatch.setattr(sharding, "divide_cpu", lambda *arguments: asked.append(arguments))
    sizes = [(12, 1, 8), (8, 1, 4), (24, 2, 8)]  # windows, parts, devices
    runs = [
        run_config(training__batch_size=batch, training__grad_accum_steps=parts, training__cpu_devices=devices)
        for batch, parts, devices in sizes
    ]
    divide_cpu(Study("s", "?", "", tuple(RunSpec(str(i), "", run) for i, run in enumerate(runs))))
    assert asked == [(4, 4)]


def study_of(argument=""):
    namespace = {}
    exec(TINY, namespace)
    return Study.from_mapping(namespace["get_config"](argument).to_dict())


@pytest.fixture
def tokens_kept(cache, monkeypatch):
    """Make studies of this process and of those that it starts use one cache of tokens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="module")
def whole(recipe, cache, tmp_path_factory):
    """The study, run without interruptions."""
    workdir = tmp_path_factory.mktemp("whole")
    ran = launch(cache, recipe, f"--workdir={workdir}")
    assert ran.returncode == 0, ran.stderr
    assert "run 4 of 4: rope, seed 1; about" in ran.stdout
    # Orbax warns if the disk is slow, as it is when other tests run.
    assert [line for line in ran.stderr.splitlines() if "Waiting for previous save" not in line] == []
    return workdir


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_study_leaves_all_it_should(whole):
    names = ("report.md", "results.csv", "by_seed.csv", "ranks.csv", "members.csv", "figures/extrapolation.png")
    for name in names:
        assert (whole / name).stat().st_size > 0, name
    assert len(list((whole / "members").glob("*.npz"))) == 4
    report = (whole / "report.md").read_text()
    for expected in (
        "Which of two?",
        "not distinguishable",
        "rope ntk",
        "### Text found again",
        "figures/copy_gain.png",
    ):
        assert expected in report
    costs = report.split("### What they cost in training")[1]
    assert re.search(r"\| none \| 0 \| [01]\.\d+ \|.*\n\| rope \| 0 \| [01]\.\d+ \|", costs)
    assert "| alibi" not in costs  # not in this study
    assert "(figures/cost.png)" in costs
    assert "runs are done" not in report


def test_numbers_are_of_both_seeds(whole):
    own = {
        seed: next(
            float(row["value"])
            for row in rows(whole / "by_seed.csv")
            if (row["encoding"], row["metric"], row["eval_length"], row["seed"])
            == ("none", "prefix_bits_per_byte", "128", seed)
        )
        for seed in "01"
    }
    assert own["0"] != own["1"]
    (pooled,) = (
        row
        for row in rows(whole / "results.csv")
        if (row["encoding"], row["metric"], row["eval_length"]) == ("none", "prefix_bits_per_byte", "128")
    )
    assert float(pooled["value"]) == pytest.approx((own["0"] + own["1"]) / 2)  # both over the same bytes
    assert pooled["seed"] == ""
    assert float(pooled["ci_low"]) < float(pooled["value"]) < float(pooled["ci_high"])


def test_curves_and_figures_are_in_tensorboard(whole):
    curve = EventAccumulator(str(whole / "tensorboard" / "mean-rope_ntk")).Reload()
    assert [event.step for event in curve.Scalars("windows/prefix_bits_per_byte")] == [32, 64, 128]
    study = EventAccumulator(str(whole / "tensorboard" / "study")).Reload()
    assert "figures/extrapolation" in study.Tags()["images"]
    assert "custom_scalars__config__" in study.Tags()["tensors"]
    member = next(path for path in (whole / "runs").iterdir() if path.name.startswith("rope-seed0"))
    assert "_hparams_/session_start_info" in str(
        EventAccumulator(str(member / "tensorboard" / "final")).Reload().summary_metadata
    )


def test_a_study_killed_and_terminated_equals_one_that_was_not(whole, recipe, cache, tmp_path):
    arguments = command(recipe, f"--workdir={tmp_path}")
    for at, number, code in (("step 6/12", signal.SIGKILL, -9), ("run 3 of 4", signal.SIGTERM, 143)):
        with subprocess.Popen(
            arguments, cwd=ROOT, env=environment(cache, drawn=False), stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith(at):
                    process.send_signal(number)
                    break
            process.stdout.read()
        assert process.returncode == code
    assert "2 of 4 runs are done" in (tmp_path / "report.md").read_text()
    assert launch(cache, recipe, f"--workdir={tmp_path}", drawn=False).returncode == 0
    for name in ("results.csv", "by_seed.csv", "ranks.csv"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    for path in (whole / "members").iterdir():
        ours, theirs = (read_sums(folder / "members" / path.name)[0] for folder in (tmp_path, whole))
        assert list(ours) == list(theirs)
        for key, sums in ours.items():
            np.testing.assert_array_equal(sums, theirs[key])


@pytest.mark.usefixtures("undrawn", "tokens_kept")
def test_members_that_go_on_start_from_trained_parameters(whole, tmp_path, capsys):
    """Two runs of the study, and two more. A parent of which only the sums are left is trained again."""
    work, longer = tmp_path / "work", study_of("then")
    runs = tuple(spec for spec in longer.runs if spec.variant.startswith("rope"))
    shutil.copytree(whole, work)
    (parent,) = (work / "runs").glob("rope-seed1-*")
    shutil.rmtree(parent)
    run_study(dataclasses.replace(longer, runs=runs, baseline=""), work, launched=0.0)
    assert "run 3 of 4: rope, then longer (128 tokens), seed 0" in capsys.readouterr().out
    logs = {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (work / "runs").glob("*/metrics.jsonl")
    }
    for child in (name for name in logs if "then" in name):
        start = json.loads((work / "runs" / child / "config.json").read_text())["initial_weights"]["source"]
        ended = [line["loss"] for line in logs[start] if "loss" in line][-1]
        begun = next(line["loss"] for line in logs[child] if "loss" in line)
        assert abs(begun - ended) < 0.5 < abs(begun - logs[start][0]["loss"])
    assert {row["encoding"] for row in rows(work / "results.csv")} == {"rope", "rope, then longer (128 tokens)"}


@pytest.mark.usefixtures("tokens_kept")
def test_a_finished_study_is_shown_again_and_trains_nothing(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "lock"}
    run_study(study_of(), whole, launched=0.0)
    shown = capsys.readouterr().out
    assert "rope ntk" in shown
    assert "step " not in shown
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != "lock"} == before


def test_a_study_in_use_is_refused(tmp_path):
    import fcntl

    with (tmp_path / "lock").open("w") as lock:
        lock.write("process 12345 on elsewhere")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(WorkdirError, match="in use by process 12345"):
            run_study(study_of(), tmp_path, launched=0.0)


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(None, 1, False), (1, None, False), (None, None, False), (1, 1, False), (1, 2, True)],
)
def test_a_whole_study_and_its_parts_refuse_each_other_but_parts_do_not(first, second, allowed, tmp_path, monkeypatch):
    trained = []

    def train(remaining, *_):  # the second one is started while the first one trains
        trained.append({spec.variant for spec in remaining})
        if len(trained) == 1:
            run_study(study_of(), tmp_path, launched=0.0, shard=second)

    monkeypatch.setattr("posenc_jax.runs.study._train", train)
    monkeypatch.setattr("posenc_jax.reporting.study_report.print_summary", lambda workdir: None)
    refusing = contextlib.nullcontext() if allowed else pytest.raises(WorkdirError, match="is in use by process")
    with refusing:
        run_study(study_of(), tmp_path, launched=0.0, shard=first)
    assert trained == ([{"none"}, {"rope"}] if allowed else [{"none"}] if first else [{"none", "rope"}])


def test_the_plan_counts_runs_and_programs_and_writes_nothing(recipe, cache, tmp_path):
    ran = launch(cache, f"{recipe}:longer", "--dry_run", f"--workdir={tmp_path / 'work'}")
    assert ran.returncode == 0, ran.stderr
    assert "program 4 of 4" in ran.stdout
    table = [line.split("│")[1:4] for line in ran.stdout.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in row] for row in table if row[2].strip()]
    assert [row[0] for row in rows] == ["1", "1", "2", "2", ""]  # the numbers of --shard
    assert rows[-1][1:] == ["all", "8"]
    assert not (tmp_path / "work").exists()


def test_parts_of_the_devices_are_refused_for_a_single_run(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.sharding\.parallel_runs = 2: must be 0 outside of studies"):
        run(run_config(sharding__parallel_runs=2), tmp_path / "run", launched=0.0)


def test_jobs_of_a_cluster_do_a_part_each_and_together_the_whole(whole, recipe, cache, tmp_path, monkeypatch):
    for name, value in environment(cache, drawn=False).items():
        monkeypatch.setenv(name, value)
    study = study_of()
    launching = command(recipe, f"--workdir={tmp_path}", "--submit", "cluster=local timeout_min=10")
    jobs = submit(study, tmp_path, "cluster=local timeout_min=10", launching)
    assert len(jobs) == 2
    for job in jobs:
        job.result()
        assert "run 2 of 2" in job.stdout()
    for name in ("results.csv", "by_seed.csv", "ranks.csv"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    assert "runs are done" not in (tmp_path / "report.md").read_text()
    assert submit(study, tmp_path, "cluster=local", launching) == []


def test_runs_that_go_on_from_others_are_of_their_shard():
    assert [{spec.variant for spec in own} for own in shards(study_of("longer").runs)] == [
        {"none", "none, then longer (128 tokens)"},
        {"rope", "rope, then longer (128 tokens)"},
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("cluster=lokal", "lokal"),
        ("cluster=local timeout_min=soon", "timeout_min"),
        ("cluster=local colour_blue=3", "colour_blue"),
        ("cluster", "not enough values"),
        ("timeout_min=3", "srun|sbatch|slurm"),
    ],
)
def test_settings_that_submitit_does_not_take_are_refused(settings, reason, recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # which could contain SLURM
    with pytest.raises(ConfigError, match=f"(?s)--submit = .*is not what submitit takes: .*({reason})"):
        submit(study_of(), tmp_path, settings, [recipe])


def test_jobs_need_submitit(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ConfigError, match="pip install submitit"):
        submit(study_of(), tmp_path, "", [recipe])


def test_a_part_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=re.escape("--shard = 3: must be from 1 to 2")):
        run_study(study_of(), tmp_path / "work", launched=0.0, shard=3)
    assert not (tmp_path / "work").exists()


@pytest.mark.usefixtures("undrawn", "tokens_kept")
def test_members_trained_together_are_measured_as_those_trained_alone(whole, tmp_path, monkeypatch):
    """Equal up to rounding on eight devices and on one. After a kill, training resumes from a shared checkpoint."""
    study, saved = study_of(), Checkpoints.save

    class Killed(BaseException):
        pass

    def save_once(self, step, *arguments):
        if step == 8:
            raise Killed
        return saved(self, step, *arguments)

    monkeypatch.setattr(Checkpoints, "save", save_once)
    with pytest.raises(Killed):
        run_study(study, tmp_path / "work", launched=0.0, stack_runs=True)
    monkeypatch.setattr(Checkpoints, "save", saved)
    run_study(study, tmp_path / "work", launched=0.0, stack_runs=True)
    columns = "encoding", "scaling", "metric", "eval_length"
    ours, theirs = (
        {tuple(row[c] for c in columns): row["value"] for row in rows(folder / "results.csv")}
        for folder in (tmp_path / "work", whole)
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert float(value) == pytest.approx(float(theirs[key]), abs=2e-4), key
    (log,) = (tmp_path / "work" / "runs").glob("none-seed1-*/metrics.jsonl")
    steps = [line["step"] for line in map(json.loads, log.read_text().splitlines()) if "loss" in line]
    assert steps == [1, 2, 4, 6, 8, 10, 12]
