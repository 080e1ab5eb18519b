"""The client's address: the peer, seen through the proxies that the settings trust.

One resolver serves the limiter, the logs, the spans and the error reports, so all of them
name the same client. :func:`resolver` is called once, at install, and returns the function
for the request path; which function that is depends on the settings, so an app without
proxies pays for one call that returns its argument.

The rules, in one place:

* Nothing is trusted by default: the client is the peer, and `X-Forwarded-For` is not read.
* `trusted` (CIDR networks): walk from the right, that is from the proxy nearest to us, while
  the addresses are trusted. The first one that is not is the client. If all are trusted, the
  leftmost is. A peer that is not trusted is the client, whatever the header says.
* `hops` (how many proxies of ours stand in front of the app): the peer is the first of them,
  so the client is the entry number `hops` from the right. With
  `X-Forwarded-For: 198.51.100.7, 203.0.113.9` and the peer `10.0.0.2`, one hop gives
  `203.0.113.9` (what our only proxy saw) and two give `198.51.100.7`. If the list is shorter,
  the leftmost entry is taken; without a list, the peer. A hop count is only safe where nobody
  can reach the app except through all of these proxies.
* Empty list elements are skipped (RFC 9110, 5.6.1). Anything else that is no address
  (`unknown`, the `_hidden` identifiers of RFC 7239, garbage) ends the walk, and the last good
  address before it is the client: what stands further left was vouched for by nobody we know.
* A peer without an address (None or an empty text: a unix socket) counts as a trusted proxy
  once proxies are configured, because only a process on this machine, with the right to open
  the socket's file, can be at its other end.
* Only the last 100 entries within the last 8,192 characters are looked at, whatever a client
  sends; the time is linear in that part.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

__all__ = ["MAX_CHARACTERS", "MAX_ENTRIES", "Resolve", "network", "parse", "resolver"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolve = Callable[[str | None, str | None], str | None]
"""From the peer (as the server gave it) and the value of `X-Forwarded-For` (all field lines
joined by a comma, or None) to the client's address."""

MAX_ENTRIES = 100
MAX_CHARACTERS = 8192

_MAX_ADDRESS = 100  # the longest IPv6 address with brackets, zone, port and quotes is shorter
_CACHED = 1024
_BRACKETED = re.compile(r"\[([^\[\]]*)\](?::[0-9]{1,5})?")
_WITH_PORT = re.compile(r"([0-9.]+):[0-9]{1,5}")


def resolver(trusted: Sequence[str], hops: int) -> Resolve:
    """The function that finds the client's address; it never raises and may be shared by threads.

    It returns an address in canonical text (`2001:db8::1`, and `1.2.3.4` for
    `::ffff:1.2.3.4`), or the peer unchanged where that is no address or nothing is trusted.

    :raises ValueError: for a network that is none, a negative hop count or one above
        `MAX_ENTRIES`, and for networks and hops together, which would be two different answers.
    """
    if hops < 0 or hops > MAX_ENTRIES:
        raise ValueError(f"hops must be from 0 to {MAX_ENTRIES}, not {hops}")
    if trusted and hops:
        raise ValueError("proxies are given by networks or by a hop count, not by both")
    if trusted:
        return _by_network(tuple(network(text) for text in trusted))
    if hops:
        return _by_hops(hops)
    return _peer


def network(text: str) -> Network:
    """The network that a CIDR text or a single address names; IPv4-mapped ones become IPv4.

    :raises ValueError: if it names none, or has bits set behind its prefix.
    """
    found = ipaddress.ip_network(text.strip())
    if isinstance(found, ipaddress.IPv6Network) and found.prefixlen >= 96:
        mapped = found.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, found.prefixlen - 96))
    return found


def parse(text: str) -> Address | None:
    """The address in one list entry, or None if there is none.

    Understands a port behind IPv4 and behind bracketed IPv6, quotes, and a zone, which is
    dropped as it means something on one machine only. IPv4-mapped IPv6 becomes IPv4.
    A port behind bare IPv6 cannot be told from its last group and is read as that.
    """
    if len(text) > _MAX_ADDRESS:
        return None
    text = text.strip(" \t")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    if bracketed := _BRACKETED.fullmatch(text):
        text = bracketed[1]
        if ":" not in text:
            return None
    elif with_port := _WITH_PORT.fullmatch(text):
        text = with_port[1]
    if ":" in text:
        text = text.partition("%")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def _peer(peer: str | None, forwarded: str | None) -> str | None:
    return peer


def _by_network(networks: tuple[Network, ...]) -> Resolve:
    # Proxies are few and come with every request; lru_cache is safe under threads, with and
    # without the GIL. Its memory is bounded: _entries lets no long text through.
    @lru_cache(maxsize=_CACHED)
    def judge(text: str) -> tuple[str, bool] | None:
        """The canonical address and whether it is trusted, or None for no address."""
        address = parse(text)
        if address is None:
            return None
        return str(address), any(address in known for known in networks)

    def resolve(peer: str | None, forwarded: str | None) -> str | None:
        client = peer
        if peer and not _is_socket_path(peer):
            judged = judge(peer)
            if judged is None:
                return peer
            client, is_trusted = judged
            if not is_trusted:
                return client
        if not forwarded:
            return client
        for entry in _entries(forwarded):
            judged = judge(entry)
            if judged is None:
                return client
            client, is_trusted = judged
            if not is_trusted:
                return client
        return client

    return resolve


def _by_hops(hops: int) -> Resolve:
    @lru_cache(maxsize=_CACHED)
    def canonical(text: str) -> str | None:
        address = parse(text)
        return None if address is None else str(address)

    def resolve(peer: str | None, forwarded: str | None) -> str | None:
        # The peer is the first hop by definition, so it is not judged.
        client = (canonical(peer) or peer) if peer else peer
        if not forwarded:
            return client
        left = hops
        for entry in _entries(forwarded):
            address = canonical(entry)
            if address is None:
                return client
            client = address
            left -= 1
            if not left:
                return client
        return client

    return resolve


def _is_socket_path(peer: str) -> bool:
    """Whether the server named a unix socket instead of an address; servers differ in how."""
    return peer.startswith(("/", "unix:"))


def _entries(forwarded: str) -> Iterator[str]:
    """The list's entries from right to left, without the empty ones, at most `MAX_ENTRIES`.

    An entry too long for an address is yielded as an empty text, so that the caller's cache
    stays small: no address either way.
    """
    if len(forwarded) > MAX_CHARACTERS:
        # The first piece of the part kept may be the end of a longer entry (the 2.0.0.1 of
        # 192.0.0.1 would pass for an address), so it goes.
        forwarded = forwarded[-MAX_CHARACTERS:].partition(",")[2]
    pieces = forwarded.rsplit(",", MAX_ENTRIES)
    if len(pieces) > MAX_ENTRIES:
        del pieces[0]
    for piece in reversed(pieces):
        entry = piece.strip(" \t")
        if entry:
            yield entry if len(entry) <= _MAX_ADDRESS else ""
