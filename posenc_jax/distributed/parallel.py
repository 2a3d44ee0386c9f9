"""Sharding constraints in a model, which make the compiler divide its work well over many devices.

The mesh is that of `jax.set_mesh`. Without a mesh, these functions change nothing. The sharding of parameters and
batches determines most of the division: see distributed/sharding.py. This file contains the rest, and the axis
"sequence", which divides the tokens of a window.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

TOKENS_AT_A_TIME = 4096  # on each device, if devices share a window


def divided_axes() -> dict[str, int]:
    """Sizes of the mesh axes that divide a model's arrays: neither "runs" nor those of a surrounding `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: size for axis, size in mesh.shape.items() if axis not in (*mesh.manual_axes, "runs")}


def shard_tokens(x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Divide the tokens of a window over "sequence". Values computed per token from x stay on the same devices."""
    if "sequence" not in divided_axes():
        return x
    return lax.with_sharding_constraint(x, PartitionSpec(None, "sequence"))


def map_tokens(f: Callable[[Any], Any], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Apply `f` to each token, on each device along "sequence" to TOKENS_AT_A_TIME at a time, to save memory."""
    devices = divided_axes().get("sequence", 1)
    B, T, D = x.shape
    if devices == 1 or T % (devices * TOKENS_AT_A_TIME):
        return f(x)
    parts = jnp.moveaxis(x.reshape(B, devices, -1, TOKENS_AT_A_TIME, D), 2, 0)

    def replace(i, parts):  # in place, unlike `lax.map`
        return parts.at[i].set(f(parts[i].reshape(B, -1, D)).reshape(parts.shape[1:]))

    parts = lax.fori_loop(0, len(parts), replace, parts)
    return jnp.moveaxis(parts, 0, 2).reshape(x.shape)


def gather_width(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """Gather the full width of an embedding table on every device. A lookup in it keeps activations divided by rows."""
    if not {"fsdp", "sequence"} & divided_axes().keys():
        return table
    return lax.with_sharding_constraint(table, PartitionSpec(vocabulary_axis(table)))


def vocabulary_axis(table: Float[Array, "V D"]) -> tuple[str, ...]:
    """The mesh axis that divides the rows of a token table: "tensor" if it divides them evenly, otherwise none."""
    devices = divided_axes().get("tensor", 1)
    return ("tensor",) if devices > 1 and len(table) % devices == 0 else ()


def map_rows(f: Callable[[Any, Any], Any], rows: Any, shared: Any) -> Any:
    """Compute `f(rows, shared)`: each device computes its own rows, and the compiler does not partition f.

    `f` reads no arrays other than its arguments. `rows` are arrays [B, ...], whose rows are divided over all mesh axes,
    or [1, ...], which apply to all rows. Every device has a copy of `shared`.
    """
    axes = tuple(divided_axes())  # also axes of size 1: gradients are summed over axes that are left out
    of_device, of_all = PartitionSpec(axes), PartitionSpec()
    specs = jax.tree.map(lambda x: of_all if len(x) == 1 else of_device, rows)
    return jax.shard_map(f, in_specs=(specs, of_all), out_specs=of_device, check_vma=False)(rows, shared)


def map_query_blocks(f: Callable[[Any, Any], Any], blocks: Any, shared: Any) -> Any:
    """Compute `f(block, shared)` for each block, divided over the devices of "sequence", in the forward pass only.

    `f` reads no arrays other than its arguments. `blocks` are arrays [blocks, ...]. Every device has a copy of
    `shared`, such as the keys. With n devices the blocks, padded with zeros, form 2 n runs. Device i takes runs i and
    2 n - 1 - i. The work of all devices is equal if block b attends to b + 1 blocks of keys.
    """
    devices = divided_axes().get("sequence", 1)
    if devices == 1:
        return lax.map(lambda block: f(block, shared), blocks)
    # Device i holds runs 2 i and 2 i + 1. It sends both to the devices that take them, which send the results back.
    taker = [min(run, 2 * devices - 1 - run) for run in range(2 * devices)]
    there = [list(enumerate(taker[first::2])) for first in (0, 1)]
    back = [[(device, holder) for holder, device in pairs] for pairs in there]

    def part(blocks, shared):
        return _exchange(lax.map(lambda block: f(block, shared), _exchange(blocks, there)), back)

    count = jax.tree.leaves(blocks)[0].shape[0]
    filling = -count % (2 * devices)
    filled = jax.tree.map(lambda x: jnp.pad(x, [(0, filling)] + [(0, 0)] * (x.ndim - 1)), blocks)
    of_device, of_all = PartitionSpec("sequence"), PartitionSpec()

    def until_copied(x):  # each device changes the layout of its shard only, before the all-gather
        return lax.with_sharding_constraint(x, of_device) if x.ndim and x.shape[0] % devices == 0 else x

    shared = jax.tree.map(until_copied, shared)
    mapped = jax.shard_map(part, in_specs=(of_device, of_all), out_specs=of_device, check_vma=False)(filled, shared)
    return jax.tree.map(lambda x: x[:count], mapped)


def _exchange(blocks: Any, pairs: list[list[tuple[int, int]]]) -> Any:
    """Send each half of a device's blocks by the (source, destination) pairs in that half's list."""

    def of_array(x):
        halves = jnp.split(x, 2)
        return jnp.concatenate([lax.ppermute(half, "sequence", own) for half, own in zip(halves, pairs, strict=True)])

    return jax.tree.map(of_array, blocks)
