"""What a metric is: name, type, labels, buckets, and how the workers' values become one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import Any

__all__ = ["LABEL", "MODES", "MOST_BUCKETS", "NAME", "Definition"]

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
MODES = ("sum", "max", "min", "latest", "live")
"""What a gauge shows of several workers: the sum, the extremes, the value that was set last, or
each living worker's own, with the label `worker` once there are several."""
MOST_BUCKETS = 500
_KINDS = ("counter", "gauge", "histogram", "summary", "unknown")


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. Equal ones are the same metric, whatever their help says."""

    name: str
    kind: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """A histogram's upper bounds without +Inf."""
    mode: str = "sum"
    help: str = field(default="", compare=False)
    unit: str = field(default="", compare=False)

    @property
    def width(self) -> int:
        """Cells of a series. A histogram: one for each bucket (not cumulative), one for +Inf, the
        sum. A summary: the count, the sum. A gauge of mode `latest`: its value, and when that was
        set.
        """
        if self.kind == "histogram":
            return len(self.buckets) + 2
        return 2 if self.kind == "summary" or self.mode == "latest" else 1

    @property
    def summed(self) -> bool:
        """Whether its count and sum are exposed. Those of a histogram with a negative bound are
        not: its sum may fall, so OpenMetrics 1.0 allows none, and no count without one. The bucket
        of +Inf is the count.
        """
        return not (self.buckets and self.buckets[0] < 0.0)

    @property
    def exposed_labels(self) -> tuple[str, ...]:
        return (*self.labels, "worker") if self.mode == "live" else self.labels

    def record(self) -> dict[str, object]:
        """The key of its record in a file."""
        return {
            "name": self.name,
            "type": self.kind,
            "help": self.help,
            "labels": self.labels,
            "buckets": self.buckets,
            "mode": self.mode,
            "unit": self.unit,
        }

    @classmethod
    def read(cls, key: object) -> Definition | None:
        """The definition in a record of any file; None for what no scrape could show."""
        try:
            return cls._read(key)
        except (KeyError, TypeError, ValueError, OverflowError):
            return None

    @classmethod
    def _read(cls, key: Any) -> Definition | None:
        labels, buckets = tuple(key["labels"]), tuple([float(b) for b in key["buckets"]])
        text = str(key["help"]).encode("utf-8", "replace").decode("utf-8").replace("\0", "")
        made = cls(key["name"], key["type"], labels, buckets, key["mode"], text, key["unit"])
        bounds = (-inf, *buckets, inf)
        sound = (
            NAME.fullmatch(made.name)
            and all(LABEL.fullmatch(label) and label != "le" for label in made.exposed_labels)
            and len(set(made.exposed_labels)) == len(made.exposed_labels)
            and made.kind in _KINDS
            and (not made.unit or NAME.fullmatch(made.unit))
            and made.mode in (MODES if made.kind == "gauge" else ("sum",))
            and bool(buckets) == (made.kind == "histogram")
            and len(buckets) <= MOST_BUCKETS
            and all(low < high for low, high in pairwise(bounds))
        )
        return made if sound else None
