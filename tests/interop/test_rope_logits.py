"""Logits of random small models with each rule of RoPE, within and past its original context, beside transformers."""

import dataclasses
import re
import tempfile

import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.evaluation.extrapolation import rule_at, scaled_constants
from posenc_jax.interop import rope_scaling
from tests.interop.foreign import loaded, logits_and_loss, random_model, tokens
from tests.small import run_config, split

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WITHIN, LONGEST, PAST = 16, st.integers(17, 23), 24  # tokens read, and max_position_embeddings
START = {"original_max_position_embeddings": st.just(WITHIN)}
FACTOR, PER_PAIR = st.floats(1, 8), "a number for each pair of channels"
LONGROPE = {"short_factor": PER_PAIR, "long_factor": PER_PAIR, **START}
RULES = {  # the fields of each rope_type, or of one of its forms
    "default": {},
    "linear": {"factor": FACTOR},
    "dynamic": {"factor": FACTOR},
    "yarn": {"factor": FACTOR, "beta_fast": st.floats(4, 40), "beta_slow": st.floats(0.5, 3), **START},
    "yarn, other attention": {"factor": st.none() | FACTOR, "attention_factor": st.floats(0.5, 2), **START},
    "yarn of DeepSeek": {
        "factor": FACTOR,
        "mscale": st.floats(0.5, 1),
        "mscale_all_dim": st.floats(0, 1),
        "truncate": st.booleans(),
        **START,
    },
    "longrope": {"factor": FACTOR, **LONGROPE},
    "longrope of Phi": {"attention_factor": st.floats(0.5, 2), **LONGROPE},
    "longrope, factor of the lengths": LONGROPE,
    "llama3": {"factor": FACTOR, "low_freq_factor": st.floats(0.5, 2), "high_freq_factor": st.floats(2.5, 8), **START},
    "proportional": {"factor": FACTOR, "partial_rotary_factor": st.floats(0.1, 1)},
}


def rope_type(name):
    return re.match(r"\w+", name)[0]


@st.composite
def models(draw, name):
    """A model type with RoPE, and the fields of a model with this rule."""
    heads, kv_heads, width = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([4, 6, 8]))
    kind, rotated = draw(st.sampled_from(["llama", "qwen2", "qwen3", "smollm3", "gpt_neox"])), 1.0
    fields = {
        "vocab_size": 61,
        "intermediate_size": 37,
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads * kv_heads,
        "max_position_embeddings": draw(LONGEST),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
    }
    base = draw(st.floats(10, 1e6))
    if kind == "gpt_neox":
        width, rotated = draw(st.sampled_from([(8, 0.5), (16, 0.25), (16, 0.4), (12, 1.0)]))
        fields |= {"rotary_emb_base": base, "rotary_pct": rotated}
    else:
        fields |= {"rope_theta": base, "num_key_value_heads": kv_heads}
    per_pair = st.lists(st.floats(1, 8), min_size=int(rotated * width) // 2, max_size=int(rotated * width) // 2)
    rule = {field: draw(per_pair if own is PER_PAIR else own) for field, own in RULES[name].items()}
    fields["rope_scaling"] = {"rope_type": rope_type(name), **rule}
    fields |= {"hidden_size": heads * kv_heads * width} | ({"head_dim": width} if kind in ("llama", "qwen3") else {})
    return kind, fields


def reading(found, model, length):
    """The model with the constants for reading this many tokens."""
    config = dataclasses.replace(
        run_config(training__length=found.pretrained_length),
        model=TransformerConfig(**found.model),
        encoding=EncodingConfig.parse(found.encoding, "encoding"),
    )
    graphdef, params, constants = split(model)
    return nnx.merge(graphdef, params, scaled_constants(config, constants, rule_at(config, "none", length)))


def test_every_rope_type_has_a_rule():
    theirs = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS.keys() | {"default"}
    assert theirs == rope_scaling.TYPES.keys() == {rope_type(name) for name in RULES}


@pytest.mark.parametrize("name", RULES)
@settings(max_examples=2, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_logits_equal_transformers_within_and_past_the_original_context(name, data):
    model_type, fields = data.draw(models(name))
    theirs = random_model(model_type, **fields)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        found, ours = loaded(folder)
    text = tokens(61, PAST)
    for length in (WITHIN, PAST):
        with torch.no_grad():
            expected = theirs(torch.tensor(text[:, :length], dtype=torch.long)).logits.numpy()
        logits, _ = logits_and_loss(reading(found, ours, length), text, text)  # one length, so one compiled program
        np.testing.assert_allclose(logits[:, :length], expected, atol=1e-4)
