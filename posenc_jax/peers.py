"""Processes that notice at once when one of them has ended: a connection of each to the first one.

A process that is killed closes its connections, whatever it was doing. jax itself notices after 100 seconds without a
sign of life, which is what remains for a host that vanishes from the network.
"""

import contextlib
import secrets
import selectors
import socket
import threading
from collections.abc import Callable

HELLO_SECONDS = 10  # that a new connection has to say who it is
TOKEN_LETTERS, INDEX_DIGITS = 32, 8
FAREWELL = b"farewell"  # said twice at most

Lost = Callable[[str], None]  # told which process has ended


class Peers:
    """The connections of this process: to all others, if it is the first one, else to the first one."""

    def __init__(self, connections: dict[socket.socket, int]):
        self._connections = connections
        self._parting = False

    @classmethod
    def serve(cls, count: int, lost: Lost) -> tuple["Peers", str]:
        """Those of the first process, and what the others need to connect to it."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        token = secrets.token_hex(TOKEN_LETTERS // 2)
        peers = cls({})
        threading.Thread(name="peers", target=peers._watch_all, args=(server, token, count, lost), daemon=True).start()
        return peers, f"{server.getsockname()[1]} {token}"

    @classmethod
    def connect(cls, host: str, address: str, index: int, count: int, lost: Lost) -> "Peers":
        """Those of another process. Raises OSError."""
        port, _, token = address.partition(" ")
        first = socket.create_connection((host, int(port)), timeout=HELLO_SECONDS)
        first.settimeout(None)
        first.sendall(f"{token}{index:>{INDEX_DIGITS}}".encode())
        peers = cls({first: 0})
        threading.Thread(name="peers", target=peers._watch_first, args=(first, count, lost), daemon=True).start()
        return peers

    def farewell(self) -> None:
        """Say that this process ends as it should."""
        self._parting = True
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.sendall(FAREWELL)

    def _watch_all(self, server: socket.socket, token: str, count: int, lost: Lost) -> None:
        staying = count - 1
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as opened:
            selector.register(opened.enter_context(server), selectors.EVENT_READ)
            while staying:
                for key, _ in selector.select():
                    connection = key.fileobj
                    assert isinstance(connection, socket.socket)
                    if connection is server:
                        connection = opened.enter_context(server.accept()[0])
                        if self._admit(connection, token):
                            selector.register(connection, selectors.EVENT_READ)
                    elif _received(connection).startswith(FAREWELL):
                        selector.unregister(connection)
                        staying -= 1
                    else:
                        reason = f"process {self._connections[connection]} of {count} has ended"
                        for other in self._connections:
                            with contextlib.suppress(OSError):
                                other.sendall(reason.encode())
                        return lost(reason)

    def _admit(self, connection: socket.socket, token: str) -> bool:
        """Whether it is one of the others'; a stranger's is closed."""
        connection.settimeout(HELLO_SECONDS)
        try:
            said = connection.recv(TOKEN_LETTERS + INDEX_DIGITS, socket.MSG_WAITALL)
        except OSError:
            said = b""
        known = secrets.compare_digest(said[:TOKEN_LETTERS], token.encode())
        if known:
            self._connections[connection] = int(said[TOKEN_LETTERS:])
        else:
            connection.close()
        return known

    def _watch_first(self, first: socket.socket, count: int, lost: Lost) -> None:
        with first:
            said = _received(first)
            if said.startswith(FAREWELL):
                self.farewell()  # before the connection is closed
            elif not self._parting:
                lost(said.decode() or f"process 0 of {count} has ended")


def _received(connection: socket.socket) -> bytes:
    """What a process said; nothing if it has ended."""
    try:
        return connection.recv(1000)
    except OSError:
        return b""
