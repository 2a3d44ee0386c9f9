"""Runs that start from another run, or only evaluate it."""

import json
import shutil

import pytest

from configs import pretrained
from posenc_jax.config import RunConfig
from posenc_jax.files import sha256
from posenc_jax.results import read_results
from posenc_jax.runs import driver, sources
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.grid import Study
from posenc_jax.runs.study import run_study
from posenc_jax.runs.workdir import WorkdirError
from posenc_jax.schema import ConfigError, plain
from tests.data.test_pretrained_tokenizer import byte_level
from tests.runs.run_helpers import config_of, content, flip, launch, logged, refuse_to_begin
from tests.small import write_text

pytestmark = pytest.mark.usefixtures("undrawn")
RULES = {"evaluation__rope_scalings": ("none", "ntk")}
FURTHER = "training.length=32 training.batch_size=8 training.duration='5 steps' training.warmup='1 steps'"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data"))


def trained_run(folder, tmp_path_factory, encoding, **changes):
    workdir = tmp_path_factory.mktemp(encoding) / "run"
    launch(config_of(folder, encoding, **changes), workdir)
    return workdir


@pytest.fixture(scope="module")
def rope(folder, tmp_path_factory):
    """A run of twelve steps with the tokens of a tokenizer.json, which is gone since then."""
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.json"
    path.write_text(byte_level(), encoding="utf-8")
    data = {"data__tokenizer": str(path), "data__vocab_size": 292, "data__tokenizer_sha256": sha256(path)}
    workdir = trained_run(folder, tmp_path_factory, "rope", **RULES, **data)
    path.unlink()
    return workdir


@pytest.fixture(scope="module")
def subwords(folder, tmp_path_factory):
    """A run with learned tokens. FoPE draws constants by the seed, and the last steps have no encoding."""
    data = {"data__tokenizer": "bpe", "data__vocab_size": 270, "training__drope": "2 steps", "seed": 5}
    return trained_run(folder, tmp_path_factory, "fope", **data)


def from_run(workdir, **changes):
    """Settings of a run from another one, by the recipe in which nearly all are open."""
    settings = pretrained.get_config()
    settings.init_from, settings.training.batch_size = str(workdir), 8
    settings.evaluation.resamples = 100
    for field, value in changes.items():
        *path, last = field.split("__")
        section = settings
        for name in path:
            section = section[name]
        section[last] = value
    return settings.to_dict()


def resolved(workdir, **changes):
    return RunConfig.from_mapping(sources.resolve(from_run(workdir, **changes)))


def rows(workdir, *lengths):
    return [row for row in read_results(workdir / "results.csv") if not lengths or row.eval_length in lengths]


@pytest.mark.parametrize("source", ["rope", "subwords"])
def test_evaluation_alone_gives_the_results_of_the_run_bit_for_bit(source, request, folder, tmp_path):
    source = request.getfixturevalue(source)
    name = workdirs.read(source)["config"]["name"]
    config = resolved(source, name=name, data__cache_dir=str(folder / "cache"))
    launch(config, tmp_path / "run")
    ours, theirs = rows(tmp_path / "run"), rows(source)
    seed = workdirs.read(source)["config"]["seed"]
    assert [{**vars(row), "seed": seed} for row in ours] == [vars(row) for row in theirs]


def test_evaluation_alone_at_new_lengths_and_rules_trains_nothing(rope, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "train", None)
    scalings = ("none", "ntk", "linear")
    changes = {"evaluation__lengths": (8, 16, 64), "evaluation__rope_scalings": scalings, "evaluation__tail": 4}
    config = resolved(rope, **changes, data__cache_dir=str(folder / "cache"))
    launch(config, tmp_path / "run")
    found = rows(tmp_path / "run")
    assert {row.eval_length for row in found if row.metric == "prefix_bits_per_byte"} == {8, 16, 64}
    assert {row.scaling for row in found} == set(scalings)
    assert {row.train_length for row in found} == {16}
    assert not (tmp_path / "run" / "checkpoints").exists()
    record = workdirs.read(tmp_path / "run")
    assert record["initial_weights"] == {"source": str(rope), "sha256": config.init_sha256, "end_tokens": []}
    for shown in (capsys.readouterr().out, (tmp_path / "run" / "report.md").read_text()):
        assert f"(sha256 {config.init_sha256[:12]})" in shown.replace("\\", "")
    assert json.loads((tmp_path / "run" / "complete.json").read_text())["content"]["step"] == 0


def test_a_scaling_rule_of_the_model_replaces_that_of_the_source(rope, folder, tmp_path):
    changes = {"encoding__scaling": "linear:factor=2", "evaluation__rope_scalings": ("none",)}
    launch(resolved(rope, **changes, data__cache_dir=str(folder / "cache")), tmp_path / "scaled")
    launch(resolved(rope, data__cache_dir=str(folder / "cache")), tmp_path / "as_it_was")
    scaled, unscaled = (rows(tmp_path / name, 32) for name in ("scaled", "as_it_was"))
    assert scaled[0].value != unscaled[0].value


def test_further_training_equals_the_continuation_of_a_study_bit_for_bit(folder, tmp_path):
    base = plain(config_of(folder, "rope", **RULES))
    settings = {"name": "life", "question": "?", "baseline": "", "base": base, "sweep": {"seed": ("seed=0",)}}
    study = Study.from_mapping(settings | {"continuations": {"way": (f"more: {FURTHER}",)}})
    run_study(study, tmp_path / "study", launched=0.0)
    parent, child = (tmp_path / "study" / "runs" / spec.name for spec in study.runs)
    own = plain(study.runs[1].config) | {"init_from": str(parent)}
    launch(RunConfig.from_mapping(sources.resolve(own)), tmp_path / "run")
    assert (tmp_path / "run" / "results.csv").read_bytes() == (child / "results.csv").read_bytes()
    assert logged(tmp_path / "run") == logged(child)
    weights = [workdirs.read(path)["initial_weights"] for path in (tmp_path / "run", child)]
    assert weights[0]["sha256"] == weights[1]["sha256"]
    assert weights[1]["source"] == parent.name


def test_a_stopped_run_that_started_from_another_goes_on_from_its_own_checkpoint(rope, folder, tmp_path, monkeypatch):
    changes = {"training__duration": "6 steps", "training__warmup": "1 steps", "training__checkpoint_every": "3 steps"}
    config = resolved(rope, **changes, data__cache_dir=str(folder / "cache"))
    launch(config, tmp_path / "whole")
    launch(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_6")
    (tmp_path / "run" / "report.md").unlink()
    monkeypatch.setattr(sources.trained, "load", None)  # the source is not read again
    launch(config, tmp_path / "run")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_moved_folder_is_the_same_run(rope, folder, tmp_path, monkeypatch):
    first = resolved(rope, data__cache_dir=str(folder / "cache"))
    launch(first, tmp_path / "run")
    moved = resolved(shutil.copytree(rope, tmp_path / "moved"), data__cache_dir=str(folder / "cache"))
    assert moved.fingerprint == first.fingerprint
    refuse_to_begin(monkeypatch)
    before = content(tmp_path / "run")
    launch(moved, tmp_path / "run")
    assert content(tmp_path / "run") == before


def test_other_weights_are_another_run(rope, folder, tmp_path):
    first = resolved(rope, data__cache_dir=str(folder / "cache"))
    launch(first, tmp_path / "run")
    other = shutil.copytree(rope, tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "step_12")
    config = resolved(other, data__cache_dir=str(folder / "cache"))
    assert config.fingerprint != first.fingerprint
    with pytest.raises(WorkdirError, match=f"init_sha256: '{first.init_sha256}' -> '{config.init_sha256}'"):
        launch(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"config.init_sha256 = .*must be the checksum of the weights in"):
        resolved(other, init_sha256=first.init_sha256)


def test_another_text_is_read_with_the_tokens_of_the_source(subwords, folder, tmp_path):
    (tmp_path / "book.txt").write_text("dcba abcd\n" * 40)
    changes = {"data__path": str(tmp_path / "book.txt"), "data__cache_dir": str(tmp_path / "cache")}
    launch(resolved(subwords, **changes), tmp_path / "run")
    record, source = workdirs.read(tmp_path / "run"), workdirs.read(subwords)
    assert record["data"]["tokenizer"] == source["data"]["tokenizer"] != "bytes"
    assert record["data"]["splits"]["test"]["bytes"] == 400
    assert record["data"]["splits"]["train"]["documents"] == 0
    assert record["config"]["data"]["tokenizer"] == "bpe"


def test_a_text_that_is_too_short_says_how_to_use_all_of_it(rope, tmp_path):
    (tmp_path / "book.txt").write_text("dcba abcd\n" * 40)
    changes = {"data__path": str(tmp_path / "book.txt"), "data__cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match=r"config.evaluation.lengths = 32: .*; config.data.test_fraction=1 puts all"):
        launch(resolved(rope, **changes, data__test_fraction=0.05), tmp_path / "run")


def test_a_damaged_checkpoint_is_skipped_and_all_damaged_ones_are_an_error(rope, folder, tmp_path, caplog):
    source = shutil.copytree(rope, tmp_path / "source")
    for step in (12, 9):
        flip(next((source / "checkpoints" / f"step_{step}" / "state").rglob("d/*")))
        if step == 12:
            assert resolved(source).init_sha256 != resolved(rope).init_sha256
            assert "checkpoint 12 of " in caplog.text
    with pytest.raises(ConfigError, match=r"config.init_from = .*cannot be used: every checkpoint in .* was damaged"):
        resolved(source)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "has no tokenizer.json, the tokenizer of the run"),
        (flip, "has a damaged tokenizer.json"),
        (lambda path: path.write_text("{}"), "has a damaged tokenizer.json"),
    ],
)
def test_a_lost_or_damaged_tokenizer_is_an_error(harm, reason, subwords, tmp_path):
    source = shutil.copytree(subwords, tmp_path / "source")
    harm(source / "tokenizer.json")
    with pytest.raises(ConfigError, match=rf"config.init_from = .*cannot be used: workdir .*source {reason}"):
        resolved(source)


def test_a_run_that_only_evaluated_is_no_source_and_names_its_own(rope, folder, tmp_path):
    launch(resolved(rope, data__cache_dir=str(folder / "cache")), tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"must have been trained; it only evaluated the model of '{rope}'"):
        resolved(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__num_layers": 3}, r"config.model.num_layers = 3: must be 1, as in config.init_from = '.*run'"),
        ({"model__architecture": "lstm"}, "config.model.architecture = 'lstm': must be 'transformer', as in"),
        ({"encoding__name": "alibi"}, "config.encoding.name = 'alibi': must be 'rope', as in"),
        ({"temperature__form": "ssmax"}, "config.temperature.form = 'ssmax': must be 'none', as in"),
        ({"layers__E": {"window": 4}}, "config.layers.E.window = 4: must not be given: config.init_from"),
        ({"layers__E": {"rope_scalings": False}}, "config.layers.E.rope_scalings = False: must not be given"),
        ({"positions__training": "randomized"}, "config.positions.training = 'randomized': must be 'contiguous', as"),
        ({"data__tokenizer": "bpe"}, "config.data.tokenizer = 'bpe': must be '.*tokenizer.json', as in"),
        ({"data__vocab_size": 300}, "config.data.vocab_size = 300: must be 292, as in"),
        ({"training__pretrained_length": 32}, "config.training.pretrained_length = 32: must be 16, as in"),
        ({"training__length": 32}, "config.training.length = 32: must be 16, as in"),
        ({"training__drope": "1 steps"}, "config.training.drope = '1 steps': must be '0 steps', as in"),
        ({"init_sha256": "f00d"}, "config.init_sha256 = 'f00d': must be the checksum of the weights in config.init_f"),
        ({"data__test_fraction": 0.7}, "config.data.test_fraction = 0.7: must be below 0.5, or 1 for training.dura"),
        ({"training__duration": "no time"}, "config.training.duration = 'no time': must be a string such as"),
    ],
)
def test_a_setting_that_contradicts_the_source_is_an_error_that_names_both(changes, reason, rope):
    with pytest.raises(ConfigError, match=reason):
        resolved(rope, **changes)


def test_free_settings_may_differ_from_those_of_the_source(rope):
    changes = {"model__dropout": 0.25, "model__dtype": "bfloat16", "model__remat": True}
    changes |= {"layers__E": {"rope_scalings": "yarn:temperature=0.2"}}
    config = resolved(rope, **changes, training__duration="5 steps", training__length=32, training__warmup="0 steps")
    assert (config.model.dropout, config.model.dtype, config.model.remat) == (0.25, "bfloat16", True)
    assert config.model_layers[0].scaling_change == "yarn:temperature=0.2"
    assert (config.training.length, config.pretrained_length) == (32, 16)


def test_an_open_setting_without_a_source_is_an_error():
    settings = pretrained.get_config()
    settings.init_from = ""
    with pytest.raises(ConfigError, match=r"config.data.corpus = None: must be given, or come from a model in config"):
        RunConfig.from_mapping(settings.to_dict())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nothing", "does not exist"),
        ("text.txt", "not a GGUF file"),
        ("empty", "must be a folder with a config.json"),
        ("a" * 300, "cannot be read: File name too long"),
        ("~no-such-user/run", "cannot be read: Could not determine home directory"),
    ],
)
def test_a_source_that_is_no_model_is_refused(name, reason, tmp_path):
    (tmp_path / "text.txt").write_text("some text, and more of it")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=rf"config.init_from = .*{reason}"):
        resolved(name if name.startswith("~") else tmp_path / name)


def test_a_study_and_a_run_of_another_release_are_refused(rope, tmp_path):
    (tmp_path / "study" / "members").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"config.init_from = .*must be one run of this study, which are in .*runs"):
        resolved(tmp_path / "study")
    source = shutil.copytree(rope, tmp_path / "source")
    record = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(record | {"format": 8}))
    with pytest.raises(ConfigError, match=r"config.init_from = .*has format 8, of another release"):
        resolved(source)
    (source / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.init_from = .*config.json is damaged"):
        resolved(source)


def test_zero_steps_and_a_checksum_need_a_source(folder):
    with pytest.raises(
        ConfigError, match=r"duration = '0 steps': must be above 0; 0, to evaluate only, needs config.i"
    ):
        config_of(folder, training__duration="0 steps", training__warmup="0 steps")
    with pytest.raises(ConfigError, match=r"config.init_sha256 = 'f00d': must be '' for init_from = ''"):
        config_of(folder, init_sha256="f00d")
    with pytest.raises(ConfigError, match=r"config.data.tokenizer = 'init_from': must be bytes, bpe, wordp"):
        config_of(folder, data__tokenizer="init_from", data__vocab_size=300)
