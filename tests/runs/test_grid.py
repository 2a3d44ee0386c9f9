"""The runs of a study: one change from each axis, applied to the base recipe; and invalid studies."""

import jax
import numpy as np
import pytest

from configs import rope_extrap
from experiments import context_extension, encoding_table, length_extrapolation, rope_base, training_time
from posenc_jax import encodings
from posenc_jax.catalogue import EncodingInfo
from posenc_jax.encodings import default_config, frequencies
from posenc_jax.evaluation.extrapolation import scaled_constants
from posenc_jax.runs.grid import Study
from posenc_jax.schema import ConfigError, plain
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import initial_state


def study(baseline="", **sweep):
    base = rope_extrap.get_config("size=smoke,encoding=none").to_dict()
    settings = {"name": "tiny", "question": "Which?", "baseline": baseline, "base": base, "sweep": sweep}
    return Study.from_mapping(settings)


def test_runs_have_one_change_of_each_axis():
    found = study(encoding=("encoding=rope encoding.base=500.0", "encoding=alibi"), seed=("seed=0", "seed=7"))
    assert [(m.variant, m.config.seed) for m in found.runs] == [
        ("rope base=500", 0),
        ("alibi", 0),
        ("rope base=500", 7),
        ("alibi", 7),
    ]
    first = found.runs[0].config
    assert plain(first.encoding) == {"name": "rope", **default_config("rope"), "base": 500.0}
    assert (first.name, first.training.length) == ("tiny", 64)
    assert list(found.variants) == ["rope base=500", "alibi"]
    assert len({spec.name for spec in found.runs}) == 4
    assert all(spec.name.startswith("rope_base_500-seed") for spec in found.variants["rope base=500"])


def test_a_change_may_be_named_and_an_axis_may_have_groups():
    found = study(
        encoding={"by position": ("slope=4: encoding=alibi encoding.max_exponent=4",), "by content": ("encoding=fox",)},
        width=("model.head_dim=16 model.num_heads=4 model.num_kv_heads=4", "model.head_dim=32"),
    )
    assert [(m.variant, m.group) for m in found.runs] == [
        ("slope=4 head_dim=16 num_heads=4 num_kv_heads=4", "by position"),
        ("slope=4 head_dim=32", "by position"),
        ("fox head_dim=16 num_heads=4 num_kv_heads=4", "by content"),
        ("fox head_dim=32", "by content"),
    ]
    assert found.runs[0].config.encoding.hyperparameters.max_exponent == 4
    assert found.runs[0].config.model.head_dim == 16


def test_members_of_then_start_from_each_member():
    base = rope_extrap.get_config("size=smoke").to_dict()
    found = Study.from_mapping(
        {
            "name": "tiny",
            "question": "Which?",
            "baseline": "rope",
            "base": base,
            "sweep": {"encoding": ("encoding=rope",), "seed": ("seed=0", "seed=1")},
            "continuations": {
                "way": {
                    "after": (
                        "PI: encoding.scaling=linear:factor=4 training.length=256 training.duration='6 steps'",
                        "longer: training.length=256",
                        "longer: training.duration='6 steps'",
                    )
                }
            },
        }
    )
    rope, pi, wider, longer, rope_1, pi_1, *_ = found.runs
    assert (pi.variant, pi.group, pi.parent) == ("rope, then PI (256 tokens)", "after", rope)
    assert (pi_1.parent, pi_1.config.seed) == (rope_1, 1)
    assert pi.config.training.length == 256
    assert str(pi.config.training.duration.plain()) == "6 steps"
    assert pi.config.encoding.hyperparameters.scaling == "linear:factor=4"
    assert pi.name.endswith(f"-seed0-{pi.config.fingerprint}-{rope.config.fingerprint}")
    assert wider.variant == "rope, then longer (256 tokens)"
    assert longer.variant == "rope, then longer"
    assert [run.config.pretrained_length for run in (rope, pi, longer)] == [64, 64, 64]


def test_further_training_scales_frequencies_as_reading_does_before_it():
    before, *after = Study.from_mapping(context_extension.get_config().to_dict()).variants.values()
    config = before[0].config
    constants = initial_constants(config)
    checked = 0
    for child, *_ in after:
        assert (child.config.training.length, child.config.pretrained_length) == (512, 128)
        rule = child.config.encoding.hyperparameters.scaling
        if rule != "none":
            read = scaled_constants(config, constants, str(frequencies.parse(rule).at(512, 128)))
            trained = initial_constants(child.config)
            for name in ("inverse_frequencies", "attention_factor"):
                np.testing.assert_array_equal(trained["encoding_0"][name], read["encoding_0"][name])
            assert child.config.evaluation.rope_scalings == ("none",)
            checked += 1
    assert checked == 7


@pytest.mark.parametrize("name", ["hope", "fope", "fire"])
def test_further_training_on_longer_windows_keeps_the_constants_of_the_encoding(name):
    base = rope_extrap.get_config(f"size=smoke,encoding={name}").to_dict()
    settings = {"name": "tiny", "question": "", "baseline": "", "base": base, "sweep": {"seed": ("seed=0",)}}
    parent, child = Study.from_mapping(settings | {"continuations": {"way": ("longer: training.length=256",)}}).runs
    jax.tree.map(np.testing.assert_array_equal, initial_constants(parent.config), initial_constants(child.config))


def initial_constants(config):
    optimizer = optimizers.build(config.optimizer, total_steps=1, warmup_steps=0)
    return initial_state(config, optimizer)["constants"]


@pytest.mark.parametrize(
    ("sweep", "then", "reason"),
    [
        ("seed=0 training.pretrained_length=32", "seed=0", "must be 0 in a run that does not continue another one"),
        ("seed=0", "longer: training.pretrained_length=32", "must be that of the run it continues"),
        ("seed=0", "random: positions.training=randomized", "must be that of the run it continues"),
    ],
)
def test_a_pretrained_length_is_that_of_the_run_that_is_continued(sweep, then, reason):
    base = rope_extrap.get_config("size=smoke").to_dict()
    settings = {"name": "tiny", "question": "", "baseline": "", "base": base, "sweep": {"seed": (sweep,)}}
    with pytest.raises(ConfigError, match=reason):
        Study.from_mapping(settings | {"continuations": {"way": (then,)}})


@pytest.mark.parametrize("size", ["default", "smoke", "small"])
@pytest.mark.parametrize(
    ("study", "runs"),
    [
        (length_extrapolation, 16 * 3),
        (rope_base, (2 * 7 + 3) * 3),
        (context_extension, 3 + 12 * 3),
        (training_time, 6 * 2),
    ],
)
def test_the_studies_of_the_project_have_their_runs(study, runs, size):
    found = Study.from_mapping(study.get_config(f"size={size}").to_dict())
    assert len(found.runs) == runs
    assert len({len(specs) for specs in found.variants.values()}) == 1  # the same number of seeds
    longest = found.runs[0].config.evaluation.lengths[-1]
    assert longest == 16 * found.runs[0].config.training.length


def test_bases_can_be_compared_at_one_width_alone():
    found = Study.from_mapping(rope_base.get_config("heads=wide").to_dict())
    assert len(found.runs) == 7 * 3
    assert {spec.config.model.head_dim for spec in found.runs} == {64}


def test_a_tuple_is_one_value():
    (spec,) = study(encoding=("encoding=rope evaluation.rope_scalings=('none','ntk')",)).runs
    assert spec.config.evaluation.rope_scalings == ("none", "ntk")


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ({"encoding": ("encoding=alibbi",)}, "Did you mean 'alibi'"),
        (
            {"encoding": ("encoding.base=3.0",)},
            "config.base.encoding.base = 3.0: no such field; the fields here are: name",
        ),
        ({"width": ("model.head_dmi=3",)}, "Did you mean 'head_dim'"),
        ({"rate": ("optimizer.decayed=x",)}, "optimizer.decayed = 'x': this field is now named 'weight_decay_mask'"),
        ({"width": ("model.head_dim=wide",)}, "config.model.head_dim = 'wide': must be an integer"),
        ({"width": ("model.head_dim",)}, "config.sweep.width\\[0\\] = 'model.head_dim': must be fields and values"),
        ({"seed": 3}, "config.sweep.seed = 3: must be a tuple of changes"),
        ({"seed": ()}, "must be a tuple of changes"),
        ({"seed": (1,)}, "config.sweep.seed\\[0\\] = 1: must be fields and values"),
        ({"seed": ("seed=1", "seed=1")}, "must not make one run twice"),
        (
            {"rule": tuple(f"a: encoding=rope encoding.scaling=yarn:factor={factor}" for factor in ("4", "4.0"))},
            "must not make one run twice",
        ),
        ({"seed": ("seed=1 seed=2",)}, "config.sweep = 'seed': must be changed once"),
        ({"encoding": ("encoding=rope",), "other": ("encoding=alibi",)}, "'encoding': must be changed once"),
        ({"base": ("encoding.base=5e5",), "encoding": ("encoding=rope",)}, "'encoding.base': .*not before encoding is"),
        ({"encoding": ("encoding=rope'",)}, "a quotation mark is not closed"),
        ({"encoding": ("encoding={[]}",)}, "must be one of: none"),
        ({"encoding": ("one\rtwo: encoding=rope",)}, "characters that can be shown"),
        ({"encoding": {"one\ntwo": ("encoding=rope",)}}, "characters that can be shown"),
        ({"seed": ("seed=1 name='\t'",)}, "characters that can be shown"),
        ({"length": ("training.length=64", "training.length=128")}, "pretrained_length': must be the same in all"),
    ],
)
def test_what_makes_no_study_is_refused(sweep, reason):
    with pytest.raises(ConfigError, match=reason):
        study(**sweep)


def test_a_baseline_must_be_a_variant():
    with pytest.raises(ConfigError, match=r"config.baseline = 'ropee': must be one of: rope.* Did you mean 'rope'"):
        study("ropee", encoding=("encoding=rope",))


def test_the_table_of_costs_must_be_there():
    settings = {"name": "tiny", "question": "?", "baseline": "", "base": rope_extrap.get_config().to_dict()}
    with pytest.raises(ConfigError, match=r"config.costs = 'none.csv': must be a table of `python -m benchmarks"):
        Study.from_mapping(settings | {"sweep": {"seed": ("seed=0",)}, "costs": "none.csv"})


def test_a_study_needs_all_its_settings():
    with pytest.raises(ConfigError, match=r"config.then = .*this field is now named 'continuations'"):
        Study.from_mapping({"name": "tiny", "question": "?", "baseline": "", "base": {}, "sweep": {}, "then": {}})
    with pytest.raises(ConfigError, match=r"config.name = None: is missing; also missing: config.base, config.sweep\."):
        Study.from_mapping({"question": "?"})


@pytest.mark.parametrize(("given", "baseline"), [({}, "low"), ({"baseline": "high"}, "high"), ({"baseline": ""}, "")])
def test_a_study_needs_neither_question_nor_baseline(given, baseline):
    base, sweep = rope_extrap.get_config().to_dict(), {"base": ("low: encoding.base=1e3", "high: encoding.base=1e6")}
    found = Study.from_mapping({"name": "tiny", "base": base, "sweep": sweep} | given)
    assert (found.question, found.baseline) == ("", baseline)


def test_the_table_of_encodings_has_each_under_what_the_code_says_it_does():
    def family(name):
        facts = EncodingInfo.of(name)
        if facts.acts_on in ("nothing", "embeddings"):
            return "none, or added to embeddings"
        if facts.acts_on == "queries and keys":
            return "queries and keys"
        return "logits, by content" if facts.data_dependent or facts.acts_on == "weights" else "logits, by position"

    found = Study.from_mapping(encoding_table.get_config("size=smoke").to_dict())
    assert {spec.variant: spec.group for spec in found.runs} == {name: family(name) for name in encodings.names()}
    assert found.costs.endswith("encodings.csv")
