"""An HTTP client of exact bytes: what is sent is what the test says, sound or not."""

from __future__ import annotations

import re
import socket
from typing import Self

from opsguard.testing import Answer, Request

__all__ = ["Client", "encode"]

TIMEOUT = 20.0
_BODILESS = (204, 304)
_END = re.compile(rb"\r\n\r?\n")
"""Of a head. Under Python 3.14 the empty line of gunicorn's own error page is a bare LF, as
`textwrap.dedent` tidies it there; clients may take that (RFC 9112, 2.2)."""


class Client:
    """One connection, from an address of this machine if one is asked for. What does not come
    within the timeout, in seconds, does not come.
    """

    def __init__(self, port: int, timeout: float = TIMEOUT, *, address: str | None = None) -> None:
        # One that is bound first needs a port that no closed one has: a long run uses up all.
        source = None if address is None else (address, 0)
        self._socket = socket.create_connection(
            ("127.0.0.1", port), timeout=timeout, source_address=source
        )
        self._buffer = b""
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> None:
        """Send all, or as much as the server takes before it hangs up."""
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def read_on(self, answer: Answer) -> None:
        """Read the rest of a chunked answer of which there was `enough` before."""
        self._read_chunked(answer, None)

    def ask(self, request: Request) -> Answer:
        """Send a request and read its answer."""
        self.send(encode(request))
        return self.answer(request.method)

    def answer(self, method: str = "GET", enough: int | None = None) -> Answer:
        """The next answer, or what there is of it: `complete` says whether that is all.

        `enough` is the number of body bytes after which no more is read.
        """
        answer = Answer()
        while answer.status is None or 100 <= answer.status < 200:
            head = self._head()
            if head is None:
                answer.status = None
                return answer
            first, *lines = head.decode("latin-1").split("\r\n")
            answer.status = int(first.split(" ")[1])
            answer.headers = [_pair(line) for line in lines]
        if method == "HEAD" or answer.status in _BODILESS:
            answer.complete = True
        elif "chunked" in answer.header("transfer-encoding"):
            self._read_chunked(answer, enough)
        elif answer.header("content-length"):
            length = int(answer.header("content-length")[0])
            answer.chunks.append(self._take(length))
            answer.complete = len(answer.body) == length
        else:
            self._read_rest(answer, enough)
        return answer

    def _read_chunked(self, answer: Answer, enough: int | None) -> None:
        while enough is None or len(answer.body) < enough:
            size = self._until(b"\r\n")
            if size is None:
                return
            length = int(size.strip().split(b";")[0], 16)
            if length == 0:
                answer.complete = self._until(b"\r\n") is not None
                return
            answer.chunks.append(self._take(length))
            if self._until(b"\r\n") is None:
                return

    def _read_rest(self, answer: Answer, enough: int | None) -> None:
        """A body that ends with the connection: whether it was all, nothing says."""
        while enough is None or len(answer.body) < enough:
            if not self._buffer and not self._more():
                return
            answer.chunks.append(self._buffer)
            self._buffer = b""

    def _head(self) -> bytes | None:
        while (end := _END.search(self._buffer)) is None:
            if not self._more():
                return None
        head, self._buffer = self._buffer[: end.start()], self._buffer[end.end() :]
        return head

    def _until(self, mark: bytes) -> bytes | None:
        while mark not in self._buffer:
            if not self._more():
                return None
        found, _, self._buffer = self._buffer.partition(mark)
        return found + mark

    def _take(self, length: int) -> bytes:
        while len(self._buffer) < length and self._more():
            pass
        found, self._buffer = self._buffer[:length], self._buffer[length:]
        return found

    def _more(self) -> bool:
        if self._ended:
            return False
        try:
            if hasattr(socket, "TCP_QUICKACK"):  # servers send head and body apart, and wait for it
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            data = self._socket.recv(65_536)
        except (ConnectionResetError, TimeoutError):
            data = b""
        self._buffer += data
        self._ended = not data
        return bool(data)


def encode(request: Request, *, target: bytes | None = None) -> bytes:
    """A request as it goes over the wire. `target` stands for the path where that is no text."""
    path = target or request.path.encode("latin-1")
    head = [b"%s %s HTTP/1.1" % (request.method.encode("latin-1"), path)]
    head += [f"{name}: {value}".encode("latin-1") for name, value in request.all_headers()]
    return b"\r\n".join(head) + b"\r\n\r\n" + _body(request)


def _body(request: Request) -> bytes:
    if not request.body or not request.chunked:
        return request.body
    half = len(request.body) // 2
    parts = [request.body[:half], request.body[half:], b""]
    return b"".join([b"%x\r\n%s\r\n" % (len(part), part) for part in parts])


def _pair(line: str) -> tuple[str, str]:
    name, _, value = line.partition(":")
    return name, value.strip()
