"""What the service says of itself: its /metrics and its log, read by somebody else."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Endpoint", "Exposition", "Key", "Log", "quantile"]

Key = tuple[str, str, str]
"""Method, endpoint, status, as the metrics have them."""


@dataclass(slots=True)
class Endpoint:
    """What /metrics says of one endpoint, all methods together. `buckets` are cumulative counts by
    upper bound in seconds; `codes` counts by the first digit of the status.
    """

    codes: Counter[str] = field(default_factory=Counter)
    buckets: Counter[float] = field(default_factory=Counter)
    in_progress: float = 0.0

    @property
    def requests(self) -> int:
        return self.codes.total()


class Exposition:
    """A scrape in the Prometheus text format, looked up by the names of the metrics."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[tuple[Mapping[str, str], float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def samples(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        """(labels, value) of every sample of this name."""
        return self._samples.get(name, [])

    def total(self, name: str, **labels: str) -> float:
        """The sum over the samples that have these labels; 0 if there is none."""
        return sum(
            value for found, value in self.samples(name) if labels.items() <= dict(found).items()
        )

    def requests(self) -> Counter[Key]:
        """How many requests were counted by method, endpoint and status."""
        found: Counter[Key] = Counter()
        for labels, value in self.samples("http_requests_total"):
            found[labels["method"], labels["endpoint"], labels["status"]] += int(value)
        return found

    def durations(self) -> Counter[tuple[str, str]]:
        """How many durations were observed by method and endpoint."""
        found: Counter[tuple[str, str]] = Counter()
        for labels, value in self.samples("http_request_duration_seconds_count"):
            found[labels["method"], labels["endpoint"]] += int(value)
        return found

    def endpoints(self) -> dict[str, Endpoint]:
        """The requests by endpoint."""
        found: dict[str, Endpoint] = defaultdict(Endpoint)
        for (_, endpoint, status), count in self.requests().items():
            found[endpoint].codes[status[:1]] += count
        for labels, value in self.samples("http_request_duration_seconds_bucket"):
            found[labels["endpoint"]].buckets[float(labels["le"])] += int(value)
        for labels, value in self.samples("http_requests_in_progress"):
            found[labels["endpoint"]].in_progress += value
        return dict(sorted(found.items()))


def quantile(share: float, buckets: Mapping[float, int]) -> float:
    """The quantile as Prometheus' `histogram_quantile` estimates it: linear within the bucket it
    falls into, the highest finite bound if that is the last one, NaN without observations.
    """
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if not total:
        return nan
    rank = share * total
    below, start = 0, 0.0
    for bound in bounds:
        if buckets[bound] >= rank and bound != inf:
            inside = buckets[bound] - below
            return start + (bound - start) * (rank - below) / inside if inside else start
        below = buckets[bound]
        start = bound if bound != inf else start
    return start


class Log:
    """The lines of the service's log. Those that are no JSON objects are `broken`."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.broken: list[str] = []
        self.lines: list[tuple[str, dict[str, Any]]] = []
        """(the line as written, its fields)"""
        for line in lines:
            try:
                fields = json.loads(line)
            except ValueError:
                fields = None
            if isinstance(fields, dict):
                self.lines.append((line, fields))
            else:
                self.broken.append(line)

    def access(self) -> list[dict[str, Any]]:
        """The access lines."""
        return [fields for _, fields in self.lines if fields.get("logger") == "opsguard.access"]

    def saying(self, message: str) -> list[dict[str, Any]]:
        """The lines with this message."""
        return [fields for _, fields in self.lines if fields.get("message") == message]

    def of(self, request_id: str) -> list[str]:
        """The lines of one request, as written."""
        return [line for line, fields in self.lines if fields.get("request_id") == request_id]
