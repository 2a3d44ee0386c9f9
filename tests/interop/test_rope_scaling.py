"""RoPE's fields of config.json against Hugging Face transformers, there and back, and what is refused."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posenc_jax.encodings import frequencies
from posenc_jax.interop.rope_scaling import Rope, read, read_layer, section, write
from posenc_jax.schema import ConfigError

PAIRS = [1.0, 1.5, 2.0, 4.0]
ORIGINAL = "original_max_position_embeddings"
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


def fields_of(rule=None, longest=128, **beside):
    """A config.json of the older form."""
    return {"max_position_embeddings": longest, "rope_scaling": rule, **beside}


def ours(rope, head_dim, length):
    """Inverse frequencies [pairs] (radians per token) and attention factor at a length read."""
    scaling = frequencies.parse(rope.scaling).own_at(length, rope.pretrained_length)
    return scaling.frequencies(int(rope.fraction * head_dim), rope.base, rope.pretrained_length)


def theirs(config, head_dim, lengths):
    """The same of transformers, for one length after another, computed in float64."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    rotary = transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding  # reads partial_rotary_factor
    shape = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    usual = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        after.callback(torch.set_default_dtype, usual)
        for owner, name in ((torch, "float"), (torch, "float32")):
            patch.setattr(owner, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        found = []
        for length in lengths:
            own = {name: value for name, value in config.items() if name not in ("rotary_pct", "rotary_emb_base")}
            module = rotary(transformers.LlamaConfig(**copied(own), **shape))
            module(torch.zeros(1, dtype=torch.float64), torch.tensor([[length - 1]]))
            found.append((module.inv_freq.numpy(), module.attention_scaling))
    return found


def copied(config):
    """transformers writes into the sections that it is given."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}


@st.composite
def configs(draw, types=("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional")):
    """Fields of config.json in either form, and the width of a head."""
    head_dim = draw(st.sampled_from([8, 16, 24, 64, 80, 128]))
    share = draw(st.sampled_from([1.0, 0.5, 0.75, 0.25] if head_dim >= 16 else [1.0]))
    kind = draw(st.sampled_from(types))
    pairs = head_dim // 2 if kind == "proportional" else int(share * head_dim) // 2
    share = share if int(share * head_dim) % 2 == 0 else 1.0
    pairs = int(share * head_dim) // 2
    original = draw(st.integers(16, 10_000))
    factor = draw(st.floats(1, 64))
    own, longest = {"rope_type": kind}, original
    if kind in ("linear", "dynamic", "llama3", "yarn") or (kind in ("longrope", "proportional") and draw(st.booleans())):
        own["factor"] = factor
    if kind in ("yarn", "longrope", "llama3"):
        longest = draw(st.integers(original + 1, 64 * original))
        own[ORIGINAL] = original
        if kind != "llama3" and draw(st.booleans()):
            own["attention_factor"] = draw(st.floats(0.25, 4))
    if kind == "yarn":
        if draw(st.booleans()):
            own["factor"] = None
        if draw(st.booleans()):
            own["beta_slow"], own["beta_fast"] = draw(st.floats(0.01, 4)), draw(st.floats(4.5, 4000))
        if draw(st.booleans()):
            own["truncate"] = draw(st.booleans())
        for name in draw(st.sampled_from([(), ("mscale",), ("mscale", "mscale_all_dim")])):
            own[name] = draw(st.sampled_from([0.0, 0.707, 1.0]))
    if kind == "llama3":
        own["low_freq_factor"], own["high_freq_factor"] = draw(st.floats(0.1, 4)), draw(st.floats(4.5, 100))
    if kind == "longrope":
        for name in ("short_factor", "long_factor"):
            own[name] = draw(st.lists(st.floats(0.5, 100), min_size=pairs, max_size=pairs))
    base = draw(st.sampled_from([10_000.0, 500_000.0, 150.0, 1e6, 2.0]))
    beside = {"rope_theta": base, "partial_rotary_factor": share}
    if draw(st.booleans()):  # the form of transformers 5
        return {"max_position_embeddings": longest, "rope_parameters": own | beside}, head_dim
    if kind in ("yarn", "longrope", "llama3") and draw(st.booleans()):
        beside[ORIGINAL] = own.pop(ORIGINAL)
    if draw(st.booleans()):
        own["type"] = own.pop("rope_type")
    return {"max_position_embeddings": longest, "rope_scaling": own} | beside, head_dim


@pytest.mark.torch
@settings(max_examples=150, deadline=None, derandomize=True)
@given(configs(), st.lists(st.integers(4, 100_000), min_size=1, max_size=2))
def test_frequencies_equal_transformers_at_every_length(drawn, lengths):
    config, head_dim = drawn
    rope = read(config, head_dim)
    lengths = [*lengths, rope.pretrained_length, rope.pretrained_length + 1]
    for length, (theta, factor) in zip(lengths, theirs(config, head_dim, lengths), strict=True):
        found, attention = ours(rope, head_dim, length)
        np.testing.assert_allclose(found, theta, rtol=1e-6)
        assert attention == factor
