"""A client that sends what a browser would not: any bytes, half a conversation."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse

__all__ = ["HOST", "ID_HEADER", "Answer", "ask"]

HOST = "127.0.0.1"
ID_HEADER = "X-Request-ID"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `ids` are the values of all X-Request-ID headers."""

    status: int
    ids: tuple[str, ...]
    body: bytes


def ask(
    port: int,
    method: str,
    target: str,
    *,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes | None = None,
    chunked: bool = False,
    leave: bool = False,
    timeout: float = 15.0,
) -> Answer:
    """One request on a connection of its own. Nothing is checked or escaped: texts go out as their
    latin-1 bytes. With `leave` the connection is reset after the first bytes of the body.

    :raises OSError: if there is no answer (a broken one is a ConnectionError).
    """
    lines = [f"{method} {target} HTTP/1.1", f"Host: {HOST}:{port}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in headers]
    if body is not None:
        lines.append("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}")
    head = "\r\n".join([*lines, "", ""]).encode("latin-1")
    with socket.create_connection((HOST, port), timeout) as connection:
        connection.sendall(head + (_chunks(body) if chunked else body or b""))
        response = HTTPResponse(connection, method=method)
        try:
            response.begin()
            ids = tuple(response.headers.get_all(ID_HEADER, []))
            if leave:
                received = response.read(1)
                # Linger 0: closing sends a reset, as a client does that is gone for good.
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                received = response.read()
        except HTTPException as error:
            raise ConnectionError(f"a broken answer: {error!r}") from error
        finally:
            response.close()
        return Answer(response.status, ids, received)


def _chunks(body: bytes | None, size: int = 8192) -> bytes:
    body = body or b""
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join([b"%x\r\n%s\r\n" % (len(part), part) for part in parts]) + b"0\r\n\r\n"
