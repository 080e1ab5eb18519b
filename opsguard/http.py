"""The neutral answer: what the core says, in words every adapter can speak.

A request needs no neutral twin: an adapter hands the few values that the core
reads to :meth:`opsguard.ports.Port.open` as plain arguments, because building an
object for them would cost more than everything done with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["METHODS", "Pending", "Response", "below"]

METHODS = frozenset(
    ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "QUERY")
)
"""The methods that are told apart; a client may make up any other."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer of ours, complete and small, sent by the adapter as it is.

    `headers` are (name, value) pairs of latin-1 text, names in their canonical case;
    `Content-Length` is among them. For HEAD `body` is empty and the headers are those of GET.
    Immutable, so it may be shared by threads.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Pending(Protocol):
    """An answer that takes a look outside of this process to find: a key store, a remote limit.

    `run` blocks for it, `arun` awaits it; None means that the request may go on. Once, and by the
    request's own thread or task.
    """

    def run(self) -> Response | None: ...

    async def arun(self) -> Response | None: ...


def below(path: str, root: str | None) -> str:
    """The path as the router of an ASGI app sees it: without the ``root_path`` that the app is
    mounted under, if that ends where a segment of the path does.
    """
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path
