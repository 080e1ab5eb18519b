"""Reading the sources of a scrape: ours in the calling thread, users' collectors in helpers.

A collector that raises, or hangs past the budget, costs its own families and nothing else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from opsguard.metrics.cleaning import Only

__all__ = ["Crew", "Exposable", "Outcome", "Source", "collectors_of", "read"]


class Exposable(Protocol):
    """A source that writes its own text, for speed."""

    def expose(self, openmetrics: bool) -> Iterable[tuple[str, str]]:
        """Return (family name, text) pairs, each text with its HELP and TYPE lines.

        The text must be whole lines, its names legal in every version of the format, its
        label values escaped; `# EOF` is not part of it.
        """
        ...


Source: TypeAlias = Exposable | Collector | CollectorRegistry
Outcome: TypeAlias = list[Metric] | tuple[tuple[str, str], ...] | BaseException
"""What reading a source gave: metrics, or finished texts (the tuple), or the error."""


def collectors_of(registry: CollectorRegistry, patience: float) -> list[Collector]:
    """Return what is registered, one by one, so that each can be isolated.

    The attributes are private: without them the registry is one collector like another.
    Its lock may be held for long (a collector is described under it) or, after a fork,
    for ever, and its own methods would wait for it; the copy of a dict is whole without.
    """
    try:
        lock = registry._lock
        locked = lock.acquire(timeout=patience)
        try:
            collectors, target = list(registry._collector_to_names), registry._target_info
        finally:
            if locked:
                lock.release()
    except (AttributeError, RuntimeError):  # RuntimeError: it grew while it was copied
        return [registry]
    if not target:
        return collectors
    metric = Metric("target", "Target metadata", "info")
    metric.add_sample("target_info", target, 1)
    return [Only(metric), *collectors]


def read(source: Exposable | Collector, openmetrics: bool) -> Outcome:
    expose: Callable[[bool], Iterable[tuple[str, str]]] | None
    expose = getattr(source, "expose", None)
    try:
        if expose is not None:
            return tuple(expose(openmetrics))
        return list(source.collect())  # type: ignore[union-attr]
    except Exception as error:
        return error


class Crew:
    """Runs users' collectors, so that one which hangs costs only itself. Thread-safe.

    A daemon thread takes them in turn and ends with the last. When one collector holds
    it up for a twentieth of the budget, another thread goes on with those still waiting.
    What runs past the budget is left behind in its thread and not called again before it
    has returned: never more than one thread per collector.
    """

    def __init__(self, clock: Callable[[], float], budget: float) -> None:
        self._clock = clock
        self._budget = budget
        self.patience = budget / 20
        self._changed = threading.Condition()
        # By identity, as collectors need not be hashable; kept so that no id is reused.
        self._running: dict[int, Collector] = {}

    def collect(self, collectors: Sequence[Collector], openmetrics: bool) -> list[Outcome]:
        """Return for each collector what it gave, or the error that took its place."""
        deadline = self._clock() + self._budget
        late = f"no answer within {self._budget:g} s"
        outcomes: list[Outcome] = [TimeoutError(late) for _ in collectors]
        with self._changed:
            waiting = deque(
                (index, collector)
                for index, collector in enumerate(collectors)
                if id(collector) not in self._running
            )
            unfinished = {index for index, _ in waiting}
            work = waiting, unfinished, outcomes, openmetrics
            held_up = True  # nobody is at work yet
            while unfinished and (remaining := deadline - self._clock()) > 0:
                if held_up and waiting and not self._hire(*work):
                    break
                before = len(unfinished)
                self._changed.wait(min(remaining, self.patience))
                held_up = len(unfinished) == before
            waiting.clear()  # what has not begun by now does not begin
            return list(outcomes)

    def _hire(
        self,
        waiting: deque[tuple[int, Collector]],
        unfinished: set[int],
        outcomes: list[Outcome],
        openmetrics: bool,
    ) -> bool:
        worker = threading.Thread(
            target=self._work,
            args=(waiting, unfinished, outcomes, openmetrics),
            name="opsguard-collector",
            daemon=True,
        )
        try:
            worker.start()
        except RuntimeError as error:  # no thread to be had, or the interpreter is ending
            for index, _ in waiting:
                outcomes[index] = error
            return False
        return True

    def _work(
        self,
        waiting: deque[tuple[int, Collector]],
        unfinished: set[int],
        outcomes: list[Outcome],
        openmetrics: bool,
    ) -> None:
        while True:
            with self._changed:
                if not waiting:
                    return
                index, collector = waiting.popleft()
                self._running[id(collector)] = collector
            outcome: Outcome
            try:
                outcome = read(collector, openmetrics)
            except BaseException as error:  # SystemExit of a collector is its own affair
                outcome = error
            with self._changed:
                del self._running[id(collector)]
                outcomes[index] = outcome
                unfinished.discard(index)
                if not unfinished:
                    self._changed.notify_all()
