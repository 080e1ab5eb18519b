"""What the demo shows, on a terminal or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan

from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from opsguard.demo.checks import sent
from opsguard.demo.overhead import Overhead
from opsguard.demo.scrape import Exposition, Log, quantile
from opsguard.demo.server import Service
from opsguard.demo.traffic import Outcome

__all__ = ["Report", "latencies"]


class Report:
    """Writes each part of the demo to a console."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def service(self, service: Service) -> None:
        print_ = self._console.print
        print_(f"[bold]{escape(' '.join(service.command))}[/]", soft_wrap=True)
        print_()
        for path, what in (
            ("/items", "the shop"),
            ("/metrics", "its metrics, for Prometheus"),
            ("/boom", "an unhandled exception: a safe answer, counted and logged"),
        ):
            print_(f"  [cyan]{service.url}{path:<9}[/] {what}", highlight=False, soft_wrap=True)
        print_(f"  log lines: {escape(str(service.log))}", highlight=False, soft_wrap=True)
        print_()

    def sending(self, visits: int, clients: int) -> None:
        self._console.print(f"Sending {visits} requests, {clients} at a time ...\n")

    def traffic(self, exposition: Exposition) -> None:
        self._console.print(latencies(exposition), "")

    def counts(self, outcomes: Sequence[Outcome], exposition: Exposition) -> None:
        """What the client sent beside what the service counted."""
        expected, counted = sent(outcomes), exposition.requests()
        table = Table(title="What was sent, and what /metrics says", title_justify="left")
        for name in ("method", "endpoint", "status"):
            table.add_column(name)
        for name in ("sent", "counted", ""):
            table.add_column(name, justify="right")
        for key in sorted(expected.keys() | counted.keys(), key=lambda key: (key[1], key)):
            same = expected[key] == counted[key]
            mark = Text("ok", "green") if same else Text("DIFFERENT", "bold red")
            table.add_row(*map(escape, key), str(expected[key]), str(counted[key]), mark)
        self._console.print(table)
        refused = sum(outcome.refused for outcome in outcomes)
        if refused:
            self._console.print(
                f"{refused} more were so odd that the server itself refused them: "
                "they reached no app, so they are counted nowhere."
            )
        self._console.print()

    def lines(self, outcomes: Iterable[Outcome], log: Log) -> None:
        """A few log lines of telling requests, as they were written."""
        self._console.print("Log lines, as written (an order, an exception, a client that left):")
        for key in (("/orders", 201), ("/boom", 500), ("/stream", 499)):
            ids = [
                outcome.answer.ids[0]
                for outcome in outcomes
                if (outcome.visit.endpoint, outcome.visit.status) == key
                and outcome.answer
                and outcome.answer.ids
            ]
            # Lines with a stack run over many rows; of those there is one in the log file.
            for line in [line for one in ids[:1] for line in log.of(one) if len(line) < 600]:
                self._console.print(JSONHighlighter()(line), soft_wrap=True)
        self._console.print()

    def overhead(self, overhead: Overhead) -> None:
        self._console.print(
            f"Overhead, roughly: {overhead.added:.1f} µs of CPU on a handler of "
            f"{overhead.bare:.1f} µs that does nothing else "
            f"(the same without opsguard against itself: {overhead.noise:+.1f} µs)."
        )
        if not overhead.telling:
            self._console.print("This machine is too busy for it: the noise is as large.")
        self._console.print(
            "It is measured in a second or two. The real figures, beside pages that do work: "
            "nox -s bench\n"
        )

    def verdict(self, outcomes: Sequence[Outcome], differences: Sequence[str]) -> None:
        if not differences:
            self._console.print(
                f"[bold green]All as it should be[/]: {len(outcomes)} requests, each counted once "
                "under its route, each answered with its id, each with one access line."
            )
            return
        self._console.print(f"[bold red]{len(differences)} things are not as they should be[/]:")
        for difference in differences:
            self._console.print(f"  - {escape(difference)}", highlight=False, soft_wrap=True)

    def staying(self, service: Service) -> None:
        self._console.print(f"\nThe shop stays open at {service.url}/items until Ctrl-C.")

    def failed(self, message: str) -> None:
        self._console.print(f"[bold red]{escape(message)}[/]", highlight=False, soft_wrap=True)


def latencies(exposition: Exposition) -> Table:
    """Requests and latencies by endpoint, of nothing but a scrape."""
    endpoints = exposition.endpoints()
    codes = sorted({code for endpoint in endpoints.values() for code in endpoint.codes})
    table = Table(title="Requests by endpoint, from /metrics", title_justify="left")
    table.add_column("endpoint", no_wrap=True)
    for name in ("requests", *[f"{code}xx" for code in codes], "p50", "p95", "in progress"):
        table.add_column(name, justify="right")
    for name, endpoint in endpoints.items():
        table.add_row(
            escape(name),
            str(endpoint.requests),
            *[str(endpoint.codes[code] or "") for code in codes],
            *[_milliseconds(quantile(share, endpoint.buckets)) for share in (0.5, 0.95)],
            f"{endpoint.in_progress:g}",
        )
    table.caption = "p50 and p95: estimated from the buckets; 4xx: with 499, clients that left"
    return table


def _milliseconds(seconds: float) -> str:
    return "" if isnan(seconds) else f"{seconds * 1000:.3g} ms"
