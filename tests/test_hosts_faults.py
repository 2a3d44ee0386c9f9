"""What goes wrong where several processes do a run: damaged checkpoints, full disks, losses that are not finite."""

import re
import shutil

import numpy as np
import pytest

from tests.test_faults import mounted
from tests.test_hosts import cache, pair, ran
from tests.test_launch import logged

__all__ = ["cache", "mounted", "pair"]  # fixtures


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
        assert kept["tokens"].shape[0] == 16  # the rows of both


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs the command mount")
def test_a_disk_that_is_full_ends_all_and_the_run_goes_on_once_there_is_room(pair, cache, mounted):
    size = 20_000_000
    disk = mounted(f"size={size}")
    (disk / "other").write_bytes(bytes(size - shutil.disk_usage(disk).used - 2_000_000))
    outcomes = ran(cache, disk / "run", 2)
    assert {code for code, *_ in outcomes} <= {1, 5}, outcomes
    told = "".join(errors for *_, errors in outcomes)
    assert re.search("^error: the checkpoint of step .* could not be written", told, re.MULTILINE), told
    (disk / "other").unlink()
    outcomes = ran(cache, disk / "run", 2)
    assert [code for code, *_ in outcomes] == [0, 0], outcomes
    assert logged(disk / "run") == logged(pair)
