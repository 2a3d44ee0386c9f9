r"""The interface of every encoding, whose own hooks do nothing: no positional encoding at all.

Letters: B batch, T query length, S key length, D model width, H query heads, d head width. Positions are int32 or, for
schedules that place tokens between whole numbers, float32; `[B or 1, T]`: a batch that shares its positions passes one
row, and a bias made of positions is then computed once.
"""

import difflib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Real

from posenc_jax.schema import check_schema

# The hooks that change attention. An encoding overrides at least one of them.
HOOKS = ("embed", "rotate", "scores", "bias", "weights", "values")

# What `prepare` gives for queries and for keys: None, or arrays [B, T, ...] that follow them.
Context = tuple[Any, Any]

Function = TypeVar("Function", bound=Callable[..., Any])


class Constant(nnx.Variable):
    """An array that is not trained, yet saved, stacked and exchanged as parameters are."""


@dataclass(frozen=True)
class Widths:
    """The sizes of a model that decide the shapes of an encoding's arrays."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self):
        for field, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{field} = {value!r}: must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads = {self.num_kv_heads}: must divide num_heads = {self.num_heads}")


@dataclass(frozen=True)
class Dims(Widths):
    """All sizes that an encoding may depend on. The first training of the model placed tokens below `max_length`."""

    max_length: int

    @property
    def widths(self) -> Widths:
        return Widths(self.d_model, self.num_heads, self.num_kv_heads, self.head_dim)


class Pairwise(NamedTuple):
    """A bias made of operations on numbers, so that a kernel can compute it for one pair of tokens or a block of them.

    `function(query, key, q_pos, k_pos)` is the bias of one head, from the terms and positions of queries and of keys,
    which are broadcast against each other. With a `unit`, that is the input x of a sum: the bias is then the sum of
    `unit(x, *numbers)` over n units, of which each head has its own. Positions are float32, and all must be finite,
    also for keys ahead.
    """

    function: Callable[..., Array]
    query: tuple[Float[Array, "#B T #H"], ...] = ()
    key: tuple[Float[Array, "#B S #H"], ...] = ()
    unit: Callable[..., Array] | None = None
    numbers: tuple[Float[Array, "#H n"], ...] = ()


class Encoding(nnx.Module):
    r"""No positional encoding ("NoPE"): order is known from the causal mask alone.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d}

    Source: Haviv et al. 2022; Kazemnejad et al. 2023. Nothing is learned. As every hook here is the identity, this
    class is also what all encodings derive from, overriding the hooks they need.
    """

    shared: ClassVar[bool] = True  # one instance for all layers, or one per layer
    relative: ClassVar[bool] = True  # unchanged when a constant is added to all positions
    blockwise: ClassVar[bool] = True  # the bias may be evaluated on a block of queries x a block of keys
    causal_only: bool = False  # has no meaning, or no published form, where a query sees keys ahead of it
    table_length: int | None = None  # positions from here on cannot be encoded; None: any position can
    widths: Widths | None = None  # that it was built for, by `posenc_jax.encodings.build`

    @dataclass(frozen=True)
    class Config:
        pass

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        check_schema(cls.Config, f"{cls.__qualname__}.Config")

    def __init__(self, config: Config, dims: Dims, rngs: nnx.Rngs):
        pass

    def embed(self, x: Float[Array, "B T D"], positions: Real[Array, "#B T"]) -> Float[Array, "B T D"]:
        """Add positions to the token embeddings, before the first layer."""
        return x

    def prepare(self, x: Float[Array, "B T D"], positions: Real[Array, "#B T"]) -> Context:
        """Compute, from the input of an attention layer, what the later hooks need for queries and for keys."""
        return None, None

    def rotate(
        self,
        q: Float[Array, "B T H d"],
        k: Float[Array, "B S K d"],
        q_pos: Real[Array, "#B T"],
        k_pos: Real[Array, "#B S"],
        ctx: Context,
    ) -> tuple[Float[Array, "B T H e"], Float[Array, "B S K e"]]:
        """Transform queries and keys by their own positions; K heads of keys, fewer than H with grouped queries."""
        return q, k

    def scores(self, q: Float[Array, "B T H d"], k: Float[Array, "B S H d"], ctx: Context) -> Float[Array, "B H T S"]:
        """Logits before the bias, in float32."""
        return jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])

    def bias(
        self,
        q: Float[Array, "B T H d"],
        k: Float[Array, "B S H d"],
        logits: Float[Array, "B H T S"],
        q_pos: Real[Array, "#B T"],
        k_pos: Real[Array, "#B S"],
        ctx: Context,
    ) -> Float[Array, "#B #H T S"] | None:
        """What is added to the logits, in float32; an encoding to which only the distance matters is a `DistanceBias`.

        Queries and keys are as `rotate` left them; logits are the lowest float32 where the query may not see the key.
        """
        return None

    def pairwise(
        self,
        q: Float[Array, "B T H d"],
        k: Float[Array, "B S H d"],
        q_pos: Real[Array, "#B T"],
        k_pos: Real[Array, "#B S"],
        ctx: Context,
    ) -> Pairwise | None:
        """The bias as a kernel can compute it, if it has such a form; arguments are as for `bias`."""
        return None

    def weights(self, logits: Float[Array, "B H T S"], mask: Bool[Array, "T S"]) -> Float[Array, "B H T S"]:
        """Attention weights of the logits; `mask` is True where a query may see a key."""
        return jax.nn.softmax(masked(logits, mask), axis=-1)

    def values(
        self,
        weights: Float[Array, "B H T S"],
        v: Float[Array, "B S H e"],
        q_pos: Real[Array, "#B T"],
        k_pos: Real[Array, "#B S"],
        ctx: Context,
    ) -> Float[Array, "B T H e"]:
        """The output of each query: its weights, which are of v's dtype, times the values."""
        return jnp.einsum("bhts,bshe->bthe", weights, v)

    # An encoding whose logits depend on the tokens between key and query may also give them a block of keys at a time,
    # from the query's own block back, by the next three hooks; `scores` and `bias` together must say the same.

    def scan_init(self, q: Float[Array, "B t H d"]) -> Any:
        """What queries carry before they meet any key: by default one sum each, [B, H, t]."""
        return jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    def scan_keys(self, k: Float[Array, "B s K d"], ctx: Any) -> Any:
        """The context of a block of keys in `scan_step`, computed once for all queries, from that of `prepare`."""
        return ctx

    def scan_step(
        self,
        carry: Any,
        q: Float[Array, "B t H d"],
        k: Float[Array, "B s H d"],
        mask: Bool[Array, "t s"],
        ctx: Context,
    ) -> tuple[Any, Float[Array, "B H t s"]]:
        """What the queries carry past a block of keys, and its logits with the bias, in float32.

        `mask` is True where a query may see a key; other logits have no meaning. `ctx` holds the queries' context of
        `prepare` and the keys' of `scan_keys`.
        """
        raise NotImplementedError


class DistanceBias(Encoding):
    """Encodings whose bias depends on nothing but the distance, in tokens, between query and key.

    Attention may then compute the bias once for each distance, not for each pair.
    """

    def distance_bias(self, distance: Real[Array, "*n"]) -> Float[Array, "H *n"]:
        """The bias of each head at each distance i - j, in float32; any finite number at negative ones."""
        raise NotImplementedError(f"{type(self).__name__} must override distance_bias")

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return jnp.moveaxis(distance_bias_of(self, distances(q_pos, k_pos)), 0, 1)


def distance_bias_of(encoding: DistanceBias, distance: Real[Array, "*n"]) -> Float[Array, "H *n"]:
    """What `encoding.distance_bias` returns. Raises TypeError if it is not one float32 number per head and distance."""
    bias = encoding.distance_bias(distance)
    shape = jnp.shape(bias)
    fits = len(shape) == distance.ndim + 1 and shape[1:] == distance.shape
    _check_bias(encoding, "distance_bias", bias, fits, f"[H, *distance.shape] with distance.shape = {distance.shape}")
    return bias


def distances(q_pos: Real[Array, "#B T"], k_pos: Real[Array, "#B S"]) -> Real[Array, "#B T S"]:
    """Tokens from each key forward to each query: i - j, negative where the key is ahead."""
    return q_pos[:, :, None] - k_pos[:, None, :]


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see: none ahead of it if `causal`, and then with a `window` so many up to its own.

    `contiguous`: it is known that positions step by one from key to key, and that the queries stand at the last keys.
    """

    causal: bool = True
    window: int | None = None
    contiguous: bool = False

    def __post_init__(self):
        if self.window and not self.causal:
            raise ValueError(f"window = {self.window} must be None where queries see keys ahead of them")

    def materialize(self, query_index: Int[Array, "T"], key_index: Int[Array, "S"]) -> Bool[Array, "T S"]:
        """True where the query may see the key."""
        return self.allows(query_index[:, None] - key_index)

    def allows(self, distance: Int[Array, "*n"]) -> Bool[Array, "*n"]:
        """True where a key so many tokens before the query may be seen."""
        seen = distance >= 0 if self.causal else jnp.ones(distance.shape, bool)
        return seen & (distance < self.window) if self.window else seen


CAUSAL = AttentionMask()


def masked(logits: Float[Array, "B H T S"], mask: Bool[Array, "T S"]) -> Float[Array, "B H T S"]:
    """Logits, the lowest number of their dtype where a query may not see a key."""
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def visible(logits: Float[Array, "B H T S"]) -> Bool[Array, "B H T S"]:
    """Where the logits given to `bias` are those of keys that the query may see."""
    return logits > jnp.finfo(logits.dtype).min


def construct(cls: type[Encoding], config: Any, dims: Dims, rngs: nnx.Rngs) -> Encoding:
    """An encoding of this class. Raises TypeError for one that overrides no hook, or holds arrays that are lost."""
    name = cls.__name__
    if cls is not Encoding and not overrides(cls, *HOOKS):
        near = [match for key in vars(cls) for match in difflib.get_close_matches(key, HOOKS, n=1, cutoff=0.7)]
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{name} has no effect: it must override one of {', '.join(HOOKS)}{hint}")
    encoding = cls(config, dims, rngs)
    _, _, _, others = nnx.split(encoding, nnx.Param, Constant, ...)
    for path, leaf in nnx.to_flat_state(others):
        field, kind = ".".join(map(str, path)), type(leaf).__name__
        advice = "nnx.Param(array) if it is trained, posenc_jax.encodings.base.Constant(array) if not"
        raise TypeError(f"{name}.{field} is of type {kind}, which training does not keep: assign {advice}")
    encoding.widths = dims.widths
    return encoding


def bias_of(
    encoding: Encoding,
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S H d"],
    logits: Float[Array, "B H T S"],
    q_pos: Real[Array, "#B T"],
    k_pos: Real[Array, "#B S"],
    ctx: Context,
) -> Float[Array, "#B #H T S"] | None:
    """What `encoding.bias` returns. Raises TypeError if it cannot be added to the logits as it is."""
    bias = encoding.bias(q, k, logits, q_pos, k_pos, ctx)
    if bias is not None:
        (B, H, T, S), shape = logits.shape, jnp.shape(bias)
        fits = len(shape) == 4 and shape[0] in (1, B) and shape[1] in (1, H) and shape[2:] == (T, S)
        _check_bias(encoding, "bias", bias, fits, f"[{B} or 1, {H} or 1, {T}, {S}], which is [B or 1, H or 1, T, S]")
    return bias


def _check_bias(encoding: Encoding, hook: str, bias: Any, fits: bool, allowed: str) -> None:
    dtype = jnp.result_type(bias)
    if not fits or dtype != jnp.float32:
        found = f"{type(encoding).__name__}.{hook} has shape {jnp.shape(bias)} and dtype {dtype.name}"
        raise TypeError(f"{found}: must be float32 of shape {allowed}")


def overrides(encoding: Encoding | type[Encoding], *hooks: str) -> bool:
    """Whether the encoding, or a class of them, has its own form of any of these hooks."""
    cls = encoding if isinstance(encoding, type) else type(encoding)
    return any(getattr(cls, hook) is not getattr(Encoding, hook) for hook in hooks)


def reads_both_ways(encoding: Encoding) -> bool:
    """Whether the encoding says where keys ahead of the query are: biases and sums here count what lies behind it."""
    return not encoding.causal_only and not overrides(encoding, "scores", "bias", "weights", "values")


def full_float32(function: Function) -> Function:
    """The function with matrix products in full float32, whose factors GPUs and TPUs would round by default."""

    @functools.wraps(function)
    def exact(*arguments: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return exact  # type: ignore[return-value]
