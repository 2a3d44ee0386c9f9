"""Models sharded over several CPU devices: the same results, and each device holds only its part."""

import functools
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import bert
from posenc_jax.config import RunConfig
from posenc_jax.distributed import sharding
from posenc_jax.models import cross_entropy
from posenc_jax.schema import ConfigError
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step
from tests import compile_flags
from tests.small import run_config
from tests.test_launch import ROOT

PROGRAM = """
import os
import jax
from posenc_jax.distributed.sharding import divide_cpu
os.cpu_count = lambda: {cores}
divide_cpu({parts}, {rows})
print(len(jax.devices()))
"""


@pytest.mark.parametrize(
    ("cores", "parts", "rows", "environment", "expected"),
    [
        (4, 2, 16, {}, 2),
        (1, 2, 16, {}, 1),
        (4, 3, 16, {}, 2),
        (4, 2, 5, {}, 1),
        (4, 2, 16, {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}, 4),
        (4, 2, 16, {"JAX_NUM_CPU_DEVICES": "1"}, 1),
    ],
)
def test_the_cpu_is_divided_as_far_as_cores_and_rows_allow(cores, parts, rows, environment, expected):
    program = PROGRAM.format(cores=cores, parts=parts, rows=rows)
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert int(ran.stdout) == expected


ROWS, LENGTH = 8, 192


def model(encoding="rope", **changes):
    """A config that is long enough for blockwise attention, with two query heads for each key head."""
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "num_layers": 1}
    sizes = {f"model__{name}": value for name, value in heads.items()}
    return run_config(encoding, **{"training__length": LENGTH} | sizes | changes)


def batch(seed, mesh):
    tokens = np.random.default_rng(seed).integers(0, 256, (ROWS, LENGTH + 1), dtype=np.int32)
    return sharding.shard_rows(tokens, mesh)


def new_state(config, mesh=None):
    return initial_state(config, optimizers.build(config.optimizer, total_steps=10, warmup_steps=2), mesh)


def compiled(config, mesh):
    """The step, compiled for the devices of the mesh."""
    return _compiled(config, mesh, cross_entropy.LOGITS_BYTES, cross_entropy.MIN_PART)


@functools.cache
def _compiled(config, mesh, *_):
    optimizer = optimizers.build(config.optimizer, total_steps=10, warmup_steps=2)
    step = make_train_step(config, abstract_model(config)[0], optimizer, jnp.ones(256, jnp.int32))
    state = new_state(config, mesh)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(sharding.placement(state, mesh), None))
        return jitted.lower(state, batch(0, mesh)).compile()


@functools.cache
def trained(config, devices=8, **axes):
    """The gradient after one step, from Adam's moments, and the metrics of two steps, as NumPy arrays."""
    mesh = sharding.make_mesh(ROWS, jax.devices()[:devices], **axes)
    state, step = new_state(config, mesh), compiled(config, mesh)
    places = jax.tree.map(lambda x: x.sharding, state)
    metrics = []
    with jax.set_mesh(mesh):
        for seed in range(2):
            state, values = step(state, batch(seed, mesh))
            assert jax.tree.map(lambda x: x.sharding, state) == places  # so that the program can be reused
            metrics.append(jax.device_get(values))
            if seed == 0:
                gradient = jax.device_get(state["optimizer"][1].inner_state[0].mu)
    return gradient, metrics


def assert_near(one, other):
    def near(x, y):
        np.testing.assert_allclose(x, y, atol=2e-4 * np.abs(x).max())

    jax.tree.map(near, one[0], other[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), one[1], other[1])


DIVIDED = {"fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("encoding", "axes"),
    [
        ("rope", {}),
        ("rope", DIVIDED),
        ("rope", {"fsdp": 8}),
        pytest.param("rope", {"tensor": 2}, marks=pytest.mark.slow),
        ("t5", DIVIDED),
        ("fire", DIVIDED),
        ("fox", DIVIDED),
        ("cope", DIVIDED),
    ],
    ids=str,
)
def test_a_divided_model_is_trained_as_on_one_device(encoding, axes):
    assert_near(trained(model(encoding), devices=1), trained(model(encoding), **axes))


def collectives(config, devices=8, **axes):
    """The kind and dimensions of each array that the devices exchange in a step."""
    mesh = sharding.make_mesh(ROWS, jax.devices()[:devices], **axes)
    program = compiled(config, mesh).as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", program):
        yield from (
            (kind, tuple(map(int, filter(None, dims.split(","))))) for dims in re.findall(r"\[([\d,]*)\]", result)
        )


def test_with_fsdp_kernels_travel_and_tokens_stay():
    exchanged = list(collectives(model(), fsdp=8))
    assert ("all-gather", (64, 64)) in exchanged
    assert not [dims for _, dims in exchanged if any(size % LENGTH == 0 for size in dims)]


@pytest.mark.parametrize("name", ["t5", pytest.param("fire", marks=pytest.mark.slow), "cope"])
def test_a_learned_bias_adds_up_its_gradient_once_and_not_in_every_block(name):
    config = model(name)
    shapes = {x.shape for x in jax.tree.leaves(new_state(config)["params"])}
    assert {dims for _, dims in collectives(config)} <= shapes | {()}


@pytest.fixture(params=[False, True], ids=["whole", "in parts"])
def vocabulary(request, monkeypatch):
    """Compute the logits all at once, or by parts of the vocabulary."""
    if request.param:
        monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1)
        monkeypatch.setattr(cross_entropy, "MIN_PART", 32)


@pytest.mark.usefixtures("vocabulary")
def test_with_tensor_kernels_stay_and_tokens_are_summed():
    exchanged = list(collectives(model(model__num_kv_heads=4), devices=4, tensor=4))
    assert ("all-reduce", (ROWS * LENGTH, 64)) in exchanged
    assert {kind for kind, _ in exchanged} == {"all-reduce"}
    assert all(dims == () or {LENGTH, ROWS * LENGTH} & set(dims) for _, dims in exchanged)


@pytest.mark.parametrize("axes", [DIVIDED, pytest.param({"tensor": 8}, marks=pytest.mark.slow)], ids=str)
def test_a_divided_vocabulary_in_parts_is_trained_as_a_whole_one(axes, monkeypatch):
    whole = trained(model(), devices=1)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", 1)
    monkeypatch.setattr(cross_entropy, "MIN_PART", 24)
    assert_near(whole, trained.__wrapped__(model(), **axes))


@pytest.mark.parametrize("name", ["learned", "transformer_xl", "wall", "grape_ap"])
def test_large_kernels_of_encodings_are_divided_too(name):
    params = new_state(model(name), sharding.make_mesh(ROWS, fsdp=8))["params"]["encoding_0"]
    largest = max(jax.tree.leaves(params), key=lambda x: x.size)
    assert largest.addressable_shards[0].data.size == largest.size / 8


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards if shard.device == device
    )


@pytest.mark.parametrize("axes", [{"fsdp": 8}, pytest.param({"fsdp": 4, "tensor": 2}, marks=pytest.mark.slow), DIVIDED])
def test_each_device_keeps_its_part_of_parameters_and_moments(axes):
    config, parts = model(), math.prod(axes.values())
    mesh = sharding.make_mesh(ROWS, **axes)
    with jax.set_mesh(mesh):
        after, _ = compiled(config, mesh)(new_state(config, mesh), batch(0, mesh))
    for kept in (new_state(config, mesh), after):
        whole = sum(x.nbytes for x in jax.tree.leaves(kept))
        for device in mesh.devices.flat:
            assert whole / parts <= bytes_on(device, kept) < 1.1 * whole / parts


def test_a_divided_state_starts_with_the_numbers_of_a_whole_one():
    config = model(model__use_bias=True, model__tied_embeddings=False)
    divided = new_state(config, sharding.make_mesh(ROWS, **DIVIDED))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), new_state(config), divided)


def test_a_vocabulary_that_cannot_be_divided_stays_whole_and_its_width_is_divided():
    encoder = RunConfig.from_mapping(bert.get_config("size=smoke,tokens=bytes,positions=rope").to_dict())
    params = new_state(encoder, sharding.make_mesh(ROWS, **DIVIDED))["params"]
    assert params["embedding"].shape == (257, 64)  # one more token, the mask
    assert params["embedding"].addressable_shards[0].data.shape == (257, 32)


@pytest.mark.parametrize(
    ("axes", "field"),
    [({"tensor": 3}, "sharding.tensor"), ({"fsdp": 3}, "sharding.fsdp"), ({"tensor": 4, "fsdp": 4}, "sharding.fsdp")],
)
def test_devices_that_cannot_be_divided_so_are_refused(axes, field):
    with pytest.raises(ConfigError, match=field):
        sharding.make_mesh(ROWS, **axes)


@pytest.mark.parametrize(
    ("count", "options", "shape"),  # on eight devices
    [
        (24, {}, (8, 1, 1, 1)),
        (4, {}, (4, 2, 1, 1)),
        (10, {}, (5, 1, 1, 1)),  # eight parts would also need two rounds
        (3, {}, (3, 2, 1, 1)),
        (3, {"shares_rows": False}, (3, 1, 1, 1)),
        (2, {"rows": 9}, (2, 3, 1, 1)),  # one device of each part is unused
        (2, {"parallel_runs": 4}, (2, 4, 1, 1)),
        (24, {"parallel_runs": 3, "rows": 1}, (3, 1, 1, 1)),
        (24, {"fsdp": 2, "tensor": 2}, (2, 1, 2, 2)),
        (24, {"parallel_runs": 1, "fsdp": 2, "tensor": 2}, (1, 2, 2, 2)),
    ],
)
def test_parts_of_the_devices_have_runs_of_their_own(count, options, shape):
    mesh = sharding.make_stack_mesh(count, **{"rows": 8} | options)
    assert mesh.axis_names == ("runs", "data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == mesh.size


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"parallel_runs": 9},
            "config.sharding.parallel_runs = 9: must be at most 8: there are 8 devices, of which a model needs 1",
        ),
        (
            {"parallel_runs": 3, "tensor": 4},
            "config.sharding.parallel_runs = 3: must be at most 2: there are 8 devices, of which a model needs 4",
        ),
        ({"fsdp": 16}, "config.sharding.fsdp = 16"),
        ({"rows": 3, "fsdp": 2}, "config.training.batch_size / grad_accum_steps = 3"),
    ],
)
def test_parts_that_there_are_no_devices_for_are_refused(options, reason):
    with pytest.raises(ConfigError, match=reason):
        sharding.make_stack_mesh(24, **{"rows": 8} | options)


def test_rows_are_shared_by_data_and_fsdp_and_not_by_tensor():
    assert dict(sharding.make_mesh(4, fsdp=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="batch_size"):
        sharding.make_mesh(2, fsdp=2, tensor=2)


SEEDED = """
import hashlib
import jax
from jax.sharding import PartitionSpec
from posenc_jax.distributed import sharding
from posenc_jax.training import optimizer
from posenc_jax.training.step import initial_state
from tests.small import run_config

config, mesh = run_config(seed=7), sharding.make_mesh(8)
state = initial_state(config, optimizer.build(config.optimizer, total_steps=10, warmup_steps=2), mesh)
rows = jax.sharding.NamedSharding(mesh, PartitionSpec(sharding.row_axes(mesh)))
drawn = jax.jit(lambda: jax.random.bits(jax.random.fold_in(jax.random.key(7), 3), (8, 100)), out_shardings=rows)()
assert len(drawn.sharding.device_set) == len(jax.devices()) == {devices}
arrays = jax.tree.leaves(jax.device_get((state["params"], drawn)))
print(hashlib.sha256(b"".join(x.tobytes() for x in arrays)).hexdigest())
"""


def test_a_seed_means_the_same_bits_in_every_process_and_on_any_number_of_devices():
    """This holds for initial weights, and for random numbers that devices draw for their rows, e.g. for dropout."""

    def digest(devices):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": compile_flags.chosen(),
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        environment["PYTHONHASHSEED"] = str(devices)
        command = [sys.executable, "-c", SEEDED.format(devices=devices)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    assert digest(1) == digest(8)


def test_rows_of_a_process_become_the_global_array():
    """Here one process has all rows. tests/distributed/test_hosts.py tests several processes."""
    mesh, rows = sharding.make_mesh(ROWS, fsdp=2, tensor=2), np.arange(3 * ROWS * 5).reshape(3, ROWS, 5)
    assert sharding.own_rows(ROWS, mesh).tolist() == list(range(ROWS))
    own, whole = sharding.shard_rows(rows, mesh, axis=1, count=ROWS), sharding.shard_rows(rows, mesh, axis=1)
    assert own.sharding == whole.sharding
    assert {shard.data.shape for shard in own.addressable_shards} == {(3, ROWS // 4, 5)}
    np.testing.assert_array_equal(own, rows)
    np.testing.assert_array_equal(sharding.fetch(whole), rows)
