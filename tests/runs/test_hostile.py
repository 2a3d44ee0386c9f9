"""Malicious workdirs: nothing outside them changes, and the command soon ends with one line and exit code 4."""

import contextlib
import gc
import json
import os
import random
import re
import shutil
import socket
import time
from pathlib import Path
from types import CoroutineType

import pytest
from rich.console import Console

from configs import rope_extrap
from posenc_jax.files import sha256, sha256_of, write_sealed
from posenc_jax.reporting import report
from posenc_jax.reporting.metrics_log import MetricsLog
from posenc_jax.runs import trained
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.cluster import submit
from posenc_jax.runs.finish import is_complete_after_repair
from posenc_jax.runs.grid import Study
from posenc_jax.runs.run import run
from posenc_jax.runs.study import run_study
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import ConfigError
from posenc_jax.training import checkpoint
from posenc_jax.training.checkpoint import MANIFEST
from tests.small import run_config

pytestmark = pytest.mark.usefixtures("undrawn")
RECORD = {"data": {"fingerprint": ""}}
# Paths that runs, studies, figures, logs and checkpoints create in addition to those of the run in this test.
MADE = (
    "damaged",
    "profile",
    "nonfinite.npz",
    "members",
    "runs",
    "parts",
    "jobs",
    "discussion.md",
    "tensorboard/study",
    "config.json.0123456789abcdef.tmp",
    "checkpoints/step_6",
    "checkpoints/step_6.orbax-checkpoint-tmp",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of the run and its text."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "text.txt").write_text("Some words, and then some other words. " * 300)
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return run_config(
        "rope",
        data__path=str(folder / "text.txt"),
        data__cache_dir=str(folder / "cache"),
        model__num_layers=1,
        training__length=32,
        training__duration="4 steps",
        training__warmup="1 steps",
        training__log_every="1 steps",
        training__checkpoint_every="2 steps",
        training__steps_per_dispatch=2,
        evaluation__lengths=(32, 64),
        evaluation__rope_scalings=("none",),
        evaluation__windows=2,
        evaluation__resamples=100,
    )


@pytest.fixture(scope="module")
def whole(folder, config):
    """The workdir of a finished run."""
    run(config, folder / "run", launched=time.monotonic())
    return folder / "run"


@pytest.fixture
def workdir(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def contents(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def planted(workdir, kind, outside):
    """Replace each path in turn with a link, including paths that do not exist, and yield the path."""
    paths = sorted(workdir.rglob("*")) + [workdir / name for name in MADE]
    for path in paths:
        kept = outside / "kept"
        is_folder, existed = path.is_dir() or not path.suffix, path.exists()
        if kind == "hard link" and is_folder:
            continue
        if existed:
            path.rename(kept)
        elif is_folder:
            kept.mkdir()
        else:
            kept.write_text("precious")
        path.parent.mkdir(parents=True, exist_ok=True)
        {"symbolic link": os.symlink, "hard link": os.link}[kind](kept, path)
        yield path
        path.unlink()
        if existed:
            kept.rename(path)
        else:
            shutil.rmtree(kept) if kept.is_dir() else kept.unlink()


@pytest.mark.parametrize("kind", ["symbolic link", "hard link"])
def test_a_link_at_any_path_that_a_run_writes_is_refused_and_nothing_outside_changes(kind, workdir, config, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (workdir / "report.md").unlink()  # so that the run has something to do
    count = 0
    for path in planted(workdir, kind, outside):
        count += 1
        before = contents(outside), contents(workdir)
        for use in (
            lambda: run(config, workdir, launched=0.0),
            lambda: workdirs.claim(workdir, config, RECORD).__enter__(),
            lambda: trained.load(workdir),
        ):
            with pytest.raises(WorkdirError, match=re.escape(str(path))) as raised:
                use()
            assert raised.value.exit_code == 4
            assert kind in str(raised.value)
            assert "\n" not in str(raised.value)
        assert (contents(outside), contents(workdir)) == before
    assert count > 30


def test_a_study_and_its_jobs_refuse_links(tmp_path):
    base = rope_extrap.get_config("size=smoke").to_dict()
    own = {"name": "hostile", "question": "?", "baseline": "", "base": base, "sweep": {"seed": ("seed=0",)}}
    asked, outside = Study.from_mapping(own), tmp_path / "outside"
    for name in ("lock", "members", "parts", "runs", "jobs", "figures", "report.md", "tensorboard"):
        workdir = tmp_path / name
        workdir.mkdir()
        outside.mkdir()
        (workdir / name).symlink_to(outside)
        for use in (
            lambda workdir: run_study(asked, workdir, launched=0.0),
            lambda workdir: run_study(asked, workdir, launched=0.0, shard=1),
            lambda workdir: submit(asked, workdir, "cluster=debug", ["true"]),
        ):
            with pytest.raises(WorkdirError, match="symbolic link"):
                use(workdir)
        outside.rmdir()  # fails unless the folder is empty


@pytest.mark.parametrize("name", ["lock", "config.json", "metrics.jsonl", "deep/er/file"])
def test_a_named_pipe_or_a_socket_is_refused_and_not_waited_for(name, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("run") / name
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(WorkdirError, match="special file"):
        run(config, Path("run"), launched=0.0)
    path.unlink()
    with socket.socket(socket.AF_UNIX) as own:
        own.bind(str(path))
        with pytest.raises(WorkdirError, match="special file"):
            run(config, Path("run"), launched=0.0)


def test_the_workdir_itself_may_be_a_link(workdir, config, tmp_path, capsys):
    (tmp_path / "link").symlink_to(workdir)
    run(config, tmp_path / "link", launched=0.0)
    assert "Bits per byte" in capsys.readouterr().out


def test_only_results_are_set_aside_whatever_a_record_names(workdir, config, tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    ended = json.loads((workdir / "complete.json").read_text())["content"]
    ended["files"]["../victim.txt"] = "0" * 64
    write_sealed(workdir / "complete.json", ended)
    assert is_complete_after_repair(config, workdir)
    assert victim.read_text() == "precious"
    assert not (tmp_path / "damaged").exists()


HOSTILE = {  # contents for any file
    "empty": b"",
    "null": b"null",
    "number": b"3",
    "list": b"[]",
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "nan": b'{"content": NaN, "config": NaN, "step": NaN, "sha256": NaN}',
    "large number": b'{"format": 1' + b"0" * 10_000 + b"}",
    "no UTF-8": b"\xff\xfe\x00",
    "escapes": b'"\x1b[2J\\u001b[2J\\u202e"',
    "large field": b"run,encoding\n" + b"x" * 200_000,
}
WRONG = [None, -1, 3, 2**63, 1e308, "", "\x1b[31m", True, [], {}, [[]], {"a": None}]


def refusal(use):
    """The error that `use` raises, which launch.py must report in one line; None if it raises none."""
    try:
        use()
    except Exception as error:
        told = error
    else:
        return None
    assert getattr(told, "exit_code", None) in (1, 2, 4) or isinstance(told, OSError), repr(told)
    return told


def reopen(workdir, config):
    """Read a workdir in the same order as a run that continues. Returns the error that refuses it, if any."""
    uses = (
        lambda: is_complete_after_repair(config, workdir) and report.print_summary(workdir, Console(quiet=True)),
        lambda: workdirs.read(workdir),
        lambda: MetricsLog(workdir / "metrics.jsonl", 3).__exit__(),
        lambda: report.write_report(workdir),
        lambda: checkpoint.newest_intact(workdir / "checkpoints", lambda *_: None),
    )
    return [told for told in map(refusal, uses) if told]


def mutations(value, chance):
    """Copies of a JSON value, each with one part replaced or removed."""
    text = json.dumps(value)
    paths = list(parts_of(value))
    for path in chance.sample(paths, min(len(paths), 40)):
        for wrong in [*chance.sample(WRONG, 2), "missing"]:
            copy = json.loads(text)
            *parents, last = path
            part = copy
            for name in parents:
                part = part[name]
            if wrong == "missing":
                del part[last]
            else:
                part[last] = wrong
            yield copy


def parts_of(value, prefix=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*prefix, key)
        yield from parts_of(item, (*prefix, key))


@pytest.fixture
def light(monkeypatch):
    """Write reports without figures, which take a second each."""
    monkeypatch.setattr(report, "_figures", lambda *_: ())


READ = ("config.json", "complete.json", "metrics.jsonl", "results.csv", "windows.npz", f"checkpoints/step_4/{MANIFEST}")


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", READ)
def test_any_content_of_a_file_is_read_or_refused(name, workdir, config):
    whole, chance = (workdir / name).read_bytes(), random.Random(name)
    cut = {f"cut {i}": whole[: chance.randrange(len(whole))] for i in range(4)}
    flipped = {}
    for i in range(12):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        flipped[f"flipped {i}"] = bytes(damaged)
    for content in (HOSTILE | cut | flipped).values():
        (workdir / name).write_bytes(content)
        reopen(workdir, config)
        (workdir / name).write_bytes(whole)
        write_sealed(workdir / "complete.json", ended(workdir))
    (workdir / name).unlink()
    (workdir / name).mkdir()
    reopen(workdir, config)


def ended(workdir):
    return {"step": 4, "files": {name: sha256(workdir / name) for name in workdirs.RESULTS}}


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", ["config.json", "complete.json", f"checkpoints/step_4/{MANIFEST}"])
def test_a_record_of_another_form_is_refused_though_its_sum_is_right(name, workdir, config):
    whole = (workdir / name).read_text()
    value, chance = json.loads(whole), random.Random(name)
    sealed = "sha256" in value
    for changed in mutations(value["content"] if sealed else value, chance):
        text = json.dumps({"content": changed, "sha256": sha256_of(changed)} if sealed else changed)
        (workdir / name).write_text(text)
        reopen(workdir, config)
    (workdir / name).write_text(whole)
    assert not reopen(workdir, config)


@pytest.mark.usefixtures("light")
def test_results_with_any_number_are_shown_or_refused(workdir, config):
    header, *lines = (workdir / "results.csv").read_text().splitlines()
    fields = lines[0].split(",")
    for i in range(len(fields)):
        for wrong in ("", "0", "-1", "nan", "1e400", "9" * 5000, "x" * 200_000, "\x1b[2J"):
            (workdir / "results.csv").write_text("\n".join([header, ",".join([*fields[:i], wrong, *fields[i + 1 :]])]))
            write_sealed(workdir / "complete.json", ended(workdir))
            reopen(workdir, config)


def test_a_table_too_large_to_be_shown_is_refused(workdir, config):
    header, line, *_ = (workdir / "results.csv").read_text().splitlines()
    _, _, scaling, seed, length, _, metric, *rest = line.split(",")
    lines = [",".join(["r", f"e{i}", scaling, seed, length, str(i + 1), metric, *rest]) for i in range(2000)]
    (workdir / "results.csv").write_text("\n".join([header, *lines]))
    write_sealed(workdir / "complete.json", ended(workdir))
    (refused, *_) = reopen(workdir, config)
    assert "too many to be shown" in str(refused)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from orbax's tasks
def test_a_checkpoint_of_any_content_is_restored_or_refused_though_its_sums_are_right(workdir, caplog):
    caplog.set_level("CRITICAL", "asyncio")
    shutil.rmtree(workdir / "checkpoints" / "step_2")
    step, chance = workdir / "checkpoints" / "step_4", random.Random(0)
    paths = [path for path in sorted(step.rglob("*")) if path.is_file() and path.name != MANIFEST]
    for path in paths:
        whole = path.read_bytes()
        for content in chance.sample([b"", HOSTILE["deep"], HOSTILE["null"], whole[: len(whole) // 2]], 1):
            path.write_bytes(content)
            checkpoint.write_manifest(step)
            assert "\n" not in str(refusal(lambda: trained.load(workdir)))
        path.write_bytes(whole)
    metadata = step / "meta" / "metadata"
    meta = json.loads(metadata.read_text())
    for leaves in (None, [], {}, {"a": None}, 3, {**meta["leaves"], "x": [[10**9], "float32"]}):
        metadata.write_text(json.dumps({**meta, "leaves": leaves}))
        checkpoint.write_manifest(step)
        assert refusal(lambda: trained.load(workdir)).exit_code == 4
    for (
        found
    ) in gc.get_objects():  # tasks left by failed restores, which would warn when they are freed in a later test
        if type(found) is CoroutineType and "orbax" in found.cr_code.co_filename:
            with contextlib.suppress(Exception):
                found.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.d_model", 10**9),
        ("model.d_model", 10**6),
        ("model.d_ff", 2**31 - 1),
        ("model.num_layers", 10**6),
        ("data.vocab_size", 2**31 - 1),
    ],
)
def test_a_record_of_a_model_that_cannot_fit_is_refused_before_anything_is_made(field, value, workdir, monkeypatch):
    record = json.loads((workdir / "config.json").read_text())
    section, name = field.split(".")
    record["config"][section][name] = value
    if name == "vocab_size":
        record["config"]["data"]["tokenizer"] = "bpe"
    (workdir / "config.json").write_text(json.dumps(record))
    monkeypatch.setattr(trained, "abstract_model", None)  # not even traced
    with pytest.raises(ConfigError, match=re.escape(f"config.{field} = ")):
        trained.load(workdir)


def test_a_pattern_of_a_record_that_takes_ages_to_match_is_not_matched(workdir):
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["optimizer"]["weight_decay_mask"] = "([a-z_0-9/]+)+!"
    (workdir / "config.json").write_text(json.dumps(record))
    trained.load(workdir)


@pytest.mark.usefixtures("light")
def test_a_report_shows_no_control_characters_of_a_record(workdir):
    record = json.loads((workdir / "config.json").read_text())
    for section, name in (
        (record, "command"),
        (record, "device"),
        (record["data"], "name"),
        (record["config"], "name"),
    ):
        section[name] = "\x1b[2Jcleared \u202etxet"
    record["config"]["model"]["architecture"] = record["versions"]["jax"] = "\x1b[2Jcleared \u202etxet"
    (workdir / "config.json").write_text(json.dumps(record))
    report.write_report(workdir)
    assert (workdir / "report.md").read_text().count("x1b") == 6
    assert not {"\x1b", "\u202e"} & set((workdir / "report.md").read_text())
