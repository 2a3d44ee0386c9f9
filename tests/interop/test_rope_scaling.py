"""RoPE's fields of config.json against Hugging Face transformers, there and back, and what is refused."""

import contextlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posenc_jax.encodings import frequencies
from posenc_jax.interop import rope_scaling
from posenc_jax.interop.fields import Fields
from posenc_jax.interop.rope_scaling import Rope, read_section, section, write
from posenc_jax.schema import ConfigError

ORIGINAL = "original_max_position_embeddings"


def read(config, head_dim=8, fraction=1.0, **options):
    fields = Fields(config, "config.json")
    found = rope_scaling.read(fields, head_dim, fraction=fraction, **options)
    fields.finish()
    return found


def ours(rope, head_dim, length):
    """Inverse frequencies [pairs] (radians per token) and attention factor at a length read."""
    scaling = frequencies.parse(rope.scaling).own_at(length, rope.pretrained_length)
    return scaling.frequencies(int(rope.fraction * head_dim), rope.base, rope.pretrained_length)


def theirs(config, head_dim, lengths, layer_type=None):
    """The same of transformers, for each length alone, computed in float64."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("safetensors.torch")  # its table of dtypes must be made before they are replaced
    transformers.logging.set_verbosity_error()
    models, shape = transformers.models, {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "head_dim": head_dim}
    found, usual = [], torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as after:
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        after.callback(torch.set_default_dtype, usual)
        for length in lengths:
            own = {name: dict(value) if isinstance(value, dict) else value for name, value in config.items()}
            x, positions = torch.zeros(1, dtype=torch.float64), torch.tensor([[length - 1]])
            if layer_type is None:  # the module of GPT-NeoX, which reads partial_rotary_factor for all rules
                kind = transformers.GPTNeoXConfig if "rotary_pct" in config else transformers.LlamaConfig
                module = models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding(kind(**own, **shape))
                module(x, positions)
                found.append((module.inv_freq.numpy(), module.attention_scaling))
            else:
                own = transformers.Gemma3TextConfig(**own, **shape)
                module = models.gemma3.modeling_gemma3.Gemma3RotaryEmbedding(own)
                module(x, positions, layer_type)
                names = (f"{layer_type}_inv_freq", f"{layer_type}_attention_scaling")
                theta, factor = (getattr(module, name) for name in names)
                found.append((theta.numpy(), factor))
    return found


def check(rope, config, head_dim, lengths, layer_type=None):
    """Compare with transformers at these lengths and around the length that the rule starts from."""
    lengths = [*lengths, rope.pretrained_length, rope.pretrained_length + 1]
    for length, (theta, factor) in zip(lengths, theirs(config, head_dim, lengths, layer_type), strict=True):
        found, attention = ours(rope, head_dim, length)
        np.testing.assert_allclose(found, theta, rtol=1e-8)
        assert attention == factor


@st.composite
def configs(draw, kind):
    """Fields of config.json in either form with this rule, and the width of a head."""
    head_dim = draw(st.sampled_from([8, 16, 24, 64, 80, 128]))
    share = draw(st.sampled_from([1.0, 0.5, 0.75, 0.25] if head_dim >= 16 else [1.0]))
    share = share if int(share * head_dim) % 2 == 0 else 1.0
    pairs = int(share * head_dim) // 2
    if kind == "proportional":
        share = draw(st.floats(0.05, 1))
    original = draw(st.sampled_from([16, 128, 2048]) | st.integers(16, 10_000))
    factor = draw(st.floats(1, 64))
    own, longest = {"rope_type": kind}, original
    if kind in ("linear", "dynamic", "llama3", "yarn") or (
        kind in ("longrope", "proportional") and draw(st.booleans())
    ):
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
@pytest.mark.parametrize("kind", list(rope_scaling.TYPES))
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data(), st.integers(4, 100_000))
def test_frequencies_equal_transformers_at_every_length_there_and_back(kind, data, length):
    config, head_dim = data.draw(configs(kind))
    rope = read(config, head_dim)
    check(rope, config, head_dim, [length])
    written = write(rope, head_dim, partial=True)
    assert read(written, head_dim) == rope
    check(rope, written, head_dim, [length])


@pytest.mark.torch
@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize(
    ("base", "original", "betas", "degenerate"),
    [
        (1e4, 2048, (32, 1), False),
        (1e4, 2048, (20, 19.9), False),
        (2.0, 10_000, (32, 1), True),  # all pairs turn more often than beta_fast
        (1e4, 8, (32, 4), True),  # none turns as often as beta_slow
        (1e4, 8, (32, 1.3), True),  # rounded up, the range is one index
    ],
)
def test_the_pairs_that_yarn_mixes_are_those_of_transformers(base, original, betas, degenerate, truncate):
    fast, slow = betas
    rule = {"rope_type": "yarn", "factor": 4.0, "beta_fast": fast, "beta_slow": slow, "truncate": truncate}
    config = {"max_position_embeddings": 4 * original, "rope_theta": base, "rope_scaling": rule | {ORIGINAL: original}}
    rope = read(config, 64)
    assert ("always_cut" in rope.scaling) == degenerate
    check(rope, config, 64, [10])


# Settings, and those that their config.json is read as where they differ.
SETTINGS = [
    ("none", "none"),
    ("linear:factor=4", "linear:factor=4"),
    ("linear", "linear:factor=1"),
    ("dynamic_ntk", "dynamic_ntk"),
    ("dynamic_ntk:factor=4", "dynamic_ntk:factor=4"),
    ("proportional:fraction=0.5,factor=1", "proportional:fraction=0.5,factor=1"),
    ("proportional:fraction=0.25,factor=8", "proportional:fraction=0.25,factor=8"),
    ("yarn:factor=4", "yarn:factor=4"),
    ("yarn:factor=4,beta_fast=16,beta_slow=2,truncate=0", "yarn:factor=4,beta_fast=16,beta_slow=2,truncate=0"),
    ("yarn:factor=4,attention_factor=1.5", "yarn:factor=4,attention_factor=1.5"),
    ("yarn:factor=4,temperature=0", "yarn:factor=4,attention_factor=1"),
    ("by_parts:factor=4", "yarn:factor=4,attention_factor=1"),
    ("by_parts:factor=4,beta_fast=8,paper_ramp=1", "llama3:factor=4,high_freq_factor=8"),
    ("llama3:factor=8", "llama3:factor=8"),
    ("llama3:factor=8,low_freq_factor=2,high_freq_factor=8", "llama3:factor=8,low_freq_factor=2,high_freq_factor=8"),
    ("longrope:factors=1|2|3|4,factor=4", "longrope:factors=1|2|3|4,factor=4"),
    ("longrope:factors=1|2|3|4,short=1|1|1|2,factor=4", "longrope:factors=1|2|3|4,short=1|1|1|2,factor=4"),
    ("longrope:factors=1|2|3|4,factor=1,attention_factor=2", "longrope:factors=1|2|3|4,factor=1,attention_factor=2"),
]


@pytest.mark.parametrize(("scaling", "expected"), SETTINGS)
def test_settings_survive_config_json(scaling, expected):
    rope = Rope(10000.0, 1.0, scaling, 1024)
    found = read(write(rope, 8))
    assert found == Rope(10000.0, 1.0, expected, 1024)
    for length in (1000, 1024, 1025, 4096):
        for one, other in zip(ours(found, 8, length), ours(rope, 8, length), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "scaling", ["ntk:factor=4", "rebased:to=500000", "dynamic_ntk:factor=3,read=4096", "dynamic_ntk:factor=3,read=100"]
)
def test_a_rule_that_changes_the_base_is_written_as_another_base(scaling):
    rope = Rope(10000.0, 1.0, scaling, 1024)
    written = write(rope, 8)
    assert written["rope_scaling"] is None
    for one, other in zip(ours(read(written), 8, 5000), ours(rope, 8, 5000), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_an_original_length_is_written_and_becomes_the_length_that_the_rule_starts_from():
    for scaling in ("yarn:factor=4", "dynamic_ntk", "llama3:factor=4", "longrope:factors=1|2|3|4,factor=4"):
        separator = "," if ":" in scaling else ":"
        rope = Rope(10000.0, 1.0, f"{scaling}{separator}original_length=512", 1024)
        assert read(write(rope, 8)) == Rope(10000.0, 1.0, scaling, 512)


def test_a_rotated_share_of_the_channels_survives_config_json():
    rope = Rope(5000.0, 0.5, "yarn:factor=4", 256)
    names = {"base_field": "rotary_emb_base", "fraction_field": "rotary_pct"}
    written = write(rope, 64, partial=True, **names)
    assert (written["rotary_emb_base"], written["rotary_pct"]) == (5000.0, 0.5)
    assert read(written, 64, 0.25, **names) == rope
    own, longest = section(rope, 64)
    assert (own["partial_rotary_factor"], own["rope_theta"], longest) == (0.5, 5000.0, 1024)
    assert read({"max_position_embeddings": longest, "rope_parameters": own}, 64) == rope


def test_missing_fields_have_the_defaults_of_transformers():
    assert read({"max_position_embeddings": 2048}) == Rope(10000.0, 1.0, "none", 2048)
    assert read({"max_position_embeddings": 2048}, 64, 0.25) == Rope(10000.0, 0.25, "none", 2048)
    assert read({"max_position_embeddings": 2048}, base=1e6).base == 1e6
    yarn = {"max_position_embeddings": 2048, "rope_scaling": {"rope_type": "yarn", "factor": 4}}
    assert read(yarn, 64) == Rope(10000.0, 1.0, "yarn:factor=4", 2048)
    yarn["rope_scaling"] |= {"beta_fast": 0, "beta_slow": None, "mscale": 0.7, ORIGINAL: 512}
    assert read(yarn, 64) == Rope(10000.0, 1.0, "yarn:factor=4", 512)
    yarn["rope_scaling"]["mscale_all_dim"] = 0.7
    assert read(yarn, 64).scaling == "yarn:factor=4,attention_factor=1"


def test_of_several_places_transformers_chooses():
    both = {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}}
    assert read({"max_position_embeddings": 64} | both).scaling == "linear:factor=2"
    config = {"max_position_embeddings": 64, "rope_theta": 5.0, "rope_scaling": {"rope_theta": 7.0, "type": "default"}}
    assert read(config).base == 7
    yarn = {"type": "linear", "rope_type": "llama3", "factor": 4, "low_freq_factor": 1, "high_freq_factor": 4}
    config = {"max_position_embeddings": 64, ORIGINAL: 32, "rope_scaling": yarn | {ORIGINAL: 16}}
    assert read(config) == Rope(10000.0, 1.0, "llama3:factor=4", 32)


@pytest.mark.torch
def test_gpt_neox_has_other_names():
    names = {"base_field": "rotary_emb_base", "fraction_field": "rotary_pct"}
    config = {"max_position_embeddings": 64, "rotary_emb_base": 500.0, "rotary_pct": 0.5}
    rope = read(config, 32, 0.25, **names)
    assert rope == Rope(500.0, 0.5, "none", 64)
    check(rope, config, 32, [100])


GEMMA = {
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    },
}


@pytest.mark.torch
@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize(
    "full",
    [
        {},
        {"rope_type": "yarn", "factor": 8.0, ORIGINAL: 512},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, ORIGINAL: 512},
    ],
)
def test_sections_of_layer_types_equal_transformers(layer_type, full):
    sections = {name: dict(own) for name, own in GEMMA["rope_parameters"].items()}
    if full:
        sections["full_attention"] = full | {"rope_theta": 1e6}
    rope = read_section(sections[layer_type], f"rope_parameters.{layer_type}", 16, 4096)
    check(rope, GEMMA | {"rope_parameters": sections}, 16, [5000], layer_type)


def test_sections_of_layer_types_are_not_read_as_one():
    with pytest.raises(
        ConfigError, match=r"rope_parameters = \['full_attention', 'sliding_attention'\]: has a section"
    ):
        read(GEMMA)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"rope_type": "yarm", "factor": 2},
            r"rope_scaling.rope_type = 'yarm': must be one of: .* Did you mean 'yarn'",
        ),
        ({"type": ["yarn"]}, r"rope_scaling.type = \['yarn'\]: must be one of"),
        ({"type": "mrope"}, r"rope_scaling.type = 'mrope': must be one of"),
        ({"type": "default", "mrope_section": [2, 2]}, r"rope_scaling.mrope_section = \[2, 2\]: no such field"),
        ({"type": "linear", "factr": 2}, r"rope_scaling.factr = 2: no such field; .* Did you mean 'factor'"),
        ({"type": "linear"}, r"rope_scaling.factor = None: is missing"),
        ({"type": "linear", "factor": 0.5}, r"rope_scaling.factor = 0.5: must be at least 1"),
        ({"type": "linear", "factor": "2"}, r"rope_scaling.factor = '2': must be a number"),
        ({"type": "linear", "factor": 2, "rope_theta": 1}, r"rope_scaling.rope_theta = 1.0: must be above 1"),
        ({"type": "linear", "factor": 2, "truncate": True}, r"rope_scaling.truncate = True: no such field"),
        (
            {"type": "default", "partial_rotary_factor": 1.5},
            r"partial_rotary_factor = 1.5: must be above 0 and at most 1",
        ),
        ({"type": "default", "partial_rotary_factor": 0.4}, r"partial_rotary_factor = 0.4: .* not 3 of head_dim = 8"),
        ({"type": "dynamic", "factor": 2, ORIGINAL: 64}, rf"{ORIGINAL} = 64: must be max_position_embeddings = 128"),
        ({"type": "yarn", ORIGINAL: 64}, r"rope_scaling.factor = None: is missing"),
        ({"type": "yarn", "factor": None, ORIGINAL: 256}, r"factor = None: .* = 0.5, which must be at least 1"),
        ({"type": "yarn", "factor": 2, "attention_factor": 0}, r"attention_factor = 0.0: must be above 0"),
        (
            {"type": "yarn", "factor": 2, "beta_slow": 40},
            r"rope_scaling.beta_slow = 40.0: must be below beta_fast = 32",
        ),
        ({"type": "yarn", "factor": 2, ORIGINAL: 1.5}, rf"rope_scaling.{ORIGINAL} = 1.5: must be an integer"),
        ({"type": "llama3", "factor": 2, "low_freq_factor": 1}, r"rope_scaling.high_freq_factor = None: is missing"),
        (
            {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1},
            r"rope_scaling.low_freq_factor = 4.0: must be below high_freq_factor = 1",
        ),
        (
            {"type": "longrope", "short_factor": [1] * 4, "long_factor": [1] * 3},
            r"rope_scaling.long_factor = \(1.0, 1.0, 1.0\): must be 4 numbers, one per pair",
        ),
        (
            {"type": "longrope", "short_factor": [1, 1, 1, 0], "long_factor": [1] * 4},
            r"rope_scaling.short_factor\[3\] = 0.0: must be at least 0.001",
        ),
    ],
)
def test_a_wrong_section_is_refused(rule, message):
    with pytest.raises(ConfigError, match=f"^config.json: .*{message}"):
        read({"max_position_embeddings": 128, "rope_scaling": rule})


@pytest.mark.parametrize(
    ("config", "fraction", "message"),
    [
        ({"max_position_embeddings": None}, 1.0, "config.json: max_position_embeddings = None: is missing"),
        ({"rope_theta": 0.5}, 1.0, "config.json: rope_theta = 0.5: must be above 1"),
        ({"rope_scaling": "yarn"}, 1.0, "config.json: rope_scaling = 'yarn': must be dict"),
        ({"partial_rotary_factor": 2.0}, 1.0, "config.json: partial_rotary_factor = 2.0: must be above 0"),
        ({"partial_rotary_factor": 0.5}, None, "config.json: partial_rotary_factor = 0.5: must be 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, None, "partial_rotary_factor = 0.5: must be 1 for this"),
    ],
)
def test_a_wrong_field_beside_the_section_is_refused(config, fraction, message):
    with pytest.raises(ConfigError, match=message):
        read({"max_position_embeddings": 128} | config, 8, fraction)


def test_a_section_of_a_layer_type_has_no_truncate():
    with pytest.raises(ConfigError, match=r"^full.truncate = False: must be true"):
        read_section({"rope_type": "yarn", "factor": 2.0, "truncate": False}, "full", 8, 128)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            Rope(1e4, 1.0, "yarn:factor=4,paper_ramp=1", 1024),
            r"^config.encoding.scaling = 'yarn:.*does not scale atten",
        ),
        (Rope(1e4, 1.0, "yarn:factor=4", 4), r"^config.encoding.scaling = 'yarn:factor=4': .*; always_cut=1 mixes"),
        (Rope(1e4, 0.5, "proportional:factor=2", 64), r"^config.encoding.fraction = 0.5: must be 1 for proportional"),
        (Rope(1e4, 0.5, "none", 64), r"^config.encoding.fraction = 0.5: must be 1 for this family"),
    ],
)
def test_settings_without_counterpart_are_refused(rope, message):
    with pytest.raises(ConfigError, match=message):
        write(rope, 16)
