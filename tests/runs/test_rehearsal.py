"""Runs are traced before anything is written: a run that cannot work leaves no files, and tracing happens once."""

import time
from collections import Counter
from pathlib import Path

import pytest

from posenc_jax.evaluation import attention_stats, scoring
from posenc_jax.runs.driver import Driver
from posenc_jax.runs.grid import RunSpec
from posenc_jax.runs.run import run
from posenc_jax.schema import ConfigError
from posenc_jax.training import memory, objectives
from tests.data.settings import write_books
from tests.small import run_config

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_books(folder, 8, text="what is read of {name} " * 40)
    return folder


def tiny(folder: Path, encoding: str = "rope", **changes):
    training = {"length": 16, "batch_size": 8, "duration": "4 steps", "warmup": "1 step", "log_every": "2 steps"}
    training |= {"validate_every": "4 steps", "checkpoint_every": "4 steps"}
    evaluation = {"lengths": (16, 32), "windows": 8, "validation_windows": 8, "tail": 8, "rope_scalings": ("none",)}
    own = {f"training__{name}": value for name, value in training.items()}
    own |= {f"evaluation__{name}": value for name, value in evaluation.items()}
    own |= {"data__path": str(folder / "books"), "data__cache_dir": str(folder / "cache"), "model__num_layers": 1}
    return run_config(encoding, **own | changes)


@pytest.mark.parametrize(
    ("encoding", "changes"),
    [
        ("rope", {"evaluation__copy_distances": (8, 12), "evaluation__copy_chunk": 4}),
        ("none", {"sharding__fsdp": 2, "sharding__tensor": 2}),
        ("rope", {"training__drope": "2 steps", "training__grad_accum_steps": 2, "training__batch_size": 16}),
        ("learned", {"positions__training": "randomized", "positions__range": 64, "positions__evaluation": "drawn"}),
    ],
)
def test_what_is_traced_before_is_not_traced_again(encoding, changes, folder, tmp_path, monkeypatch):
    traced = Counter()

    def counted(name, function):
        def call(*arguments, **options):
            traced[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(objectives, "training_loss", counted("training", objectives.training_loss))
    monkeypatch.setattr(scoring, "token_losses", counted("scoring", scoring.token_losses))
    monkeypatch.setattr(attention_stats, "layers", counted("watching", attention_stats.layers))
    config = tiny(folder, encoding, **changes)
    driver, spec = Driver(lambda _: tmp_path / "run"), RunSpec("run", "", config)
    driver.program(config)
    before = Counter(traced)
    assert before["training"]
    assert before["scoring"]
    assert before["watching"]
    driver.complete(spec, launched=time.monotonic())
    assert traced == before


def test_what_fails_while_it_is_traced_leaves_no_workdir(folder, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise TypeError("shapes that do not fit")

    monkeypatch.setattr(scoring, "token_losses", fail)
    with pytest.raises(TypeError, match="shapes that do not fit"):
        run(tiny(folder), tmp_path / "run", launched=time.monotonic())
    assert not (tmp_path / "run").exists()


def test_a_batch_that_no_memory_holds_is_refused_and_leaves_no_workdir(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "check_fits", lambda *_, **__: None)
    monkeypatch.setattr(memory, "device_memory", lambda devices: 100)
    with pytest.raises(ConfigError, match=r"config.training.batch_size = 8: must be smaller: 2 batches put"):
        run(tiny(folder), tmp_path / "run", launched=time.monotonic())
    assert not (tmp_path / "run").exists()
