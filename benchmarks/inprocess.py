"""Compare variants of one app inside this process, and check that each did its work."""

from __future__ import annotations

import re
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.apps import Served, make_all
from benchmarks.drivers import direct, protocol
from benchmarks.estimates import Controls, added_us
from benchmarks.harness import Claim, InProcess, Plan, in_turn, requests_per_block, run
from benchmarks.program import Record, finished

Driver = Callable[[Served, str, AbstractEventLoop], Callable[[int], None]]


def _direct(served: Served, path: str, loop: AbstractEventLoop) -> Callable[[int], None]:
    return direct.serve(served, (path,), loop)


DRIVERS: Mapping[str, Driver] = {"direct": _direct, "protocol": protocol.serve}


@dataclass(slots=True)
class Counted:
    """Counts the requests of an arm."""

    serve: Callable[[int], None]
    requests: int = 0

    def __call__(self, requests: int) -> None:
        self.requests += requests
        self.serve(requests)


def compare(
    framework: str,
    path: str,
    driver: str,
    subjects: Sequence[str],
    claims: Sequence[Claim],
    controls: Controls,
    plan: Plan,
) -> Record:
    """Measure ``subjects`` (variants of `make_all`) against the bare app and the controls."""
    names = ("bare", *subjects, controls.twin, controls.planted)
    served = make_all(framework, names)
    loop = direct.new_loop()
    complaints = different_answers(served, path, loop)
    counted = {name: Counted(DRIVERS[driver](served[name], path, loop)) for name in names}
    arms = {name: InProcess(name, counted[name], served[name].drain) for name in names}
    rest = [arms[name] for name in names if name != "bare"]
    every = [Claim(f"{name} added µs", added_us(name)) for name in subjects]
    requests = requests_per_block(arms["bare"])
    rounds = in_turn(arms["bare"], rest, requests)
    outcome = run(rounds, [*claims, *every], controls, plan)
    if "guarded" in served:
        complaints += idle_guard(served["guarded"], path, counted["guarded"].requests, loop)
    return finished(outcome.as_record(), complaints) | {
        "framework": framework,
        "path": path,
        "driver": driver,
        "requests_per_block": requests,
        "guarded_requests": counted["guarded"].requests if "guarded" in counted else 0,
    }


def different_answers(
    served: Mapping[str, Served], path: str, loop: AbstractEventLoop
) -> list[str]:
    """Variants that do not answer what the bare app answers; a guarded one that adds no id."""
    status, _, body = direct.fetch(served["bare"], path, loop)
    found = [] if status == 200 else [f"the bare app answers {status}"]
    for name, one in served.items():
        got, headers, content = direct.fetch(one, path, loop)
        if (got, content) != (status, body):
            found.append(f"{name} answers differently from the bare app")
        if name == "guarded" and "x-request-id" not in headers:
            found.append("the guarded app sends no X-Request-ID")
    return found


def idle_guard(served: Served, path: str, requests: int, loop: AbstractEventLoop) -> list[str]:
    """Whether the guarded app's own counter has seen every request of its blocks."""
    seen = counted_requests(metrics_text(served, loop), path)
    if seen < requests:
        return [f"the guarded app counted {seen:g} of {requests} requests: is it on?"]
    return []


def metrics_text(served: Served, loop: AbstractEventLoop) -> str:
    """What the guarded app exports now."""
    _, _, body = direct.fetch(served, "/metrics", loop, encoding="identity")
    return body.decode()


def counted_requests(exposition: str, endpoint: str) -> float:
    """The sum of ``http_requests_total`` over one endpoint in a text exposition."""
    sample = re.compile(r'^http_requests_total\{[^}]*endpoint="([^"]*)"[^}]*\} (\S+)', re.MULTILINE)
    return sum(float(value) for name, value in sample.findall(exposition) if name == endpoint)
