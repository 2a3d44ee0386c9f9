"""Checkpoints are restored exactly and verified. Readers of a running run change nothing."""

import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from posenc_jax.distributed import sharding
from posenc_jax.training import checkpoint
from posenc_jax.training import optimizer as optimizers
from posenc_jax.training.checkpoint import CheckpointError, Checkpoints, SaveError, check_step, read_newest
from posenc_jax.training.step import initial_state
from tests.small import run_config


def state(value):
    return {"params": {"a": jnp.full((3, 4), value), "b": jnp.arange(5)}, "step": jnp.asarray(value, jnp.int32)}


def saved(folder, *steps, keep_last=2):
    checkpoints = Checkpoints(folder / "checkpoints", keep_last)
    for step in steps:
        checkpoints.save(step, state(float(step)), {"step": step})
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


def test_the_last_ones_are_kept(tmp_path):
    folder = saved(tmp_path, 1, 2, 3, 4, 5)
    assert checkpoint.steps(folder) == [4, 5]
    saved(tmp_path, 6)  # by another process
    assert checkpoint.steps(folder) == [5, 6]


def test_the_newest_comes_back_exactly(tmp_path):
    found, meta = restored(saved(tmp_path, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, found, state(2.0))
    assert meta["step"] == 2


def test_no_checkpoint_is_no_error(tmp_path):
    assert restored(tmp_path / "checkpoints") is None


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_damage_of_any_file_is_noticed_and_the_checkpoint_before_is_used(tmp_path, caplog, harm):
    intact = saved(tmp_path / "intact", 1, 2)
    names = [path.relative_to(intact) for path in (intact / "step_2").rglob("*") if path.is_file()]
    assert len(names) > 10
    for i, name in enumerate(names):
        folder = shutil.copytree(intact, tmp_path / str(i) / "checkpoints")
        harm(folder / name)
        caplog.clear()
        found, _ = restored(folder)
        assert found["step"] == 1
        assert "checkpoint 2 is damaged" in caplog.text, name
        assert not (folder / "step_2").exists()
        (kept,) = (folder.parent / "damaged").iterdir()
        assert sum(path.is_file() for path in kept.rglob("*")) >= len(names) - 1


@pytest.mark.parametrize("at", [i / 40 for i in range(40)])
def test_no_byte_of_the_manifest_can_change_unnoticed(tmp_path, at):
    folder = tmp_path / "step_1"
    folder.mkdir()
    (folder / "a").write_text("content")
    checkpoint.write_manifest(folder)
    assert checkpoint.damage(folder) is None
    flip(folder / "manifest.json", at)
    assert checkpoint.damage(folder)


def test_if_all_are_damaged_it_says_so(tmp_path):
    folder = saved(tmp_path, 1, 2)
    for step in (1, 2):
        flip(largest_file(folder / f"step_{step}"))
    with pytest.raises(CheckpointError, match=r"every checkpoint.*start from step 0"):
        restored(folder)
    assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_a_first_checkpoint_that_was_not_sealed_is_as_none(tmp_path, caplog):
    folder = saved(tmp_path, 1)
    (folder / "step_1" / "manifest.json").unlink()
    assert restored(folder) is None
    assert "manifest.json is missing" in caplog.text


def test_a_checkpoint_is_sealed_as_soon_as_it_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(1, state(1.0), {"step": 1})
    seal = tmp_path / "checkpoints" / "step_1" / "manifest.json"
    for _ in range(1000):
        if seal.exists():
            break
        time.sleep(0.01)
    assert checkpoint.damage(seal.parent) is None
    checkpoints.close()


def test_what_a_process_left_as_it_died_in_a_save_is_removed(tmp_path):
    folder = saved(tmp_path, 1)
    (folder / "step_2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    found, _ = restored(folder)
    assert found["step"] == 1
    assert [path.name for path in folder.iterdir()] == ["step_1"]


FULL = """
import resource, sys
from pathlib import Path
import jax.numpy as jnp
import numpy as np
from launch import tell_unraisable
from posenc_jax.training.checkpoint import Checkpoints, SaveError

sys.unraisablehook = tell_unraisable
checkpoints = Checkpoints(Path(sys.argv[1]) / "checkpoints", 2)
noise = np.random.default_rng(0).normal(size=(20, 100, 100))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    checkpoints.save(1, {str(i): jnp.asarray(values) for i, values in enumerate(noise)}, {"step": 1})
    checkpoints.wait()
except SaveError as error:
    print(error)
"""


def test_a_save_that_finds_no_room_is_told_in_one_line_with_the_reason_alone(tmp_path):
    ran = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True)
    told = f"the checkpoint of step 1 could not be written to {tmp_path / 'checkpoints'}: File too large; those before "
    assert ran.stdout == f"{told}it are kept, and the same command goes on from there\n", ran.stderr
    assert "Event loop is closed" not in ran.stderr


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
        restored(saved(tmp_path, 1), other)


def test_a_step_that_was_saved_already_is_an_error(tmp_path):
    saved(tmp_path, 2)
    with pytest.raises((CheckpointError, ValueError)):
        saved(tmp_path, 2)


def test_a_checkpoint_of_the_first_format_can_be_read(tmp_path):
    """`checkpoint_format_1` was saved by the code that introduced this format."""
    folder = shutil.copytree(Path(__file__).with_name("checkpoint_format_1"), tmp_path / "checkpoints")
    size = {"d_model": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "d_ff": 8}
    config = run_config("t5", seed=3, **{f"model__{name}": value for name, value in size.items()})
    expected = initial_state(config, optimizers.build(config.optimizer, total_steps=2, warmup_steps=1))
    found, meta = restored(folder, jax.tree.map(jnp.zeros_like, expected))
    assert (meta["step"], int(found["seed"])) == (7, 3)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, expected)


def test_a_checkpoint_of_an_unknown_format_is_refused_and_left(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1, 2)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="step_2 has format 1, of another release"):
        restored(folder)
    assert {path.name for path in folder.iterdir()} == {"step_1", "step_2"}


@pytest.mark.parametrize(("before", "after"), [(8, 1), (1, 8)])
def test_a_state_saved_on_some_devices_comes_back_on_others(tmp_path, before, after):
    def on(devices, seed):
        config = run_config(model__num_layers=1, seed=seed)
        mesh = sharding.make_mesh(8, jax.devices()[:devices], fsdp=devices)
        return initial_state(config, optimizers.build(config.optimizer, total_steps=2, warmup_steps=1), mesh)

    state, like = on(before, seed=0), on(after, seed=1)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    checkpoints.save(1, state, {"step": 1})
    checkpoints.close()
    found, _ = restored(tmp_path / "checkpoints", like)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)
    assert len(found["params"]["embedding"].devices()) == after


def test_a_reader_takes_the_newest_intact_one_and_changes_nothing(tmp_path):
    """The run is saving. There are a temporary folder, a checkpoint without a seal, and a damaged checkpoint."""
    folder = saved(tmp_path, 1, 2, 3, 4, keep_last=4)
    flip(largest_file(folder / "step_3"))
    (folder / "step_4" / "manifest.json").unlink()
    (folder / "step_5.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    found, meta = read_newest(folder, state(0.0))
    jax.tree.map(np.testing.assert_array_equal, found, state(2.0))
    assert meta["step"] == 2
    assert sorted(tmp_path.rglob("*")) == before
    assert read_newest(tmp_path / "none", state(0.0)) is None


def test_a_reader_and_a_run_that_saves_do_not_disturb_each_other(tmp_path, monkeypatch):
    """The run saves two more checkpoints, and deletes the one that the reader has chosen before it is read."""
    run, load = Checkpoints(tmp_path / "checkpoints", 2), checkpoint._load
    for step in (1, 2):
        run.save(step, state(float(step)), {"step": step})
    run.wait()

    def late(folder, *arguments):
        monkeypatch.setattr(checkpoint, "_load", load)
        for step in (3, 4):
            run.save(step, state(float(step)), {"step": step})
        run.wait()
        assert not folder.exists()
        return load(folder, *arguments)

    monkeypatch.setattr(checkpoint, "_load", late)
    found, _ = read_newest(tmp_path / "checkpoints", state(0.0))
    run.close()
    assert found["step"] == 4


def test_a_reader_in_the_middle_of_a_save_leaves_the_save_whole(tmp_path, monkeypatch):
    run, write = Checkpoints(tmp_path / "checkpoints", 2), checkpoint.write_manifest
    run.save(1, state(1.0), {"step": 1})
    run.wait()
    read = []

    def reading(folder):
        read.append(read_newest(tmp_path / "checkpoints", state(0.0))[1]["step"])
        write(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", reading)
    run.save(2, state(2.0), {"step": 2})
    run.close()
    assert read == [1]
    assert restored(tmp_path / "checkpoints")[1]["step"] == 2


def test_a_reader_of_a_checkpoint_that_stays_and_cannot_be_read_is_told(tmp_path, monkeypatch):
    folder = saved(tmp_path, 1)

    def fail(*_):
        raise OSError("as it is")

    monkeypatch.setattr(checkpoint, "_load", fail)
    with pytest.raises(OSError, match="as it is"):
        read_newest(folder, state(0.0))


def test_of_several_parts_that_fail_to_be_written_the_first_is_told(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 2)
    checkpoints.save(1, state(1.0), {"step": 1})
    checkpoints.wait()
    for reason in ("No space left on device", "another"):
        checkpoints._tell(OSError(28, reason))
    with pytest.raises(SaveError, match="No space left on device"):
        checkpoints.wait()


@pytest.mark.parametrize("step", [5, -1, None, "5", 1.5])
def test_a_checkpoint_of_a_step_that_the_run_has_not_is_refused(step):
    with pytest.raises(CheckpointError, match=f"of step {step}, but the run has only 4 steps"):
        check_step(step, 4, Path("checkpoints"))
