"""Whatever a request holds, on every adapter: an answer, one line, sound ids, sound numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsguard.testing import Request
from tests.contract.harness import Samples, guard, parse
from tests.contract.scenarios import ADAPTERS, ASGI

# Django's ASGI handler leaves the spooled body open when an answer breaks off.
pytestmark = pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*")
SOUND = re.compile(r"[A-Za-z0-9._-]{1,128}")
PATHS = (b"/plain", b"/items/7", b"/ids", b"/bound", b"/empty", b"/handled", b"/refused/9")

latin = st.text(st.characters(max_codepoint=255), max_size=40)
"""What a header can hold: any bytes."""
ids = st.one_of(latin, st.from_regex(SOUND, fullmatch=True), st.just("x" * 300))
addresses = st.one_of(
    latin,
    st.ip_addresses().map(str),
    st.sampled_from(["unknown", "[::1]:80", "1.2.3.4:5", "fe80::1%eth0", "::ffff:1.2.3.4", ",,,"]),
    st.lists(st.ip_addresses().map(str), max_size=120).map(", ".join),
)
headers = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["X-Request-ID", "X-Correlation-ID"]), ids),
        st.tuples(st.just("X-Forwarded-For"), addresses),
    ),
    max_size=4,
)
paths = st.one_of(
    st.binary(max_size=30).map(lambda path: b"/" + path),
    st.text(max_size=20).map(lambda path: f"/{path}".encode("utf-8", "replace")),
    st.sampled_from(PATHS),
)
methods = st.one_of(st.sampled_from(["GET", "POST", "HEAD", "get", "", "M" * 300]), latin)


@st.composite
def requests(draw: st.DrawFn, *, asgi: bool) -> Request:
    # What servers make of a path: ASGI has text, WSGI the bytes as they are.
    errors = "replace" if asgi else "surrogateescape"
    return Request(
        path=draw(paths).decode("utf-8", errors).replace("?", "/"),
        method=draw(methods),
        headers=tuple(draw(headers)),
        body=draw(st.binary(max_size=20)),
        chunked=draw(st.booleans()),
        client=draw(st.one_of(st.none(), st.just("127.0.0.1"), addresses)),
        root_path=draw(st.sampled_from(["", "/shop"])),
        strict=False,
    )


def total(found: Samples, name: str) -> float:
    return sum([value for (sample, _), value in found.items() if sample == name])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_any_request_is_answered_recorded_once_and_harmless(adapter: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path, proxies={"trusted": ["127.0.0.1/32", "10.0.0.0/8"]})
    served = 0

    @settings(suppress_health_check=[HealthCheck.too_slow])
    @given(requests(asgi=adapter in ASGI))
    def check(request: Request) -> None:
        nonlocal served
        served += 1
        answer = guarded.send(request)
        assert answer.error is None
        assert answer.status is not None
        assert answer.status < 500
        (request_id,) = answer.header("x-request-id")
        for one in (request_id, *answer.header("x-correlation-id")):
            assert SOUND.fullmatch(one)
        lines = guarded.lines()
        assert len(lines) == served
        line = lines[-1]
        assert line["request_id"] == request_id
        assert line["status_code"] == answer.status
        found = guarded.samples()
        assert total(found, "http_requests_total") == served
        assert total(found, "http_requests_in_progress") == 0.0
        assert total(found, "opsguard_internal_errors_total") == 0.0

    check()
    scrape = guarded.send(Request("/metrics"))
    assert total(parse(scrape.body.decode()), "http_requests_total") == served
