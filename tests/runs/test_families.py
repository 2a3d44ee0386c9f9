"""A run of each family of models, from training to report, which is then continued from an earlier checkpoint."""

import csv
import shutil

import jax
import numpy as np
import pytest

from configs import bert, hybrid, recurrent
from posenc_jax.config import RunConfig
from posenc_jax.model_config import RECURRENT
from tests.runs.run_helpers import launch, logged
from tests.small import write_text
from tests.test_launch import checkpoint_arrays

pytestmark = pytest.mark.usefixtures("undrawn")
TRAINING = {"duration": "24 steps", "warmup": "4 steps", "log_every": "4 steps", "checkpoint_every": "8 steps"}
EVALUATION = {"lengths": (32, 64, 128), "windows": 4, "validation_windows": 4, "resamples": 100}
RANDOMIZED = {"training": "randomized", "range": 128}


def family(name):
    """The recipe of a family."""
    if name in RECURRENT:
        return recurrent.get_config(f"size=smoke,cell={name}")
    if name == "encoder_rope":
        return bert.get_config("size=smoke,positions=rope")
    config = hybrid.get_config(f"size=smoke,form={name}")
    config.positions.update(RANDOMIZED)
    config.training.drope = "5 steps" if name == "drope" else "0 steps"  # after step 19; the test resumes at step 16
    return config


def watched(workdir):
    """For each validation step, the number of layers with a largest logit, and with an entropy above 0."""
    return {
        line["step"]: (len(line.get("attention_logit_max", ())), sum(x > 0 for x in line.get("attention_entropy", ())))
        for line in logged(workdir)
        if "validation_loss" in line
    }


@pytest.mark.parametrize(
    ("name", "told", "layers"),
    [
        ("drope", "drope", 2),
        pytest.param("irope", "irope", 4, marks=pytest.mark.slow),
        ("encoder_rope", "An encoder, which predicts hidden tokens", 2),
        *(
            pytest.param(
                cell,
                f"recurrent language model (**{cell}**)",
                0,
                marks=pytest.mark.slow if cell in ("rnn", "gru") else (),  # which share their code with lstm
            )
            for cell in RECURRENT
        ),
    ],
)
def test_a_family_runs_from_end_to_end_and_resumes(name, told, layers, tmp_path):
    data = write_text(tmp_path)
    config = family(name)
    config.training.update(TRAINING)
    config.evaluation.update(EVALUATION)
    config.data.update({"path": str(data / "text"), "cache_dir": str(data / "cache")})
    config, workdir = RunConfig.from_mapping(config.to_dict()), tmp_path / "run"
    launch(config, workdir)
    assert told in (workdir / "report.md").read_text()
    with (workdir / "results.csv").open() as file:
        names = {row["encoding"] for row in csv.DictReader(file)}
    assert names == {"rope" if name in ("drope", "irope") else name}
    losses = [line["loss"] for line in logged(workdir) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert set(watched(workdir).values()) == {(layers, layers)}

    if name in RECURRENT:
        return
    state, results = checkpoint_arrays(workdir), (workdir / "results.csv").read_bytes()
    shutil.rmtree(workdir / "checkpoints" / "step_24")
    (workdir / "report.md").unlink()
    launch(config, workdir)
    jax.tree.map(np.testing.assert_array_equal, checkpoint_arrays(workdir), state)
    assert (workdir / "results.csv").read_bytes() == results
