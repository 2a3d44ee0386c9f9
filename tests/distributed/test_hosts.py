"""Runs of several real CPU processes: one program, one set of logs, and a common end, even if one is killed."""

import contextlib
import csv
import fcntl
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from posenc_jax.distributed import hosts
from posenc_jax.schema import ConfigError
from tests.test_launch import RECIPE, ROOT, checkpoint_arrays, command, environment, logged

BRIEF = (
    RECIPE,
    "--config.training.duration=30 steps",
    "--config.training.log_every=5 steps",
    "--config.training.checkpoint_every=5 steps",  # after step 15, the checkpoint of step 5 is on disk
    "--config.training.validate_every=15 steps",
    "--config.model.num_layers=1",
    "--config.model.dropout=0.1",
    "--config.evaluation.lengths=(32, 64)",
    "--config.evaluation.windows=5",
    "--config.evaluation.validation_windows=5",
    "--config.evaluation.resamples=100",
    '--config.evaluation.rope_scalings=("none",)',
)
PATIENCE = 400  # seconds


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


def begun(words: list[str], cache: Path, drawn: bool = True, **variables: str) -> subprocess.Popen:
    """Start a command and capture its output and errors."""
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=ROOT, env=environment(cache, drawn=drawn) | variables, **kept)


@contextlib.contextmanager
def started(cache: Path, workdir: Path, count: int, *arguments: str, brief: tuple[str, ...] = BRIEF) -> Iterator[list]:
    """Start `count` processes of one run with 4 devices in total. Processes that are left at the end are killed."""
    changed = {argument.partition("=")[0] for argument in arguments}
    kept = [argument for argument in brief if argument.partition("=")[0] not in changed]
    place = [f"--coordinator=localhost:{free_port()}", f"--processes={count}"] if count > 1 else []
    processes = [
        begun(
            command(*kept, *arguments, f"--workdir={workdir}", *place, *([f"--process_id={index}"] if place else [])),
            cache,
            drawn=False,
            JAX_NUM_CPU_DEVICES=str(4 // count),
        )
        for index in range(count)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(processes: list) -> list[tuple[int, str, str]]:
    """The exit code, output and errors of each process."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def ran(cache: Path, workdir: Path, count: int, *arguments: str, **options) -> list[tuple[int, str, str]]:
    with started(cache, workdir, count, *arguments, **options) as processes:
        return ended(processes)


def signalled(processes: list, index: int, number: int, at: str) -> list[tuple[int, str, str]]:
    """Signal one process after the first one has printed a line that starts with `at`. Returns how all ended."""
    for line in processes[0].stdout:
        if line.startswith(at):
            break
    processes[index].send_signal(number)
    return ended(processes)


def said(output: str) -> str:
    """The output without the messages of gloo's C++ threads about connections, which are mixed into it."""
    return re.sub(r"\[Gloo] Rank|is connected to|Expected number of connected|peer ranks( is :|\.)|\d|\s", "", output)


def assert_close(workdir: Path, other: Path) -> None:
    """Check that the logs and results of two runs are equal up to rounding."""
    for one, two in zip(logged(workdir), logged(other), strict=True):
        assert one.keys() == two.keys()
        for name in one:
            np.testing.assert_allclose(one[name], two[name], rtol=1e-3 if "norm" in name else 1e-5, err_msg=name)
    tables = [list(csv.DictReader((path / "results.csv").read_text().splitlines())) for path in (workdir, other)]
    assert len(tables[0]) == len(tables[1]) > 0
    for one, two in zip(*tables, strict=True):
        assert (one["metric"], one["eval_length"]) == (two["metric"], two["eval_length"])
        assert float(one["value"]) == pytest.approx(float(two["value"]), rel=1e-4, abs=1e-4)


def test_the_events_and_the_record_of_two_processes_are_written_by_one(pair):
    for folder in ("tensorboard", "tensorboard/final"):  # of training and final evaluation
        assert len(list((pair / folder).glob("events*"))) == 1
    assert " x4 (2 processes, " in json.loads((pair / "config.json").read_text())["device"]


def test_a_process_that_is_killed_ends_the_others_and_the_restart_gives_the_same_bits(pair, cache, tmp_path):
    workdir = tmp_path / "run"
    for victim, at in ((1, "step 15/30"), (0, "step 25/30")):
        with started(cache, workdir, 2) as processes:
            outcomes = signalled(processes, victim, signal.SIGKILL, at)
        assert outcomes[victim][0] == -9
        code, _, errors = outcomes[1 - victim]
        if victim == 0 and code in (1, -6):  # on a busy machine, jax may exit first because it has lost its service
            assert "another task died" in errors
        else:
            assert code == 5, errors
            assert f"\nerror: process {victim} of 2 has ended; so this one ends too, and the same" in f"\n{errors}"
        assert "Traceback" not in errors
    (code, output, errors), other = ran(cache, workdir, 2)
    assert (code, other[0]) == (0, 0), errors + other[2]
    assert "step 15/30" not in output  # continued after step 15
    assert logged(workdir) == logged(pair)
    assert (workdir / "results.csv").read_bytes() == (pair / "results.csv").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, checkpoint_arrays(workdir), checkpoint_arrays(pair))


FAILING = """
import os, sys, time
from posenc_jax.distributed import hosts, peers
received = peers._received
peers._received = lambda connection: (received(connection), time.sleep(1))[0]
hosts.join(hosts.Place(sys.argv[1], 2, int(sys.argv[2])))
if hosts.index() == 1:
    os.kill(os.getpid(), 9)
raise RuntimeError("a collective failed")
"""


def test_a_failure_that_another_end_caused_is_not_told_in_place_of_it(cache):
    address = f"localhost:{free_port()}"
    processes = [begun([sys.executable, "-c", FAILING, address, str(index)], cache) for index in range(2)]
    (code, _, errors), (killed, *_) = ended(processes)
    assert (code, killed) == (5, -9), errors
    assert errors.startswith("error: process 1 of 2 has ended; so this one ends too")


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


ALONE = """
from posenc_jax.distributed import hosts
hosts.NOTICE_SECONDS, hosts.FOUND_OUT_SECONDS = 0.1, 1
hosts.join(hosts.Place())
"""


def test_a_process_that_jax_has_found_out_and_that_never_comes_is_told_in_one_line(cache):
    code = [sys.executable, "-c", ALONE]
    place = SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURM_PROCID": "0", "SLURM_JOB_ID": str(free_port())}
    ((code, _, errors),) = ended([begun(code, cache, **place)])
    told = "waiting for the other processes of this run\nerror: not all processes of this run came in 1 s\n"
    assert (code, errors) == (5, told)


FOUND = """
import os
from posenc_jax.distributed import hosts
hosts.join(hosts.place(None, None, None))
told = hosts.on_leader(lambda: f"from {hosts.index()}")
hosts.check_same({"a setting": 1})
numbers = hosts.index(), hosts.count()
del os.environ["SLURM_PROCID"]  # so that jax provides the numbers, as on TPUs
assert hosts._numbers() == numbers
os.write(2, f"{numbers}, told {told}".encode())
hosts.leave(0, alike=True)
"""


def test_processes_that_jax_has_found_out_have_its_numbers_and_agree(cache):
    place = SLURM | {"SLURM_STEP_NODELIST": "localhost", "SLURMD_NODENAME": "localhost"}
    place |= {"SLURM_JOB_ID": str(free_port())}
    code = [sys.executable, "-c", FOUND]
    outcomes = ended([begun(code, cache, **place | {"SLURM_PROCID": str(index)}) for index in range(2)])
    assert [(code, errors) for code, _, errors in outcomes] == [(0, f"({i}, 2), told from 0") for i in range(2)]


def test_a_host_that_cannot_be_found_is_told(monkeypatch):
    def unknown(*_):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    told = "--coordinator = 'nowhere:1': must name a host that can be found: Name or service not known."
    with pytest.raises(ConfigError, match=re.escape(told)):
        hosts.join(hosts.Place("nowhere:1", 2, 1))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="must name a host that can be found"):
        hosts.join(hosts.Place("a..b:1", 2, 0))


def test_all_stop_at_one_step_and_other_numbers_of_processes_go_on(pair, cache, tmp_path):
    workdir = tmp_path / "run"
    with started(cache, workdir, 2) as processes:
        outcomes = signalled(processes, 1, signal.SIGTERM, "step 5/30")
    assert [code for code, *_ in outcomes] == [143, 143], outcomes
    assert outcomes[0][2].startswith("error: stopped by SIGTERM at step ")
    assert outcomes[1][2] == ""  # only one of them reports it
    step = int(outcomes[0][2].split("at step ")[1].split(",")[0])
    assert (workdir / "checkpoints" / f"step_{step}" / "manifest.json").exists()
    with started(cache, workdir, 4) as processes:
        outcomes = signalled(processes, 3, signal.SIGINT, "step 20/30")
    assert [code for code, *_ in outcomes] == [130] * 4, outcomes
    assert f"step {step}/30" not in outcomes[0][1]
    ((code, output, errors),) = ran(cache, workdir, 1)
    assert code == 0, errors
    assert "step 20/30" not in output
    assert_close(workdir, pair)
    assert {path.name for path in workdir.iterdir()} == {path.name for path in pair.iterdir()}


def test_heads_that_processes_share_are_told_apart_from_rows(pair, cache, tmp_path):
    """Two devices along "tensor" hold the same rows. Here they belong to different processes."""
    sharded = ("--config.sharding.tensor=2", "--config.sharding.fsdp=2")
    sharded += "--config.training.duration=5 steps", "--config.training.warmup=5 steps"
    outcomes = ran(cache, tmp_path / "run", 4, *sharded)
    assert [code for code, *_ in outcomes] == [0] * 4, outcomes
    ((code, *_),) = ran(cache, tmp_path / "one", 1, *sharded[2:])
    assert code == 0
    losses = [logged(path)[0]["loss"] for path in (tmp_path / "run", tmp_path / "one", pair)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_what_the_first_process_refuses_ends_all_with_its_code(pair, cache, tmp_path):
    outcomes = ran(cache, pair, 2, "--config.seed=1")
    assert [code for code, *_ in outcomes] == [4, 4]
    assert "belongs to another config" in outcomes[0][2]
    assert outcomes[1][2] == ""
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcomes = ran(cache, tmp_path / "run", 2)
    assert [code for code, *_ in outcomes] == [4, 4]
    assert "is in use by" in outcomes[0][2]


def test_processes_with_other_settings_refuse_each_other(cache, tmp_path):
    port = free_port()
    place = (f"--workdir={tmp_path / 'run'}", f"--coordinator=localhost:{port}", "--processes=2")
    processes = [
        begun(command(*BRIEF, f"--config.seed={index}", *place, f"--process_id={index}"), cache) for index in range(2)
    ]
    outcomes = ended(processes)
    assert [code for code, *_ in outcomes] == [2, 2], outcomes
    assert outcomes[0][2] == "error: config.seed = 0: must be the same in all processes, but process 1 has 1.\n"
    assert outcomes[1][2] == ""
    assert not (tmp_path / "run").exists()


STUDY = """
from ml_collections import ConfigDict
from configs import rope_extrap

def get_config():
    config = ConfigDict()
    config.name, config.question, config.baseline, config.costs = "tiny", "Which of two?", "none", ""
    config.base = recipe = rope_extrap.get_config("size=smoke,encoding=none")
    recipe.training.duration, recipe.training.warmup = "6 steps", "2 steps"
    recipe.evaluation.lengths, recipe.evaluation.windows = (32, 64, 128), 6
    config.sweep = ConfigDict({"encoding": ("encoding=none", "encoding=rope")})
    return config
"""


@pytest.mark.slow
def test_a_study_is_done_by_all_processes(cache, tmp_path):
    (tmp_path / "tiny.py").write_text(STUDY)
    recipe = (f"--config={tmp_path / 'tiny.py'}",)
    tables = []
    for count in (2, 1):
        outcomes = ran(cache, tmp_path / f"by-{count}", count, brief=recipe)
        assert [code for code, *_ in outcomes] == [0] * count, outcomes
        assert [errors for *_, errors in outcomes] == [""] * count
        tables.append(list(csv.DictReader((tmp_path / f"by-{count}" / "results.csv").read_text().splitlines())))
    for one, two in zip(*tables, strict=True):
        assert (one["encoding"], one["metric"]) == (two["encoding"], two["metric"])
        assert float(one["value"]) == pytest.approx(float(two["value"]), rel=1e-4, abs=1e-4)
    again = ran(cache, tmp_path / "by-2", 2, brief=recipe)
    assert [code for code, *_ in again] == [0, 0]
    assert "run 1 of 2" not in again[0][1]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (("localhost:1", 2, None), "--process_id = None: must be given too"),
        ((None, 2, 0), "--coordinator = None: must be given too"),
        (("localhost", 2, 0), "must be HOST:PORT"),
        (("localhost:99999", 2, 0), "localhost:99999': must be HOST:PORT, of process 0, with a port from 1 to 65535"),
        (("localhost:0", 2, 0), "with a port from 1 to 65535"),
        (("localhost:1", 0, 0), "--processes = 0: must be at least 1"),
        (("localhost:1", 2, 2), "--process_id = 2: must be from 0 to 1"),
    ],
)
def test_a_wrong_place_is_told(given, reason):
    with pytest.raises(ConfigError, match=reason):
        hosts.place(*given)


def test_a_step_of_slurm_with_many_tasks_is_found_out(monkeypatch):
    for name in {name for name in os.environ if name.startswith(("SLURM", "TPU", "MEGASCALE"))}:
        monkeypatch.delenv(name)
    assert hosts.place(None, None, None) is None
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert hosts.place(None, None, None) == hosts.Place()
    assert hosts.place(None, 1, None) is None  # a single process, as requested
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert hosts.place(None, None, None) is None
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.delenv("SLURM_PROCID")  # a batch script that was not started by srun
    assert hosts.place(None, None, None) is None


@pytest.fixture
def metadata(monkeypatch) -> Iterator[dict[str, str]]:
    """A metadata server like that of Google's virtual machines. It answers with the values in the dictionary."""
    attributes: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.rpartition("/")[2]
            known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes.get(name, "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        yield attributes
        server.shutdown()


def test_the_hosts_of_a_tpu_slice_are_counted(metadata, monkeypatch, tmp_path):
    for name in {name for name in os.environ if name.startswith(("TPU", "MEGASCALE"))}:
        monkeypatch.delenv(name)
    metadata["worker-network-endpoints"] = "a:b:10.0.0.1,a:b:10.0.0.2"
    assert hosts._tpu_hosts(tmp_path) == 1  # no chip, so no server is queried
    (tmp_path / "accel0").touch()
    assert hosts._tpu_hosts(tmp_path) == 2
    del metadata["worker-network-endpoints"]
    assert hosts._tpu_hosts(tmp_path) == 1
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")  # as on Kubernetes
    assert hosts._tpu_hosts(tmp_path) == 4
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    assert hosts._tpu_hosts(tmp_path) == 8
