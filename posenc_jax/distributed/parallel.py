"""What a model says of where its arrays are, so that the compiler divides its work over many devices as it should.

The mesh is that of `jax.set_mesh`; without one, nothing here changes anything. Most follows from where parameters and
batches are: see training/sharding.py. Here is the rest, and the axis "sequence", over which windows are divided.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

TOKENS_AT_A_TIME = 4096  # on each device, where devices share a window


def divided_axes() -> dict[str, int]:
    """The axes of the mesh that the compiler divides a model's arrays by, and their devices.

    Not those that a surrounding `jax.shard_map` divides by, nor "runs", of which a model is one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in (*mesh.manual_axes, "runs")}


def shard_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Divide the tokens of a window over "sequence": what is computed from x token by token stays on its devices."""
    if "sequence" not in divided_axes():
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(None, "sequence"))


def map_tokens(f: Callable[[Any], Any], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """`f` of each token, on devices along "sequence" TOKENS_AT_A_TIME: what it makes on the way takes little memory."""
    devices = divided_axes().get("sequence", 1)
    B, T, D = x.shape
    if devices == 1 or T % (devices * TOKENS_AT_A_TIME):
        return f(x)
    parts = jnp.moveaxis(x.reshape(B, devices, -1, TOKENS_AT_A_TIME, D), 2, 0)

    def replace(i, parts):  # in place, which `lax.map` would not do
        return parts.at[i].set(f(parts[i].reshape(B, -1, D)).reshape(parts.shape[1:]))

    parts = lax.fori_loop(0, len(parts), replace, parts)
    return jnp.moveaxis(parts, 0, 2).reshape(x.shape)


def gather_width(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """A table of embeddings, of which every device has the whole width for a while.

    A lookup in a part of the width would divide the activations by width too, where they should be divided by rows.
    """
    if not {"fsdp", "sequence"} & divided_axes().keys():
        return table
    return lax.with_sharding_constraint(table, PartitionSpec(vocabulary_axis(table)))


def vocabulary_axis(table: Float[Array, "V D"]) -> tuple[str, ...]:
    """The axis of the mesh that divides the rows of a table of tokens: "tensor", where it divides them evenly."""
    devices = divided_axes().get("tensor", 1)
    return ("tensor",) if devices > 1 and len(table) % devices == 0 else ()


def map_rows(f: Callable[[Any, Any], Any], rows: Any, shared: Any) -> Any:
    """`f(rows, shared)`, of which each device computes its rows, and the compiler divides nothing.

    Args:
      f: a function of arrays, which reads no others than its arguments.
      rows: arrays [B, ...], whose rows all axes of the mesh divide, or [1, ...], for all rows.
      shared: arrays of which every device has a copy.
    """
    axes = tuple(divided_axes())  # also those of one device: gradients are summed over others
    of_device, of_all = PartitionSpec(axes), PartitionSpec()
    specs = jax.tree.map(lambda x: of_all if len(x) == 1 else of_device, rows)
    return jax.shard_map(f, in_specs=(specs, of_all), out_specs=of_device, check_vma=False)(rows, shared)


def map_query_blocks(f: Callable[[Any, Any], Any], blocks: Any, shared: Any) -> Any:
    """`f(block, shared)` of each block; each device along "sequence" computes its part, in the forward pass only.

    Every device has a copy of `shared`, such as the keys, and its part of all else. With n devices the blocks are in
    2 n runs, and device i takes runs i and 2 n - 1 - i: all have as much to do where block b sees b + 1 blocks of keys.

    Args:
      f: a function of arrays, which reads no others than its arguments.
      blocks: arrays [blocks, ...]; blocks of zeros fill the last runs up.
      shared: arrays that f reads for every block.
    """
    devices = divided_axes().get("sequence", 1)
    if devices == 1:
        return lax.map(lambda block: f(block, shared), blocks)
    # Device i holds runs 2 i and 2 i + 1. Both go to the devices that take them, and their results come back.
    taker = [min(run, 2 * devices - 1 - run) for run in range(2 * devices)]
    there = [list(enumerate(taker[first::2])) for first in (0, 1)]
    back = [[(device, holder) for holder, device in pairs] for pairs in there]

    def part(blocks, shared):
        return _exchange(lax.map(lambda block: f(block, shared), _exchange(blocks, there)), back)

    count = jax.tree.leaves(blocks)[0].shape[0]
    filling = -count % (2 * devices)
    filled = jax.tree.map(lambda x: jnp.pad(x, [(0, filling)] + [(0, 0)] * (x.ndim - 1)), blocks)
    of_device, of_all = PartitionSpec("sequence"), PartitionSpec()

    def until_copied(x):  # whatever lays an array out is done by each device for its part, before all get all of it
        return lax.with_sharding_constraint(x, of_device) if x.ndim and x.shape[0] % devices == 0 else x

    shared = jax.tree.map(until_copied, shared)
    mapped = jax.shard_map(part, in_specs=(of_device, of_all), out_specs=of_device, check_vma=False)(filled, shared)
    return jax.tree.map(lambda x: x[:count], mapped)


def _exchange(blocks: Any, pairs: list[list[tuple[int, int]]]) -> Any:
    """Send each half of a device's blocks, from the first device to the second of a pair in that half's list."""

    def of_array(x):
        halves = jnp.split(x, 2)
        return jnp.concatenate([lax.ppermute(half, "sequence", own) for half, own in zip(halves, pairs, strict=True)])

    return jax.tree.map(of_array, blocks)
