"""Invariants of the address resolver, for any peer and any header."""

from __future__ import annotations

import ipaddress

from hypothesis import assume, given
from hypothesis import strategies as st

from opsguard.addresses import MAX_ENTRIES, parse, resolver

TRUSTED = ("10.0.0.0/8", "2001:db8::/32")
TRUSTED_NETWORKS = [ipaddress.ip_network(text) for text in TRUSTED]

v4 = st.ip_addresses(v=4)
v6 = st.ip_addresses(v=6)
addresses = v4 | v6
trusted_addresses = st.ip_addresses(network=TRUSTED[0]) | st.ip_addresses(network=TRUSTED[1])
ports = st.integers(0, 65535)

written = (
    addresses.map(str)
    | st.builds("{}:{}".format, v4, ports)
    | st.builds("[{}]".format, v6)
    | st.builds("[{}]:{}".format, v6, ports)
    | st.builds('"[{}]:{}"'.format, v6, ports)
    | st.builds("::ffff:{}".format, v4)
    | st.builds("{}%eth{}".format, v6, st.integers(0, 9))
)
garbage = st.text(max_size=40) | st.sampled_from(
    [
        "unknown",
        "_hidden",
        "",
        " ",
        '"',
        "[",
        "[]",
        "[]:80",
        "1.2.3.4:",
        "%",
        "1.2.3.4%eth0",
        "::1%",
    ]
)
headers = st.none() | st.text() | st.lists(written | garbage, max_size=8).map(", ".join)
peers = st.none() | st.just("") | st.text(max_size=30) | written
configurations = st.sampled_from([((), 0), (TRUSTED, 0), ((), 1), ((), 2), ((), MAX_ENTRIES)])


def is_address(text: str) -> bool:
    try:
        return str(ipaddress.ip_address(text)) == text
    except ValueError:
        return False


@given(configuration=configurations, peer=peers, header=headers)
def test_the_client_is_the_peer_or_a_canonical_address(
    configuration: tuple[tuple[str, ...], int], peer: str | None, header: str | None
) -> None:
    client = resolver(*configuration)(peer, header)
    assert client == peer or (client is not None and is_address(client))


@given(peer=peers, header=headers)
def test_without_proxies_the_peer_comes_back_untouched(
    peer: str | None, header: str | None
) -> None:
    assert resolver((), 0)(peer, header) is peer


@given(peer=addresses, header=headers)
def test_an_untrusted_peer_wins_whatever_the_header_says(
    peer: ipaddress.IPv4Address | ipaddress.IPv6Address, header: str | None
) -> None:
    address = parse(str(peer))
    assume(not any(address in network for network in TRUSTED_NETWORKS))
    assert resolver(TRUSTED, 0)(str(peer), header) == str(address)


@given(
    forged=st.text(max_size=200),
    client=addresses,
    proxies=st.lists(trusted_addresses, min_size=1, max_size=6),
)
def test_what_a_client_writes_itself_never_counts_behind_trusted_proxies(
    forged: str,
    client: ipaddress.IPv4Address | ipaddress.IPv6Address,
    proxies: list[ipaddress.IPv4Address | ipaddress.IPv6Address],
) -> None:
    address = parse(str(client))
    assume(not any(address in network for network in TRUSTED_NETWORKS))
    *seen, peer = map(str, proxies)
    header = ", ".join([forged, str(client), *seen])
    assert resolver(TRUSTED, 0)(peer, header) == str(address)


@given(forged=st.text(max_size=200), chain=st.lists(addresses, min_size=1, max_size=6))
def test_what_a_client_writes_itself_never_counts_within_the_hops(
    forged: str, chain: list[ipaddress.IPv4Address | ipaddress.IPv6Address]
) -> None:
    header = ", ".join([forged, *map(str, chain)])
    assert resolver((), len(chain))("192.0.2.1", header) == str(parse(str(chain[0])))


@given(address=addresses, text=st.data())
def test_every_way_to_write_an_address_means_that_address(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, text: st.DataObject
) -> None:
    port = text.draw(ports)
    if isinstance(address, ipaddress.IPv4Address):
        forms = [f"{address}", f"{address}:{port}", f"::ffff:{address}", f'"{address}"']
        expected: ipaddress.IPv4Address | ipaddress.IPv6Address = address
    else:
        forms = [f"{address.exploded.upper()}", f"[{address}]:{port}", f"[{address}%1]"]
        expected = address.ipv4_mapped or address
    assert [parse(form) for form in forms] == [expected] * len(forms)


@given(text=st.text())
def test_parse_never_raises(text: str) -> None:
    found = parse(text)
    assert found is None or parse(str(found)) == found
