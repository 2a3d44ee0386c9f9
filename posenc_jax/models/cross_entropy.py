"""Cross-entropy over a large vocabulary, computed in chunks so that the logits are never all in memory."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from posenc_jax.distributed.parallel import vocabulary_axis
from posenc_jax.encodings.base import soft_capped
from posenc_jax.linear import matmul

LOGITS_BYTES = 2**27  # of logits in memory at a time, over all devices; a chunk of MIN_PART tokens may need more
MIN_PART = 512  # smallest chunk of the vocabulary, in tokens


def logits(
    x: Float[Array, "*N D"],
    kernel: Float[Array, "W D"],
    bias: Float[Array, "V"] | None,
    vocab_size: int,
    softcap: float = 0.0,
) -> Float[Array, "*N V"]:
    """x times the first V rows of the kernel, plus the bias, in float32; then `soft_capped`."""
    flat = matmul(x.reshape(-1, x.shape[-1]), kernel[:vocab_size].astype(x.dtype), True, jnp.float32)
    return soft_capped(flat if bias is None else flat + bias, softcap).reshape(*x.shape[:-1], vocab_size)


def cross_entropy(
    x: Float[Array, "*N D"],
    kernel: Float[Array, "W D"],
    bias: Float[Array, "V"] | None,
    vocab_size: int,
    targets: Int[Array, "*N"],
    softcap: float = 0.0,
) -> Float[Array, "*N"]:
    """Nats of the targets under a softmax of the `logits`. At most about LOGITS_BYTES of logits are in memory.

    If all logits fit, they are computed once and kept for the gradient. Otherwise the log-sum-exp is accumulated over
    chunks of the vocabulary, and the backward pass recomputes the logits of each chunk: a third more matmuls. Each pass
    reads every row of the kernel once, and the backward pass writes its gradient once, in float32. Chunks of tokens
    would add to the whole gradient of the kernel each time, and would move a sharded batch between devices.
    """
    most = max(MIN_PART, LOGITS_BYTES // (4 * targets.size))
    if vocab_size <= most:
        own_logits = logits(x, kernel, bias, vocab_size, softcap)
        return optax.softmax_cross_entropy_with_integer_labels(own_logits, targets)
    axis = vocabulary_axis(kernel) if len(kernel) == vocab_size else ()
    own = vocab_size // math.prod(jax.sharding.get_abstract_mesh().shape[name] for name in axis)
    cut = _Cut(own, -(-own // most), axis, softcap)
    nats: Array = _by_parts(cut, x.reshape(-1, x.shape[-1]), kernel, bias, targets.reshape(-1))
    return nats.reshape(targets.shape)


class _Cut(NamedTuple):
    """A vocabulary in chunks of one size; the last chunk may overlap the one before it.

    If `axis` names mesh axes, each device along them has `vocab_size` tokens of its own and cuts those into chunks.
    """

    vocab_size: int
    parts: int
    axis: tuple[str, ...] = ()
    softcap: float = 0.0

    def logits(self, i, x, kernel, bias):
        """Logits, tokens, kernel rows and first token of chunk i; an overlap has logits of -inf and tokens of -1."""
        size = -(-self.vocab_size // self.parts)
        start = jnp.minimum(i * size, self.vocab_size - size)
        tokens = start + jnp.arange(size)
        new = tokens >= i * size
        rows = jax.lax.dynamic_slice_in_dim(kernel, start, size).astype(x.dtype)
        shift = jnp.zeros(size) if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, size)
        logits = soft_capped(matmul(x, rows, True, jnp.float32) + shift, self.softcap)
        return jnp.where(new, logits, -jnp.inf), jnp.where(new, tokens, -1), rows, start

    def own(self, targets):
        """Targets as indices into the tokens of this device; `vocab_size` for a token of another device."""
        if not self.axis:
            return targets
        own = targets - jax.lax.axis_index(self.axis) * self.vocab_size
        return jnp.where((own >= 0) & (own < self.vocab_size), own, self.vocab_size)

    def over_devices(self, f, x, kernel, bias, *others, gradients=False):
        """`f(x, kernel, bias, *others)`. Each device along `axis` has its own rows of kernel and bias.

        The results are equal on all devices or, with `gradients`, they are the gradients of x, kernel and bias.
        """
        if not self.axis:
            return f(x, kernel, bias, *others)
        own, same = PartitionSpec(self.axis), PartitionSpec()
        given, made = (same, own, own, *(same for _ in others)), (same, own, own) if gradients else same
        mapped = jax.shard_map(f, in_specs=given, out_specs=made, axis_names=set(self.axis), check_vma=False)
        return mapped(x, kernel, bias, *others)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_parts(cut, x, kernel, bias, targets):
    return _forward(cut, x, kernel, bias, targets)[0]


def _forward(cut, x, kernel, bias, targets):
    def sums(x, kernel, bias, targets):
        def add(i, sums):
            top, total = sums
            logits = cut.logits(i, x, kernel, bias)[0]
            new_top = jnp.maximum(top, logits.max(axis=1))
            return new_top, total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)

        zero = jnp.zeros(targets.shape, jnp.float32)
        own_top, total = jax.lax.fori_loop(0, cut.parts, add, (zero - jnp.inf, zero))
        top = jax.lax.pmax(own_top, cut.axis)
        total = jax.lax.psum(total * jnp.exp(own_top - top), cut.axis)
        target = cut.own(targets)
        row = jnp.minimum(target, cut.vocab_size - 1)
        of_target = jnp.einsum("nd,nd->n", x, kernel[row].astype(x.dtype), preferred_element_type=jnp.float32)
        if bias is not None:
            of_target += bias[row]
        of_target = soft_capped(of_target, cut.softcap)
        return top + jnp.log(total), jax.lax.psum(jnp.where(row == target, of_target, 0), cut.axis)

    log_sum, of_target = cut.over_devices(sums, x, kernel, bias, targets)
    return log_sum - of_target, (x, kernel, bias, targets, log_sum)


def _backward(cut, residuals, gradient):
    def gradients(x, kernel, bias, targets, log_sum, gradient):
        target = cut.own(targets)

        def add(i, sums):
            d_x, d_kernel, d_bias = sums
            logits, tokens, rows, start = cut.logits(i, x, kernel, bias)
            d_logits = (jnp.exp(logits - log_sum[:, None]) - (tokens == target[:, None])) * gradient[:, None]
            if cut.softcap:  # the derivative of c tanh(z / c) is 1 - tanh(z / c)^2
                d_logits *= jnp.where(tokens < 0, 0, 1 - (logits / cut.softcap) ** 2)
            if bias is not None:
                d_bias = _add_at(d_bias, d_logits.sum(axis=0), start)
            d_logits = d_logits.astype(x.dtype)
            d_x += jnp.matmul(d_logits, rows, preferred_element_type=jnp.float32)
            d_rows = jnp.matmul(d_logits.T, x, preferred_element_type=jnp.float32)
            return d_x, _add_at(d_kernel, d_rows, start), d_bias

        zeros = jax.tree.map(lambda of: jnp.zeros(of.shape, jnp.float32), (x, kernel, bias))
        d_x, d_kernel, d_bias = jax.lax.fori_loop(0, cut.parts, add, zeros)
        return jax.lax.psum(d_x, cut.axis), d_kernel, d_bias

    d_x, d_kernel, d_bias = cut.over_devices(gradients, *residuals, gradient, gradients=True)
    return d_x.astype(residuals[0].dtype), d_kernel, d_bias, None


_by_parts.defvjp(_forward, _backward)


def _add_at(total, part, start):
    old = jax.lax.dynamic_slice_in_dim(total, start, len(part))
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, 0)
