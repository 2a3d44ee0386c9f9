"""Runs that start from a model of another project: evaluated, trained further, and evaluated again."""

import json
import shutil
import struct

import pytest

from configs import pretrained
from experiments import pretrained_extension
from posenc_jax.config import RunConfig
from posenc_jax.interop import export
from posenc_jax.interop.pretrained import open_pretrained
from posenc_jax.results import read_results
from posenc_jax.runs import plan, sources
from posenc_jax.runs import workdir as workdirs
from posenc_jax.runs.grid import Study
from posenc_jax.schema import ConfigError, plain
from tests.interop import test_gguf
from tests.interop.foreign import llama_folder
from tests.runs.run_helpers import flip, launch, logged

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder of a random model of Llama's form, and a text beside it."""
    folder = llama_folder(tmp_path_factory.mktemp("hub") / "model")
    (folder.parent / "book.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    return folder


def resolved(source, model, settings=None, **changes):
    settings = settings or pretrained.get_config()
    settings.init_from = str(source)
    settings.data.path, settings.data.cache_dir = str(model.parent / "book.txt"), str(model.parent / "cache")
    settings.training.batch_size, settings.evaluation.resamples, settings.training.warmup = 8, 100, "0 steps"
    settings.training.validate_every, settings.evaluation.validation_windows = "4 steps", 2
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        (settings[section] if section else settings)[field] = value
    return RunConfig.from_mapping(sources.resolve(settings.to_dict()))


def test_a_model_is_evaluated_at_lengths_around_its_context_on_the_whole_text(model, tmp_path):
    config = resolved(model, model)
    assert config.model.num_kv_heads == 1
    assert (config.encoding.name, config.encoding.hyperparameters.base) == ("rope", 500.0)
    assert config.evaluation.lengths == (8, 16, 32, 64)
    assert (config.pretrained_length, config.init_sha256) == (32, open_pretrained(str(model)).sha256)
    launch(config, tmp_path / "run")
    found = read_results(tmp_path / "run" / "results.csv")
    assert {row.train_length for row in found} == {32}
    assert {row.scaling for row in found} == {"none", "yarn"}
    splits = workdirs.read(tmp_path / "run")["data"]["splits"]
    assert splits["test"]["bytes"] == (model.parent / "book.txt").stat().st_size
    assert splits["train"]["tokens"] == 0


def test_the_study_past_the_context_of_a_model_takes_any_model(model):
    settings = pretrained_extension.get_config("text=novels,longest=16384,retrieval=yes")
    lengths = settings.evaluation.lengths
    settings.evaluation.lengths, settings.evaluation.tail = (8, 64), 8
    settings.evaluation.retrieval_lengths = (64,)
    config = resolved(model, model, settings)
    assert lengths == (1024, 2048, 4096, 8192, 16384)
    assert config.name == "pretrained_extension_novels"
    assert config.evaluation.rope_scalings == pretrained_extension.RULES
    assert config.evaluation.retrieval_tasks == ("passkey", "needle", "multi_key")
    assert config.pretrained_length == 32


def test_a_model_that_is_trained_further_is_a_source_with_its_tokenizer_and_end_tokens(model, tmp_path):
    changes = {"training__duration": "4 steps", "data__test_fraction": 0.3, "data__validation_fraction": 0.3}
    ending = shutil.copytree(model, tmp_path / "ending")
    settings = json.loads((ending / "config.json").read_text())
    (ending / "config.json").write_text(json.dumps(settings | {"eos_token_id": [5, 3]}))
    config = resolved(ending, model, **changes)
    launch(config, tmp_path / "more")
    assert sources.open_source(str(tmp_path / "more")).end_tokens == {3, 5}
    export.export(tmp_path / "more", tmp_path / "exported")
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["eos_token_id"] == [3, 5]
    first = next(line for line in logged(tmp_path / "more") if "loss" in line)
    assert first["loss"] > 1
    own = resolved(tmp_path / "more", model, data__path="", data__corpus="stdlib", evaluation__lengths=(16,))
    assert (own.data.tokenizer, own.data.test_fraction, own.evaluation.tail) == ("init_from", 1.0, 8)
    assert own.init_sha256 != config.init_sha256
    assert (tmp_path / "more" / "tokenizer.json").read_text() == (model / "tokenizer.json").read_text()
    own = resolved(tmp_path / "more", model, **{name: changes[name] for name in list(changes)[1:]}, name="again")
    launch(own, tmp_path / "again")
    ours, theirs = (read_results(tmp_path / name / "results.csv") for name in ("again", "more"))
    assert [row.value for row in ours] == [row.value for row in theirs]


def test_settings_that_contradict_the_model_and_damaged_weights_are_refused(model, tmp_path):
    for changes, reason in (
        ({"model__d_model": 32}, "config.model.d_model = 32: must be 16, as in config.init_from = "),
        ({"data__tokenizer": "bytes"}, "config.data.tokenizer = 'bytes': must be 'init_from', as in"),
        ({"temperature__form": "llama4"}, "config.temperature.form = 'llama4': must be 'none', as in"),
        ({"encoding__scaling": "nkt"}, "config.encoding.scaling = 'nkt': .*Did you mean 'ntk'"),
    ):
        with pytest.raises(ConfigError, match=reason):
            resolved(model, model, **changes)
    config = resolved(model, model)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in model.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    flip(damaged / "model.safetensors", 0.9)
    with pytest.raises(ConfigError, match=r"config.init_sha256 = .*must be the checksum of the weights in config.i"):
        resolved(damaged, model, init_sha256=config.init_sha256)


def claiming(path):
    """Make the header of a safetensors file claim to be longer than the file."""
    path.write_bytes(struct.pack("<Q", path.stat().st_size) + path.read_bytes()[8:])


def pickled(path):
    path.rename(path.parent / "pytorch_model.bin")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def set_field(**fields):
    """A function that changes fields of a JSON file."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def enlarged(path):
    """Give the tokenizer a token beyond the embedding."""
    spec = json.loads(path.read_text())
    spec["model"]["vocab"]["far"] = 340
    path.write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("file", "harm", "reason"),
    [
        ("model.safetensors", cut, "model.safetensors is damaged: "),
        ("model.safetensors", claiming, "model.safetensors is damaged: "),
        ("model.safetensors", pickled, "pytorch_model.bin is a pickle, which can run any code"),
        ("config.json", cut, "config.json is damaged: "),
        ("config.json", set_field(model_type="lama"), "model_type = 'lama': must be one of: .* Did you mean 'llama'?"),
        ("config.json", set_field(eos_token_id="</s>"), "eos_token_id = '</s>' must be a token id, or a list of them"),
        ("tokenizer.json", lambda path: path.unlink(), "must have a tokenizer.json"),
        ("tokenizer.json", cut, "the tokenizer cannot be used: "),
        (
            "tokenizer.json",
            enlarged,
            "the tokenizer cannot be used: it has 341 tokens, more than the 340 rows of the embedding",
        ),
    ],
)
def test_errors_of_a_damaged_folder_name_the_setting_the_folder_and_the_reason(model, tmp_path, file, harm, reason):
    folder = shutil.copytree(model, tmp_path / "model")
    harm(folder / file)
    with pytest.raises(ConfigError, match=rf"^config.init_from = '{folder}': .*{reason}"):
        resolved(folder, model)


@pytest.mark.parametrize(
    ("at", "content", "reason"),
    [
        (-9, b"", "is damaged: tensor .* ends after the file does"),
        (16, struct.pack("<Q", 2**40), "is damaged: it says that 1099511627776 more values follow"),
        (0, b"GGML", "it does not begin with 'GGUF'"),
    ],
    ids=["cut", "claims", "other"],
)
def test_errors_of_a_damaged_file_name_the_setting_the_file_and_the_reason(model, tmp_path, at, content, reason):
    path = tmp_path / "model.gguf"
    test_gguf.write(path, "llama", test_gguf.random_weights())
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + content + whole[at + len(content) :] if content else whole[:at])
    with pytest.raises(ConfigError, match=rf"^config.init_from = '{path}': .*{reason}"):
        resolved(path, model)


def test_merges_of_tokens_that_a_gguf_file_lacks_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(test_gguf, "LETTERS", [chr(x) for x in range(65, 65 + 61)])  # without "AB"
    test_gguf.write(tmp_path / "model.gguf", "llama", test_gguf.random_weights())
    with pytest.raises(ConfigError, match=r"^config.init_from = .*tokenizer.ggml.merges = .*does not fit the tokens"):
        resolved(tmp_path / "model.gguf", model)


def test_the_plan_of_a_study_that_only_evaluates_has_no_steps(model, capsys, monkeypatch):
    monkeypatch.setattr(plan, "probe_step", None)
    config = resolved(model, model, evaluation__rope_scalings=("none",))
    sweep = {"rule": ("encoding.scaling=none", "encoding.scaling=linear:factor=2")}
    settings = {"name": "s", "question": "?", "baseline": "", "base": plain(config), "sweep": sweep}
    plan.print_plan(Study.from_mapping(settings))
    shown = capsys.readouterr().out
    assert "program 1 of 1: evaluation of scaling=none" in shown
    (row,) = ([cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│ 1" in line)
    assert (row[2:4], row[5]) == (["2", "0"], "")
    assert row[4] == f"{2 * plan.evaluation_flops(config):.2e}"
