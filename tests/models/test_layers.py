"""Layers that differ: sections of the letters in config.model.pattern."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import hybrid
from posenc_jax.config import RunConfig
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation import extrapolation
from posenc_jax.schema import ConfigError, plain
from posenc_jax.training import flops
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, build_model, initial_state
from tests.models.test_settings import hidden, states
from tests.small import run_config, split, transformer

SSMAX = {"form": "ssmax", "scale": 0.1, "floor": 8}
# Sections, and the fields of a model in which all layers are like theirs.
SECTIONS = {
    "encoding": ({"encoding": {"name": "fire"}}, {}),
    "hyper-parameters": ({"encoding": {"name": "rope", "base": 50.0}}, {"hyperparameters": {"base": 50.0}}),
    "window": ({"window": 3}, {"window": 3}),
    "no window": ({"window": 0}, {}),
    "sinks": ({"attention_sinks": True}, {"attention_sinks": True}),
    "several": (
        {"encoding": {"name": "alibi"}, "window": 5, "attention_sinks": True},
        {"window": 5, "attention_sinks": True},
    ),
}


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_layers_of_a_letter_are_those_of_a_model_with_its_settings(kind, seed):
    section, fields = SECTIONS[kind]
    mixed = transformer("rope", pattern="GL", layers={"L": section}, seed=seed)
    common = transformer("rope", seed=seed)
    own = transformer(section.get("encoding", {"name": "rope"})["name"], seed=seed, **fields)
    x = hidden(seed)
    for i, model in enumerate((common, own)):
        nnx.update(model.block(i), nnx.state(mixed.block(i)))
        nnx.update(model.encoding(i), nnx.state(mixed.encoding(i)))
        np.testing.assert_array_equal(states(mixed, i, x), states(model, i, x))
    if kind != "no window":
        nnx.update(common.block(1), nnx.state(mixed.block(1), nnx.filterlib.Not(nnx.PathContains("sinks"))))
        assert np.abs(states(mixed, 1, x) - states(common, 1, x)).max() > 1e-4


def test_a_letter_may_have_a_temperature_of_its_own():
    config = run_config(model__pattern="GLN", model__num_layers=3, layers={"L": {"temperature": SSMAX}})
    model = build_model(config, jnp.uint32(0))
    found = [model.block(i).attention.temperature for i in range(3)]
    assert [own and own.form for own in found] == [None, "ssmax", None]
    changes = {"temperature__form": "llama4", "temperature__layers": "N"}
    none, off = {"encoding": {"name": "none"}}, {"temperature": SSMAX | {"form": "none"}}
    config = run_config(model__pattern="GLNX", model__num_layers=4, layers={"L": none, "X": none | off}, **changes)
    forms = [layer.temperature and layer.temperature.form for layer in config.model_layers]
    assert forms == [None, "llama4", "llama4", None]


def test_layers_with_parameters_of_their_own_have_them_each():
    model = transformer("fox", num_layers=4, pattern="GL", layers={"L": {"encoding": {"name": "fire"}}})
    assert model.modules == ("encoding_0", "encoding_L1", "encoding_2", "encoding_L3")
    shared = transformer("fox", num_layers=4, pattern="GL", layers={"L": {"encoding": {"name": "t5"}}})
    assert shared.modules == ("encoding_0", "encoding_L0", "encoding_2", "encoding_L0")


def constants_of(config):
    return initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))["constants"]


@pytest.mark.parametrize("rule", ["linear:factor=4", "yarn:factor=2"])
def test_scaling_rules_leave_the_layers_that_say_so(rule):
    rope = {"name": "rope", "base": 100.0}
    layers = {"A": {"encoding": rope}, "B": {"encoding": rope, "rope_scalings": False}, "C": {"rope_scalings": False}}
    config = run_config(model__pattern="ABCG", model__num_layers=4, layers=layers)
    constants = constants_of(config)
    found = extrapolation.scaled_constants(config, constants, rule)
    for module, base, scaled in (
        ("encoding_A0", 100.0, True),
        ("encoding_B0", 100.0, False),
        ("encoding_C0", 10000.0, False),
        ("encoding_0", 10000.0, True),
    ):
        expected, _ = frequencies.parse(rule if scaled else "none").frequencies(32, base, 64)
        np.testing.assert_allclose(found[module]["inverse_frequencies"], expected, rtol=1e-6)
    assert found.keys() == constants.keys()


@pytest.mark.parametrize(
    ("rule", "own", "written"),
    [
        ("yarn:factor=4", "yarn:temperature=0.3", "yarn:factor=4,temperature=0.3"),
        ("yarn:factor=2,temperature=0.4", "yarn:temperature=0.1,beta_fast=8", "yarn:factor=2,beta_fast=8"),
    ],
)
def test_a_rule_may_have_other_arguments_in_the_layers_of_a_letter(rule, own, written):
    """The model is that in which both encodings have their rule from training on."""
    evaluated = run_config(model__pattern="LG", layers={"L": {"rope_scalings": own}})
    letters = {"L": {"encoding": {"name": "rope", "scaling": written}}}
    trained = run_config(model__pattern="LG", layers=letters, encoding__scaling=rule)
    tokens = jnp.arange(24)[None] % 7

    def logits(config, rule):
        graphdef, params, constants = split(build_model(config, jnp.uint32(0)))
        constants = extrapolation.scaled_constants(config, constants, rule)
        return np.asarray(nnx.merge(graphdef, params, constants)(tokens))

    expected = logits(trained, "none")
    np.testing.assert_allclose(logits(evaluated, rule), expected, atol=1e-6)
    assert np.abs(logits(run_config(model__pattern="LG", layers={"L": {}}), rule) - expected).max() > 1e-3
    np.testing.assert_array_equal(logits(evaluated, "linear:factor=2"), logits(run_config(), "linear:factor=2"))


def test_a_method_may_have_other_arguments_in_the_layers_of_a_letter():
    config = run_config(model__pattern="LG", layers={"L": {"rope_scalings": "streaming:first=2"}})
    graphdef, params, constants = split(build_model(config, jnp.uint32(0)))
    graphdef, constants = extrapolation.structure_under(
        config, graphdef, params, constants, "streaming:first=3,window=9"
    )
    model = nnx.merge(graphdef, params, constants)
    found = [str(model.encoding(i).scaling) for i in range(2)]
    assert found == ["streaming:first=2,window=9", "streaming:first=3,window=9"]


def test_a_change_of_rules_keeps_the_names_of_parameters_and_the_base_of_windows():
    """A trained model can then be evaluated with it."""
    yarn = {"rope_scalings": "yarn:temperature=0.2"}
    config = run_config("decoupled_rope", model__pattern="LG", layers={"L": yarn})
    assert [layer.module for layer in config.model_layers] == ["encoding_0", "encoding_1"]
    changes = {"model__pattern": "EG", "model__window": 8, "encoding__window_base": 100.0}
    local, distant = run_config(**changes, layers={"E": {"rope_scalings": False}, "G": yarn}).model_layers
    assert (local.encoding.hyperparameters.base, local.rope_scalings) == (100.0, False)
    assert (distant.encoding.hyperparameters.base, distant.rope_scalings) == (10000.0, True)
    with pytest.raises(ConfigError, match=r"config.layers.E.rope_scalings = 'yarn.*must be True or False"):
        run_config(**changes, layers={"E": yarn})


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ({"N": {}}, r"config.layers.N = \{\}: must be named by one capital letter"),
        ({"LL": {}}, r"config.layers.LL = \{\}: must be named by one capital letter"),
        ({"L": {"windw": 3}}, r"config.layers.L.windw = 3: no such field.*Did you mean 'window'"),
        ({"L": {"window": -1}}, r"config.layers.L.window = -1: must be at least 0"),
        ({"L": {"window": None}}, r"config.layers.L.window = None: must be given"),
        ({"L": {"encoding": {"name": "rop"}}}, r"config.layers.L.encoding.name = 'rop'.*Did you mean 'rope'"),
        ({"L": {"encoding": {"name": "sinusoidal"}}}, r"config.layers.L.encoding.name = .*config.encoding.name"),
        ({"L": {"encoding": {"name": "rope", "scaling": "dynamic_ntk"}}}, r"config.layers.L.encoding.scaling = .*leng"),
        (
            {"L": {"encoding": {"name": "stick_breaking"}, "attention_sinks": True}},
            r"config.layers.L.attention_sinks = True: must be False for encoding 'stick_breaking'",
        ),
        (
            {"L": {"rope_scalings": "yarn"}},
            r"config.layers.L.rope_scalings = 'yarn': must be True, False, or a rule with",
        ),
        (
            {"L": {"rope_scalings": "ntk:temperature=1"}},
            r"config.layers.L.rope_scalings = .*ntk takes, each once: factor",
        ),
        (
            {"L": {"encoding": {"name": "alibi"}, "rope_scalings": "yarn:factor=2"}},
            r"config.layers.L.rope_scalings = .*must be True or False, .* encoding 'alibi'",
        ),
        ({"L": {"rope_scalings": "yarn:beta_slow=9"}}, r"config.layers.L.rope_scalings = .*must have 0 < beta_slow"),
        ({"L": {}, "X": {}}, r"config.layers.X = .*must be a letter of the first 2 layers .* 'LG'"),
        ({}, r"config.model.pattern = 'LG': .*config.layers.L is missing"),
        ({"L": {}, "G": {"encoding": {"name": "alibi"}}}, None),
        ({"L": {"encoding": {"name": "t5"}}, "G": {"encoding": {"name": "alibi"}}}, r"config.model.pattern = .*E or G"),
    ],
)
def test_wrong_sections_are_refused(layers, reason):
    def build():
        abstract_model(run_config(model__pattern="LG", layers=layers))

    if reason is None:
        build()
    else:
        with pytest.raises(ConfigError, match=reason):
            build()


def test_a_model_without_attention_or_causal_mask_refuses_what_it_does_not_have():
    with pytest.raises(ConfigError, match=r"config.layers.L.window = 4: must be 0"):
        run_config(model__causal=False, model__pattern="LG", layers={"L": {"window": 4}})
    config = run_config(model__causal=False, model__pattern="LG", layers={"L": {"encoding": {"name": "fox"}}})
    with pytest.raises(ConfigError, match=r"config.layers.L.encoding.name = 'fox'.*not causal"):
        abstract_model(config)
    settings = plain(config) | {"layers": 3}
    with pytest.raises(ConfigError, match=r"config.layers = 3: must be a section"):
        RunConfig.from_mapping(settings)


def test_records_and_fingerprints_without_sections_are_as_before():
    config = run_config()
    record = plain(config)
    assert record["layers"] == {}
    del record["layers"]
    assert RunConfig.from_mapping(record).fingerprint == config.fingerprint
    mixed = run_config(model__pattern="LG", layers={"L": {"window": 4}})
    assert mixed.fingerprint != run_config(model__pattern="EG", model__window=4).fingerprint
    assert RunConfig.from_mapping(plain(mixed)) == mixed


def test_flops_count_the_keys_of_each_layer():
    ends = [run_config(model__pattern=pattern, model__window=8) for pattern in ("E", "G")]
    mixed = run_config(model__pattern="LG", layers={"L": {"window": 8}})
    assert 2 * flops.per_token(mixed) == sum(map(flops.per_token, ends))


def recipe(form):
    return RunConfig.from_mapping(hybrid.get_config(f"form={form}").to_dict())


def is_global(kind):
    return kind == "full_attention"


RELEASED = {"gemma3": "Gemma3TextConfig", "gemma4": "Gemma4TextConfig", "olmo3": "Olmo3Config"}
RELEASED |= {"gpt_oss": "GptOssConfig"}


@pytest.mark.torch
@pytest.mark.parametrize("form", RELEASED)
def test_recipes_have_the_layers_of_the_released_code(form):
    """The layer types, bases and frequencies of the configurations in Hugging Face's transformers."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, RELEASED[form]):
        pytest.skip(f"this release of transformers has no {form}")
    config, released = recipe(form), getattr(transformers, RELEASED[form])()
    layers = config.model_layers
    types = released.layer_types[: len(layers)]
    assert [layer.window == 0 for layer in layers] == [is_global(kind) for kind in types]
    assert all(layer.attention_sinks == (form == "gpt_oss") for layer in layers)
    assert config.model.qk_norm == (form != "gpt_oss")
    assert [layer.rope_scalings for layer in layers] == [
        form == "gpt_oss" or (is_global(kind) and form != "gemma4") for kind in types
    ]
    for layer, kind in zip(layers, types, strict=True):
        found = released.rope_parameters.get(kind, released.rope_parameters)
        assert layer.encoding.hyperparameters.base == found["rope_theta"]
        if found["rope_type"] == "proportional":
            assert layer.encoding.name == "p_rope"
            assert layer.encoding.hyperparameters.fraction == found["partial_rotary_factor"]
        else:
            assert layer.encoding.name == "rope"


def test_swan_changes_nothing_within_its_training_length():
    config = recipe("swan")
    assert [(layer.window > 0, layer.temperature is not None) for layer in config.model_layers] == [
        *[(True, False)] * 3,
        (False, True),
    ]
    own = build_model(config, jnp.uint32(0)).block(3).attention.temperature
    q = jnp.ones((1, 512, 1, 2))
    factor = own(q, jnp.arange(512)[None], None)[0, :, 0, 0]
    np.testing.assert_array_equal(factor[:256], 1)
    np.testing.assert_allclose(factor[256:], np.log(np.arange(257, 513)) / np.log(256), rtol=1e-6)
