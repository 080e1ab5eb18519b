"""What an adapter holds: the path of a request, in the words of one protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opsguard.accelerator import speed
from opsguard.exchange import Exchange

if TYPE_CHECKING:
    from opsguard.plan import Plan

__all__ = ["Port", "Protocol", "T"]

T = TypeVar("T")
"""What a protocol writes headers in: str or bytes."""

Open = Callable[[str, str, str, str | None, Mapping[str, str] | None, Any], Exchange]
Head = Callable[[Exchange, int, Iterable[tuple[T, T]]], list[tuple[T, T]]]


@dataclass(frozen=True, slots=True)
class Protocol(Generic[T]):
    """How a protocol reads and writes headers, in its own type of text: str or bytes.

    `exchange` is the subclass that reads a request header. `incoming(name)` is what the protocol
    calls the request header of this lower-case name. `name(name)` and `value(value)` give a
    response header; `fold(name)` makes two spellings of a name equal. `names(headers)` gives the
    folded names of headers, where there is a faster way than one by one.
    """

    exchange: type[Exchange]
    incoming: Callable[[str], T]
    name: Callable[[str], T]
    value: Callable[[str], T]
    fold: Callable[[T], T]
    names: Callable[[Iterable[tuple[T, T]]], Iterable[T]] | None = None


if TYPE_CHECKING or speed is None:

    class Hinge:
        """Where a port's `door` is; the accelerator has a type of this name."""

        __slots__ = ("door",)

else:
    Hinge = speed.Hinge


class Port(Hinge, Generic[T]):
    """A plan in the words of one protocol.

    An adapter reads the attributes anew for each request: `override` exchanges them in tests.
    `wanted` maps the request headers that `open` takes, in the protocol's own naming, to their
    lower-case names; `gather` takes them out of a mapping of headers.
    """

    __slots__ = ("gather", "head", "open", "plan", "protocol", "wanted")

    door: Any
    """`open` and `head` in C, or None."""

    def __init__(self, protocol: Protocol[T], plan: Plan) -> None:
        self.protocol = protocol
        self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.open: Open = plan.open_with(self.protocol.exchange)
        self.head: Head[T] = plan.head_with(self.protocol)
        self.wanted = {self.protocol.incoming(name): name for name in plan.wanted}
        self.gather = self._gather
        self.door = plan.door(self)
        if self.door is not None:
            self.open, self.head = self.door.open, self.door.head
            self.gather = self.door.gather

    def _gather(self, environ: Mapping[T, str]) -> dict[str, str] | None:
        """The wanted headers of a mapping of headers, as `open` takes them."""
        found = {name: environ[key] for key, name in self.wanted.items() if environ.get(key)}
        return found or None
