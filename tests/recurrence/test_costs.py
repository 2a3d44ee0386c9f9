"""Costs against length: growth and crossovers for known times, and measurements on small models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import recurrent
from experiments.recurrence import costs
from experiments.recurrence.costs import Cost
from posenc_jax.attention import Attention
from posenc_jax.config import RunConfig
from posenc_jax.results import read_rows, write_rows
from posenc_jax.training.objectives import token_losses
from posenc_jax.training.step import build_model
from tests.small import run_config, split

LENGTHS = (64, 128, 256, 512, 1024)


def rows(model, seconds, held=lambda n: 8 * n, lengths=LENGTHS, noise=(1.0,)):
    """Timings of training, with one repeat for each noise factor."""
    return [
        Cost(model, "training", n, 1, repeat, factor * seconds(n), held(n), 1)
        for repeat, factor in enumerate(noise)
        for n in lengths
    ]


def of(found, model, quantity="seconds"):
    (row,) = [row for row in found if (row.model, row.quantity) == (model, quantity)]
    return row


def recurrent_config(cell):
    recipe = recurrent.get_config(f"size=smoke,cell={cell}")
    recipe.model.d_model = 16
    return RunConfig.from_mapping(recipe.to_dict())


def test_exponents_are_those_of_the_powers():
    found = costs.exponents(
        rows("attention", lambda n: 3e-9 * n**2, lambda n: 5 * n**2) + rows("recurrence", lambda n: 2e-5 * n)
    )
    assert of(found, "attention").value == pytest.approx(2)
    assert of(found, "attention", "temporary_bytes").value == pytest.approx(2)
    assert of(found, "recurrence").value == pytest.approx(1)
    assert of(found, "recurrence").ci_low is None


def test_exponents_are_of_the_longer_half_of_the_lengths():
    bent = rows("bent", lambda n: 1.0 if n <= 128 else n**1.5)
    (exponent,) = [row for row in costs.exponents(bent) if row.quantity == "seconds"]
    assert (exponent.shortest, exponent.longest) == (256, 1024)
    assert exponent.value == pytest.approx(1.5)


def test_the_interval_of_an_exponent_is_over_repeats():
    steady = costs.exponents(rows("steady", lambda n: n**2.0, noise=(1.0, 2.0, 0.5)))
    assert of(steady, "steady").ci_low == pytest.approx(2)  # slower repeats have the same exponent
    slopes = (1.8, 2.0, 2.2)
    noisy = [
        Cost("noisy", "training", n, 1, repeat, float(n) ** slope, n, 1)
        for repeat, slope in enumerate(slopes)
        for n in LENGTHS
    ]
    exponent = of(costs.exponents(noisy), "noisy")
    assert exponent.value == pytest.approx(2.0)
    assert exponent.ci_high - 2.0 == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    assert exponent.ci_low == pytest.approx(4.0 - exponent.ci_high)


def test_an_exponent_takes_three_lengths():
    with pytest.raises(ValueError, match="three lengths"):
        costs.exponents(rows("short", lambda n: n, lengths=(64, 128)))


def crossing(attention, recurrence):
    (found,) = costs.crossovers(rows("transformer", attention) + rows("gru", recurrence), ["gru"], "transformer")
    return found


def test_crossover_is_where_the_powers_meet():
    found = crossing(lambda n: 1e-7 * n**2, lambda n: 3e-5 * n)
    assert found.length == pytest.approx(300)
    assert str(found) == "training: gru is faster than transformer from about 300 tokens on"


def test_without_a_crossover_it_says_up_to_where():
    found = crossing(lambda n: 1e-7 * n**2, lambda n: 3e-3 * n)
    assert found.length is None
    assert str(found) == "training: gru is not faster than transformer at any length up to 1024 tokens"


def test_a_recurrence_that_is_always_faster_is_so_from_the_shortest_length():
    found = crossing(lambda n: 1e-7 * n**2, lambda n: 1e-7 * n)
    assert found.length == 64
    assert str(found) == "training: gru is faster than transformer at every length from 64 tokens"


def test_a_recurrence_must_stay_faster():
    found = crossing(lambda n: 1.0, lambda n: 2.0 if n in (64, 256) else 0.5)
    assert 256 < found.length < 512
    assert crossing(lambda n: 1.0, lambda n: 2.0 if n == 1024 else 0.5).length is None


def test_crossovers_are_of_median_times():
    slow_once = rows("gru", lambda n: 3e-5 * n, noise=(1.0, 1.0, 100.0))
    attention = rows("transformer", lambda n: 1e-7 * n**2, noise=(1.0, 1.0, 1.0))
    (found,) = costs.crossovers(attention + slow_once, ["gru"], "transformer")
    assert found.length == pytest.approx(300)


def test_recurrences_wait_for_every_token_and_attention_for_every_layer():
    assert costs.sequential_steps(run_config("rope"), 100) == 2
    assert costs.sequential_steps(recurrent_config("gru"), 100) == 200


def test_every_model_is_timed_in_every_repeat_at_every_length(tmp_path):
    small = {"model__num_layers": 1, "model__d_model": 16, "model__d_ff": 16, "model__head_dim": 8}
    configs, dense = {"gru": recurrent_config("gru")}, {"dense attention": run_config("rope", **small)}
    found = costs.measure(configs, (8, 16), batch=2, repeats=2, seconds=0.0, dense=dense, dense_up_to=8)
    assert {(row.model, row.work, row.length, row.repeat) for row in found} == {
        (model, work, length, repeat)
        for model, length in (("gru", 8), ("gru", 16), ("dense attention", 8))
        for work in ("training", "inference")
        for repeat in (0, 1)
    }
    assert len(found) == 12
    assert all(row.seconds > 0 and row.batch == 2 for row in found)
    held = {(row.model, row.work, row.length): row.temporary_bytes for row in found}
    assert held["gru", "training", 16] > held["gru", "inference", 16] > 0
    assert held["gru", "training", 16] > held["gru", "training", 8]
    write_rows(tmp_path / "costs.csv", Cost, found)
    assert read_rows(tmp_path / "costs.csv", Cost) == found


def test_dense_attention_holds_all_logits_and_reads_the_same():
    config = run_config("rope", model__num_layers=1)
    own = costs.structure(config, dense=False), costs.structure(config, dense=True)
    _, params, constants = split(build_model(config, jnp.zeros((), jnp.uint32)))
    tokens = jax.random.randint(jax.random.key(0), (1, 257), 0, 256)

    def read(graphdef):
        return lambda params, constants: token_losses(nnx.merge(graphdef, params, constants), tokens)

    blocks, dense = (read(graphdef) for graphdef in own)
    np.testing.assert_allclose(dense(params, constants), blocks(params, constants), rtol=2e-4, atol=2e-4)
    assert "[1,2,256,256]" in str(jax.make_jaxpr(dense)(params, constants))
    assert "[1,2,256,256]" not in str(jax.make_jaxpr(blocks)(params, constants))
    assert Attention.attend is None  # other models are not affected


def test_only_attention_can_be_dense():
    with pytest.raises(ValueError, match="gru has no attention"):
        costs.structure(recurrent_config("gru"), dense=True)
