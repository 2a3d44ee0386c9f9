"""Runs that start from a model of another project: evaluated, trained further, and evaluated again."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import pretrained
from posenc_jax.config import RunConfig
from posenc_jax.interop.pretrained import open_pretrained
from posenc_jax.results import read_results
from posenc_jax.runs import sources
from posenc_jax.runs import workdir as workdirs
from posenc_jax.schema import ConfigError
from tests.data.test_pretrained_tokenizer import byte_level
from tests.runs.run_helpers import flip, launch, logged

pytestmark = pytest.mark.usefixtures("undrawn")
WIDTH, HIDDEN, VOCABULARY = 16, 24, 340
SETTINGS = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "max_position_embeddings": 32,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder of a random model of Llama's form."""
    folder, draw = tmp_path_factory.mktemp("hub") / "model", np.random.default_rng(0)
    folder.mkdir()
    layer, attention = "model.layers.0.", {"q": 16, "k": 8, "v": 8}
    shapes = {f"{layer}self_attn.{name}_proj.weight": (rows, WIDTH) for name, rows in attention.items()}
    shapes |= {f"{layer}self_attn.o_proj.weight": (WIDTH, WIDTH), "model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    shapes |= {f"{layer}mlp.{name}_proj.weight": (HIDDEN, WIDTH) for name in ("gate", "up")}
    shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, HIDDEN)
    tensors = {name: draw.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"
    save_file(tensors | {name: np.ones(WIDTH, np.float32) for name in norms}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    (folder / "tokenizer.json").write_text(byte_level())
    (folder.parent / "book.txt").write_text("It was the best of times, it was the worst of times. " * 60)
    return folder


def resolved(source, model, **changes):
    settings = pretrained.get_config()
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


def test_a_model_that_is_trained_further_is_a_source_with_its_tokenizer(model, tmp_path):
    changes = {"training__duration": "4 steps", "data__test_fraction": 0.3, "data__validation_fraction": 0.3}
    config = resolved(model, model, **changes)
    launch(config, tmp_path / "more")
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
