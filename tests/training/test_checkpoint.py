"""Checkpoints come back exactly, are verified, and the best one outlives the last."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.training import optimizer as optimizers
from posenc_jax.training import sharding
from posenc_jax.training.checkpoint import CheckpointError, Checkpoints
from posenc_jax.training.step import initial_state
from tests.small import run_config


def state(value):
    return {"params": {"a": jnp.full((3, 4), value), "b": jnp.arange(5)}, "step": jnp.asarray(value, jnp.int32)}


def saved(folder, losses, keep_last=2):
    checkpoints = Checkpoints(folder / "checkpoints", keep_last)
    for step, loss in losses.items():
        checkpoints.save(step, state(float(step)), {"step": step}, loss)
    checkpoints.close()
    return folder / "checkpoints"


def restored(folder, like=None):
    checkpoints = Checkpoints(folder, 2)
    try:
        return checkpoints.restore(like or state(0.0))
    finally:
        checkpoints.close()


def largest_file(folder):
    files = [path for path in (folder / "state").rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def damage(folder):
    file = largest_file(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    folder = saved(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.6})
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"step_2", "step_4", "step_5"}


def test_the_newest_comes_back_exactly(tmp_path):
    found, meta = restored(saved(tmp_path, {1: 2.0, 2: 3.0}))
    jax.tree.map(np.testing.assert_array_equal, found, state(2.0))
    assert meta["step"] == 2


def test_no_checkpoint_is_no_error(tmp_path):
    assert restored(tmp_path / "checkpoints") is None


@pytest.mark.parametrize("harm", ["flip", "delete", "truncate", "manifest"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, caplog, harm):
    folder = saved(tmp_path, {1: 2.0, 2: 3.0})
    largest = largest_file(folder / "step_2")
    if harm == "flip":
        damage(folder / "step_2")
    elif harm == "delete":
        largest.unlink()
    elif harm == "truncate":
        largest.write_bytes(largest.read_bytes()[:-1])
    else:
        (folder / "step_2" / "manifest.json").write_text("{")
    found, _ = restored(folder)
    assert found["step"] == 1
    assert "checkpoint 2 is damaged" in caplog.text
    assert not (folder / "step_2").exists()
    assert len(list((tmp_path / "damaged").iterdir())) == 1


def test_if_all_are_damaged_it_says_so(tmp_path):
    folder = saved(tmp_path, {1: 2.0, 2: 3.0})
    damage(folder / "step_1")
    damage(folder / "step_2")
    with pytest.raises(CheckpointError, match="every checkpoint"):
        restored(folder)


@pytest.mark.parametrize(
    "other",
    [
        {"params": {"a": jnp.zeros((3, 5)), "b": jnp.arange(5)}, "step": jnp.zeros((), jnp.int32)},
        {"params": {"a": jnp.zeros((3, 4), jnp.bfloat16), "b": jnp.arange(5)}, "step": jnp.zeros((), jnp.int32)},
        {"params": {"a": jnp.zeros((3, 4))}, "step": jnp.zeros((), jnp.int32)},
    ],
    ids=["shape", "dtype", "missing"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, other):
    with pytest.raises(CheckpointError, match="other arrays"):
        restored(saved(tmp_path, {1: 2.0}), other)


def test_a_step_that_was_saved_already_is_an_error(tmp_path):
    saved(tmp_path, {2: 1.0})
    with pytest.raises((CheckpointError, ValueError)):
        saved(tmp_path, {2: 1.0})


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_state_saved_on_some_devices_comes_back_on_others(tmp_path, before, after):
    def on(devices, seed):
        config = run_config(model__num_layers=1, seed=seed)
        mesh = sharding.make_mesh(8, jax.devices()[:devices], fsdp=devices)
        return initial_state(config, optimizers.build(config.optimizer, total_steps=2, warmup_steps=1), mesh)

    state, like = on(before, seed=0), on(after, seed=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(1, state, {"step": 1}, 1.0)
    checkpoints.close()
    found, _ = restored(tmp_path / "checkpoints", like)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)
    assert len(found["params"]["embedding"].devices()) == after
