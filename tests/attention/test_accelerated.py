"""Kernels are chosen by the device, and by what the encoding and the arrays allow."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from posenc_jax import encodings
from posenc_jax.attention import Attention, layer
from posenc_jax.attention.accelerated import accelerated
from posenc_jax.attention.fused import fused
from posenc_jax.attention.kernel import kernel
from posenc_jax.encodings.base import Dims, Sight
from tests.small import run_config

DIMS = Dims(d_model=16, num_heads=4, num_kv_heads=2, head_dim=8, max_length=64)
AMPERE = SimpleNamespace(platform="gpu", compute_capability="8.0")
TPU = SimpleNamespace(platform="tpu")


def choice(name, device, dtype=jnp.bfloat16, length=64):
    encoding = encodings.build(name, DIMS, nnx.Rngs(0))
    q, k = (jnp.zeros((2, length, heads, 8), dtype) for heads in (4, 2))
    return accelerated(encoding, q, k, k, Sight(contiguous=True), device)


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.usefixtures("one_device")
def test_the_device_and_the_encoding_choose():
    assert choice("rope", AMPERE) is choice("rope", TPU) is fused
    assert choice("rope", AMPERE, jnp.float32) is kernel
    assert choice("t5", AMPERE) is choice("fire", AMPERE) is choice("fox", AMPERE) is kernel
    assert choice("t5", TPU) is choice("cope", AMPERE) is choice("wall", TPU) is None


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("capability", ["7.5", "gfx90a"])
def test_other_gpus_have_no_kernels(capability):
    device = SimpleNamespace(platform="gpu", compute_capability=capability)
    assert choice("rope", device) is choice("t5", device) is None


def test_a_cpu_has_no_kernels():
    assert choice("rope", None) is choice("t5", None) is None


def test_pallas_kernels_are_left_out_where_the_compiler_divides_arrays():
    """Tests have eight devices. cuDNN's kernels say how they are divided."""
    assert choice("rope", TPU) is choice("t5", AMPERE) is None
    assert choice("rope", AMPERE) is fused


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

    def choose(encoding, q, k, v, sight):
        given.append((q.shape, k.shape, v.shape, sight))
        return lambda encoding, q, k, v, *others: jnp.zeros_like(q)

    monkeypatch.setattr(layer, "accelerated", choose)
    out = attention(encodings.build("rope", DIMS, nnx.Rngs(0)), jnp.ones((2, 10, config.d_model)), jnp.arange(10)[None])
    assert given == [((2, 10, 4, 8), (2, 10, 2, 8), (2, 10, 2, 8), Sight())]
    assert not out.any()
