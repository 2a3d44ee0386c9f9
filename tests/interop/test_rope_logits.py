"""Logits of a model with each rule of transformers, read here and there, within and past its original context."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from posenc_jax.config import EncodingConfig, TransformerConfig
from posenc_jax.evaluation.extrapolation import rule_at, scaled_constants
from posenc_jax.interop import rope_scaling
from posenc_jax.interop.fields import Fields
from posenc_jax.models.transformer import Transformer
from tests.small import forward, run_config, split, tokens

pytestmark = pytest.mark.torch

ORIGINAL = 32
START = {"original_max_position_embeddings": ORIGINAL}
FACTORS = {"short_factor": [1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], "long_factor": [1, 2, 3, 4, 5, 6, 7, 8]}
RULES = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 4.0, **START},
    "yarn of DeepSeek": {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7, "truncate": False, **START},
    "longrope": {"factor": 4.0, **FACTORS, **START},
    "longrope of Phi": {"attention_factor": 1.25, **FACTORS, **START},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **START},
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}


MODEL = TransformerConfig(num_layers=2, d_model=32, head_dim=16, d_ff=48, scale_embeddings=False)


def parameters(weights):
    """The parameters of our model from the weights of transformers' Llama."""

    def kernel(name):
        return {"kernel": weights[f"{name}.weight"].T}

    found = {"embedding": weights["model.embed_tokens.weight"], "norm": {"scale": weights["model.norm.weight"]}}
    for i in range(2):
        own = f"model.layers.{i}"
        attention = {name: kernel(f"{own}.self_attn.{name}_proj") for name in "qkv"}
        found[f"block_{i}"] = {
            "attention": attention | {"out": kernel(f"{own}.self_attn.o_proj")},
            "attention_norm": {"scale": weights[f"{own}.input_layernorm.weight"]},
            "feed_forward": {name: kernel(f"{own}.mlp.{name}_proj") for name in ("gate", "up", "down")},
            "feed_forward_norm": {"scale": weights[f"{own}.post_attention_layernorm.weight"]},
        }
    return found


@pytest.mark.parametrize("name", RULES)
def test_logits_equal_transformers_within_and_past_the_original_context(name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    kind, rule = name.split()[0], RULES[name]
    settings = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=4 * ORIGINAL if START.items() <= rule.items() else ORIGINAL,
        rope_parameters={"rope_type": kind, "rope_theta": 100.0, **rule},
        initializer_range=0.5,  # large weights, so that positions matter
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(settings).eval()
    rope = rope_scaling.read(Fields(settings.to_dict(), "config.json"), 16)
    assert rope.pretrained_length == ORIGINAL
    config = dataclasses.replace(
        run_config("rope", training__length=ORIGINAL), model=MODEL, encoding=EncodingConfig.of("rope", **rope.settings)
    )
    built = Transformer(MODEL, config.encoding, vocab_size=64, max_length=ORIGINAL, rngs=nnx.Rngs(0))
    graphdef, _, constants = split(built)
    params = parameters({name: value.numpy() for name, value in model.state_dict().items()})
    for length in (ORIGINAL, 3 * ORIGINAL, ORIGINAL // 2):
        batch = tokens(batch=1, length=length)
        read = scaled_constants(config, constants, rule_at(config, "none", length))
        found = np.asarray(forward(nnx.merge(graphdef, params, read), batch))
        with torch.no_grad():
            expected = model(torch.tensor(np.asarray(batch, np.int64))).logits.numpy()
        np.testing.assert_allclose(found, expected, atol=1e-4 * abs(expected).max())
