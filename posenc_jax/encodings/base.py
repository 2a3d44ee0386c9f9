r"""The interface of all encodings. Its own hooks do nothing, which is attention without a positional encoding.

Letters: B batch, T queries, S keys, D model width, H query heads, K key heads, d head width. Positions are int32, or
float32 for schedules that place tokens between whole numbers. Their shape is [B or 1, T]: a batch whose sequences share
their positions passes one row, and a bias of positions is then computed once.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Real

from posenc_jax.documents import Documents
from posenc_jax.schema import Range, check_schema

# The hooks that change attention. An encoding overrides at least one of them.
HOOKS = ("embed", "rotate", "scores", "bias", "weights", "values")

# What the hooks are given.
Queries = Float[Array, "B T H d"]
Keys = Float[Array, "B S K d"]
RepeatedKeys = Float[Array, "B S H d"]  # each head of keys once for every query head of its group
Logits = Float[Array, "B H T S"]
Weights = Float[Array, "B H T S"]
Mask = Bool[Array, "T S"] | Bool[Array, "B 1 T S"]  # the latter if a window holds several documents
QueryPositions = Real[Array, "#B T"]
KeyPositions = Real[Array, "#B S"]
Context = tuple[Any, Any]  # what `prepare` returns for queries and for keys: None, or arrays [B, T, ...]

Base = Annotated[float, Range(above=1)]  # of inverse frequencies base^(-2m/d)


class Constant(nnx.Variable):
    """An array that is not trained, but saved, stacked and replaced like a parameter."""


def constant(values: Any) -> Constant:
    """Numbers as a float32 `Constant`."""
    return Constant(jnp.asarray(values, jnp.float32))


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


class Pairwise(NamedTuple):
    """A bias made of elementwise operations, which a kernel can compute for any block of queries and keys.

    `function(query, key, q_pos, k_pos)` returns the bias of one head. Its arguments are the terms and positions of
    queries and of keys, which broadcast against each other. With a `unit`, the function returns the input x of a sum
    instead: the bias is the sum of `unit(x, *numbers)` over n units. Each head has its own units. Positions are
    float32. All results must be finite, for keys ahead of the query too.
    """

    function: Callable[..., Array]
    query: tuple[Float[Array, "#B T #H"], ...] = ()
    key: tuple[Float[Array, "#B S #H"], ...] = ()
    unit: Callable[..., Array] | None = None
    numbers: tuple[Float[Array, "#H n"], ...] = ()


class Encoding(nnx.Module):
    r"""No positional encoding ("NoPE"): only the causal mask tells the order of tokens.

    .. math:: z_{ij} = q_i \cdot k_j / \sqrt{d}

    Source: Haviv et al. 2022; Kazemnejad et al. 2023. Nothing is learned. Every hook here is the identity. All other
    encodings derive from this class and override the hooks that they need.
    """

    shared: ClassVar[bool] = True  # one instance for all layers, or one per layer
    relative: ClassVar[bool] = True  # unchanged when a constant is added to all positions
    blockwise: ClassVar[bool] = True  # the bias of a block of queries and keys can be computed from the block alone
    head_factor: int = 1  # attention heads that `rotate` makes of each query head
    rotates_keys_once: bool = False  # `rotate` uses a key's own position and context, and no other token
    causal_only: bool = False  # not defined, or not published, for queries that see keys ahead of them
    both_ways: bool = False  # has logits or values of its own, which are defined for keys ahead of the query too
    table_length: int | None = None  # positions from here on cannot be encoded; None: any position can
    widths: Widths | None = None  # the sizes given to `posenc_jax.encodings.build`
    softcap: float = 0.0  # of the logits before the bias, see `soft_capped`; a model sets it

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

    def prepare(
        self, x: Float[Array, "B T D"], positions: Real[Array, "#B T"], documents: Int[Array, "B T"] | None = None
    ) -> Context:
        """Compute what the other hooks need from the input of an attention layer, for queries and for keys.

        If the window holds several `documents` (see `posenc_jax.documents`), no token may change the context of another
        document. Without them the argument is not passed. An encoding that overrides `extend` does not override this
        method.
        """
        if not overrides(self, "extend"):
            return None, None
        return self.extend(x, positions, None, **({} if documents is None else {"documents": documents}))[0]

    def rotate(
        self, q: Queries, k: Keys, q_pos: QueryPositions, k_pos: KeyPositions, ctx: Context
    ) -> tuple[Float[Array, "B T heads e"], Float[Array, "B S K e"]]:
        """Transform queries and keys by their own positions. K < H for grouped queries.

        Each query head becomes `head_factor` attention heads, which follow one another: heads = head_factor * H.
        """
        return q, k

    def scores(self, q: Queries, k: RepeatedKeys, ctx: Context) -> Logits:
        """Logits before the bias, in float32, with the soft cap."""
        products = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
        return soft_capped(products / math.sqrt(q.shape[-1]), self.softcap)

    def bias(
        self, q: Queries, k: RepeatedKeys, logits: Logits, q_pos: QueryPositions, k_pos: KeyPositions, ctx: Context
    ) -> Float[Array, "#B #H T S"] | None:
        """The float32 bias that is added to the logits. If it depends only on the distance, derive from `DistanceBias`.

        Queries and keys are those that `rotate` returned. Logits of keys that the query may not see are the lowest
        float32.
        """
        return None

    def pairwise(
        self, q: Queries, k: RepeatedKeys, q_pos: QueryPositions, k_pos: KeyPositions, ctx: Context
    ) -> Pairwise | None:
        """The bias in a form that kernels can compute, if it has one. Arguments are those of `bias`."""
        return None

    def weights(self, logits: Logits, mask: Mask) -> Weights:
        """Attention weights from logits. `mask` is True where the query may see the key."""
        return jax.nn.softmax(masked(logits, mask), axis=-1)

    def values(
        self, weights: Weights, v: Float[Array, "B S H e"], q_pos: QueryPositions, k_pos: KeyPositions, ctx: Context
    ) -> Float[Array, "B T H e"]:
        """The output of each query: weights times values. The weights have the dtype of `v`."""
        return jnp.einsum("bhts,bshe->bthe", weights, v)

    @property
    def packable(self) -> bool:
        """Whether documents of one window have the same outputs as each of them alone.

        Attention hides the tokens of other documents. An encoding that overrides `prepare` or `extend` must take their
        argument `documents`. One whose other hooks read tokens that the query does not see is not packable.
        """
        own = (getattr(self, hook) for hook in ("prepare", "extend") if overrides(self, hook))
        return all("documents" in inspect.signature(hook).parameters for hook in own)

    # Generation reads each token once and caches its keys, values and context. The next three say how an encoding does
    # that. Beside the cached tokens, `bias`, `weights` and `values` may get keys after the query, which are masked.

    @property
    def cacheable(self) -> bool:
        """Whether a cache gives the same logits as the whole text. Generation recomputes the text if it does not."""
        return not overrides(self, "prepare")

    def extend(
        self,
        x: Float[Array, "B T D"],
        positions: Real[Array, "#B T"],
        state: Any,
        documents: Int[Array, "B T"] | None = None,
    ) -> tuple[Context, Any]:
        """`prepare` for T tokens that follow others: their context, and the state after them.

        `state` is the one after the tokens before them, or None for the first tokens of a text. With `documents`, there
        are no tokens before them. An encoding that overrides `prepare` instead of this method cannot be cached.
        """
        return self.prepare(x, positions), None

    def update_keys(self, k: Keys, ctx: Any) -> Keys:
        """The cached keys after one more token, whose context is `ctx`, has been read.

        For an encoding whose `scores` depend on the tokens between key and query: the product of a query with the
        updated keys must equal `scores`. The keys are float32. Those of the new token are added after the update.
        """
        return k

    # An encoding whose logits depend on the tokens between key and query may override the next three hooks. They
    # compute the logits of one block of keys at a time, from the query's own block backwards. The result must equal
    # `scores` plus `bias`.

    def scan_init(self, q: Float[Array, "B t H d"]) -> Any:
        """The initial carry of the queries. The default is one sum per query and head: [B, H, t]."""
        return jnp.zeros((q.shape[0], q.shape[2], q.shape[1]), jnp.float32)

    def scan_keys(self, k: Float[Array, "B s K d"], ctx: Any) -> Any:
        """The context of a block of keys for `scan_step`, computed once for all queries from that of `prepare`."""
        return ctx

    def scan_step(
        self,
        carry: Any,
        q: Float[Array, "B t H d"],
        k: Float[Array, "B s H d"],
        mask: Bool[Array, "t s"] | Bool[Array, "B 1 t s"],
        ctx: Context,
    ) -> tuple[Any, Float[Array, "B H t s"]]:
        """The carry after a block of keys, and the float32 logits of the block with the bias.

        `mask` is True where the query may see the key. All other logits are ignored. `ctx` holds the context of the
        queries from `prepare` and that of the keys from `scan_keys`.
        """
        raise NotImplementedError


class DistanceBias(Encoding):
    """An encoding whose bias depends only on the distance, in tokens, between query and key.

    Attention can then compute the bias once for each distance, not for each pair.
    """

    def distance_bias(self, distance: Real[Array, "*n"]) -> Float[Array, "H *n"]:
        """The float32 bias of each head at each distance i - j. It must be finite at negative distances too."""
        raise NotImplementedError(f"{type(self).__name__} must override distance_bias")

    def bias(self, q, k, logits, q_pos, k_pos, ctx):
        return jnp.moveaxis(distance_bias_of(self, distances(q_pos, k_pos)), 0, 1)


def distance_bias_of(encoding: DistanceBias, distance: Real[Array, "*n"]) -> Float[Array, "H *n"]:
    """The result of `encoding.distance_bias`. Raises TypeError unless it is a float32 per head and distance."""
    bias = encoding.distance_bias(distance)
    shape = jnp.shape(bias)
    fits = len(shape) == distance.ndim + 1 and shape[1:] == distance.shape
    _check_bias(encoding, "distance_bias", bias, fits, f"[H, *distance.shape] with distance.shape = {distance.shape}")
    return bias


def distances(q_pos: QueryPositions, k_pos: KeyPositions) -> Real[Array, "#B T S"]:
    """The distance i - j, in tokens, from key j to query i. It is negative for keys ahead of the query."""
    return q_pos[:, :, None] - k_pos[:, None, :]


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see.

    If `causal`, it sees no key ahead of it. With a `window`, it sees only that many keys, of which the last is its own.
    `contiguous` says that positions step by one from key to key of a document, and that the queries are the last of the
    tokens.
    """

    causal: bool = True
    window: int | None = None
    contiguous: bool = False

    def __post_init__(self):
        if self.window is not None and not (self.causal and self.window >= 1):
            allowed = "must be at least 1, or None" if self.causal else "must be None if causal = False"
            raise ValueError(f"window = {self.window!r}: {allowed}")

    def materialize(self, query_index: Int[Array, "T"], key_index: Int[Array, "S"]) -> Bool[Array, "T S"]:
        """True where the query may see the key."""
        return self.allows(query_index[:, None] - key_index)

    def allows(self, distance: Int[Array, "*n"]) -> Bool[Array, "*n"]:
        """True where the query may see the key that is `distance` tokens before it."""
        seen = distance >= 0 if self.causal else jnp.ones(distance.shape, bool)
        return seen & (distance < self.window) if self.window else seen


CAUSAL = AttentionMask()


class AttentionInputs(NamedTuple):
    """The arrays of an attention: queries and keys as `rotate` returns them, and what the hooks read beside them.

    The queries are the last T of the S tokens. Their H heads share K heads of keys and values. `sinks` are logits that
    take weight from all keys: see `posenc_jax.attention.sinks`. `documents` are the numbers of the documents of queries
    and keys if a window holds several: see `posenc_jax.documents`. A query sees only keys of its own document.
    """

    q: Queries
    k: Keys
    v: Float[Array, "B S K e"]
    q_pos: QueryPositions
    k_pos: KeyPositions
    ctx: Context = (None, None)
    sinks: Float[Array, "H"] | None = None
    documents: Documents | None = None


def masked(logits: Logits, mask: Mask) -> Logits:
    """Logits with the lowest number of their dtype for keys that the query may not see."""
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def soft_capped(logits: Float[Array, "*n"], softcap: float) -> Float[Array, "*n"]:
    """softcap * tanh(logits / softcap), which lies between both signs of `softcap`; 0 changes nothing.

    Source: Gemma 2 (2024), section 2.
    """
    return softcap * jnp.tanh(logits / softcap) if softcap else logits


def visible(logits: Logits) -> Bool[Array, "B H T S"]:
    """True where the query may see the key, from the logits that `bias` is given."""
    return logits > jnp.finfo(logits.dtype).min


def construct(cls: type[Encoding], config: Any, dims: Dims, rngs: nnx.Rngs) -> Encoding:
    """Build an encoding of this class. Raises TypeError if it overrides no hook or holds arrays outside variables."""
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
    encoding.widths = Widths(dims.d_model, dims.num_heads, dims.num_kv_heads, dims.head_dim)
    return encoding


def bias_of(
    encoding: Encoding, q: Queries, k: RepeatedKeys, logits: Logits, *others: Any
) -> Float[Array, "#B #H T S"] | None:
    """The result of `Encoding.bias`. Raises TypeError unless it is None or a float32 array that fits the logits."""
    bias = encoding.bias(q, k, logits, *others)
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
    """Whether the encoding, or the class, overrides any of these hooks. A soft cap counts as `scores` of its own."""
    cls = encoding if isinstance(encoding, type) else type(encoding)
    capped = cls is not encoding and encoding.softcap and "scores" in hooks
    return bool(capped) or any(getattr(cls, hook) is not getattr(Encoding, hook) for hook in hooks)


def reads_both_ways(encoding: Encoding) -> bool:
    """Whether the encoding is defined for keys ahead of the query. Most biases and sums count only tokens behind it."""
    own = overrides(encoding, "scores", "bias", "weights", "values")
    return encoding.both_ways or not (encoding.causal_only or own)


def full_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with all matrix products in full float32. GPUs and TPUs would round the factors by default."""

    @functools.wraps(function)
    def exact(*arguments: Any) -> Any:  # jax's own decorator is one context in jax 0.7: a nested call would not end it
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return exact
