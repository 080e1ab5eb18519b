"""The demo from its first line to its last."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from rich.console import Console
from rich.live import Live

from opsguard.demo.checks import differences
from opsguard.demo.overhead import ROUNDS, Overhead
from opsguard.demo.report import Report, latencies
from opsguard.demo.scrape import Exposition, Log
from opsguard.demo.server import Service, ServiceFailed, environment, serving
from opsguard.demo.traffic import CLIENTS, SCRAPE, START, Outcome, drive, pay, script

__all__ = ["play"]

SETTLE = 5.0
"""Seconds after which a client that left must have been noticed and every line written."""
REFRESH = 3.0
MEASURE = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What the service said of itself once it had come to rest, and what of it is wrong."""

    exposition: Exposition
    log: Log
    differences: list[str]


def play(
    framework: str,
    console: Console,
    *,
    port: int = 0,
    once: bool = False,
    rounds: int = ROUNDS,
) -> int:
    """Run the demo; returns its exit status: 0 if everything was as it should be, else 1.

    Without `once` it stays until Ctrl-C. `rounds` says how long the overhead is measured. The
    server it started is ended on every way out, on SIGTERM and SIGHUP too: they come out as
    SystemExit with 128 plus the signal's number.
    """
    report = Report(console)
    with _signals_end_it():
        try:
            with serving(framework, port) as (service, first):
                report.service(service)
                outcomes = [Outcome(START, first)]
                measure = functools.partial(_overhead, framework, service, rounds)
                wrong = _show(service, outcomes, measure, report)
                if not once:
                    _stay(service, console, report)
        except ServiceFailed as failure:
            report.failed(str(failure))
            return 1
    return 1 if wrong else 0


def _show(
    service: Service,
    outcomes: list[Outcome],
    measure: Callable[[], Overhead | str],
    report: Report,
) -> list[str]:
    """Drive the traffic and show what came out; returns what is wrong."""
    visits = script()
    report.sending(len(visits), CLIENTS)
    outcomes += drive(service.port, visits)
    finding = _settle(service, outcomes)
    report.traffic(finding.exposition)
    report.counts(outcomes, finding.exposition)
    report.lines(outcomes, finding.log)
    wrong = finding.differences
    overhead = measure()
    if isinstance(overhead, Overhead):
        report.overhead(overhead)
    else:
        wrong = [*wrong, overhead]
    report.verdict(outcomes, wrong)
    return wrong


def _settle(service: Service, outcomes: list[Outcome]) -> Finding:
    """Look until all is as it should be, or until it had its time. A scrape is a request like any
    other: the next one counts it.
    """
    deadline = time.monotonic() + SETTLE
    while True:
        late = time.monotonic() > deadline
        exposition, scrape = _scrape(service)
        text = service.log.read_text("utf-8") if service.log.exists() else ""
        log = Log(text.split("\n")[:-1])
        found = differences(outcomes, exposition, log)
        if not found or late:
            return Finding(exposition, log, found)
        outcomes.append(scrape)
        time.sleep(0.2)


def _scrape(service: Service) -> tuple[Exposition, Outcome]:
    service.check()
    scrape = pay(service.port, SCRAPE)
    if scrape.answer is None or scrape.answer.status != 200:
        raise ServiceFailed(f"/metrics cannot be read: {scrape.error or scrape.answer}")
    return Exposition(scrape.answer.body.decode()), scrape


def _overhead(framework: str, service: Service, rounds: int) -> Overhead | str:
    """Measured in a process of its own, where nothing else runs; or why it could not be."""
    folder = service.folder / "overhead"
    folder.mkdir()
    try:
        result = subprocess.run(
            [sys.executable, "-m", "opsguard.demo.overhead", framework, str(rounds)],
            capture_output=True,
            cwd=folder,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=MEASURE,
        )
    except subprocess.TimeoutExpired:
        return f"the overhead could not be measured within {MEASURE:g} s"
    if result.returncode:
        return f"the overhead could not be measured:\n{result.stderr[-2000:]}"
    return Overhead(**json.loads(result.stdout))


def _stay(service: Service, console: Console, report: Report) -> None:
    """Keep the shop open until Ctrl-C, with a table that follows its numbers on a terminal."""
    with contextlib.suppress(KeyboardInterrupt):
        report.staying(service)
        if not console.is_terminal:
            while True:
                time.sleep(REFRESH)
                service.check()
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while True:
                live.update(latencies(_scrape(service)[0]), refresh=True)
                time.sleep(REFRESH)


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGTERM and SIGHUP as SystemExit, so that what has to be cleaned up is. One that is ignored
    stays so: that is what `nohup` asks for.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = {
        number: signal.signal(number, leave)
        for number in (signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
