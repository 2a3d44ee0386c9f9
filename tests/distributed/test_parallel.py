"""Blocks of queries distributed over devices: the same results, and the same amount of work for each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from posenc_jax.distributed import sharding
from posenc_jax.distributed.parallel import map_query_blocks

MESH = sharding.sequence_mesh(sharding.make_mesh(8))


def mapped(f, blocks, shared):
    """The results on one device and on eight."""
    one = jax.jit(lambda *arguments: map_query_blocks(f, *arguments))(blocks, shared)
    with jax.set_mesh(MESH):
        return one, jax.jit(lambda *arguments: map_query_blocks(f, *arguments))(blocks, shared)


@pytest.mark.parametrize("count", [1, 5, 16, 33])
def test_devices_give_back_every_block_in_its_place(count):
    def f(block, shared):
        i, x = block
        # The index is an array, which JAX refuses for NumPy arrays that were not passed in as arguments.
        return lax.fori_loop(0, i + 1, lambda j, total: total + shared["k"][j] * x, jnp.zeros(3)), i + shared["n"]

    k = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    blocks = jnp.arange(count), jnp.arange(3.0 * count).reshape(count, 3)
    one, eight = mapped(f, blocks, {"k": jnp.asarray(k), "n": jnp.arange(2)})
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    expected = np.cumsum(k, axis=0) * np.arange(3.0 * count).reshape(count, 3)
    np.testing.assert_allclose(one[0], expected, rtol=1e-4)


def test_devices_have_as_many_keys_to_read():
    blocks = jnp.arange(48)
    with jax.set_mesh(MESH):
        device = map_query_blocks(lambda i, _: lax.axis_index("sequence") + 0 * i, blocks, ())
    work = np.bincount(device, weights=np.arange(48) + 1)
    np.testing.assert_array_equal(work, work.mean())
