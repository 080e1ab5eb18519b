"""What was sent against what the service says of it: pure functions from both to complaints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from opsguard.demo.client import HOST
from opsguard.demo.scrape import Exposition, Key, Log
from opsguard.demo.traffic import UNMATCHED, Outcome, Visit

__all__ = ["CHECKS", "differences", "key_of", "muted", "sent"]

Check = Callable[[Sequence[Outcome], Exposition, Log], Iterator[str]]

_SOUND = re.compile(r"[A-Za-z0-9._-]{1,128}")
_METHODS = {"GET", "POST"}
_PROBES = {"/health", "/metrics"}
_FEW = 3


def key_of(visit: Visit) -> Key:
    """What counts a visit in the metrics."""
    method = visit.method if visit.method in _METHODS else "_OTHER"
    return method, visit.endpoint, str(visit.status)


def sent(outcomes: Iterable[Outcome]) -> Counter[Key]:
    """What the client has sent, as the metrics should have it."""
    return Counter(key_of(outcome.visit) for outcome in outcomes if not outcome.refused)


def muted(visit: Visit) -> bool:
    """Good answers to probes and scrapes have no access line."""
    return visit.endpoint in _PROBES and visit.status < 400


def differences(outcomes: Sequence[Outcome], exposition: Exposition, log: Log) -> list[str]:
    """Everything that is not as it should be, in words; empty if all is well."""
    return [found for check in CHECKS for found in check(outcomes, exposition, log)]


def every_visit_was_answered(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    for outcome in outcomes:
        visit, answer = outcome.visit, outcome.answer
        if outcome.refused:
            continue
        if answer is None:
            yield f"{_name(visit)}: no answer ({outcome.error})"
        elif not visit.leaves and answer.status != visit.status:
            yield f"{_name(visit)}: answered {answer.status}, not {visit.status}"


def every_answer_has_its_id(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    """One sound id on each, a client's own if it was sound, and no id twice."""
    seen: Counter[str] = Counter()
    for outcome in outcomes:
        visit, answer = outcome.visit, outcome.answer
        if outcome.refused or answer is None:
            continue
        if len(answer.ids) != 1 or not _SOUND.fullmatch(answer.ids[0]):
            yield f"{_name(visit)}: X-Request-ID is {answer.ids!r:.200}"
        elif visit.own_id and answer.ids[0] != visit.own_id:
            yield f"{_name(visit)}: the id {visit.own_id!r} came back as {answer.ids[0]!r}"
        elif not visit.own_id and any(value == answer.ids[0] for _, value in visit.headers):
            yield f"{_name(visit)}: the hostile id {answer.ids[0]!r} was taken"
        seen.update(answer.ids)
    yield from [f"the id {one!r} was given {n} times" for one, n in seen.items() if n > 1]


def every_request_is_counted_once(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    """Per method, endpoint and status, in counter and histogram; unknown paths in one series."""
    expected, counted = sent(outcomes), exposition.requests()
    for key in sorted(expected.keys() | counted.keys()):
        if expected[key] != counted[key]:
            yield f"{' '.join(key)}: {expected[key]} sent, {counted[key]} in http_requests_total"
    per_route = Counter[tuple[str, str]]()
    for (method, endpoint, _), count in counted.items():
        per_route[method, endpoint] += count
    if per_route != exposition.durations():
        yield "http_request_duration_seconds counts other requests than http_requests_total"
    series = [
        labels
        for labels, _ in exposition.samples("http_requests_total")
        if labels["endpoint"] == UNMATCHED and labels["method"] == "GET"
    ]
    if len(series) != 1:
        yield f"paths that nobody serves have {len(series)} series, not 1"


def nothing_is_in_progress(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    for labels, value in exposition.samples("http_requests_in_progress"):
        if value:
            yield f"{labels['method']} {labels['endpoint']}: {value:g} in progress when all is over"


def the_shop_counted_its_business(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    """Orders by the shop's own counter; exceptions by type; the bytes of the uploads."""
    here = sent(outcomes)
    uploads = [outcome.visit.body or b"" for outcome in outcomes if _is_upload(outcome.visit)]
    route = {"method": "POST", "endpoint": "/uploads"}
    for what, expected, found in (
        ("orders", here["POST", "/orders", "201"], exposition.total("shop_orders_total")),
        (
            "exceptions",
            here["GET", "/boom", "500"],
            exposition.total("http_errors_total", endpoint="/boom", error_type="RuntimeError"),
        ),
        (
            "uploaded bytes",
            sum(map(len, uploads)),
            exposition.total("http_request_size_bytes_sum", **route),
        ),
    ):
        if expected != found:
            yield f"{what}: {expected} sent, {found:g} in the metrics"


def opsguard_had_no_fault(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    for name in ("opsguard_internal_errors_total", "opsguard_dropped_total"):
        for labels, value in exposition.samples(name):
            if value:
                yield f"{name}{dict(labels)} is {value:g}"


def every_request_has_one_access_line(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    """With the id that the client was given, the right endpoint and status, and the peer's address
    whatever X-Forwarded-For says.
    """
    expected = {}
    for outcome in outcomes:
        if outcome.answer and outcome.answer.ids and not muted(outcome.visit):
            expected[outcome.answer.ids[0]] = outcome.visit
    lines = log.access()
    count = Counter(line.get("request_id") for line in lines)
    yield from _few(f"{_name(v)}: {count[i]} access lines with its id {i}"
                    for i, v in expected.items() if count[i] != 1)  # fmt: skip
    yield from _few(f"an access line for {line.get('method')} {line.get('path')!r:.100} has the id "
                    f"{line.get('request_id')}, which no answer had"
                    for line in lines if line.get("request_id") not in expected)  # fmt: skip
    for line in lines:
        visit = expected.get(str(line.get("request_id")))
        if visit is None:
            continue
        wanted = (visit.method, visit.endpoint, visit.status, HOST)
        found = tuple(line.get(name) for name in ("method", "endpoint", "status_code", "client"))
        if found != wanted:
            yield f"{_name(visit)}: its access line says {found}, not {wanted}"


def every_line_is_json(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    yield from _few(f"a log line is no JSON object: {line!r:.200}" for line in log.broken)


def the_shops_own_lines_have_the_id(
    outcomes: Sequence[Outcome], exposition: Exposition, log: Log
) -> Iterator[str]:
    """What a handler logs carries the request's id, in a thread or not."""
    for message in sorted({outcome.visit.says for outcome in outcomes} - {""}):
        said = Counter(str(line.get("request_id")) for line in log.saying(message))
        expected = Counter(
            outcome.answer.ids[0]
            for outcome in outcomes
            if outcome.visit.says == message and outcome.answer and outcome.answer.ids
        )
        if said != expected:
            wrong = (said - expected) + (expected - said)
            yield f"{message!r}: {wrong.total()} lines are missing, double or of another request"


CHECKS: tuple[Check, ...] = (
    every_visit_was_answered,
    every_answer_has_its_id,
    every_request_is_counted_once,
    nothing_is_in_progress,
    the_shop_counted_its_business,
    opsguard_had_no_fault,
    every_request_has_one_access_line,
    every_line_is_json,
    the_shops_own_lines_have_the_id,
)


def _name(visit: Visit) -> str:
    return f"{visit.method:.20} {visit.target:.60}"


def _is_upload(visit: Visit) -> bool:
    return visit.endpoint == "/uploads" and visit.method == "POST"


def _few(complaints: Iterable[str]) -> Iterator[str]:
    """The first complaints of a kind, and how many more there are."""
    every = list(complaints)
    yield from every[:_FEW]
    if len(every) > _FEW:
        yield f"... and {len(every) - _FEW} more like this"
