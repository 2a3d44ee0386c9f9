"""How processes find each other: missing, duplicate and foreign processes. Each process is a thread here."""

import contextlib
import logging
import re
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from posenc_jax.distributed import peers
from posenc_jax.distributed.peers import HostsError, Peers

PATIENCE = 400  # seconds


@pytest.fixture
def port() -> int:
    with socket.create_server(("", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def haste(monkeypatch):
    """Report missing processes quickly."""
    monkeypatch.setattr(peers, "NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(peers, "LIMIT_SECONDS", 0.3)


class Process:
    """One of the processes. `came` becomes its Peers, and `told` the reason if the group ends."""

    def __init__(self, threads: ThreadPoolExecutor, port: int, index: int, count: int):
        self.told: Future[str] = Future()
        self.came: Future[Peers] = threads.submit(self._come, port, index, count)

    def _come(self, port: int, index: int, count: int) -> Peers:
        if index > 0:
            came, text = Peers.connect("localhost", port, index, count, self.told.set_result)
            assert text == "go on"
            return came
        came, _ = Peers.serve(count, self.told.set_result, port=port)
        came.gather("go on", ("localhost", port))
        return came

    def refused(self) -> tuple[int, str]:
        with pytest.raises(HostsError) as told:
            self.came.result(PATIENCE)
        return told.value.exit_code, str(told.value)


def test_an_end_without_farewell_is_told_to_all(threads, port):
    processes = [Process(threads, port, index, 3) for index in (2, 0, 1)]
    for process in processes:
        process.came.result(PATIENCE)
    ended, *others = processes
    (connection,) = ended.came.result()._connections
    connection.shutdown(socket.SHUT_WR)
    assert [other.told.result(PATIENCE) for other in others] == ["process 2 of 3 has ended"] * 2


def test_a_farewell_is_no_loss(threads, port):
    processes = [Process(threads, port, index, 2) for index in (0, 1)]
    for process in processes[::-1]:
        process.came.result(PATIENCE).farewell()
    for thread in threading.enumerate():
        if thread.name == "peers":
            thread.join(PATIENCE)
    assert not any(process.told.done() for process in processes)


@pytest.mark.parametrize("missing", [1, 2])
def test_a_process_that_does_not_come_is_named_to_all(missing, threads, port, haste, caplog):
    first, _ = Peers.serve(3, print, port=port)
    other = Process(threads, port, 3 - missing, 3)
    while not first._connections:
        time.sleep(0.01)
    reason = f"process {missing} of 3 did not come to localhost:{port} in 0.3 s"
    with caplog.at_level(logging.WARNING), pytest.raises(HostsError, match=f"^{reason}$") as told:
        first.gather("go on", ("localhost", port))
    assert other.refused() == (told.value.exit_code, reason) == (5, reason)
    assert f"process 0 waits for process {missing} of 3 at localhost:{port}" in caplog.messages


def test_the_first_process_that_does_not_come_is_named(threads, port, haste, caplog):
    with caplog.at_level(logging.WARNING):
        code, text = Process(threads, port, 1, 2).refused()
    assert (code, text) == (5, f"process 0 of 2 did not come to localhost:{port} in 0.3 s: Connection refused")
    assert f"process 1 waits for process 0 of 2 at localhost:{port}: Connection refused" in caplog.messages


def test_of_many_missing_processes_some_are_named(threads, port, haste):
    _, text = Process(threads, port, 0, 100).refused()
    assert text.startswith("processes 1, 2, 3, 4, 5, 6, 7, 8, ... of 100 did not come")


def test_two_processes_of_one_number_are_refused_at_once(threads, port):
    processes = [Process(threads, port, index, 3) for index in (0, 1, 1)]
    wrong = r"--process_id = 1: must be of one process, but two have it: (127\.0\.0\.1|::1), (127\.0\.0\.1|::1)"
    for code, text in [process.refused() for process in processes]:
        assert code == 2
        assert re.fullmatch(wrong, text)


def test_another_number_of_processes_is_refused_at_once(threads, port):
    processes = [Process(threads, port, index, count) for index, count in ((0, 3), (1, 2))]
    for code, text in [process.refused() for process in processes]:
        assert code == 2
        assert re.match(r"--processes = 3: must be the same in all processes, but process 1 at \S+ has 2", text)


def test_two_first_processes_are_refused_on_one_machine_and_on_two(threads, port):
    first = Process(threads, port, 0, 2)
    while True:  # until the first process listens
        try:
            socket.create_connection(("localhost", port), PATIENCE).close()
            break
        except ConnectionRefusedError:
            pass
    code, text = Process(threads, port, 0, 2).refused()
    assert (code, "is another process 0, or another run, there?" in text) == (2, True)
    elsewhere, _ = Peers.serve(2, print)  # as on another machine: it contacts the first one
    with pytest.raises(HostsError, match="--process_id = 0: must be of one process, but two have it: here, ") as told:
        elsewhere.gather("go on", ("localhost", port))
    assert told.value.exit_code == 2
    assert first.refused() == (2, str(told.value))


HOSTILE = [
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff" * 10_000,
    b"posenc_jax".ljust(32) + b"       x       2" + b"0" * 16,
    b"posenc_jax".ljust(32) + b"      -1       2" + b"0" * 16,
    b"posenc_jax".ljust(32) + b"       7       2" + b"0" * 16,
    b"posenc_jax".ljust(32) + b"       1",
]


@pytest.mark.parametrize("said", HOSTILE)
def test_a_stranger_is_turned_away_and_disturbs_nobody(said, threads, port, monkeypatch):
    monkeypatch.setattr(peers, "MAX_STRANGERS", 2)
    first = Process(threads, port, 0, 2)
    silent = []
    while len(silent) < 4:
        try:
            silent.append(socket.create_connection(("localhost", port), PATIENCE))
        except ConnectionRefusedError:  # it does not listen yet
            continue
    if said:
        with contextlib.suppress(OSError):  # the first process may hang up before it has heard all
            silent[-1].sendall(said)
    second = Process(threads, port, 1, 2)
    for process in (second, first):
        process.came.result(PATIENCE)
    assert silent[0].recv(1) == b""  # closed, because there are too many silent connections
    if said:
        with contextlib.suppress(OSError):  # reset if it had sent more than was read
            assert silent[-1].recv(1) == b""
    for process in (second, first):
        process.came.result().farewell()
    for connection in silent:
        connection.close()


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.6\r\n", b"0 \x00" * 4000, b"9 1\n", b"2 no newline"])
def test_what_answers_in_place_of_the_first_process_is_told_apart(said, threads, port):
    with socket.create_server(("", port)) as server:
        process = Process(threads, port, 1, 2)
        with server.accept()[0] as connection:
            with contextlib.suppress(OSError):  # it may hang up before it has heard all
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
            told = f"what answers at localhost:{port} is not process 0 of this run"
            assert process.refused() == (2, told)


def test_what_is_told_cannot_write_to_the_terminal_as_it_likes(threads, port):
    with socket.create_server(("", port)) as server:
        process = Process(threads, port, 1, 2)
        with server.accept()[0] as connection:
            connection.sendall(b"2 \x1b[2Jwrong\xff\n")
            assert process.refused() == (2, "?[2Jwrong\ufffd")
