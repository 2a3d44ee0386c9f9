"""Model FLOPs agree with XLA's count for the compiled gradient, and with sums over pairs of tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import bert, recurrent
from posenc_jax import encodings
from posenc_jax.config import RunConfig
from posenc_jax.model_config import RECURRENT
from posenc_jax.runs import train
from posenc_jax.training import flops, objectives
from posenc_jax.training.step import build_model
from tests.small import run_config, split

WIDE = {"model__d_model": 128, "model__head_dim": 64, "model__d_ff": 256}


def counted(config, batch, length):
    """FLOPs per token of the loss and its gradient, as XLA counts them. XLA counts a loop as one iteration."""
    graphdef, params, constants = split(build_model(config, jnp.zeros((), jnp.uint32)))

    def loss(params, tokens):
        model = nnx.merge(graphdef, params, constants)
        return objectives.training_loss(config, model, tokens, None, jax.random.key(0))[0]

    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    analysis = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile().cost_analysis()
    return analysis["flops"] / (batch * length)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__activation": "gelu", "model__tied_embeddings": False},
        {"model__num_heads": 4, "model__num_kv_heads": 1, "model__num_layers": 3, "model__attention_gate": True},
        {"encoding": "rope_pp", "model__attention_gate": True},
    ],
)
def test_a_transformer_is_counted_as_xla_does_but_for_the_masked_half(changes):
    config = run_config(training__length=32, evaluation__lengths=(32,), **WIDE | changes)
    model = config.model
    heads = model.num_heads * encodings.load(config.encoding.name).head_factor
    masked = 12 * model.num_layers * heads * model.head_dim * (32 - 1) / 2
    assert counted(config, 8, 32) == pytest.approx(flops.per_token(config) + masked, rel=0.05)


def test_an_encoder_is_counted_with_its_head():
    recipe = bert.get_config("size=smoke,tokens=bytes,positions=rope")
    recipe.model.d_model, recipe.model.head_dim, recipe.model.d_ff, recipe.training.length = 128, 64, 256, 32
    config = RunConfig.from_mapping(recipe.to_dict())
    assert counted(config, 8, 32) == pytest.approx(flops.per_token(config), rel=0.05)


@pytest.mark.parametrize("cell", RECURRENT)
def test_a_recurrent_model_is_counted_as_xla_counts_one_token(cell):
    recipe = recurrent.get_config(f"size=smoke,cell={cell}")
    recipe.model.d_model = 128
    config = RunConfig.from_mapping(recipe.to_dict())
    # A loop over one token disappears. XLA omits the gradient with respect to the initial state, which is constant.
    stacks, gates = (2, 4) if cell == "elmo" else (1, flops.GATES[cell])
    left_out = 2 * stacks * config.model.num_layers * gates * 128**2
    assert counted(config, 64, 1) == pytest.approx(flops.per_token(config) - left_out, rel=0.05)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_pairs_are_those_that_the_mask_leaves(window):
    # The first layer has the encoding and the window, the second has neither.
    config = run_config(model__window=window, model__pattern="EN", training__length=32, evaluation__lengths=(32,))
    first = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    keys = sum(min(t, window or 32) for t in range(1, 33)) / 32
    H, d = config.model.num_heads, config.model.head_dim
    parameters = 64 * d * 4 * H + 3 * 64 * 128
    assert flops.per_token(first) == pytest.approx(6 * (parameters + 64 * 256 + 2 * H * d * keys))
    assert flops.per_token(config) - flops.per_token(first) == pytest.approx(6 * (parameters + 2 * H * d * 16.5))


def test_the_peak_is_of_all_devices_and_unknown_of_a_cpu():
    assert flops.peak("NVIDIA H200", 8) == 8 * 989e12
    assert flops.peak(jax.devices()[0].device_kind, 8) is None


def test_the_share_of_the_peak_is_logged_where_it_is_known():
    clock = train._Clock(tokens_per_step=100, flops_per_token=6.0, peak_flops=3e4)
    clock.start(1)
    values = clock.read(3)
    assert values["flops_per_second"] == pytest.approx(6 * values["tokens_per_second"])
    assert values["mfu"] == pytest.approx(values["flops_per_second"] / 3e4)
    clock = train._Clock(tokens_per_step=100, flops_per_token=6.0, peak_flops=None)
    clock.start(1)
    assert "mfu" not in clock.read(3)
