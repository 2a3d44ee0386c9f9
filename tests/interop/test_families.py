"""Each family of pretrained models gives the logits and the loss of transformers."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from posenc_jax.interop import families
from posenc_jax.interop.fields import Fields
from posenc_jax.schema import ConfigError
from tests.interop.foreign import loaded, logits_and_loss, random_model, tokens

pytestmark = pytest.mark.torch
transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")


@dataclasses.dataclass(frozen=True)
class Case:
    """Fields of a config.json, the number of tokens to read, and how the weights are saved."""

    fields: dict
    length: int = 40
    shard: str = "10GB"
    reread: dict = dataclasses.field(default_factory=dict)  # fields that transformers needs to read that many tokens


LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = LLAMA | {"head_dim": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
WINDOWS = {"sliding_window": 9, "num_hidden_layers": 3}
NEOX = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
NEOX |= {"hidden_size": 48, "num_attention_heads": 3}
GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 3, "bos_token_id": 0}
GPT2 |= {"eos_token_id": 1}
BLOOM = {"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 3}
MPT = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "n_heads": 6, "max_seq_len": 32}
BERT = {name: value for name, value in LLAMA.items() if name not in ("num_key_value_heads", "rms_norm_eps")}
BERT |= {"mask_token_id": 5}
HEADS = {"num_attention_heads": 3}
CASES = {
    "bert": [
        Case(BERT | HEADS, length=32),
        Case(BERT | {"hidden_act": "gelu_new", "tie_word_embeddings": False, "type_vocab_size": 3}, length=20),
    ],
    "bloom": [Case(BLOOM | {"n_head": 12}), Case(BLOOM | {"n_head": 8, "tie_word_embeddings": False})],
    "gemma": [
        Case(GEMMA | {"hidden_act": "gelu"}),
        Case(GEMMA | {"num_attention_heads": 2, "attention_bias": True, "tie_word_embeddings": False}),
    ],
    "gemma2": [
        Case(GEMMA | WINDOWS | {"query_pre_attn_scalar": 5}),
        Case(GEMMA | WINDOWS | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "num_hidden_layers": 2}),
        Case(GEMMA | {"final_logit_softcapping": None, "attn_logit_softcapping": None, "attention_bias": True}),
    ],
    "gemma3_text": [
        Case(
            GEMMA
            | WINDOWS
            | {"query_pre_attn_scalar": 5, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
        ),
        Case(
            GEMMA
            | WINDOWS
            | {"sliding_window_pattern": 2, "rope_local_base_freq": 50.0, "rope_theta": 5000.0}
            | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "final_logit_softcapping": 2.0}
        ),
    ],
    "gpt2": [
        Case(GPT2, length=32, shard="8KB"),
        Case(GPT2 | {"n_inner": 37, "activation_function": "gelu", "tie_word_embeddings": False}, length=30),
    ],
    "gpt_neox": [
        Case(NEOX | {"rotary_pct": 0.25, "layer_norm_eps": 1e-3}, shard="8KB"),
        Case(
            NEOX | {"rotary_pct": 1.0, "rotary_emb_base": 500, "use_parallel_residual": False, "hidden_act": "gelu_new"}
        ),
        Case(NEOX | {"attention_bias": False, "tie_word_embeddings": True}),
    ],
    "llama": [
        Case(LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 3, "rope_theta": 500.0}, shard="8KB"),
        Case(LLAMA | {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True}),
        Case(LLAMA | {"mlp_bias": True, "max_position_embeddings": 512, "num_key_value_heads": 1}, length=640),
        Case(LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ],
    "mpt": [
        Case(MPT, reread={"max_seq_len": 40}),
        Case(MPT | {"n_heads": 4, "tie_word_embeddings": False}, length=32),
    ],
    "qwen2": [
        Case(LLAMA | {"tie_word_embeddings": True}),
        Case(LLAMA | WINDOWS | {"use_sliding_window": True, "max_window_layers": 1}),
    ],
    "qwen3": [
        Case(LLAMA | {"head_dim": 10, "attention_bias": True}),
        Case(LLAMA | WINDOWS | {"head_dim": 6, "use_sliding_window": True, "max_window_layers": 2, "rope_theta": 1e6}),
    ],
    "smollm3": [
        Case(LLAMA | {"num_hidden_layers": 5, "rope_theta": 5e6}),
        Case(
            LLAMA | {"no_rope_layers": [0, 1], "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
        ),
    ],
}


def test_every_family_has_at_least_two_cases():
    assert CASES.keys() == families.TABLE.keys()
    assert all(len(cases) >= 2 for cases in CASES.values())


@pytest.mark.parametrize(
    ("model_type", "case"), [(name, case) for name, cases in CASES.items() for case in cases], ids=lambda x: str(x)[:12]
)
def test_logits_and_loss_equal_those_of_transformers(tmp_path, model_type, case):
    theirs = random_model(model_type, **case.fields)
    theirs.save_pretrained(tmp_path, max_shard_size=case.shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (case.shard != "10GB")
    for name, value in case.reread.items():
        setattr(theirs.config, name, value)
    text = tokens(61, case.length)
    labels = torch.tensor(text, dtype=torch.long)
    with torch.no_grad():
        expected = theirs(labels, labels=labels)
    found, model = loaded(tmp_path)
    masked = model.causal is False
    own = np.where(text == 5, found.vocab_size, text) if masked else text
    logits, loss = logits_and_loss(model, own, text if masked else text[:, 1:])
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4)
    np.testing.assert_allclose(loss, expected.loss.numpy(), rtol=1e-5)
    assert expected.logits.std() > 0.1  # so that logits that do not depend on the weights would be seen


@pytest.mark.parametrize("model_type", families.TABLE)
def test_absent_fields_have_the_defaults_of_transformers(model_type):
    complete = transformers.AutoConfig.for_model(model_type).to_dict()
    needed = {name: complete[name] for name in needed_fields(model_type, complete)}
    family = families.load(complete, "config.json")
    assert family.read(Fields(needed, "needed")) == family.read(Fields(complete, "complete"))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen2", {"use_sliding_window": True, "num_hidden_layers": 30}),
        ("qwen3", {"use_sliding_window": True, "num_hidden_layers": 30, "sliding_window": 7}),
        ("gemma2", {"final_logit_softcapping": None, "attn_logit_softcapping": None, "num_hidden_layers": 3}),
        ("gemma3_text", {"num_hidden_layers": 7, "sliding_window_pattern": 3}),
        ("smollm3", {"num_hidden_layers": 7, "no_rope_layer_interval": 3}),
        ("llama", {"num_key_value_heads": None}),
        ("qwen2", {"num_key_value_heads": None}),
    ],
)
def test_fields_that_follow_from_others_are_those_of_transformers(model_type, fields):
    complete = transformers.AutoConfig.for_model(model_type, **fields).to_dict()
    default = transformers.AutoConfig.for_model(model_type).to_dict()
    needed = {name: default[name] for name in needed_fields(model_type, default)} | fields
    family = families.load(complete, "config.json")
    assert family.read(Fields(needed, "needed")) == family.read(Fields(complete, "complete"))


def test_null_is_no_soft_cap():
    fields = GEMMA | {"model_type": "gemma2", "final_logit_softcapping": None, "attn_logit_softcapping": None}
    model = families.load(fields, "config.json").read(Fields(fields, "config.json")).model
    assert (model["logit_softcap"], model["attention_softcap"]) == (0, 0)


def needed_fields(model_type, complete):
    """The fields without which a config.json is refused."""
    family, needed = families.load(complete, "config.json"), dict(complete)
    for name in complete:
        without = {key: value for key, value in needed.items() if key != name}
        try:
            family.read(Fields(without, "config.json"))
        except ValueError:
            continue
        needed = without
    return needed


def test_berts_older_files_have_other_names_and_more_tensors(tmp_path):
    theirs = random_model("bert", **{name: value for name, value in BERT.items() if name != "mask_token_id"} | HEADS)
    theirs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    assert "mask_token_id" not in config
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 7, "content": "[MASK]"}]}))
    _, model = loaded(tmp_path)
    words = weights["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(model.embedding[...], np.concatenate([words, words[7:8]]))
    older = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in older.items():
        weights = {name.replace(new, old): array for name, array in weights.items()}
    weights |= {f"bert.pooler.dense.{kind}": words[0] for kind in ("weight", "bias")}
    weights |= {"cls.predictions.decoder.weight": words, "cls.seq_relationship.weight": words}
    save_file(weights, tmp_path / "model.safetensors")
    _, again = loaded(tmp_path)
    np.testing.assert_array_equal(again.embedding[...], model.embedding[...])
    np.testing.assert_array_equal(again.norm.scale[...], model.norm.scale[...])
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="mask_token_id = 103: must be a token: at least 0 and below vocab_size = 61"):
        loaded(tmp_path)
