"""The command as a user runs it: a whole run, an interrupted run, and a run that is already complete."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from posenc_jax.encodings import frequencies
from tests import compile_flags

ROOT = Path(__file__).parent.parent
RECIPE = "--config=configs/rope_extrap.py:size=smoke"
# A save waits for the previous one, so after step 30 the checkpoint of step 15 is on disk whenever the run is killed.
SAVES = ("--config.training.log_every=5 steps", "--config.training.checkpoint_every=15 steps")
BRIEF = (
    RECIPE,
    *SAVES,
    "--config.model.dropout=0.1",
    # The recipe's evaluation with fewer lengths, windows and rules. tests/test_colab.py runs all of it.
    "--config.evaluation.lengths=(32, 64, 128)",
    "--config.evaluation.windows=6",
    "--config.evaluation.validation_windows=6",
    "--config.evaluation.resamples=100",
    '--config.evaluation.rope_scalings=("none", "ntk", "yarn")',
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *arguments]


def environment(cache: Path, *, drawn: bool = True) -> dict[str, str]:
    """Environment variables of a started process, whose figures are blank unless they are `drawn`."""
    own = {"XDG_CACHE_HOME": str(cache), "XLA_FLAGS": compile_flags.XLA_FLAGS, "JAX_PLATFORMS": "cpu"}
    found = [*([] if drawn else [str(ROOT / "tests" / "undrawn")]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **own, "PYTHONPATH": os.pathsep.join(found)}


def launch(cache: Path, *arguments: str, drawn: bool = True, **variables: str) -> subprocess.CompletedProcess:
    """Run the command in a process with these environment variables."""
    started = environment(cache, drawn=drawn) | variables
    return subprocess.run(command(*arguments), cwd=ROOT, env=started, capture_output=True, text=True, timeout=500)


def logged(workdir: Path) -> list[dict]:
    """metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = ("step_seconds", "tokens_per_second", "flops_per_second", "crc32")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def checkpoint_arrays(workdir: Path) -> dict:
    from posenc_jax.config import RunConfig
    from posenc_jax.training import checkpoint, step
    from posenc_jax.training import optimizer as optimizers

    config = RunConfig.from_mapping(json.loads((workdir / "config.json").read_text())["config"])
    optimizer = optimizers.build(config.optimizer, total_steps=60, warmup_steps=10)
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", 2)
    state, _ = checkpoints.restore(step.initial_state(config, optimizer))
    checkpoints.close()
    return state


def test_a_run_leaves_all_it_should(whole):
    for name in ("config.json", "metrics.jsonl", "results.csv", "report.md", "figures/extrapolation.png"):
        assert (whole / name).stat().st_size > 0, name
    assert (whole / "checkpoints" / "step_60" / "manifest.json").exists()
    with (whole / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} >= {
        "prefix_bits_per_byte",
        "tail_bits_per_byte",
        "context_gain_bits_per_byte",
    }
    assert {row["eval_length"] for row in rows if row["metric"] == "prefix_bits_per_byte"} == {"32", "64", "128"}
    losses = [line["loss"] for line in logged(whole) if "loss" in line]
    assert losses[-1] < losses[0] - 1
    assert watched(whole) == {30: (2, 2), 60: (2, 2)}
    events = [path.read_bytes() for path in (whole / "tensorboard").glob("events*")]
    assert any(b"validation_attention/logit_max/layer_1" in content for content in events)


def watched(workdir: Path) -> dict[int, tuple[int, int]]:
    """For each validation step, the number of layers with a largest logit, and with an entropy above 0."""
    validations = [line for line in logged(workdir) if "validation_loss" in line]
    return {
        line["step"]: (len(line.get("attention_logit_max", ())), sum(x > 0 for x in line.get("attention_entropy", ())))
        for line in validations
    }


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(whole, cache, tmp_path):
    import jax
    import numpy as np

    workdir = tmp_path / "run"
    arguments = command(*BRIEF, f"--workdir={workdir}")
    for number, code, at in ((signal.SIGINT, 130, 10), (signal.SIGTERM, 143, 25), (signal.SIGKILL, -9, 40)):
        with subprocess.Popen(
            arguments, cwd=ROOT, env=environment(cache), stdout=subprocess.PIPE, text=True
        ) as process:
            printed = []
            for line in process.stdout:
                printed.append(line)
                if line.startswith(f"step {at}/60"):
                    process.send_signal(number)
                    break
            process.stdout.read()
        assert process.returncode == code
        assert ("step 1/60" in "".join(printed)) == (at == 10)
        assert not (workdir / "results.csv").exists()
    resumed = launch(cache, *BRIEF, f"--workdir={workdir}", drawn=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "step 25/60" not in resumed.stdout
    assert logged(workdir) == logged(whole)
    assert (workdir / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, checkpoint_arrays(workdir), checkpoint_arrays(whole))


def test_a_complete_run_is_shown_again_without_change(whole, cache):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    ran = launch(cache, *BRIEF, f"--workdir={whole}")
    assert ran.returncode == 0
    assert "yarn" in ran.stdout
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_a_workdir_of_another_config_is_refused(whole, cache):
    ran = launch(cache, *BRIEF, "--config.encoding.base=500.0", f"--workdir={whole}")
    assert ran.returncode == 4
    assert "encoding.base: 10000.0 -> 500.0" in ran.stderr


def test_a_loss_that_is_not_finite_ends_with_3(cache, tmp_path):
    ran = launch(cache, RECIPE, "--config.optimizer.learning_rate=1e30", f"--workdir={tmp_path / 'run'}")
    assert ran.returncode == 3
    assert "at step" in ran.stderr
    assert not (tmp_path / "run" / "results.csv").exists()


def test_a_text_that_cannot_be_used_ends_with_2_and_no_workdir(cache, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00binary")
    ran = launch(cache, RECIPE, f"--config.data.path={tmp_path / 'text.txt'}", f"--workdir={tmp_path / 'run'}")
    assert ran.returncode == 2, ran.stderr
    assert "UTF-8" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (tmp_path / "run").exists()


def test_a_damaged_checkpoint_is_said_and_the_one_before_used(whole, cache, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    (workdir / "report.md").unlink()
    files = [path for path in (workdir / "checkpoints" / "step_60" / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    ran = launch(cache, *BRIEF, f"--workdir={workdir}", drawn=False)
    assert ran.returncode == 0, ran.stderr
    assert "checkpoint 60 is damaged" in ran.stderr
    assert (workdir / "results.csv").read_bytes() == (whole / "results.csv").read_bytes()
    assert len(list((workdir / "damaged").iterdir())) == 1


def search_longrope(cache: Path, workdir: Path) -> subprocess.CompletedProcess:
    options = ("--population=4", "--iterations=1", "--windows=2")
    return subprocess.run(
        [sys.executable, "-m", "experiments.longrope_search", str(workdir), *options],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_longrope_factors_are_searched_on_a_run(cache, whole):
    ran = search_longrope(cache, whole)
    assert ran.returncode == 0, ran.stderr
    rule = ran.stdout.splitlines()[-1]
    assert str(frequencies.parse(rule)) == rule
    assert rule.startswith("longrope:factors=")
    assert "│ longrope" in ran.stdout


def test_longrope_factors_of_no_model_end_with_2(cache, tmp_path):
    ran = search_longrope(cache, tmp_path)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"error: MODEL = {str(tmp_path)!r}: ")
    assert "Traceback" not in ran.stderr


def test_a_run_divided_over_devices_goes_on_where_there_is_one(cache, tmp_path):
    short = (
        "--config.training.warmup=2 steps",
        "--config.training.validate_every=4 steps",
        "--config.optimizer.end_lr_ratio=1.0",
        "--config.evaluation.lengths=(32, 64)",
        "--config.evaluation.rope_scalings=('none',)",
        f"--workdir={tmp_path / 'run'}",
    )

    def run(devices, duration, *arguments):
        changed = (*short, f"--config.training.duration={duration} steps", *arguments)
        ran = launch(cache, RECIPE, *changed, drawn=False, JAX_NUM_CPU_DEVICES=str(devices))
        assert (ran.returncode, ran.stderr) == (0, "")

    run(4, 4, "--config.sharding.fsdp=2", "--config.sharding.tensor=2")
    run(1, 8)
    losses = {line["step"]: line["loss"] for line in logged(tmp_path / "run") if "loss" in line}
    assert list(losses) == [1, 4, 8]
    assert losses[8] < losses[4] < losses[1]
