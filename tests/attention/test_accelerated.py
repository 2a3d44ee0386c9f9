"""Kernels are chosen by the device, the encoding and the arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh

from posenc_jax import encodings
from posenc_jax.attention import Attention, dispatch
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import accelerated
from posenc_jax.attention.fused import fused
from posenc_jax.attention.pallas import kernel as kernels
from posenc_jax.attention.pallas import tpu_kernel as tpu_kernels
from posenc_jax.attention.pallas.kernel import kernel
from posenc_jax.attention.pallas.tpu_kernel import tpu_kernel
from posenc_jax.attention.target import Target
from posenc_jax.distributed import sharding
from posenc_jax.encodings.base import AttentionInputs, AttentionMask, Dims
from tests.small import run_config

DIMS = Dims(d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
AMPERE, TPU = Target("gpu", "8.0"), Target("tpu")


def choice(name, device, dtype=jnp.bfloat16, length=64):
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    q, k = (jnp.zeros((2, length, heads, 8), dtype) for heads in (4, 2))
    positions = jnp.arange(length)[None]
    inputs = AttentionInputs(q, k, k, positions, positions)
    return accelerated(encoding, inputs, AttentionMask(contiguous=True), device)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
def test_the_device_and_the_encoding_choose():
    assert choice("rope", AMPERE) is choice("rope", TPU) is fused
    assert choice("rope", AMPERE, jnp.float32) is kernel
    assert choice("t5", AMPERE) is choice("fire", AMPERE) is choice("fox", AMPERE) is kernel
    assert choice("t5", TPU) is choice("fire", TPU) is choice("fox", TPU) is tpu_kernel
    assert choice("cope", TPU) is choice("cope", AMPERE) is choice("wall", TPU) is None


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("capability", ["7.5", "gfx90a", ""])
def test_other_gpus_have_no_kernels(capability):
    device = Target("gpu", capability)
    assert choice("rope", device) is choice("t5", device) is None


@pytest.mark.parametrize(("name", "kernels"), [("rope", "splash"), ("t5", "attention_output")])
def test_a_program_for_devices_that_are_not_here_has_their_kernels(name, kernels):
    """JAX sees only CPUs here. The devices of a mesh, even one of a topology, decide the kernels."""
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    device = AbstractDevice(*("TPU v5 lite", 1, "tpu")[: len(dataclasses.fields(AbstractDevice))])

    def attend(q, k):
        positions, attention_mask = jnp.arange(64)[None], AttentionMask(contiguous=True)
        inputs = AttentionInputs(q, k, k, positions, positions)
        return dispatch.fastest(encoding, inputs, attention_mask)(encoding, inputs, attention_mask)

    q, k = (jax.ShapeDtypeStruct((2, 64, heads, 8), jnp.bfloat16) for heads in (4, 2))
    assert "pallas_call" not in str(jax.jit(attend).trace(q, k).jaxpr)
    with use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)):
        lowered = jax.jit(attend).trace(q, k).lower(lowering_platforms=("tpu",)).as_text()
    assert kernels in lowered


def test_a_cpu_has_no_kernels():
    assert choice("rope", None) is choice("t5", None) is None


def test_pallas_kernels_are_left_out_where_it_is_not_known_how_arrays_are_divided():
    """Tests have eight devices. cuDNN's kernels define how they are partitioned."""
    assert choice("rope", TPU) is choice("t5", TPU) is choice("t5", AMPERE) is None
    assert choice("rope", AMPERE) is fused


def test_devices_that_share_heads_have_only_cudnns_kernels():
    with jax.set_mesh(sharding.make_mesh(4, tensor=2)):
        assert choice("rope", TPU) is choice("t5", TPU) is choice("t5", AMPERE) is None
        assert choice("rope", AMPERE) is fused


def test_devices_that_share_a_window_have_no_kernels():
    with jax.set_mesh(sharding.sequence_mesh(sharding.make_mesh(8))):
        assert choice("rope", TPU) is choice("t5", TPU) is choice("t5", AMPERE) is choice("rope", AMPERE) is None


def test_one_device_of_several_runs_kernels_as_if_alone():
    with jax.set_mesh(sharding.make_mesh(1, jax.devices()[:1])):
        assert choice("rope", TPU) is fused
        assert choice("t5", AMPERE) is kernel
        assert choice("t5", TPU) is tpu_kernel


@pytest.mark.parametrize(
    ("name", "device"), [("t5", AMPERE), ("fire", AMPERE), ("fox", AMPERE), ("t5", TPU), ("fox", TPU)]
)
def test_devices_run_kernels_on_their_rows(name, device, monkeypatch):
    """Values and all gradients equal those on one device."""
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    graphdef, arrays = nnx.split(encoding)
    rng = np.random.default_rng(0)
    x, q, k, v = (jnp.asarray(rng.normal(size=(8, 20, *rest)), jnp.float32) for rest in ((16,), (4, 8), (2, 8), (2, 8)))
    positions, attention_mask = jnp.arange(20)[None], AttentionMask(contiguous=True)
    monkeypatch.setattr(kernels, "kernel", functools.partial(kernel, interpret=True))
    monkeypatch.setattr(tpu_kernels, "tpu_kernel", functools.partial(tpu_kernel, block=32, interpret=True))

    def gradients(attend, arrays, *rows):
        def loss(arrays, x, q, k, v):
            encoding = nnx.merge(graphdef, arrays)
            ctx = encoding.prepare(x, positions)
            inputs = AttentionInputs(q, k, v, positions, positions, ctx)
            return jnp.tanh(attend(encoding, inputs, attention_mask)).sum()

        return jax.value_and_grad(loss, argnums=range(5))(arrays, *rows)

    expected = gradients(dense, arrays, x, q, k, v)
    mesh = sharding.make_mesh(8, fsdp=2)
    with jax.set_mesh(mesh):
        inputs = AttentionInputs(q, k, v, positions, positions)
        attend = accelerated(encoding, inputs, attention_mask, device)
        assert attend is not None
        rows = jax.device_put((x, q, k, v), NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        found = jax.jit(functools.partial(gradients, attend))(arrays, *rows)
    assert found[1][2].sharding.shard_shape(q.shape)[0] == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), expected, found)


def test_pallas_kernels_run_on_each_device_of_a_mesh():
    found = []

    def body(x):
        found.append(choice("t5", AMPERE))
        return x

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.arange(8))
    assert found[0] is kernel


def test_the_layer_runs_by_the_kernel_that_is_chosen(monkeypatch):
    config = run_config(model__num_heads=4, model__num_kv_heads=2, model__head_dim=8).model
    attention = Attention(config, nnx.Rngs(0))
    given = []

    def choose(encoding, inputs, attention_mask):
        given.append((*(x.shape for x in inputs[:3]), attention_mask))
        return lambda encoding, inputs, attention_mask: jnp.zeros_like(inputs.q)

    monkeypatch.setattr(dispatch, "accelerated", choose)
    rope = encodings.build("rope", dataclasses.replace(DIMS, d_model=config.d_model), nnx.Rngs(0))
    out = attention(rope, jnp.ones((2, 10, config.d_model)), jnp.arange(10)[None])
    assert given == [((2, 10, 4, 8), (2, 10, 2, 8), (2, 10, 2, 8), AttentionMask())]
    assert not out.any()
