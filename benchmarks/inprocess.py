"""Compare variants of one app inside this process, and check that each did its work."""

from __future__ import annotations

import random
import re
from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import cores
from benchmarks.apps import Served, make_all
from benchmarks.drivers import direct, protocol
from benchmarks.drivers.request import HEADERS, Headers
from benchmarks.estimates import Controls, added_us
from benchmarks.guarding import KEYED_VARIANTS, LIMITED, VARIANTS
from benchmarks.harness import (
    BLOCK_SECONDS,
    Claim,
    InProcess,
    Plan,
    in_teams,
    interleaved,
    requests_per_block,
    run,
)
from benchmarks.program import Record, finished
from opsguard.logging.batches import BATCH

Driver = Callable[[Served, str, AbstractEventLoop, Headers], Callable[[int], None]]


def _direct(
    served: Served, path: str, loop: AbstractEventLoop, headers: Headers
) -> Callable[[int], None]:
    return direct.serve(served, (path,), loop, headers)


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
    *,
    beside: Mapping[str, str] = {},
    headers: Headers = HEADERS,
    block: float = BLOCK_SECONDS,
    turn: int | None = None,
    warm: int = 0,
    step: int = BATCH,
    judged: bool = True,
) -> Record:
    """Measure ``subjects`` (variants of `make_all`) and the controls, each against the variant that
    ``beside`` names for it, else against the bare app. All get the same request. Not ``judged`` is
    a run that is one sample among others: the controls are measured as subjects are.

    ``block`` is for how many seconds the bare app is served at a time. What is a fraction of a
    microsecond needs many short blocks: within a long one a shared machine drifts by more. With
    ``turn`` the two of a team take turns of so many requests within a block, a multiple of
    ``step``, each after ``warm`` that do not count.
    """
    cores.measure_here()
    rest = (*subjects, controls.twin, controls.planted)
    names = tuple(dict.fromkeys(("bare", *beside.values(), *rest)))
    # What is made first lies elsewhere in memory: a page is a per cent dearer for that, or cheaper.
    # So is what serves first, and keeps what it has made. Chance decides about both.
    order = random.sample(names, len(names))
    served = make_all(framework, order)
    # Each has a loop of its own, as on its server: what one has put off is done in its time.
    loops = {name: direct.new_loop() for name in order}
    counted = {
        name: Counted(DRIVERS[driver](served[name], path, loops[name], headers)) for name in order
    }
    complaints = different_answers(served, path, loops, headers)
    arms = {name: InProcess(name, counted[name], served[name].drain) for name in order}
    for arm in arms.values():
        arm.block(BATCH)
    teams = [(arms[beside.get(name, "bare")], arms[name]) for name in rest]
    every = [Claim(f"{name} added µs", added_us(name)) for name in (subjects if judged else rest)]
    requests = requests_per_block(arms["bare"], block, step=step)
    rounds = interleaved(teams, requests, turn, warm) if turn else in_teams(teams, requests)
    outcome = run(rounds, [*claims, *every], controls if judged else None, plan)
    guarded = [name for name in names if name in VARIANTS]
    for name in guarded:
        if VARIANTS[name].get("metrics", {}).get("enabled", True):
            complaints += idle_guard(served[name], path, counted[name].requests, loops[name])
    return finished(outcome.as_record(), complaints) | {
        "framework": framework,
        "path": path,
        "driver": driver,
        "requests_per_block": requests,
        "guarded_requests": sum(counted[name].requests for name in guarded if _has_line(name)),
    }


def _has_line(variant: str) -> bool:
    """Whether this variant writes an access line for each request."""
    return bool(VARIANTS[variant].get("logging", {}).get("access", "all") == "all")


def different_answers(
    served: Mapping[str, Served],
    path: str,
    loops: Mapping[str, AbstractEventLoop],
    sent: Headers = HEADERS,
) -> list[str]:
    """Variants that do not answer what the bare app answers; a guarded one that adds no id, one
    with a limit that does not tell of it, one with a key that lets a stranger in.
    """
    status, _, body = direct.fetch(served["bare"], path, loops["bare"], headers=sent)
    found = [] if status == 200 else [f"the bare app answers {status}"]
    for name, one in served.items():
        loop = loops[name]
        got, headers, content = direct.fetch(one, path, loop, headers=sent)
        if (got, content) != (status, body):
            found.append(f"{name} answers differently from the bare app")
        if name in VARIANTS and "x-request-id" not in headers:
            found.append(f"{name} sends no X-Request-ID")
        limited = name == "limiter" or name in LIMITED
        if limited and name != "key" and "x-ratelimit-remaining" not in headers:
            found.append(f"{name} sends no X-RateLimit-Remaining: is it on?")
        if name in KEYED_VARIANTS and direct.fetch(one, path, loop, headers=HEADERS)[0] != 401:
            found.append(f"{name} lets somebody in without a key")
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
