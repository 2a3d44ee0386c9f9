"""Runs stacked in one program against the same runs trained separately by the loop on one device."""

import dataclasses
import json
import logging
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.data.tokenizers import ByteTokenizer
from posenc_jax.data.tokens import Dataset, Split
from posenc_jax.encodings import frequencies
from posenc_jax.evaluation.scoring import Scorer
from posenc_jax.runs import train
from posenc_jax.runs import members
from posenc_jax.distributed import sharding
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import Checkpoints
from posenc_jax.runs.members import CARRIED, Program, groups, program_of, train_members
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import abstract_model, build_model, initial_state, make_train_step
from tests.encodings.test_contract import alternative, config_fields
from tests.small import run_config, split

ONE = jax.devices()[:1]
ON_ONE = sharding.make_members_mesh(1, 8, ONE)


def tiny(encoding="rope", **changes):
    """A run with one layer and seven steps, in dispatches of at most three."""
    model = {"model__num_layers": 1, "model__d_model": 32, "model__d_ff": 32, "model__head_dim": 16}
    training = {"duration": "7 steps", "warmup": "2 steps", "batch_size": 8, "length": 16, "log_every": "1 step"}
    training |= {"validate_every": "7 steps", "checkpoint_every": "7 steps", "steps_per_dispatch": 3}
    evaluation = {"evaluation__lengths": (16,), "evaluation__tail": 8}
    return run_config(encoding, **model, **evaluation, **{f"training__{k}": v for k, v in training.items()} | changes)


def text(size=4000):
    tokens = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    train = Split("train", tokens, np.array([0, size // 3, size]), ("one", "two"), size)
    return Dataset("random", "0", ByteTokenizer(), {"train": train})


def alone(config, workdir):
    """Train a run by itself. Returns its final state and the lines of its log."""

    def validate(params, constants, dropped):
        return {"validation_loss": 0.0, "validation_bits_per_byte": 0.0}

    workdir.mkdir(exist_ok=True)
    mesh = sharding.make_mesh(config.training.batch_size, ONE)
    state = train.train(config, text(), mesh, workdir, validate, launched=time.monotonic())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return state, [line for line in lines if "loss" in line]


RUNS = [
    tiny(model__dropout=0.1),
    tiny(model__dropout=0.1, seed=3, encoding__base=500.0),
    tiny(model__dropout=0.1, seed=3, encoding__scaling="yarn:factor=4", optimizer__weight_decay=0.0),
    tiny(model__dropout=0.1, name="other", optimizer__learning_rate=0.03, optimizer__weight_decay=3.0),
]


@pytest.fixture(scope="module")
def runs_alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return [alone(config, folder / str(i)) for i, config in enumerate(RUNS)]


def assert_equal(member, of_run):
    state, lines = of_run
    jax.tree.map(np.testing.assert_array_equal, member.state, state)
    assert [line["step"] for line in lines] == list(range(1, len(member.metrics["loss"]) + 1))
    for name, values in member.metrics.items():
        if name != "finite":
            assert values.tolist() == [line[name] for line in lines]
    assert member.stopped_at is None


@pytest.mark.bits
def test_members_one_after_another_are_their_runs_bit_for_bit(runs_alone):
    members = train_members(RUNS, text(), devices=ONE)
    for member, of_run in zip(members, runs_alone, strict=True):
        assert_equal(member, of_run)
    first, *others = (jax.tree.leaves(member.state["params"]) for member in members)
    assert all(any((x != y).any() for x, y in zip(first, other, strict=True)) for other in others)


@pytest.mark.parametrize(("devices", "vectorized"), [(1, True), (2, True), (3, False), (8, False)])
def test_members_at_once_or_on_several_devices_are_their_runs_to_rounding(runs_alone, devices, vectorized):
    members = train_members(RUNS, text(), devices=jax.devices()[:devices], vectorized=vectorized)
    for member, (state, lines) in zip(members, runs_alone, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), member.state, state)
        np.testing.assert_allclose(member.metrics["loss"], [line["loss"] for line in lines], rtol=1e-5)


def test_states_are_on_the_devices_once():
    before = sum(x.nbytes for x in jax.live_arrays())
    for _, states, _ in Program(RUNS[0], text(), ON_ONE, vectorized=False).train(RUNS):
        of_states = sum(x.nbytes for x in jax.tree.leaves(states))
        batches = 2 * len(RUNS) * RUNS[0].training.steps_per_dispatch * 4 * 40 * 40
        assert sum(x.nbytes for x in jax.live_arrays()) - before < 1.5 * of_states + batches


@pytest.mark.parametrize(
    "divided",
    [
        {"members": 2},  # each over four devices that share its rows
        {"members": 2, "fsdp": 2, "tensor": 2},
        {"members": 1, "fsdp": 4},
        {"tensor": 2},
    ],
    ids=str,
)
def test_members_that_devices_share_are_their_runs_to_rounding(runs_alone, divided):
    def of(config):
        return dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, **divided))

    members = train_members([of(config) for config in RUNS], text(), vectorized="fsdp" not in divided)
    for member, (state, lines) in zip(members, runs_alone, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), member.state, state)
        np.testing.assert_allclose(member.metrics["loss"], [line["loss"] for line in lines], rtol=1e-5)


def test_parts_of_the_devices_hold_members_of_their_own():
    mesh = sharding.make_members_mesh(4, 8, members=2, fsdp=2)
    (states, batches, _), _ = Program(RUNS[0], text(), mesh, vectorized=True).compiled(4, False).input_shardings
    assert states["params"]["block_0"]["attention"]["q"]["kernel"].shard_shape((4, 32, 32)) == (2, 16, 32)
    assert batches.shard_shape((4, 3, 8, 17)) == (2, 3, 2, 17)


@pytest.mark.parametrize("vectorized", [False, True])
def test_devices_send_each_other_nothing(vectorized):
    mesh = sharding.make_members_mesh(8, 8)
    program = Program(RUNS[0], text(), mesh, vectorized).compiled(8, False).as_text()
    assert "while" in program
    assert not re.search("all-reduce|all-gather|all-to-all|reduce-scatter|collective", program)


def test_the_encoding_is_dropped_from_members_when_it_is_from_their_runs(tmp_path):
    config = tiny(training__drope="2 steps")
    (member,) = train_members([config], text(), devices=ONE)
    assert_equal(member, alone(config, tmp_path / "run"))


@pytest.mark.parametrize("vectorized", [pytest.param(False, marks=pytest.mark.bits), True])
def test_a_member_that_diverges_stops_and_is_told_while_the_others_go_on(runs_alone, tmp_path, vectorized):
    absurd = dataclasses.replace(RUNS[0], optimizer=dataclasses.replace(RUNS[0].optimizer, learning_rate=1e30))
    with pytest.raises(train.NonFiniteLoss) as stopped:
        alone(absurd, tmp_path / "run")
    stopped_at = int(re.search(r"at step (\d+);", str(stopped.value))[1])
    members = train_members([RUNS[0], absurd, RUNS[1]], text(), devices=ONE, vectorized=vectorized)
    assert [member.stopped_at for member in members] == [None, stopped_at, None]
    assert members[1].state["step"] == stopped_at - 1
    assert not members[1].metrics["finite"][stopped_at - 1 :].any()
    for member, (state, _) in zip((members[0], members[2]), runs_alone, strict=False):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4 * vectorized), member.state, state)


@pytest.mark.bits
def test_members_that_do_not_fit_are_trained_in_equal_parts(runs_alone):
    program = Program(RUNS[0], text(), ON_ONE, vectorized=False)
    usage = program.compiled(2, False).memory_analysis()
    memory = usage.argument_size_in_bytes + usage.temp_size_in_bytes + usage.output_size_in_bytes
    memory -= usage.alias_size_in_bytes
    assert program.size(4, 2 * memory) == 4
    assert program.size(4, memory) == 2
    assert program.size(4, memory - 1) == program.size(4, 1) == 1
    for member, of_run in zip(train_members(RUNS[:3], text(), devices=ONE, memory=memory), runs_alone, strict=False):
        assert_equal(member, of_run)


def test_members_that_the_compiler_refuses_are_trained_in_smaller_parts(monkeypatch):
    """The TPU compiler refuses a program that does not fit into memory. Any other error is raised."""
    mesh = sharding.make_members_mesh(24, 8, jax.devices()[:2])
    program, asked = Program(RUNS[0], text(), mesh, vectorized=True), []

    def refuse(size, dropped):
        asked.append(size)
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(program, "compiled", refuse)
    message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm."
    assert program.size(24, 2**60) == 2
    assert asked == [24, 12, 8, 6, 4]
    message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="else"):
        program.size(20, 2**60)


def test_a_member_can_be_saved_and_restored_as_its_run(tmp_path):
    (member,) = train_members(RUNS[1:2], text(), devices=ONE)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    checkpoints.save(7, member.state, {})
    checkpoints.wait()
    like = initial_state(RUNS[1], optimizers.build(RUNS[1].optimizer, total_steps=7, warmup_steps=2))
    restored, _ = checkpoints.restore(like)
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, member.state)


BASES = [tiny(seed=i, encoding__base=10.0**i) for i in range(1, 6)]
RULES = [
    "none",
    "linear:factor=4",
    "ntk:factor=4",
    "rebased:to=5e5",
    "dynamic_ntk:factor=4,read=64",
    "by_parts:factor=4,beta_fast=2,beta_slow=0.5",
    "yarn:factor=4,beta_fast=2,beta_slow=0.5",
    "llama3:factor=4",
    "longrope:factors=1|1|1.5|2|2.5|3|3.5|4,factor=4",
]


@pytest.mark.parametrize(
    "configs", [BASES, [tiny(encoding__scaling=rule) for rule in RULES]], ids=["bases", "scaling_rules"]
)
def test_one_program_trains_and_one_scores_all_bases_or_scaling_rules(configs, caplog):
    assert {frequencies.parse(rule).rule for rule in RULES} == frequencies.RULES.keys()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        members = train_members(configs, text(), devices=ONE)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation of" in r.getMessage()]
    assert len([message for message in compiled if "train_members_steps" in message]) == 1
    assert len({float(member.metrics["loss"][-1]) for member in members}) == len(configs)
    scorer = Scorer(abstract_model(configs[0])[0], sharding.make_mesh(1, ONE), batch_tokens=64)
    windows = np.random.default_rng(1).integers(0, 256, (4, 17), dtype=np.int32)
    for member in members:
        scorer(member.state["params"], member.state["constants"], windows)
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
def test_members_of_every_encoding_may_differ_in_seed_rate_and_decay(name):
    other = tiny(name, name="other", seed=1, optimizer__learning_rate=0.1, optimizer__weight_decay=0.0)
    assert groups([tiny(name), other]) == [[0, 1]]


def test_fifty_seeds_and_their_rates_keep_one_program_which_is_traced_once(monkeypatch):
    traced = []

    def counted(config):
        traced.append(config.label)
        return abstract_model(config)

    monkeypatch.setattr(members, "abstract_model", counted)
    own = {"training__duration": "11 steps"}  # used by no other test
    kept = [program_of(tiny(seed=seed, optimizer__learning_rate=1 / (seed + 1), **own)) for seed in range(50)]
    assert len({id(program) for program in kept}) == len(traced) == 1
    assert program_of(tiny(encoding__base=7.0, **own)) is kept[0]  # traced again, because its structure might differ
    assert program_of(tiny("alibi", **own)) != kept[0]


def test_groups_are_in_order_whatever_lies_between():
    configs = [tiny(), tiny("alibi"), tiny(seed=1), tiny("alibi", encoding__max_exponent=4.0), tiny("none"), tiny()]
    assert groups(configs) == [[0, 2, 5], [1, 3], [4]]


def test_recurrent_models_are_members_by_their_cell():
    configs = [
        RunConfig.from_mapping(recurrent.get_config(f"size=smoke,cell={cell}").to_dict())
        for cell in ("lstm", "gru", "lstm")
    ]
    assert groups(configs) == [[0, 2], [1]]


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
    assert groups([tiny(), tiny(**{field: BAKED[field]}), tiny(seed=1)]) == [[0, 2], [1]]


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
def test_the_step_of_members_is_the_same_program_whatever_they_may_differ_in(settings, change):
    def step(config):
        optimizer = optimizers.build(config.optimizer, total_steps=7, warmup_steps=2)
        train_step = make_train_step(config, abstract_model(config)[0], optimizer, jnp.ones(256, jnp.int32))
        tokens = jax.ShapeDtypeStruct((8, 17), jnp.int32)
        return traced(train_step, jax.eval_shape(lambda: initial_state(config, optimizer)), tokens)

    configs = tiny(**settings), tiny(**settings | change)
    assert next(iter(change)).replace("__", ".").startswith(CARRIED)
    assert groups(configs) == [[0, 1]]
    assert step(configs[0]) == step(configs[1])


@pytest.mark.parametrize(("name", "field"), config_fields(), ids=lambda value: getattr(value, "name", value))
def test_a_setting_of_an_encoding_is_in_the_arrays_or_keeps_runs_apart(name, field):
    other = field.metadata.get("alternative") or alternative(field.type, field.default)
    configs = tiny(name), tiny(name, **{f"encoding__{field.name}": other})
    if len(groups(configs)) == 1:
        models = [split(build_model(config, jnp.zeros((), jnp.uint32))) for config in configs]
        tokens = jnp.zeros((2, 17), jnp.int32)

        def losses(graphdef):
            return lambda params, constants: token_losses(nnx.merge(graphdef, params, constants), tokens)

        first, second = (traced(losses(graphdef), params, constants) for graphdef, params, constants in models)
        assert first == second
