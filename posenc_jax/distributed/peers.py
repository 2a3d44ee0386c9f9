"""Processes stay connected to process 0, so that all notice at once when one of them ends.

The kernel closes the connections of a process that is killed. jax's own heartbeat does not replace this: at any
interval, it aborts the process from C++ with a trace and exit code 134. Its interval stays at 100 seconds, to detect
hosts that vanish from the network.

Anyone may connect. Messages are therefore single lines of bounded length. A connection is closed if its first message
is not one of this run.
"""

import contextlib
import errno
import logging
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from posenc_jax.errors import reason

log = logging.getLogger(__name__)

NOTICE_SECONDS = 10  # after which missing processes are reported
LIMIT_SECONDS = 60  # in which all processes must connect
CONNECT_SECONDS = 10  # for one attempt to connect
RETRY_SECONDS = 0.2  # between attempts
GLANCE_SECONDS = 1  # for process 0 to check whether another process 0 uses its address
MAX_STRANGERS = 100  # open connections that have not identified themselves
MAX_BYTES = 1000  # of a message
ANYONE = "posenc_jax"  # the token of processes that cannot share a secret one
TOKEN_LETTERS, NUMBER_DIGITS, NONCE_LETTERS = 32, 8, 16
HELLO_BYTES = TOKEN_LETTERS + 2 * NUMBER_DIGITS + NONCE_LETTERS
GO, WRONG, LOST = 0, 2, 5  # first word of a message from process 0; WRONG and LOST are also exit codes
FAREWELL = b"farewell\n"  # sent at most twice
DUAL = socket.has_dualstack_ipv6()
FAMILY = socket.AF_INET6 if DUAL else socket.AF_INET

Lost = Callable[[str], None]  # called with a text that names the process that has ended


class HostsError(Exception):
    """The processes of a run did not find each other (exit code 5), or their settings conflict (exit code 2)."""

    def __init__(self, reason: str, exit_code: int = LOST):
        super().__init__(reason)
        self.exit_code = exit_code


class Peers:
    """The connections of this process. Process 0 is connected to all others; each other process only to process 0."""

    def __init__(self, index: int, count: int, lost: Lost, token: str):
        self.index, self.count, self._lost = index, count, lost
        self._token = f"{token:<{TOKEN_LETTERS}}"
        self._nonce = secrets.token_hex(NONCE_LETTERS // 2)
        self._hello = f"{self._token}{index:>{NUMBER_DIGITS}}{count:>{NUMBER_DIGITS}}{self._nonce}".encode()
        self._connections: dict[socket.socket, int] = {}
        self._changed = threading.Condition()  # guards _connections and _wrong
        self._wrong = ""
        self._met = self._parting = False

    @classmethod
    def serve(cls, count: int, lost: Lost, *, port: int = 0, token: str = ANYONE) -> tuple["Peers", int]:
        """The Peers of process 0, and the port on which it listens; port 0 means any. Raises HostsError."""
        peers = cls(0, count, lost, token)
        try:
            server = socket.create_server(("", port), family=FAMILY, dualstack_ipv6=DUAL)
        except OSError as error:
            hint = "; is another process 0, or another run, there?" if error.errno == errno.EADDRINUSE else ""
            raise HostsError(f"process 0 cannot listen at port {port}: {reason(error)}{hint}", WRONG) from error
        port = server.getsockname()[1]
        _start(peers._watch_all, server)
        return peers, port

    @classmethod
    def connect(
        cls, host: str, port: int, index: int, count: int, lost: Lost, *, token: str = ANYONE
    ) -> tuple["Peers", str]:
        """The Peers of another process, and the text that process 0 sent after all had connected. Raises HostsError."""
        peers = cls(index, count, lost, token)
        where, begun, noticed = f"{host}:{port}", time.monotonic(), False
        while True:
            with contextlib.ExitStack() as opened:
                try:
                    first = opened.enter_context(socket.create_connection((host, port), CONNECT_SECONDS))
                    first.settimeout(LIMIT_SECONDS + CONNECT_SECONDS)
                    first.sendall(peers._hello)
                    messages = opened.enter_context(first.makefile("rb"))
                    said, problem = messages.readline(MAX_BYTES), "the connection was closed"
                except OSError as error:
                    said, problem = b"", reason(error)
                if said:
                    code, text = _parsed(said)
                    if code != GO:
                        stranger = f"what answers at {where} is not process 0 of this run"
                        raise HostsError(text or stranger, code or WRONG)
                    first.settimeout(None)
                    peers._connections[first] = 0
                    opened.pop_all()
                    _start(peers._watch_first, first, messages)
                    return peers, text
            waited = time.monotonic() - begun
            if waited > LIMIT_SECONDS:
                raise HostsError(f"process 0 of {count} did not come to {where} in {LIMIT_SECONDS} s: {problem}")
            if waited > NOTICE_SECONDS and not noticed:
                log.warning("process %d waits for process 0 of %d at %s: %s", index, count, where, problem)
                noticed = True
            time.sleep(RETRY_SECONDS)

    def gather(self, text: str, at: tuple[str, int]) -> None:
        """Send `text` to all other processes once they have come to the address `at`. Raises HostsError."""
        for seconds in (NOTICE_SECONDS, LIMIT_SECONDS - NOTICE_SECONDS):
            self._look_for_another(at)
            with self._changed:
                self._changed.wait_for(lambda: self._wrong or not self._missing(), seconds)
                missing = self._missing()
                self._met = not (missing or self._wrong)
            if self._met:
                return self._tell(GO, text)
            if self._wrong:
                raise HostsError(self._wrong, WRONG)
            if seconds == NOTICE_SECONDS:
                log.warning("process 0 waits for %s at %s:%d", missing, *at)
        problem = f"{missing} did not come to {at[0]}:{at[1]} in {LIMIT_SECONDS} s"
        self._parting = True
        self._tell(LOST, problem)
        raise HostsError(problem)

    def farewell(self) -> None:
        """Tell the others that this process ends normally."""
        self._parting = True
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.sendall(FAREWELL)

    def _missing(self) -> str:
        numbers = sorted({*range(1, self.count)} - {*self._connections.values()})
        named = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return named and f"process{'es' * (len(numbers) > 1)} {named} of {self.count}"

    def _look_for_another(self, at: tuple[str, int]) -> None:
        """Connect to the address at which others look for process 0. Another process 0 there makes both fail."""
        with contextlib.suppress(OSError), socket.create_connection(at, GLANCE_SECONDS) as found:
            found.sendall(self._hello)
            with found.makefile("rb") as messages:
                code, text = _parsed(messages.readline(MAX_BYTES))
            if code == WRONG:
                with self._changed:
                    self._wrong = text

    def _watch_all(self, server: socket.socket) -> None:
        strangers: list[socket.socket] = []
        staying = self.count - 1
        with selectors.DefaultSelector() as selector, server:
            selector.register(server, selectors.EVENT_READ)
            while staying and not self._wrong:
                for key, _ in selector.select():
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is server:
                        try:
                            strangers.append(server.accept()[0])
                        except OSError:  # for example, too many open files
                            time.sleep(RETRY_SECONDS)
                            continue
                        selector.register(strangers[-1], selectors.EVENT_READ)
                        if len(strangers) > MAX_STRANGERS:
                            selector.unregister(strangers[0])
                            strangers.pop(0).close()
                    elif connection in strangers:
                        strangers.remove(connection)
                        if not self._admit(connection):
                            selector.unregister(connection)
                            connection.close()
                    elif connection not in self._connections:  # a stranger's connection, closed above
                        continue
                    elif _received(connection).startswith(FAREWELL):
                        selector.unregister(connection)
                        staying -= 1
                    else:
                        ended = f"process {self._connections[connection]} of {self.count} has ended"
                        self._tell(LOST, ended)
                        staying = 0
                        if not self._parting:
                            self._lost(ended)
        for connection in (*strangers, *self._connections):
            connection.close()

    def _admit(self, connection: socket.socket) -> bool:
        """Whether the connection comes from another process of the run. If so, it stays open."""
        said = _received(connection)
        numbers = [said[TOKEN_LETTERS:][i : i + NUMBER_DIGITS].strip() for i in (0, NUMBER_DIGITS)]
        known = secrets.compare_digest(said[:TOKEN_LETTERS], self._token.encode())
        if not known or len(said) != HELLO_BYTES or not all(number.isdigit() for number in numbers):
            return False
        if said == self._hello:  # it comes from this process
            _send(connection, GO, "")
            return False
        index, count = map(int, numbers)
        if index >= count:
            return False
        wrong, holder = "", {0: "here"} | {number: _host(held) for held, number in self._connections.items()}
        if count != self.count:
            allowed = f"must be the same in all processes, but process {index} at {_host(connection)} has {count}"
            wrong = f"--processes = {self.count}: {allowed}"
        elif index in holder:
            both = f"{holder[index]}, {_host(connection)}"
            wrong = f"--process_id = {index}: must be of one process, but two have it: {both}"
        with self._changed:
            if not wrong:
                self._connections[connection] = index
            elif not self._met:
                self._wrong = wrong
            self._changed.notify()
        if wrong:
            _send(connection, WRONG, wrong)
        if self._wrong:
            self._tell(WRONG, self._wrong)
        return not wrong

    def _tell(self, code: int, text: str) -> None:
        for connection in list(self._connections):
            _send(connection, code, text)

    def _watch_first(self, first: socket.socket, messages: BinaryIO) -> None:
        said = b""
        with first, messages:
            with contextlib.suppress(OSError):
                said = messages.readline(MAX_BYTES)
            if said == FAREWELL:
                self.farewell()  # before the connection is closed
            elif not self._parting:
                self._lost(_parsed(said)[1] or f"process 0 of {self.count} has ended")


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that stays reserved while the block runs. Code that sets SO_REUSEPORT can listen there."""
    with socket.socket(FAMILY) as held:
        if DUAL:
            held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("", 0))
        yield held.getsockname()[1]


def _start(watch: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(name="peers", target=watch, args=arguments, daemon=True).start()


def _send(connection: socket.socket, code: int, text: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(f"{code} {text[: MAX_BYTES - 10]}\n".encode())


def _received(connection: socket.socket) -> bytes:
    """The bytes that another process sent; empty if it has ended. The connection must be ready to be read."""
    try:
        return connection.recv(HELLO_BYTES)
    except OSError:
        return b""


def _parsed(message: bytes) -> tuple[int | None, str]:
    """The code and the text of a message of process 0. The code is None for other bytes."""
    found = re.fullmatch(rb"([025]) (.*)\n", message)
    if found is None:
        return None, ""
    text = found[2].decode(errors="replace")
    return int(found[1]), "".join(letter if letter.isprintable() else "?" for letter in text)


def _host(connection: socket.socket) -> str:
    """The address of the machine at the other end."""
    try:
        return connection.getpeername()[0].removeprefix("::ffff:")
    except OSError:
        return "an unknown address"
