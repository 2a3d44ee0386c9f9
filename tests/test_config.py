"""Settings are converted strictly: errors name the wrong setting and what is allowed."""

import dataclasses
import json
import typing

import pytest
from ml_collections import ConfigDict

from configs import base, rope_extrap
from posenc_jax import encodings
from posenc_jax.config import EncodingConfig, ModelConfig, RunConfig, TransformerConfig
from posenc_jax.schema import RENAMED, ConfigError, Duration, Range, changes, convert, plain
from tests.small import run_config


@pytest.mark.parametrize("size", ["default", "smoke", "small", "base"])
@pytest.mark.parametrize("encoding", encodings.names())
def test_every_size_and_encoding_of_the_main_recipe_is_accepted(size, encoding):
    config = RunConfig.from_mapping(rope_extrap.get_config(f"size={size},encoding={encoding}").to_dict())
    assert config.encoding.name == encoding
    assert RunConfig.from_mapping(json.loads(json.dumps(plain(config)))) == config


def test_base_holds_every_field_and_no_other():
    def fields(cls, prefix=""):
        for name, hint in typing.get_type_hints(cls).items():
            hint = TransformerConfig if hint is ModelConfig else hint  # the others have no more fields
            nested = dataclasses.is_dataclass(hint) and (name == "model" or not hasattr(hint, "parse"))
            yield from fields(hint, f"{prefix}{name}.") if nested else [prefix + name]

    def keys(config, prefix=""):
        for name, value in config.items():
            nested = isinstance(value, ConfigDict) and name != "encoding"
            yield from keys(value, f"{prefix}{name}.") if nested else [prefix + name]

    assert sorted([*keys(base.get_config()), "layers", "task"]) == sorted(fields(RunConfig))
    assert base.get_config().layers == ConfigDict()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seed": -1}, r"config.seed = -1: must be at least 0"),
        ({"model__num_layers": 0}, "must be at least 1"),
        ({"model__num_kv_heads": 3}, "must divide num_heads"),
        ({"model__dropout": 1.0}, "below 1"),
        ({"model__activation": "swigloo"}, "Did you mean 'swiglu'"),
        ({"training__length": 1}, "at least 2"),
        ({"training__duration": "many steps"}, "700 steps"),
        ({"training__duration": "1e999 steps"}, "700 steps"),
        ({"training__duration": "0 steps"}, "above 0"),
        ({"training__duration": "1.2.3 steps"}, "700 steps"),
        ({"data__test_fraction": 1.0}, "must be below 0.5, or 1 for training.duration = '0 steps'"),
        ({"data__corpus": None}, "config.data.corpus = None: must be given, or come from a model in config.init_from"),
        ({"init_from": "smollm2"}, "config.init_sha256 = '': must be the sha256 of its weights for init_from = 'smol"),
        ({"training__duration": "1e16 steps"}, r"of at most 1e\+15"),
        ({"training__batch_size": 2**31}, r"below 2\^31"),
        ({"data__path": "a\0b"}, "without NUL"),
        ({"data__path": "\udcff"}, "UTF-8"),
        ({"training__grad_accum_steps": 3}, "must divide batch_size"),
        ({"sharding__fsdp": 0}, "at least 1"),
        ({"sharding__fsdp": 3}, "sharding.fsdp = 3: must divide config.model.d_model = 64"),
        ({"sharding__tensor": 4}, "sharding.tensor = 4: must divide config.model.num_heads = 2"),
        ({"sharding__tensor": 2, "model__num_kv_heads": 1}, "must divide config.model.num_kv_heads = 1"),
        ({"sharding__tensor": 2, "model__d_ff": 127}, "must divide config.model.d_ff = 127"),
        ({"optimizer__learning_rate": float("nan")}, "finite"),
        ({"optimizer__weight_decay_mask": "("}, "regular expression"),
        ({"optimizer__name": "adamv"}, "must be one of: adamw, lion, muon, adafactor. Did you mean 'adamw'"),
        ({"optimizer__schedule": "wds"}, "must be one of: cosine, linear, wsd, constant. Did you mean 'wsd'"),
        ({"optimizer__name": "lion", "optimizer__eps": 1e-6}, "must be 1e-08 for lion, which does not use it"),
        ({"optimizer__schedule": "constant", "optimizer__end_lr_ratio": 0.5}, "must be 0.1 for constant"),
        ({"optimizer__schedule": "wsd"}, "config.training.decay = '0 steps': must be above 0 for schedule 'wsd'"),
        ({"training__decay": "5 steps"}, "config.training.decay = '5 steps': must be .* '0 steps' for all others"),
        ({"logging__wandb": "a/b"}, "config.logging.wandb = 'a/b': must be the name of a project: letters"),
        ({"logging__sample_tokens": 0}, "config.logging.sample_tokens = 0: must be at least 1"),
        ({"logging__sample_prompt": "a", "model__causal": False}, "config.logging.sample_prompt = 'a': must be ''"),
        ({"evaluation__lengths": ()}, "increasing"),
        ({"evaluation__lengths": (64, 32)}, "increasing"),
        ({"evaluation__tail": 33}, "at most 64, the training length, and the shortest"),
        ({"evaluation__rope_scalings": ("ntk",)}, 'hold "none"'),
        ({"evaluation__rope_scalings": ("none", "none")}, "distinct"),
        ({"evaluation__rope_scalings": ("none", "ntk:factor=4", "ntk:factor=4.0")}, "distinct"),
        (
            {"evaluation__rope_scalings": ("none", "yarn:paper_ramp=0.5")},
            r"scalings\[1\] = .*paper_ramp must be 0 or 1",
        ),
        (
            {"evaluation__rope_scalings": ("none", "yarn:original_length=64.5")},
            "original_length must be an integer",
        ),
        (
            {"evaluation__rope_scalings": ("none", "ntk:factor=1e300")},
            r"scalings\[1\] = .*must give finite frequencies",
        ),
        ({"encoding__scaling": "ntk:factor=1e300"}, "config.encoding.scaling = .*must give finite frequencies"),
        ({"encoding__scaling": "yarm"}, "config.encoding.scaling = 'yarm': .*Did you mean 'yarn'"),
        ({"evaluation__rope_scalings": ("none", "yarm")}, "Did you mean 'yarn'"),
        ({"evaluation__rope_scalings": ("none", "longrope:factors=1|2")}, r"scalings\[1\] = .*one per pair, not 2"),
        ({"data__vocab_size": 300}, "256 for the bytes tokenizer"),
        ({"name": "../up"}, "names a folder"),
        ({"name": "a" * 101}, "at most 100"),
        ({"encoding__base": 1.0}, "above 1"),
        ({"encoding__base": 1e39}, r"must be a finite number, and at most 3.4e\+38"),
        ({"seed": 2**31 - 1, "data__vocab_size": 2**31 - 1}, "vocab_size = 2147483647: must be .* at most 1048576"),
        ({"evaluation__resamples": 2_000_000_000}, "must be at most 625000 for evaluation.windows = 16"),
        ({"positions__range": 2**31 - 1}, "must be .* at most 16777216, up to which float32 counts positions"),
        ({"model__d_model": 2**30}, "must be at least 1 and at most 1048576"),
    ],
)
def test_a_wrong_value_is_refused(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        run_config(**changes)


@pytest.mark.parametrize("name", ["alibi", "p_rope", "learned_rope", "selective_rope"])
def test_scaling_rules_are_refused_where_nothing_can_be_scaled(name):
    with pytest.raises(ConfigError, match="no frequencies to scale"):
        run_config(name, evaluation__rope_scalings=("none", "ntk"))


def test_fields_of_another_encoding_are_refused():
    with pytest.raises(ConfigError, match=r"config.encoding.base = .*fields are: max_exponent.*encoding=NAME"):
        run_config(encoding__name="alibi")


def test_a_name_that_is_no_string_is_refused():
    with pytest.raises(ConfigError, match=r"config.encoding.name = \['rope'\]: must be one of: none, sinusoidal"):
        EncodingConfig.parse({"name": ["rope"]}, "config.encoding")


@dataclasses.dataclass(frozen=True)
class Sample:
    count: int
    share: typing.Annotated[float, Range(at_least=0, at_most=1)]
    on: bool
    sizes: tuple[int, ...]
    kind: typing.Literal["a", "b"] = "a"


GOOD = {"count": 1, "share": 0.5, "on": True, "sizes": (1, 2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": True}, "config.count = True: must be an integer, not True or False"),
        ({"count": 1.0}, "must be an integer"),
        ({"count": "1"}, "must be an integer"),
        ({"count": None}, "must be an integer"),
        ({"share": False}, "must be a number"),
        ({"share": 1.5}, "at least 0 and at most 1"),
        ({"share": float("inf")}, "finite"),
        ({"share": 10**400}, "finite"),
        ({1: 2}, "config.1 = 2: no such field"),
        ({"on": 1}, "must be True or False"),
        ({"sizes": (1, 2.5)}, r"config.sizes\[1\] = 2.5"),
        ({"sizes": 3}, "must be a tuple"),
        ({"sizes": {32: 64}}, "must be a tuple"),
        ({"sizes": {32, 64}}, "must be a tuple"),
        ({"sizes": b"ab"}, "must be a tuple"),
        ({"kind": "c"}, "must be one of: a, b"),
        ({"cuont": 3}, "Did you mean 'count'"),
    ],
)
def test_conversion_casts_nothing(change, reason):
    with pytest.raises(ConfigError, match=reason):
        convert(Sample, GOOD | change)


def test_conversion_takes_whole_numbers_for_floats_and_lists_for_tuples():
    sample = convert(Sample, GOOD | {"share": 1, "sizes": [3]})
    assert type(sample.share) is float
    assert sample.sizes == (3,)


@pytest.mark.parametrize("name", sorted(set(RENAMED) - {"then"}))
def test_a_setting_of_an_earlier_release_is_refused_by_its_new_name(name):
    settings = plain(run_config())
    (section,) = (own for own in settings.values() if isinstance(own, dict) and RENAMED[name] in own)
    section[name] = section.pop(RENAMED[name])
    with pytest.raises(ConfigError, match=f"{name} = .*this field is now named '{RENAMED[name]}'"):
        RunConfig.from_mapping(settings)


def test_the_defaults_of_a_model_built_by_hand_are_those_of_the_recipes():
    assert plain(TransformerConfig()) == base.get_config().model.to_dict()


@pytest.mark.parametrize("name", sorted(TransformerConfig.__dataclass_fields__.keys() - {"architecture"}))
def test_a_run_must_give_every_setting_of_its_model(name):
    settings = plain(run_config())
    del settings["model"][name]
    with pytest.raises(ConfigError, match=f"config.model.{name} = None: is missing"):
        RunConfig.from_mapping(settings)


def test_an_error_shows_the_beginning_of_a_long_value():
    told = str(ConfigError("config.field", {"number": list(range(1000))}, "must be a number"))
    assert told.startswith("config.field = {'number': [0, 1, 2")
    assert told.endswith("...: must be a number.")
    assert len(told) < 500


def test_a_missing_field_is_refused():
    with pytest.raises(ConfigError, match=r"config.count = None: is missing"):
        convert(Sample, {name: value for name, value in GOOD.items() if name != "count"})


@pytest.mark.parametrize(
    ("text", "steps"),
    [("7 steps", 7), ("1 step", 1), ("1000 tokens", 10), ("1001 tokens", 11), ("2.5 epochs", 25), ("1e-5 epochs", 1)],
)
def test_durations_are_whole_steps_rounded_up(text, steps):
    duration = Duration.parse(text, "d")
    assert duration.steps(tokens_per_step=100, tokens_per_epoch=1000) == steps
    assert Duration.parse(duration.plain(), "d") == duration


def test_changes_are_the_settings_that_differ():
    old, new = plain(run_config()), plain(run_config(training__duration="99 steps", seed=3))
    assert changes(old, new) == {"seed": [0, 3], "training.duration": ["60 steps", "99 steps"]}
    assert changes({"a": {"b": 1}}, {"c": 2}) == {"a.b": [1, None], "c": [None, 2]}


def test_the_fingerprint_differs_with_what_is_trained_or_measured():
    changes = ({}, {"seed": 1}, {"encoding__base": 5e5}, {"training__duration": "7 steps"}, {"evaluation__tail": 3})
    assert len({run_config(**change).fingerprint for change in changes}) == 5
    free = ({}, {"training__log_every": "7 steps"}, {"sharding__fsdp": 2}, {"training__steps_per_dispatch": 2})
    assert len({run_config(**change).fingerprint for change in free}) == 1
    sources = [{"init_from": name, "init_sha256": sha * 64} for name, sha in (("here", "a"), ("there", "a"), ("", ""))]
    assert [run_config(**source).fingerprint == run_config(**sources[0]).fingerprint for source in sources] == [
        True,
        True,
        False,
    ]


def test_settings_that_were_added_later_leave_the_fingerprints_of_earlier_runs_as_they_were():
    assert run_config("none").fingerprint == "8e1653f66467"


@pytest.mark.parametrize(
    ("one", "other"), [("yarn:factor=4", "yarn:beta_slow=1,factor=4.0"), ("rebased:to=10", "rebased:to=1e1")]
)
def test_a_scaling_written_otherwise_is_the_same_run(one, other):
    trained = [run_config(encoding__scaling=text) for text in (one, other)]
    read = [run_config(evaluation__rope_scalings=("none", text)) for text in (one, other)]
    for first, second in (trained, read):
        assert first == second
        assert first.fingerprint == second.fingerprint
    assert read[0].evaluation.rope_scalings == ("none", one)


def test_a_wrong_value_is_told_before_a_missing_one():
    with pytest.raises(ConfigError, match=r"config\.model\.d_model = 'x'"):
        ModelConfig.parse({"architecture": "lstm", "d_model": "x"}, "config.model")
