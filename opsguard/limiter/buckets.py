"""Whose bucket: from a request to the last part of a bucket's key, and what the request costs.

A bucket's key is made of parts that cannot be mistaken for each other: the scope with its length in
front, the rate, the kind of client, and last the client. Texts that people or clients choose are
hashed where they are long, and always where a function gave them: they may be secrets. Nothing here
raises, and there is always a bucket: a request whose own cannot be told is counted by address, in
a bucket apart.
"""

from __future__ import annotations

import inspect
import ipaddress
import math
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Protocol

from opsguard.limiter.rates import Rate, Strategy

__all__ = [
    "IDENTITIES",
    "Ask",
    "Cost",
    "Whose",
    "bucket_name",
    "cost_of",
    "describe_key",
    "of_address",
    "prefix",
    "whose",
]

IDENTITIES: Final = {"key": "key_id", "tenant": "tenant_id", "user": "user_id"}
"""The keys of policies that are attributes of an identity."""

_LONGEST_NAME = 64
_LONGEST_ANSWER = 4096  # characters of what a key function gives


class Ask(Protocol):
    """What the limiter reads of a request; an exchange is one."""

    @property
    def method(self) -> str: ...
    @property
    def routed(self) -> str:
        """The decoded path that the router sees."""
        ...

    @property
    def client(self) -> str | None: ...
    @property
    def request_id(self) -> str: ...
    @property
    def endpoint(self) -> str | None: ...
    @property
    def source(self) -> Any:
        """The adapter's own request, for functions of users."""
        ...

    def header(self, name: str) -> str: ...

    # And, where there are API keys, `identity`: an object with `key_id`, `tenant_id`,
    # `user_id`, `tier` and `master`, or None.


Whose = Callable[[Ask], str]
Cost = Callable[[Ask], float]


def prefix(scope: str, rate: Rate, strategy: Strategy, kind: str) -> str:
    """The part of a bucket's key that is the same for all clients of a policy."""
    name = scope if len(scope) <= _LONGEST_NAME and scope.isascii() else f"#{_hashed(scope)}"
    burst = f"+{rate.burst}" if rate.burst else ""
    return f"{len(name)}:{name}:{strategy[0]}{rate.amount}/{rate.period}{burst}:{kind}:"


def of_address(ask: Ask) -> str:
    """The client's address, of IPv6 the /64: one customer has that many."""
    client = ask.client
    if client and ":" not in client and len(client) <= _LONGEST_NAME:
        return client
    return _odd_address(client or "")


@lru_cache(maxsize=4096)
def _network(client: str) -> str:
    try:
        address = ipaddress.IPv6Address(client.partition("%")[0])
    except ValueError:
        return "-"
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Address(int(address) >> 64 << 64)) + "/64"


def _odd_address(client: str) -> str:
    # A unix socket without trusted proxies has no address: then everybody shares one bucket.
    return _network(client) if 0 < len(client) <= _LONGEST_NAME else "-"


def whose(
    key: str | Callable[..., object], on_fallback: Callable[[BaseException | None], None]
) -> tuple[str, Whose]:
    """The kind of client and the function that tells the client, for a policy's key.

    `on_fallback` hears of a function that raised (with the error) or gave no usable text.
    """
    if callable(key):
        return "f", _by_function(key, on_fallback)
    if key == "address":
        return "a", of_address
    if key == "global":
        return "g", _everybody
    return key[0], _by_identity(IDENTITIES[key])


def _everybody(ask: Ask) -> str:
    return "*"


def _by_identity(attribute: str) -> Whose:
    def identify(ask: Ask) -> str:
        name = getattr(getattr(ask, "identity", None), attribute, None)
        if not name or not isinstance(name, str):
            return f"!{of_address(ask)}"  # nobody we know
        if len(name) <= _LONGEST_NAME and name.isascii():
            return f"={name}"
        return f"#{_hashed(name)}"

    return identify


def _by_function(
    function: Callable[..., object], on_fallback: Callable[[BaseException | None], None]
) -> Whose:
    call = _called_with(function)

    def identify(ask: Ask) -> str:
        error: BaseException | None = None
        try:
            name = call(ask)
            if type(name) is int:
                name = str(name)
            if isinstance(name, str) and 0 < len(name) <= _LONGEST_ANSWER:
                return f"#{_hashed(name)}"
        except Exception as raised:
            error = raised
        on_fallback(error)
        return f"!{of_address(ask)}"

    return identify


def cost_of(
    cost: Callable[..., object], on_fallback: Callable[[BaseException | None], None]
) -> Cost:
    """What a request costs, from a user's function: at least 0, whole or infinite.

    Fractions are rounded up. What is negative or no number at all is 1, and told to
    `on_fallback`, as is an error.
    """
    call = _called_with(cost)

    def costs(ask: Ask) -> float:
        error: BaseException | None = None
        try:
            value = call(ask)
            if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
                return value if math.isinf(value) else math.ceil(value)
        except Exception as raised:
            error = raised
        on_fallback(error)
        return 1

    return costs


def describe_key(policy_key: str | Callable[..., object]) -> str:
    """A policy's key for people."""
    if isinstance(policy_key, str):
        return policy_key
    return f"function {getattr(policy_key, '__name__', 'of the app')}"


def bucket_name(key: str | Callable[..., object], shown: str | None) -> str:
    """The last part of the key of the client that an operator asks about."""
    if shown is None:
        return "<client>"
    if key == "global":
        return "*"
    if key == "address":
        return shown if ":" not in shown else _odd_address(shown)
    if callable(key) or len(shown) > _LONGEST_NAME or not shown.isascii():
        return f"#{_hashed(shown)}"
    return f"={shown}"


def _called_with(function: Callable[..., object]) -> Callable[[Ask], object]:
    """The function as one of an ask: it may take the framework's own request, or nothing."""
    try:
        takes = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        takes = []  # a builtin that does not tell
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    if any(one.kind in positional for one in takes):
        return lambda ask: function(ask.source)
    return lambda ask: function()


def _hashed(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
