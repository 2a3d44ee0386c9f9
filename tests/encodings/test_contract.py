"""The contract of every encoding in the table. A new encoding is tested as soon as it has a row there."""

import dataclasses
import functools
import sys
import typing
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posenc_jax import encodings
from posenc_jax.attention.dense import dense
from posenc_jax.attention.dispatch import algorithm
from posenc_jax.distributed import sharding
from posenc_jax.encodings.base import CAUSAL, AttentionInputs, Encoding
from posenc_jax.schema import ConfigError, Range
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.step import abstract_model, initial_state, make_train_step
from tests.small import DIMS, forward, run_config, split, tokens, transformer

every_encoding = pytest.mark.parametrize("name", encodings.names())


def kinds():
    """Every encoding. It is marked slow if an earlier one overrides the same hooks, and so uses the same code paths."""
    seen = set()
    for name in encodings.names():
        own = encodings.load(name)
        hooks = [hook for hook, value in vars(Encoding).items() if callable(value) and not hook.startswith("_")]
        overridden = frozenset(hook for hook in hooks if getattr(own, hook) is not getattr(Encoding, hook))
        yield pytest.param(name, marks=pytest.mark.slow if overridden in seen else ())
        seen.add(overridden)


one_of_each_kind = pytest.mark.parametrize("name", list(kinds()))


def forms():
    """Every encoding, with its defaults and with each other value of its boolean and literal settings."""
    for name in encodings.names():
        yield pytest.param(name, {}, id=name)
        for field in dataclasses.fields(encodings.load(name).Config):
            choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
            for choice in (not field.default,) if field.type is bool else choices:
                if choice != field.default:
                    yield pytest.param(name, {field.name: choice}, id=f"{name}-{field.name}={choice}")


LENGTH = 24
TEXT, PLACES = tokens(length=LENGTH), jnp.arange(LENGTH)[None]


def small(name, **changes):
    """A model of one layer, with noise on every parameter, so that none has a special value such as zero."""
    return perturbed(transformer(name, num_layers=1, **changes))


def perturbed(model: nnx.Module) -> nnx.Module:
    graphdef, params, constants = split(model)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(structure, noisy), constants)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradients(graphdef, params, constants, text, positions):
    def loss(params):
        logits = nnx.merge(graphdef, params, constants)(text, positions)
        return (logits**2).mean(), logits

    gradients, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradients


class Form:
    """A small model with one form of an encoding, and the outputs of one compiled program for it."""

    def __init__(self, name, hyperparameters):
        self.name, self.hyperparameters = name, hyperparameters
        self.model = small(name, hyperparameters=hyperparameters)
        self.table_length = self.model.encoding().table_length
        self.arrays = split(self.model)

    def __call__(self, text=TEXT, positions=PLACES):
        return logits_and_gradients(*self.arrays, text, positions)[0]

    @functools.cached_property
    def far(self):
        """The logits at eight times the training length, or at the length of the learned table if there is one."""
        return forward(self.model, tokens(length=self.table_length or 256))


@pytest.fixture(scope="module", params=[pytest.param(form.values, id=form.id) for form in forms()])
def form(request):
    return Form(*request.param)


@every_encoding
def test_docstring_has_equation_and_source(name):
    doc = encodings.load(name).__doc__
    assert doc != Encoding.__doc__ or name == "none"
    assert ".. math::" in doc
    assert "Source:" in doc


@every_encoding
def test_logits_of_a_bfloat16_model_have_their_shape_and_are_float32(name):
    logits = nnx.eval_shape(lambda: transformer(name, num_layers=1, dtype="bfloat16")(tokens()))
    assert logits.shape == (2, 32, 64)
    assert logits.dtype == jnp.float32


def test_later_tokens_do_not_change_earlier_logits(form):
    before, after = form(), form(TEXT.at[:, 15].set((TEXT[:, 15] + 1) % 64))
    np.testing.assert_allclose(before[:, :15], after[:, :15], atol=1e-6)
    assert jnp.abs(before[:, 15:] - after[:, 15:]).max() > 1e-3


def test_a_prefix_gives_the_same_logits_as_the_whole(form):
    text = tokens(length=form.table_length or 256)
    np.testing.assert_allclose(form(text[:, :LENGTH]), form.far[:, :LENGTH], atol=2e-5)


def test_shifting_all_positions_changes_nothing_if_and_only_if_relative(form):
    shift = 8 if form.table_length else 1000
    difference = jnp.abs(form() - form(positions=PLACES + shift)).max()
    if encodings.load(form.name).relative:
        assert difference < 1e-3
    else:
        assert difference > 1e-2


@one_of_each_kind
def test_positions_of_one_row_serve_the_batch(name):
    model = small(name)
    for_each_row = jnp.tile(PLACES, (2, 1))
    np.testing.assert_allclose(forward(model, TEXT, PLACES), forward(model, TEXT, for_each_row), atol=1e-5)


def test_finite_at_eight_times_the_training_length(form):
    assert jnp.isfinite(form.far).all()
    if form.table_length is not None:
        with pytest.raises(ValueError, match="beyond"):
            forward(form.model, tokens(length=256))


@every_encoding
def test_bfloat16_stays_close_to_float32_at_eight_times_the_training_length(name):
    exact, rounded = small(name), small(name, dtype="bfloat16")
    text = tokens(length=exact.encoding().table_length or 256)
    difference = jnp.abs(forward(rounded, text) - forward(exact, text))
    assert difference.max() < (0.5 if name == "tapa" else 0.15)  # its phase multiplies the rounding of q and k by 2 pi
    assert difference.mean() < 0.015


def test_gradients_reach_every_parameter(form):
    _, gradients = logits_and_gradients(*form.arrays, TEXT, PLACES)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert jnp.isfinite(gradient).all(), path
        assert jnp.abs(gradient).max() > 0, path


def config_fields():
    return [(name, field) for name in encodings.names() for field in dataclasses.fields(encodings.load(name).Config)]


@pytest.mark.parametrize(("name", "field"), config_fields(), ids=lambda value: getattr(value, "name", value))
def test_every_field_of_config_changes_the_output(name, field):
    other = field.metadata.get("alternative") or alternative(field.type, field.default)
    assert change_of_output(name, {field.name: other}) > 1e-4


def change_of_output(name, hyperparameters):
    """How much the output changes with a setting. If it reshapes parameters, only their new entries can change it."""
    window = 8 if "window_base" in hyperparameters else 0
    models = tuple(transformer(name, num_layers=1, window=window, hyperparameters=own) for own in ({}, hyperparameters))
    shapes = [jax.tree.map(jnp.shape, split(model)[1]) for model in models]
    if shapes[0] == shapes[1]:
        models = map(perturbed, models)
    else:
        others = split(perturbed(models[0]))[1]
        models = (with_values_of_entries(model, others) for model in models)
    # Some settings act only on distances and positions beyond the training length.
    positions = 40 * jnp.arange(32)[None] if not transformer(name).encoding().table_length else None
    default, changed = (forward(model, tokens(), positions) for model in models)
    return jnp.abs(default - changed).max()


def with_values_of_entries(model, others):
    """The model with the parameters `others` and, in encodings, values that depend on name and index alone.

    Arrays of the same name and of two shapes then agree in all entries that both have.
    """
    graphdef, params, constants = split(model)

    def values(path, x):
        place = zlib.crc32(jax.tree_util.keystr(path).encode()) % 1000
        for axis, index in enumerate(np.indices(x.shape)):
            place = place + index * (12.9898, 78.233, 37.719)[axis]
        return jnp.asarray(43758.5453 * np.sin(place) % 1 - 0.5, x.dtype)

    own = {key: jax.tree_util.tree_map_with_path(values, x) for key, x in params.items() if key.startswith("encoding_")}
    return nnx.merge(graphdef, {key: own.get(key, others.get(key)) for key in params}, constants)


class Idle(encodings.load("t5")):
    """A T5 encoding with more learned rows than it reads, and a model with more layers than it uses."""

    @dataclasses.dataclass(frozen=True)
    class Config(encodings.load("t5").Config):
        rows: int = 0
        layer: bool = False
        read: int = 0

    def __init__(self, config, dims, rngs):
        super().__init__(config, dims, rngs)
        self.read = self.table.shape[0] + config.read
        self.table = nnx.Param(jnp.pad(self.table[...], ((0, config.rows + config.read), (0, 0))))
        self.layer = nnx.Linear(3, 3, rngs=rngs) if config.layer else None

    def distance_bias(self, distance):
        return jnp.moveaxis(self.table[...][distance % self.read], -1, 0)


@pytest.mark.parametrize(("change", "noticed"), [({"rows": 8}, False), ({"layer": True}, False), ({"read": 8}, True)])
def test_parameters_that_a_setting_adds_and_nothing_reads_are_noticed(change, noticed, monkeypatch):
    monkeypatch.setitem(encodings.TABLE, "idle", "idle.Idle")
    monkeypatch.setitem(sys.modules, "posenc_jax.encodings.idle", sys.modules[__name__])
    assert (change_of_output("idle", change) > 1e-4) == noticed


def alternative(hint, default):
    """Another valid value of a field."""
    base = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
    if typing.get_origin(base) is typing.Literal:
        return next(choice for choice in typing.get_args(base) if choice != default)
    if base is bool:
        return not default
    allowed = [limit for limit in getattr(hint, "__metadata__", ()) if isinstance(limit, Range)]
    candidates = [base(default * 2), base(default / 2), base(default + 1)]
    return next(value for value in candidates if value != default and all(value in limit for limit in allowed))


@every_encoding
def test_an_unknown_hyperparameter_is_refused(name):
    with pytest.raises(ConfigError, match="no such field"):
        encodings.build(name, DIMS, nnx.Rngs(0), tempo=1.0)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"must be one of: none, .*Did you mean 'alibi'"):
        encodings.build("alibbi", DIMS, nnx.Rngs(0))


@every_encoding
def test_works_with_every_form_of_attention(name):
    """This includes grouped-query attention, norms before the encoding, and an untied output layer."""
    logits = forward(transformer(name, num_layers=1, num_kv_heads=2, qk_norm=True, tied_embeddings=False), TEXT)
    assert jnp.isfinite(logits).all()
    assert logits.std() > 1e-3


@pytest.mark.parametrize("change", [{"num_kv_heads": 2}, {"qk_norm": True}, {"tied_embeddings": False}], ids=str)
def test_every_form_of_attention_changes_the_output(change):
    logits = [forward(transformer("rope", num_layers=1, **own), TEXT) for own in ({}, change)]
    assert jnp.abs(logits[0] - logits[1]).max() > 1e-3


@every_encoding
@pytest.mark.parametrize("head_dim", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_head_of_odd_width_is_refused_or_encoded_whole(name, head_dim):
    dims, positions = dataclasses.replace(DIMS, head_dim=head_dim), jnp.arange(32)[None]
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 32, dims.num_heads, head_dim))

    @jax.jit
    def attended(x):
        encoding = perturbed(encodings.build(name, dims, nnx.Rngs(3)))
        ctx = encoding.prepare(x, positions)
        turned, keys = encoding.rotate(q, k, positions, positions, ctx)
        return turned, dense(encoding, AttentionInputs(turned, keys, v, positions, positions, ctx))

    refused = None
    try:
        turned, out = attended(attention_inputs()[0])
    except ConfigError as error:
        refused = str(error)
    if refused:
        assert f"head_dim = {head_dim}" in refused
        return
    assert jnp.isfinite(out).all()
    if turned.shape == q.shape:
        changed = (turned != q).any(axis=(0, 1, 2))
        assert changed.all() or not changed.any()


@one_of_each_kind
def test_recomputing_layers_gives_the_same_gradients(name):
    gradients = []
    for remat in (False, True):
        graphdef, params, constants = split(transformer(name, num_layers=1, remat=remat))

        def loss(params, graphdef=graphdef, constants=constants):
            return nnx.merge(graphdef, params, constants)(TEXT).std()

        gradients.append(jax.jit(jax.grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


@one_of_each_kind
def test_compiled_equals_uncompiled(name):
    model = small(name)
    np.testing.assert_allclose(forward(model, TEXT), model(TEXT), atol=2e-5)


def attention_inputs():
    """The input of an attention layer, and the queries, keys and values."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2, 32, DIMS.d_model))
    return x, *(jax.random.normal(key, (2, 32, DIMS.num_heads, DIMS.head_dim)) for key in keys[1:])


def test_last_queries_alone_equal_the_full_attention(form):
    """As with a key-value cache, the hooks get only the last queries, with their positions and context."""

    @jax.jit
    def attended(x, q, k, v):
        encoding = perturbed(encodings.build(form.name, DIMS, nnx.Rngs(3), **form.hyperparameters))
        positions = jnp.arange(32)[None]
        ctx = encoding.prepare(x, positions)
        q, k = encoding.rotate(q, k, positions, positions, ctx)
        full = dense(encoding, AttentionInputs(q, k, v, positions, positions, ctx))
        last_ctx = (jax.tree.map(lambda leaf: leaf[:, -5:], ctx[0]), ctx[1])
        last = AttentionInputs(q[:, -5:], k, v, positions[:, -5:], positions, last_ctx)
        forms = (dense, functools.partial(algorithm(encoding, 10**6), block=7))
        return full[:, -5:], [attend(encoding, last, CAUSAL) for attend in forms]

    full, cached = attended(*attention_inputs())
    for last in cached:
        np.testing.assert_allclose(last, full, atol=1e-5)


@every_encoding
def test_grouped_queries_equal_a_head_of_keys_repeated_for_each(name):
    positions = jnp.arange(32)[None]

    def build(heads):
        return encodings.build(name, dataclasses.replace(DIMS, num_kv_heads=heads), nnx.Rngs(3))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def attended(heads, repeats, x, q, k, v):
        encoding = perturbed(build(heads))
        keys, values = (jnp.repeat(a[:, :, :2], repeats, axis=2) for a in (k, v))
        ctx = encoding.prepare(x, positions)
        turned = encoding.rotate(q, keys, positions, positions, ctx)
        return dense(encoding, AttentionInputs(*turned, values, positions, positions, ctx))

    shapes = [jax.tree.map(jnp.shape, nnx.state(nnx.eval_shape(lambda n=heads: build(n)))) for heads in (2, 4)]
    if shapes[0] != shapes[1]:
        pytest.skip("has parameters for each head of keys; its own tests compare grouped queries with its equation")
    results = [attended(heads, repeats, *attention_inputs()) for heads, repeats in ((2, 1), (4, 2))]
    np.testing.assert_allclose(*results, atol=1e-5)


@one_of_each_kind
def test_stacked_members_equal_each_alone(name):
    members = [split(small(name, seed=seed)) for seed in (0, 1)]
    graphdef = members[0][0]
    assert graphdef == members[1][0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(member[1:] for member in members))
    together = jax.jit(jax.vmap(lambda arrays: nnx.merge(graphdef, *arrays)(TEXT)))(stacked)
    for logits, (_, params, constants) in zip(together, members, strict=True):
        np.testing.assert_allclose(logits, forward(nnx.merge(graphdef, params, constants), TEXT), atol=5e-5)


@one_of_each_kind
def test_dropout_bfloat16_grouped_queries_and_eight_devices_together(name):
    changes = {"model__num_layers": 1, "model__dropout": 0.2, "model__dtype": "bfloat16", "model__num_kv_heads": 1}
    config = run_config(name, **changes)
    model = abstract_model(config)[0]
    optimizer = optimizers.build(config.optimizer, total_steps=4, warmup_steps=1)
    step = jax.jit(make_train_step(config, model, optimizer, jnp.ones(256, int)))
    mesh = sharding.make_mesh(8)
    state = sharding.replicate(initial_state(config, optimizer), mesh)
    for seed in (0, 1):
        batch = np.random.default_rng(seed).integers(0, 256, (8, 33), dtype=np.int32)
        state, metrics = step(state, sharding.shard_rows(batch, mesh))
    assert metrics["finite"]
    assert metrics["loss"] < 12
