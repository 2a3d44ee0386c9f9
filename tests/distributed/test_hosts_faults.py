"""Faults in runs of several processes: damaged checkpoints, failed writes of one process, and non-finite losses."""

import re
import resource
import shutil

import numpy as np
import pytest

from tests.distributed.test_hosts import ended, ran, started
from tests.test_launch import logged


def test_a_damaged_checkpoint_is_set_aside_by_the_first_process_and_all_go_on_from_the_one_before(
    pair, cache, tmp_path
):
    run = shutil.copytree(pair, tmp_path / "run")
    (run / "report.md").unlink()
    part = max((run / "checkpoints" / "step_30").rglob("ocdbt.process_1/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    (code, output, errors), other = ran(cache, run, 2)
    assert (code, other[0]) == (0, 0), errors + other[2]
    assert re.search(rf"checkpoint 30 is damaged \(changed: .*{part.name}\)", errors)
    assert other[2] == ""
    assert "step 30/30" in output
    assert "step 25/30" not in output
    assert logged(run) == logged(pair)
    assert (run / "results.csv").read_bytes() == (pair / "results.csv").read_bytes()


def test_all_end_alike_where_the_loss_is_not_finite(cache, tmp_path):
    (code, _, errors), other = ran(cache, tmp_path / "run", 2, "--config.optimizer.learning_rate=1e30")
    assert (code, other[0]) == (3, 3), errors + other[2]
    assert re.match(r"error: loss .* at step (\d+); stopped before that step, whose batch is in ", errors)
    assert other[2] == ""
    with np.load(tmp_path / "run" / "nonfinite.npz", allow_pickle=False) as kept:
        assert kept["tokens"].shape[0] == 16  # the rows of both processes


@pytest.mark.parametrize("index", [0, 1])
def test_one_process_that_cannot_write_its_part_ends_all_and_the_run_goes_on_once_it_can(pair, cache, tmp_path, index):
    run = shutil.copytree(pair, tmp_path / "run")
    (run / "report.md").unlink()
    shutil.rmtree(run / "checkpoints" / "step_30")
    with started(cache, run, 2) as processes:
        most = 20_000  # bytes per file: more than earlier files have, and less than one array
        resource.prlimit(processes[index].pid, resource.RLIMIT_FSIZE, (most, most))
        outcomes = ended(processes)
    assert outcomes[index][0] == 1, outcomes
    assert outcomes[1 - index][0] in ((5, 1, -6) if index == 0 else (5,)), outcomes  # jax may exit first, as if killed
    told = r"error: the checkpoint of step 30 could not be written to .*; those before it are kept"
    assert re.search(told, outcomes[index][2])  # threads of tensorstore may also write to the same line
    if index == 0:  # which seals checkpoints
        assert [code for code, *_ in ran(cache, run, 2)] == [0, 0]
        assert logged(run) == logged(pair)
        assert (run / "results.csv").read_bytes() == (pair / "results.csv").read_bytes()
