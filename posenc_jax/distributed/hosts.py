"""Runs of several processes, as on the hosts of a pod: how the processes meet, agree, and end together.

Every process runs the same program and calls these functions in the same order. Process 0, the leader, does the work
that only one process may do, such as writing logs. A single process needs no agreement, and does not import jax for it.
"""

import itertools
import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

from posenc_jax.distributed.peers import LOST, NOTICE_SECONDS, HostsError, Peers, reserved_port
from posenc_jax.errors import one_line, reason
from posenc_jax.schema import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_SECONDS = 5  # how long a failing process waits to learn whether another one was lost first
FAREWELL_SECONDS = 300  # the longest time that an ending process waits for the others
FOUND_OUT_SECONDS = 300  # the time limit for processes that jax detects
WAIT_MILLISECONDS = 30 * 24 * 3600 * 1000  # for a decision of process 0; a lost process ends the wait


class LeaderError(HostsError):
    """Raised in all other processes for an error of process 0. Process 0 prints the error."""


@dataclass(frozen=True)
class Place:
    """The address of process 0, the number of processes, and the index of this one. No address: jax detects them."""

    coordinator: str = ""
    count: int = 0
    index: int = 0


class _Group(NamedTuple):
    peers: Peers
    client: Any  # of jax's key-value store, which runs in process 0


_group: _Group | None = None
_keys = (f"posenc_jax/{number}" for number in itertools.count())  # of the store; each is used once


def place(coordinator: str | None, count: int | None, index: int | None) -> Place | None:
    """The place that the flags give. Without flags, an empty Place if jax can detect it. None for a single process.

    jax detects Cloud TPU pod slices, and SLURM steps with more than one task. Raises ConfigError.
    """
    if count == 1 or coordinator is count is index is None:
        return Place() if count is None and max(_slurm_tasks(), _tpu_hosts()) > 1 else None
    if coordinator is None or count is None or index is None:
        given = {"--coordinator": coordinator, "--processes": count, "--process_id": index}
        missing = next(flag for flag, value in given.items() if value is None)
        raise ConfigError(missing, None, f"must be given too, as {', '.join(given)} go together")
    named = re.fullmatch(r"\S+:([0-9]{1,5})", coordinator)
    if named is None or not 1 <= int(named[1]) <= 65535:
        raise ConfigError("--coordinator", coordinator, "must be HOST:PORT, of process 0, with a port from 1 to 65535")
    if count < 1:
        raise ConfigError("--processes", count, "must be at least 1")
    if not 0 <= index < count:
        raise ConfigError("--process_id", index, f"must be from 0 to {count - 1}")
    return Place(coordinator, count, index)


def _slurm_tasks() -> int:
    """The number of tasks in the SLURM step of this process; 1 outside of SLURM."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    return int(tasks) if tasks.isdecimal() and all(name in os.environ for name in needed) else 1


def _tpu_hosts(devices: Path = Path("/dev")) -> int:
    """The number of hosts in the Cloud TPU slice of this host; 1 without TPUs."""
    if not (any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))):
        return 1
    named = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if named is None and "TPU_SKIP_MDS_QUERY" not in os.environ:
        server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
        address = f"http://{server}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
        request = urllib.request.Request(address, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                named = answer.read().decode()
        except (OSError, ValueError):  # not on Google Cloud
            named = None
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    return len((named or "").split(",")) * (int(slices) if slices.isdecimal() else 1)


def join(place: Place) -> None:
    """Join the processes of a run. Returns once all have joined. Call it before a device is first used.

    Afterwards, only process 0 prints more than errors. If a process ends without `leave`, the others print which one it
    was and end with exit code 5. If process 0 ends and jax notices it first, jax aborts with its own trace. Raises
    ConfigError and HostsError.
    """
    global _group
    peers = _met(place) if place.coordinator else _found_out()
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # undoes the change of jax's preemption service
    _group = _Group(peers, _store())
    if not is_leader():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        logging.getLogger().setLevel(logging.ERROR)
    sys.excepthook = _end_after


def _met(place: Place) -> Peers:
    """Meet at the address of the flags, then join jax's service on the same host, at another port."""
    host, _, port = place.coordinator.rpartition(":")
    host = host.strip("[]")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        problem = f"must name a host that can be found: {reason(error)}"
        raise ConfigError("--coordinator", place.coordinator, problem) from error
    service = f"[{host}]" if ":" in host else host
    if place.index > 0:
        peers, told = Peers.connect(host, int(port), place.index, place.count, lost)
        _initialize(f"{service}:{told}", place.count, place.index)
        return peers
    peers, _ = Peers.serve(place.count, lost, port=int(port))
    with reserved_port() as free:
        peers.gather(str(free), (host, int(port)))
        _initialize(f"{service}:{free}", place.count, place.index, coordinator_bind_address=f"[::]:{free}")
    return peers


def _found_out() -> Peers:
    """Let jax detect the processes and join its service. Process 0 publishes its address there; connect to it."""
    notice = threading.Timer(NOTICE_SECONDS, log.warning, ("waiting for the other processes of this run",))
    limit = threading.Timer(FOUND_OUT_SECONDS, _end_late)
    for timer in (notice, limit):
        timer.daemon = True
        timer.start()
    _initialize(initialization_timeout=2 * FOUND_OUT_SECONDS)  # after this time jax would abort with a trace
    for timer in (notice, limit):
        timer.cancel()
    index, count = _numbers()
    client, key = _store(), "posenc_jax/peers"
    if index > 0:
        host, port, token = client.blocking_key_value_get(key, WAIT_MILLISECONDS).split()
        return Peers.connect(host, int(port), index, count, lost, token=token)[0]
    host, token = _own_address(), secrets.token_hex(16)
    peers, port = Peers.serve(count, lost, token=token)
    client.key_value_set(key, f"{host} {port} {token}")
    peers.gather("", (host, port))
    return peers


def _numbers() -> tuple[int, int]:
    """The index of this process and the number of processes, as detected by jax."""
    if _slurm_tasks() > 1:
        return int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    import jax

    jax.config.update("jax_num_cpu_devices", 1)  # must be set before the next line initializes the devices
    return jax.process_index(), jax.process_count()


def _own_address() -> str:
    """The address of this machine for other machines: its SLURM node name, or the address of its default route."""
    if _slurm_tasks() > 1:
        return os.environ.get("SLURMD_NODENAME", socket.gethostname())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        route.connect(("192.0.2.1", 9))  # an unassigned address; nothing is sent to it
        return route.getsockname()[0]


def _store() -> Any:
    """jax's key-value store, through orbax. Unlike jax's multihost_utils, it needs no device and can wait for days."""
    import orbax.checkpoint as ocp

    return ocp.multihost.get_jax_distributed_client()


def _initialize(*place: Any, **options: Any) -> None:
    import jax

    try:
        jax.distributed.initialize(*place, **options)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"at {place[0]}" if place else "where jax has found out that they are"
        raise HostsError(f"the processes of this run did not meet {where}: {one_line(error)}") from error


def _end_late() -> NoReturn:
    print(f"error: not all processes of this run came in {FOUND_OUT_SECONDS} s", file=sys.stderr)
    _end(LOST)


def index() -> int:
    """The index of this process, from 0."""
    return 0 if _group is None else _group.peers.index


def count() -> int:
    """The number of processes of this run."""
    return 1 if _group is None else _group.peers.count


def is_leader() -> bool:
    """Whether this is process 0. Only process 0 writes logs, tables and figures."""
    return index() == 0


def on_leader(function: Callable[[], T]) -> T:
    """Call a function in process 0 only, and return its value in all processes. The value must be valid in JSON.

    Process 0 raises the errors of the function. If an error has an exit code, the other processes raise LeaderError.
    """
    if _group is None:
        return function()
    key = next(_keys)
    if not is_leader():
        answer = json.loads(_group.client.blocking_key_value_get(key, WAIT_MILLISECONDS))
        if "error" in answer:
            raise LeaderError(answer["error"], answer["exit_code"])
        return answer["value"]
    try:
        answer = {"value": function()}
    except Exception as error:
        if hasattr(error, "exit_code"):
            answer = {"error": str(error), "exit_code": error.exit_code}  # type: ignore[attr-defined]
            _group.client.key_value_set(key, json.dumps(answer))
        raise
    _group.client.key_value_set(key, json.dumps(answer))
    return answer["value"]


def check_same(values: Mapping[str, Any]) -> None:
    """Raise ConfigError in all processes if a value differs between processes. The values must be valid in JSON."""
    if _group is None:
        return
    key = next(_keys)
    _group.client.key_value_set(f"{key}/{index()}", json.dumps(values))
    _group.client.wait_at_barrier(f"{key}/all", WAIT_MILLISECONDS)
    told = {int(name.rpartition("/")[2]): text for name, text in _group.client.key_value_dir_get(key)}
    first = json.loads(told[0])
    for other in (number for number in sorted(told) if told[number] != told[0]):
        found = json.loads(told[other])
        field = next(name for name in [*first, *found] if first.get(name) != found.get(name))
        allowed = f"must be the same in all processes, but process {other} has {found.get(field)!r}"
        raise ConfigError(field, first.get(field), allowed)


def leave(exit_code: int, *, alike: bool) -> None:
    """End this process: together with the others if all end `alike`, else at once. A single process is unaffected."""
    if _group is None:
        return
    if not alike:
        _end(exit_code)
    try:
        _group.client.wait_at_barrier("posenc_jax/left", FAREWELL_SECONDS * 1000)
    except RuntimeError:  # another process continues, or hangs
        _end(exit_code)
    _group.peers.farewell()
    import jax

    jax.distributed.shutdown()
    _end(exit_code)  # a normal exit would wait for devices of processes that have ended


def lost(reason: str) -> NoReturn:
    """End this process, because another process has ended."""
    told = f"error: {reason}; so this one ends too, and the same command goes on from the last checkpoint"
    print(told, file=sys.stderr)
    _end(LOST)


def _end_after(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    time.sleep(GRACE_SECONDS)
    sys.__excepthook__(kind, error, trace)
    _end(1)


def _end(exit_code: int) -> NoReturn:
    """End this process at once. A normal exit would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
