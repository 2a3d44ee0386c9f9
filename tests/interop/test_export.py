"""Exported folders give the same logits again, here and in transformers. Other models are refused with reasons."""

import json
import os
import shutil

import numpy as np
import pytest

from posenc_jax import encodings
from posenc_jax.encodings import frequencies
from posenc_jax.files import sha256
from posenc_jax.interop import equivalent, export, families, hf_writer
from posenc_jax.interop.family import Architecture
from posenc_jax.runs import trained
from posenc_jax.schema import ConfigError
from tests.interop.exported import params_of, random_model, save_run, tokens, transformers_logits, write
from tests.interop.foreign import loaded
from tests.small import forward, run_config

GPT = {"norm": "layer", "use_bias": True, "activation": "gelu"}
GEMMA = {"activation": "geglu", "branch_norm": True}
INTERLEAVED = {"pairing": "interleaved"}
# Two models or more for each family: encoding, settings, and the settings that are converted.
CASES = {
    "bert": [
        ("learned", GPT | {"causal": False, "post_norm": True}, {"scale_embeddings", "vocab_size"}),
        (
            "sinusoidal",
            GPT | {"causal": False, "post_norm": True, "tied_embeddings": False, "activation": "gelu_exact"},
            {"scale_embeddings", "vocab_size", "name"},
        ),
    ],
    "bloom": [
        ("alibi", GPT | {"embedding_norm": True, "norm_eps": 1e-3}, {"scale_embeddings", "d_ff"}),
        (
            "alibi",
            GPT | {"embedding_norm": True, "tied_embeddings": False, "num_kv_heads": 2, "d_ff": 128},
            {"scale_embeddings", "num_kv_heads"},
        ),
    ],
    "gemma": [
        ("rope", {"activation": "geglu", "tied_embeddings": False, "num_kv_heads": 1}, set()),
        ("rope", {"activation": "geglu", "hyperparameters": INTERLEAVED}, {"pairing"}),
    ],
    "gemma2": [
        ("rope", GEMMA | {"pattern": "EG", "window": 8, "logit_softcap": 3.0, "attention_softcap": 2.0}, set()),
        ("rope", GEMMA | {"scale_embeddings": False}, {"scale_embeddings"}),
    ],
    "gemma3_text": [
        (
            "rope",
            GEMMA
            | {"qk_norm": True, "pattern": "EG", "window": 8, "logit_softcap": 3.0}
            | {"hyperparameters": {"base": 1e5, "window_base": 100.0, "scaling": "linear:factor=2"}},
            set(),
        ),
        ("rope", GEMMA | {"qk_norm": True, "hyperparameters": INTERLEAVED}, {"pairing"}),
    ],
    "gpt2": [
        ("learned", GPT | {"scale_embeddings": False}, set()),
        ("sinusoidal", GPT | {"tied_embeddings": False, "activation": "gelu_exact"}, {"scale_embeddings", "name"}),
    ],
    "gpt_neox": [
        (
            "rope",
            GPT | {"parallel_residual": True, "hyperparameters": {"fraction": 0.5, "pairing": "interleaved"}},
            {"scale_embeddings", "pairing"},
        ),
        (
            "rope",
            {"norm": "layer", "activation": "gelu_exact", "scale_embeddings": False, "tied_embeddings": False},
            {"use_bias"},
        ),
    ],
    "llama": [
        ("rope", {"norm_eps": 1e-3}, {"scale_embeddings"}),
        (
            "rope",
            {
                "tied_embeddings": False,
                "num_kv_heads": 2,
                "use_bias": True,
                "activation": "geglu",
                "scale_embeddings": False,
            }
            | {"hyperparameters": {"base": 500.0, "pairing": "interleaved"}},
            {"pairing"},
        ),
        ("rope", {"hyperparameters": {"scaling": "yarn:factor=4"}}, {"scale_embeddings"}),
        ("p_rope", {"hyperparameters": {"fraction": 0.3}}, {"scale_embeddings"}),
        ("hope", {}, {"scale_embeddings"}),
    ],
    "mpt": [
        (
            "alibi",
            {"norm": "layer", "activation": "gelu_exact", "d_ff": 128, "scale_embeddings": False, "zeros": "bias"},
            set(),
        ),
        (
            "alibi",
            {"norm": "layer", "activation": "gelu_exact", "tied_embeddings": False, "zeros": "bias"},
            {"scale_embeddings", "d_ff"},
        ),
    ],
    "qwen2": [
        ("rope", {"qkv_bias": True, "scale_embeddings": False}, set()),
        ("rope", {"qkv_bias": True, "window": 8, "pattern": "EG"}, {"scale_embeddings"}),
    ],
    "qwen3": [
        ("rope", {"qk_norm": True, "window": 8, "hyperparameters": INTERLEAVED}, {"scale_embeddings", "pairing"}),
        ("rope", {"qk_norm": True, "num_kv_heads": 2, "scale_embeddings": False}, set()),
    ],
    "smollm3": [
        ("rope", {"pattern": "EN", "use_bias": True}, {"scale_embeddings"}),
        ("none", {}, {"scale_embeddings"}),
        ("rope", {"pattern": "GEN", "num_layers": 3, "window": 8, "qkv_bias": True}, {"scale_embeddings", "use_bias"}),
    ],
}
EACH = [
    pytest.param(name, i, id=f"{name}-{i}-{case[0]}") for name, cases in CASES.items() for i, case in enumerate(cases)
]
TABLES = ("learned", "sinusoidal")  # encodings that are exported with a table, which ends


def test_every_family_has_two_cases():
    assert {name for name, cases in CASES.items() if len(cases) >= 2} == set(families.TABLE)


@pytest.mark.parametrize(("name", "case"), EACH)
def test_an_exported_model_is_read_back(name, case, tmp_path):
    encoding, settings, converted = CASES[name][case]
    model, architecture = random_model(encoding, **settings)
    plan = write(tmp_path / "out", model, architecture)
    assert plan.fields["model_type"] == name
    assert {setting.rpartition(".")[2] for setting in plan.converted} == converted
    found, again = loaded(tmp_path / "out")
    assert found.vocab_size == 64 + (name == "bert")
    assert found.pretrained_length == 32
    ids = tokens(32 if encoding in TABLES else 48, found.vocab_size)  # with the mask token of encoders
    ours, theirs = forward(model, ids), forward(again, ids)
    assert np.all(theirs[..., 64:] < -1e8)  # the mask token is never predicted
    theirs = theirs[..., :64]
    if converted:
        np.testing.assert_allclose(theirs, ours, atol=1e-5)
    else:
        np.testing.assert_allclose(theirs, ours, atol=2e-6)
        if "gemma" not in name:  # its norms are stored minus one
            kept = params_of(again)
            for path, x in params_of(model).items():
                np.testing.assert_array_equal(x, kept[path], err_msg=path)


@pytest.mark.torch
@pytest.mark.parametrize(("name", "case"), EACH)
def test_transformers_gives_the_logits_of_an_exported_model(name, case, tmp_path):
    pytest.importorskip("transformers")
    encoding, settings, _ = CASES[name][case]
    model, architecture = random_model(encoding, **settings)
    write(tmp_path / "out", model, architecture)
    ids = tokens(32 if encoding in TABLES else 80, 64 + (name == "bert"))  # past the training length
    longer = {"max_seq_len": 80} if name == "mpt" else {}  # transformers reads no more tokens than that
    np.testing.assert_allclose(transformers_logits(tmp_path / "out", ids, **longer), forward(model, ids), atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("rule", ["dynamic_ntk:factor=2", "longrope:factors=1|2|3|4,short=1|1|2|2,factor=4"])
def test_rules_that_follow_the_length_do_so_in_transformers(rule, tmp_path):
    pytest.importorskip("transformers")
    write(tmp_path / "out", *random_model(hyperparameters={"scaling": rule}))
    for length in (32, 80):
        at_length = str(frequencies.parse(rule).own_at(length, 32))
        model, _ = random_model(hyperparameters={"scaling": at_length})
        ids = tokens(length)
        np.testing.assert_allclose(transformers_logits(tmp_path / "out", ids), forward(model, ids), atol=1e-4)


@pytest.mark.parametrize("encoding", encodings.names())
def test_each_encoding_is_exported_or_named_in_the_error(encoding):
    """In the model of the recipes."""
    model, architecture = random_model(encoding)
    if encoding in ("none", "rope", "p_rope", "hope"):
        assert hf_writer.plan(architecture, params_of(model)).fields["model_type"] in ("llama", "smollm3")
        return
    with pytest.raises(ConfigError, match=r"has no counterpart in transformers: llama, the nearest family") as caught:
        hf_writer.plan(architecture, params_of(model))
    assert (caught.value.field, caught.value.value) == ("config.encoding.name", encoding)


@pytest.mark.parametrize(
    ("encoding", "settings", "told"),
    [
        ("learned", {}, r"gpt2, which has this encoding, cannot express .*activation = 'swiglu' \(needs 'gelu'\), "),
        ("learned", GPT | {"norm": "rms"}, r"model.norm = 'rms': .* gpt2, .*an RMSNorm does not subtract the mean"),
        ("alibi", GPT, r"model.embedding_norm = False: .* bloom, the nearest family, .*needs True"),
        ("alibi", GPT | {"embedding_norm": True, "hyperparameters": {"learned": True}}, r"encoding.learned = True"),
        ("rope", {"qk_norm": True, "use_bias": True}, r"config.model.\w+ = True"),
        (
            "rope",
            GEMMA | {"num_heads": 3, "num_kv_heads": 3, "attention_softcap": 2.0},
            r"\(must divide d_model = 32\)",
        ),
        (
            "rope",
            {"hyperparameters": {"scaling": "longrope:factors=1|2|3|4", "window_base": 0.0}, "post_norm": True},
            "post_norm = True",
        ),
        ("p_rope", {"hyperparameters": {"reversed": True}}, r"config.encoding.name = 'p_rope'"),
        ("rope", {"hyperparameters": {"fraction": 0.5}}, r"config.encoding.fraction = 0.5"),
        ("rope", {"attention_sinks": True}, r"config.model.attention_sinks = True"),
        ("rope", {"attention_gate": True}, r"config.model.attention_gate = True"),
        ("rope", {"canon": True}, r"config.model.canon = True"),
        ("none", {"window": 8}, r"has no counterpart in transformers"),
    ],
)
def test_settings_without_counterpart_are_named(encoding, settings, told):
    model, architecture = random_model(encoding, **settings)
    with pytest.raises(ConfigError, match=told):
        hf_writer.plan(architecture, params_of(model))


def test_rules_of_rope_are_compared_by_their_rates():
    def named(**settings):
        own = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "d_model": 16}
        return equivalent.complete(Architecture(own, {"name": "rope", **settings}, 32, 64))

    raised = named(base=1e4 * 2 ** (8 / 6))
    assert equivalent.differences(named(scaling="ntk:factor=2"), raised) == {}
    assert "encoding.base" in equivalent.differences(named(), raised)
    assert "encoding.scaling" in equivalent.differences(named(), named(scaling="dynamic_ntk:factor=2"))
    assert "encoding.fraction" in equivalent.differences(named(), named(fraction=0.5))


def test_a_parameter_that_a_family_lacks_must_be_zero():
    """MPT has no biases, so a trained layer norm cannot be expressed."""
    model, architecture = random_model("alibi", norm="layer", activation="gelu_exact")
    with pytest.raises(ConfigError, match=r"has no counterpart.* mpt, .*_norm/bias = 'not zero' \(does not have it"):
        hf_writer.plan(architecture, params_of(model))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a small run with RoPE."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    save_run(workdir, run_config("rope", **SMALL))
    return workdir


SMALL = {"model__num_layers": 1, "model__d_model": 32, "model__head_dim": 16, "model__d_ff": 24}


def contents(folder):
    return {path.relative_to(folder): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("dtype", "shard_bytes", "atol"), [("float32", 10**9, 1e-5), ("bfloat16", 8000, 0.1)])
def test_a_run_is_exported_and_left_as_it_is(run, tmp_path, dtype, shard_bytes, atol):
    before = contents(run)
    told = export.export(run, tmp_path / "new" / "out", dtype=dtype, shard_bytes=shard_bytes)
    assert contents(run) == before
    assert "llama" in told
    assert "config.model.scale_embeddings = False for True" in told
    out = tmp_path / "new" / "out"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    weights = sorted(path.name for path in out.glob("*.safetensors"))
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1  # all can be read by the same users
    if dtype == "float32":
        assert weights == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == weights
        assert weights[0] == f"model-00001-of-{len(weights):05}.safetensors"
        assert len(weights) > 2
        assert index["metadata"]["total_size"] == 2 * sum(x.size for x in params_of(trained.load(run).model).values())
    config = json.loads((out / "config.json").read_text())
    assert (config["dtype"], config["eos_token_id"], config["architectures"]) == (dtype, None, ["LlamaForCausalLM"])
    found, again = loaded(out)
    ids = tokens(48)
    np.testing.assert_allclose(forward(again, ids), forward(trained.load(run).model, ids), atol=atol)
    from tokenizers import Tokenizer

    text = "A line.\n\tnaïve 나는 🍎"
    assert Tokenizer.from_str(found.tokenizer).encode(text).ids == list(text.encode())


def test_a_dropped_encoding_is_not_exported(tmp_path):
    save_run(tmp_path / "run", run_config("rope", training__drope="1 steps", **SMALL))
    assert "smollm3" in export.export(tmp_path / "run", tmp_path / "out")
    found, again = loaded(tmp_path / "out")
    assert found.encoding["name"] == "none"
    ids = tokens(48)
    np.testing.assert_allclose(forward(again, ids), forward(trained.load(tmp_path / "run").model, ids), atol=1e-5)


def test_sinusoidal_positions_are_exported_up_to_the_longest_length_that_was_read():
    config = run_config("sinusoidal", evaluation__lengths=(64, 512), training__length=64, **SMALL)
    assert export.architecture(config).pretrained_length == 512
    assert export.architecture(run_config("rope", **SMALL)).pretrained_length == run_config("rope").training.length


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"temperature__form": "ssmax"}, r"config.temperature.form = 'ssmax': has no counterpart in transformers"),
        (
            {"positions__training": "offset", "positions__range": 4096, "positions__evaluation": "even"},
            r"config.positions.evaluation = 'even': has no counterpart",
        ),
    ],
)
def test_settings_outside_of_the_model_are_checked(changes, told):
    with pytest.raises(ConfigError, match=told):
        export.architecture(run_config("rope", **SMALL | changes))


def test_recurrent_models_have_no_counterpart():
    from configs import recurrent
    from posenc_jax.config import RunConfig

    config = RunConfig.from_mapping(recurrent.get_config("cell=lstm,size=smoke").to_dict())
    with pytest.raises(ConfigError, match=r"config.model.architecture = 'lstm': has no counterpart in transformers"):
        export.architecture(config)


def test_an_output_folder_is_never_overwritten(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    for output in (tmp_path / "full", tmp_path / "full" / "file"):
        with pytest.raises(ConfigError, match=r"--output = .*must be a new or an empty folder"):
            export.export(run, output)
    for output in (run, run / "out", run / "checkpoints" / ".." / "out"):
        with pytest.raises(ConfigError, match=r"--output = .*must be outside of the workdir"):
            export.export(run, output)
    assert (tmp_path / "full" / "file").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    export.export(run, tmp_path / "link")
    assert (tmp_path / "empty" / "config.json").exists()


def test_a_folder_that_is_no_trained_run_is_refused(run, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    for name in ("no", "llama"):
        with pytest.raises(ConfigError, match=r"workdir = .*must be the folder of a run; .* with config.init_from"):
            export.export(tmp_path / name, tmp_path / "out")
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match=r"workdir = .*must hold a checkpoint"):
        export.export(tmp_path / "run", tmp_path / "out")
    config = run_config("rope", **SMALL, init_from="smollm2", init_sha256="0" * 64, training__duration="0 steps")
    save_run(tmp_path / "evaluated", config)
    with pytest.raises(ConfigError, match=r"must be a run that trains: this one only evaluates smollm2"):
        export.export(tmp_path / "evaluated", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_export_leaves_nothing(run, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(hf_writer, "_write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        export.export(run, tmp_path / "out")
    monkeypatch.setattr(hf_writer, "_write_json", full)
    with pytest.raises(ConfigError, match=r"--output = .*cannot be written: No space left on device"):
        export.export(run, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ConfigError, match=r"--output = .*needs 0.0[0-9] MB, and 0.00 MB are free there"):
        export.export(run, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--output = .*cannot be"):
        export.export(run, tmp_path / "file" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_command_prints_one_line(run, tmp_path, capsys):
    export.main([str(run), "--output", str(tmp_path / "out"), "--dtype", "bfloat16", "--shard-mb", "1"])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: llama, ")
