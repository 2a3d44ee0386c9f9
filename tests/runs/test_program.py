"""Which runs share a compiled program, and that the differences between them do not change the program."""

import logging
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.runs import program
from posenc_jax.runs.grid import RunSpec
from posenc_jax.runs.program import CARRIED, groups, program_key
from posenc_jax.runs.study import stacks_by_default
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import abstract_model, build_model, initial_state, make_train_step
from tests.encodings.test_contract import alternative, config_fields
from tests.runs.tiny_runs import ONE, stacked, tiny
from tests.small import run_config, split


def grouped(configs):
    """The indices of the runs of each program."""
    specs = [RunSpec(str(i), "", config) for i, config in enumerate(configs)]
    return [[int(spec.variant) for spec in group] for group in groups(specs)]


BASES = [tiny(seed=i, encoding__base=10.0**i) for i in range(1, 6)]
RULES = [
    "none",
    "linear:factor=4",
    "ntk:factor=4",
    "rebased:to=5e5",
    "dynamic_ntk:factor=4,read=64",
    "proportional:fraction=0.5,factor=4",
    "by_parts:factor=4,beta_fast=2,beta_slow=0.5",
    "yarn:factor=4,beta_fast=2,beta_slow=0.5",
    "resonance",
    "llama3:factor=4",
    "longrope:factors=1|1|1.5|2|2.5|3|3.5|4,factor=4",
]


@pytest.mark.parametrize(
    "configs", [BASES, [tiny(encoding__scaling=rule) for rule in RULES]], ids=["bases", "scaling_rules"]
)
def test_one_program_trains_and_one_scores_all_bases_or_scaling_rules(configs, tmp_path, caplog):
    assert {frequencies.parse(rule).rule for rule in RULES} == frequencies.RULES.keys()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        runs = stacked(configs, tmp_path)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation of" in r.getMessage()]
    assert len([message for message in compiled if "stacked_train_steps" in message]) == 1
    assert len({log[-2]["loss"] for _, log in runs}) == len(configs)
    scorer = Scorer(abstract_model(configs[0])[0], sharding.make_mesh(1, ONE), batch_tokens=64)
    windows = np.random.default_rng(1).integers(0, 256, (4, 17), dtype=np.int32)
    for state, _ in runs:
        scorer(state["params"], state["constants"], windows)
    assert scorer.compilations == 1


def test_initial_states_compile_nothing_for_another_seed_base_rate_or_decay(caplog):
    def begin(config):
        return initial_state(config, optimizers.build(config.optimizer, total_steps=1, warmup_steps=0))

    begin(tiny())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        begin(tiny(seed=5, encoding__base=7.0, encoding__scaling="yarn:factor=2", optimizer__learning_rate=0.5))
        begin(tiny(seed=6, optimizer__weight_decay=0.3))
    assert not [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]


@pytest.mark.parametrize("name", encodings.names())
def test_runs_of_every_encoding_may_differ_in_seed_rate_and_decay(name):
    other = tiny(name, name="other", seed=1, optimizer__learning_rate=0.1, optimizer__weight_decay=0.0)
    assert grouped([tiny(name), other]) == [[0, 1]]


def test_fifty_seeds_and_their_rates_keep_one_program_which_is_traced_once(monkeypatch):
    traced = []

    def counted(config):
        traced.append(config.label)
        return abstract_model(config)

    monkeypatch.setattr(program, "abstract_model", counted)
    own = {"training__duration": "11 steps"}  # used by no other test
    kept = [program_key(tiny(seed=seed, optimizer__learning_rate=1 / (seed + 1), **own)) for seed in range(50)]
    assert len({id(program) for program in kept}) == len(traced) == 1
    assert program_key(tiny(encoding__base=7.0, **own)) is kept[0]  # traced again, because its structure might differ
    assert program_key(tiny("alibi", **own)) != kept[0]


def test_groups_are_in_order_whatever_lies_between():
    configs = [tiny(), tiny("alibi"), tiny(seed=1), tiny("alibi", encoding__max_exponent=4.0), tiny("none"), tiny()]
    assert grouped(configs) == [[0, 2, 5], [1, 3], [4]]


def test_recurrent_models_share_a_program_by_their_cell():
    configs = [
        RunConfig.from_mapping(recurrent.get_config(f"size=smoke,cell={cell}").to_dict())
        for cell in ("lstm", "gru", "lstm")
    ]
    assert grouped(configs) == [[0, 2], [1]]


BAKED = {
    "data__path": "another",
    "encoding__fraction": 0.5,
    "encoding__pairing": "interleaved",
    "model__activation": "gelu",
    "model__dropout": 0.2,
    "model__dtype": "bfloat16",
    "model__num_kv_heads": 1,
    "model__pattern": "EN",
    "model__remat": True,
    "model__window": 8,
    "optimizer__b1": 0.8,
    "optimizer__b2": 0.9,
    "optimizer__grad_clip_norm": 2.0,
    "optimizer__weight_decay_mask": ".*",
    "optimizer__eps": 1e-6,
    "optimizer__name": "muon",
    "optimizer__schedule": "linear",
    "optimizer__end_lr_ratio": 0.5,
    "positions__per_layer": True,
    "positions__range": 1024,
    "positions__training": "randomized",
    "temperature__form": "ssmax",
    "training__grad_accum_steps": 2,
    "training__batch_size": 16,
    "training__drope": "1 step",
    "training__duration": "8 steps",
    "training__mask_ratio": 0.3,
    "training__length": 32,
    "training__log_every": "2 steps",
    "training__steps_per_dispatch": 4,
    "training__warmup": "3 steps",
}


@pytest.mark.parametrize("field", BAKED)
def test_runs_that_differ_in_what_a_program_is_made_from_are_kept_apart(field):
    assert grouped([tiny(), tiny(**{field: BAKED[field]}), tiny(seed=1)]) == [[0, 2], [1]]


def traced(function, *arguments):
    """The program of a function, with the arrays and numbers that are constants in it."""
    program = jax.make_jaxpr(function)(*arguments)
    return re.sub(r" at 0x\w+", "", str(program)), [np.asarray(x).tolist() for x in program.consts]


LLAMA4 = {"temperature__form": "llama4"}


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, {"name": "other"}),
        ({}, {"seed": 1}),
        ({}, {"encoding__base": 500.0}),
        ({}, {"encoding__scaling": "yarn:factor=4"}),
        (LLAMA4, {"temperature__scale": 0.2}),
        (LLAMA4, {"temperature__floor": 4}),
        ({}, {"optimizer__learning_rate": 0.5}),
        ({}, {"optimizer__weight_decay": 0.0}),
    ],
    ids=str,
)
def test_the_step_is_the_same_program_whatever_they_may_differ_in(settings, change):
    def step(config):
        optimizer = optimizers.build(config.optimizer, total_steps=7, warmup_steps=2)
        train_step = make_train_step(config, abstract_model(config)[0], optimizer, jnp.ones(256, jnp.int32))
        tokens = jax.ShapeDtypeStruct((8, 17), jnp.int32)
        return traced(train_step, jax.eval_shape(lambda: initial_state(config, optimizer)), tokens)

    configs = tiny(**settings), tiny(**settings | change)
    assert next(iter(change)).replace("__", ".").startswith(CARRIED)
    assert grouped(configs) == [[0, 1]]
    assert step(configs[0]) == step(configs[1])


@pytest.mark.parametrize(("name", "field"), config_fields(), ids=lambda value: getattr(value, "name", value))
def test_a_setting_of_an_encoding_is_in_the_arrays_or_keeps_runs_apart(name, field):
    other = field.metadata.get("alternative") or alternative(field.type, field.default)
    configs = tiny(name), tiny(name, **{f"encoding__{field.name}": other})
    if len(grouped(configs)) == 1:
        models = [split(build_model(config, jnp.zeros((), jnp.uint32))) for config in configs]
        tokens = jnp.zeros((2, 17), jnp.int32)

        def losses(graphdef):
            return lambda params, constants: token_losses(nnx.merge(graphdef, params, constants), tokens)

        first, second = (traced(losses(graphdef), params, constants) for graphdef, params, constants in models)
        assert first == second


@pytest.mark.parametrize(
    ("platform", "divided", "expected"),
    [
        ("tpu", {}, True),
        ("tpu", {"fsdp": 4}, False),
        ("tpu", {"fsdp": 4, "parallel_runs": 2}, True),
        ("cpu", {}, False),
        ("cpu", {"parallel_runs": 1}, True),
    ],
)
def test_members_have_a_part_of_the_devices_each_unless_models_are_divided(platform, divided, expected, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)] * 8)
    config = run_config(**{f"sharding__{axis}": parts for axis, parts in divided.items()})
    assert stacks_by_default(config) == expected
