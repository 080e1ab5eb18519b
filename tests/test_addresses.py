"""The client's address, by example."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from opsguard.addresses import MAX_CHARACTERS, MAX_ENTRIES, network, parse, resolver

PROXIES = ("10.0.0.0/8", "192.0.2.1", "fd00::/8")


@dataclass(frozen=True)
class Case:
    name: str
    peer: str | None
    header: str | None
    client: str | None


def ids(case: Case) -> str:
    return case.name


@pytest.mark.parametrize(
    "case",
    [
        Case("no-header", "203.0.113.9", None, "203.0.113.9"),
        Case("header-ignored", "203.0.113.9", "1.2.3.4", "203.0.113.9"),
        Case("not-even-parsed", "::FFFF:1.2.3.4", "1.2.3.4", "::FFFF:1.2.3.4"),
        Case("unix-socket-none", None, "1.2.3.4", None),
        Case("unix-socket-empty", "", "1.2.3.4", ""),
        Case("no-address", "testclient", "1.2.3.4", "testclient"),
    ],
    ids=ids,
)
def test_nothing_is_trusted_by_default(case: Case) -> None:
    """Without proxies in the settings the peer comes back as it is."""
    assert resolver((), 0)(case.peer, case.header) == case.client


@pytest.mark.parametrize(
    "case",
    [
        Case("no-header", "10.0.0.2", None, "10.0.0.2"),
        Case("empty-header", "10.0.0.2", "", "10.0.0.2"),
        Case("one-proxy", "10.0.0.2", "203.0.113.9", "203.0.113.9"),
        Case("two-proxies", "10.0.0.2", "203.0.113.9, 10.0.0.3", "203.0.113.9"),
        Case("forged-left", "10.0.0.2", "127.0.0.1, 203.0.113.9, 10.0.0.3", "203.0.113.9"),
        Case("single-address-trusted", "192.0.2.1", "203.0.113.9", "203.0.113.9"),
        Case("untrusted-peer", "203.0.113.9", "1.2.3.4", "203.0.113.9"),
        Case("untrusted-peer-canonical", "::ffff:203.0.113.9", "1.2.3.4", "203.0.113.9"),
        Case("all-trusted", "10.0.0.2", "10.0.0.5, 10.0.0.4", "10.0.0.5"),
        Case("mapped-peer-is-trusted", "::ffff:10.0.0.2", "203.0.113.9", "203.0.113.9"),
        Case("mapped-entry", "10.0.0.2", "::ffff:203.0.113.9", "203.0.113.9"),
        Case("v4-port", "10.0.0.2", "203.0.113.9:4711", "203.0.113.9"),
        Case("v6", "10.0.0.2", "2001:DB8:0:0::1", "2001:db8::1"),
        Case("v6-brackets", "10.0.0.2", "[2001:db8::1]", "2001:db8::1"),
        Case("v6-port", "10.0.0.2", "[2001:db8::1]:4711", "2001:db8::1"),
        Case("v6-quoted", "10.0.0.2", '"[2001:db8::1]:4711"', "2001:db8::1"),
        Case("v6-proxy", "fd00::2", "2001:db8::1, fd00::3", "2001:db8::1"),
        Case("zone", "10.0.0.2", "fe80::1%eth0", "fe80::1"),
        Case("zone-peer", "fd00::2%eth0", "203.0.113.9", "203.0.113.9"),
        Case("tabs-and-spaces", "10.0.0.2", " \t203.0.113.9 \t, 10.0.0.3", "203.0.113.9"),
        Case("empty-entries", "10.0.0.2", ",,203.0.113.9,, ,10.0.0.3,", "203.0.113.9"),
        Case("only-commas", "10.0.0.2", ",,,", "10.0.0.2"),
        Case("unknown", "10.0.0.2", "unknown", "10.0.0.2"),
        Case("unknown-ends-the-walk", "10.0.0.2", "1.2.3.4, unknown, 10.0.0.3", "10.0.0.3"),
        Case("obfuscated", "10.0.0.2", "1.2.3.4, _hidden", "10.0.0.2"),
        Case("garbage", "10.0.0.2", "1.2.3.4, \x00\xff\ud800, 10.0.0.3", "10.0.0.3"),
        Case("not-decimal", "10.0.0.2", "\u0661.2.3.4", "10.0.0.2"),
        Case("octal", "10.0.0.2", "010.1.1.1", "10.0.0.2"),
        Case("empty-port", "10.0.0.2", "203.0.113.9:", "10.0.0.2"),
        Case("v4-in-brackets", "10.0.0.2", "[203.0.113.9]:80", "10.0.0.2"),
        Case("v4-with-zone", "10.0.0.2", "203.0.113.9%eth0", "10.0.0.2"),
        Case("half-quoted", "10.0.0.2", '"203.0.113.9', "10.0.0.2"),
        Case("network-is-no-address", "10.0.0.2", "203.0.113.0/24", "10.0.0.2"),
        Case("overlong-entry", "10.0.0.2", "203.0.113.9, " + "1" * 5000, "10.0.0.2"),
        Case("unix-socket-none", None, "203.0.113.9", "203.0.113.9"),
        Case("unix-socket-empty", "", "203.0.113.9, 10.0.0.3", "203.0.113.9"),
        Case("unix-socket-path", "/run/app.sock", "203.0.113.9", "203.0.113.9"),
        Case("unix-socket-prefix", "unix:", "203.0.113.9", "203.0.113.9"),
        Case("unix-socket-alone", None, None, None),
        Case("unix-socket-garbage", "", "unknown", ""),
        Case("peer-without-address", "testclient", "203.0.113.9", "testclient"),
    ],
    ids=ids,
)
def test_trusted_networks(case: Case) -> None:
    """The first address from the right that is not trusted is the client."""
    assert resolver(PROXIES, 0)(case.peer, case.header) == case.client


CHAIN = "198.51.100.7, 203.0.113.9"


@pytest.mark.parametrize(
    ("hops", "case"),
    [
        (1, Case("one-hop", "10.0.0.2", CHAIN, "203.0.113.9")),
        (2, Case("two-hops", "10.0.0.2", CHAIN, "198.51.100.7")),
        (3, Case("list-too-short", "10.0.0.2", CHAIN, "198.51.100.7")),
        (2, Case("no-list", "10.0.0.2", None, "10.0.0.2")),
        (1, Case("peer-canonical", "::ffff:10.0.0.2", None, "10.0.0.2")),
        (1, Case("peer-not-judged", "testclient", CHAIN, "203.0.113.9")),
        (1, Case("peer-without-address", "testclient", None, "testclient")),
        (1, Case("unix-socket", None, CHAIN, "203.0.113.9")),
        (1, Case("unix-socket-alone", "", None, "")),
        (2, Case("empty-entries-do-not-count", "10.0.0.2", "1.2.3.4,,9.9.9.9,", "1.2.3.4")),
        (2, Case("garbage-ends-the-walk", "10.0.0.2", "1.2.3.4, unknown", "10.0.0.2")),
        (2, Case("garbage-after-one", "10.0.0.2", "unknown, 9.9.9.9:80", "9.9.9.9")),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else f"{value}",
)
def test_hops(hops: int, case: Case) -> None:
    """The peer is the first hop; the client is the entry number `hops` from the right."""
    assert resolver((), hops)(case.peer, case.header) == case.client


def test_only_the_last_entries_are_looked_at() -> None:
    """Of 10,000 entries the last hundred count; the client further left is not reached."""
    proxies = [f"10.0.0.{number % 200}" for number in range(9_999)]
    header = ", ".join(["203.0.113.9", *proxies])
    assert resolver(PROXIES, 0)("10.0.0.2", header) == proxies[-MAX_ENTRIES]


def test_the_last_entry_that_fits_is_still_found() -> None:
    """A client at the far end of a list of just the allowed length is found."""
    header = ",".join(["203.0.113.9"] + ["10.0.0.3"] * (MAX_ENTRIES - 1))
    assert resolver(PROXIES, 0)("10.0.0.2", header) == "203.0.113.9"
    assert resolver((), MAX_ENTRIES)("10.0.0.2", header) == "203.0.113.9"


def test_an_entry_cut_by_the_length_limit_is_not_taken_for_an_address() -> None:
    """The tail `2.0.0.1` of a cut `192.0.0.1` is a valid address and must not count."""
    tail = ", 10.0.0.3"
    visible = "2.0.0.1".ljust(MAX_CHARACTERS - len(tail)) + tail
    assert len(visible) == MAX_CHARACTERS
    assert resolver(PROXIES, 0)("10.0.0.2", "x, 19" + visible) == "10.0.0.3"
    assert resolver(PROXIES, 0)("10.0.0.2", visible) == "2.0.0.1"


def test_a_header_of_one_endless_entry_has_no_address() -> None:
    """A megabyte without a comma leaves the peer."""
    assert resolver(PROXIES, 0)("10.0.0.2", "9" * 1_000_000) == "10.0.0.2"


@pytest.mark.parametrize(
    ("trusted", "hops"),
    [
        (("10.0.0.0/33",), 0),
        (("*",), 0),
        (("10.0.0.1/8",), 0),
        ((), -1),
        ((), MAX_ENTRIES + 1),
        (("10.0.0.0/8",), 1),
    ],
    ids=["prefix-too-long", "star", "host-bits", "negative", "too-many-hops", "both"],
)
def test_wrong_configuration_is_an_error(trusted: tuple[str, ...], hops: int) -> None:
    """What cannot be meant is refused at construction, not at the first request."""
    with pytest.raises(ValueError, match=r"."):
        resolver(trusted, hops)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("10.0.0.0/8", "10.0.0.0/8"),
        (" 192.0.2.1 ", "192.0.2.1/32"),
        ("2001:DB8::/32", "2001:db8::/32"),
        ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
        ("::/0", "::/0"),
        ("::/96", "::/96"),
    ],
    ids=["v4", "single", "v6", "mapped", "all-v6", "not-mapped"],
)
def test_networks_are_compared_in_one_form(text: str, canonical: str) -> None:
    """An IPv4-mapped network becomes IPv4, as the addresses do."""
    assert str(network(text)) == canonical


def test_an_overlong_text_is_no_address() -> None:
    """A bound on the length comes before any parsing."""
    assert parse(" " * 200 + "1.2.3.4") is None


def test_one_resolver_serves_many_threads() -> None:
    """More addresses than the cache holds, from eight threads at once: each answer is right."""
    resolve = resolver(PROXIES, 0)
    wrong: list[str] = []

    def ask(offset: int) -> None:
        for number in range(1500):
            address = f"203.0.{(number + offset) % 250}.{number % 250}"
            if resolve("10.0.0.2", f"{address}, 10.0.0.3") != address:
                wrong.append(address)

    threads = [threading.Thread(target=ask, args=(offset * 31,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
