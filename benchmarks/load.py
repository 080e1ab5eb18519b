"""The load client, a process of its own: ``python -m benchmarks.load``.

Reads one JSON job per line on standard input and answers one line each: it sends the requests, and
asks the worker before and after for its CPU time. The number of requests is fixed, not the time, so
that bare and guarded blocks do the same work and their turns can be as short as the method wants
them (the shortest run of `wrk` is a second). Connections stay open from job to job where the server
keeps them. As soon as one answer is read the next request goes out, so that all but one of the
connections have a request waiting at the server: it never sleeps within a block.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from benchmarks import cores
from benchmarks.drivers.request import HEADERS, KEYED, Headers, wire, with_encoding
from benchmarks.served import CONTROL


class BadAnswer(Exception):
    """The server answered something else than 200 and the expected number of bytes."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(f"not the expected answer: {answer[:300]!r}")


def complete(answer: bytes) -> bool:
    """Whether this is a whole answer, by its Content-Length or its last chunk.

    An answer with neither ends with the connection, and is never known to be complete.

    >>> complete(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\n{}")
    True
    """
    head, gap, body = answer.partition(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n") if gap else ():
        if line.startswith(b"content-length:"):
            return len(body) >= int(line[15:])
        if line.startswith(b"transfer-encoding:") and b"chunked" in line:
            return body.endswith(b"0\r\n\r\n")
    return False


@dataclass(slots=True)
class Connections:
    """``width`` connections to one port, opened anew for each request unless ``keep_alive``."""

    port: int
    keep_alive: bool
    width: int
    headers: Headers = HEADERS
    _open: list[socket.socket] = field(default_factory=list)
    _sizes: dict[str, int] = field(default_factory=dict)

    def _take(self) -> socket.socket:
        if self._open:
            return self._open.pop()
        made = socket.create_connection(("127.0.0.1", self.port), timeout=30.0)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return made

    def _give_back(self, connection: socket.socket) -> None:
        if self.keep_alive:
            self._open.append(connection)
        else:
            connection.close()

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *details: object) -> None:
        while self._open:
            self._open.pop().close()

    @property
    def spare(self) -> int:
        """How many are open and wait."""
        return len(self._open)

    def hand_over(self, other: Connections) -> None:
        """All that are open belong to the other from now on."""
        if other is not self:
            other._open += self._open
            self._open = []

    def fetch(self, path: str, *, encoding: str | None = None) -> bytes:
        """One whole answer. ``encoding`` replaces the request's Accept-Encoding."""
        headers = self.headers if encoding is None else with_encoding(self.headers, encoding)
        connection = self._take()
        connection.sendall(wire(path, headers))
        answer = b""
        while not complete(answer):
            data = connection.recv(65_536)
            if not data:
                break
            answer += data
        if not answer.startswith(b"HTTP/1.1 200") or (self.keep_alive and not complete(answer)):
            raise BadAnswer(answer)
        self._give_back(connection)
        return answer

    def send(self, path: str, requests: int) -> None:
        """Many requests; the body of every answer must have the size of the first."""
        if path not in self._sizes:
            self._sizes[path] = len(self.fetch(path).partition(b"\r\n\r\n")[2])
            requests -= 1
        size, request = self._sizes[path], wire(path, self.headers)
        waiting: deque[socket.socket] = deque()
        for _ in range(requests):
            if len(waiting) == self.width:
                self._read(waiting.popleft(), size)
            connection = self._take()
            connection.sendall(request)
            waiting.append(connection)
        while waiting:
            self._read(waiting.popleft(), size)

    def _read(self, connection: socket.socket, size: int) -> None:
        answer = connection.recv(65_536)
        while (head := answer.find(b"\r\n\r\n")) < 0 or len(answer) < head + 4 + size:
            data = connection.recv(65_536)
            if not data:
                break
            answer += data
        if len(answer) != head + 4 + size or not answer.startswith(b"HTTP/1.1 200"):
            raise BadAnswer(answer)
        self._give_back(connection)


def to_one_worker(
    port: int, width: int, workers: int, seconds: float = 60.0
) -> tuple[Connections, frozenset[int]]:
    """Open connections that the same one of a server's workers has taken, and the pids of all.

    :raises RuntimeError: if so many workers do not answer in this time.
    """
    deadline = time.monotonic() + seconds
    found: dict[int, Connections] = {}
    with contextlib.ExitStack() as rest:
        while True:
            probe = rest.enter_context(Connections(port, keep_alive=True, width=width))
            one = found.setdefault(reading(probe)["pid"], probe)
            probe.hand_over(one)
            if len(found) >= workers and one.spare >= width:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{len(found)} of {workers} workers answer")
        chosen = Connections(port, keep_alive=True, width=width)
        one.hand_over(chosen)
    return chosen, frozenset(found)


def job(connections: Connections, path: str, requests: int, warm: int) -> dict[str, Any]:
    """Load, and what the worker says it has spent on it and how many it served; the first ``warm``
    come before those and are not in what was spent.
    """
    before = reading(connections, warm=warm)
    connections.send(path, warm + requests)
    after = reading(connections)
    return {key: after[key] - before[key] for key in ("cpu_ns", "requests")}


def in_turns(
    connections: Connections, path: str, requests: int, turns: str, turn: int, warm: int
) -> dict[str, Any]:
    """Load on a worker in which two arms take turns, and what it says of each."""
    reading(connections, turns=turns, turn=turn, warm=warm)
    connections.send(path, requests)
    return reading(connections)


def reading(connections: Connections, **orders: int | str) -> dict[str, Any]:
    """What the worker that answers tells of itself, and is to do (see `benchmarks.served`)."""
    query = urlencode({name: order for name, order in orders.items() if order})
    answer = connections.fetch(f"{CONTROL}?{query}" if query else CONTROL)
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])
    return found


def main() -> None:
    cores.keep_off()
    # By process too: a later server may get the port of an earlier one.
    known: dict[tuple[int, int], Connections] = {}
    for line in sys.stdin:
        order = json.loads(line)
        port, key = order["port"], (order["port"], order["process"])
        if key not in known:
            headers = KEYED if order["keyed"] else HEADERS
            known[key] = Connections(port, order["keep_alive"], order["connections"], headers)
        how = in_turns if "turns" in order["asked"] else job
        found = how(known[key], order["path"], **order["asked"])
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
