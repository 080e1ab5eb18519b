"""The numbers of all workers of a group: found, read and put together at the scrape.

A reading is consistent without a lock: the retired file is read first, then every file that it does
not contain; if another retired file is there by then, again. Nobody ever waits for another process,
stopped or not.

While no descriptor or memory is left there is no reading. Without a file that cannot be opened at
the moment, counters would fall: to Prometheus a restart, and when it is back a burst of events that
never were. With what was read of it last they would fall as well, if another worker has answered
since.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from opsguard.clock import Clock, wall
from opsguard.forks import in_child
from opsguard.metrics.merge import Merge, Merged
from opsguard.metrics.retired import RETIRED, Death, fold, generation, read_retired
from opsguard.metrics.sources import (
    Index,
    Source,
    Unreadable,
    is_held,
    is_shortage,
    open_regular,
    read_whole,
)
from opsguard.metrics.store import WORKER, Store

__all__ = ["Gathering"]

_ATTEMPTS = 5
_SITE = "metrics file of a worker"
_REMOVED = "{} was deleted: until a restart /metrics of this worker tells its own numbers alone"


class Gathering:
    """What one process knows of the others. Thread-safe; right in a forked child, which begins
    anew.

    `failed(site, error)` hears once of each file that cannot be read, `died(death)` of each worker
    that this process found dead. `manager` gives the pid of the process that starts the workers: if
    it has a file too, as it loaded the app before it forked, it still is no worker.
    """

    def __init__(
        self,
        store: Store,
        *,
        failed: Callable[[str, BaseException | None], None],
        died: Callable[[Death], None],
        limit: int,
        clock: Clock = wall,
        manager: Callable[[], int] = lambda: 0,
    ) -> None:
        self.limit = limit
        self._manager = manager
        self._store = store
        self._failed = failed
        self._died = died
        self._clock = clock
        self._begin()
        in_child(self, Gathering._begin)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._bad: set[str] = set()
        self._known: dict[str, Index] = {}
        self._retired: Source | None = None
        self._merge: Merge | None = None
        self._laid: object = None
        self._living: list[tuple[int, int]] = []
        self._several = False
        """Labels that tell workers apart came, and do not go when only one is left."""

    def merged(self) -> Merged | None:
        """The numbers of all workers; None if this one is alone and nobody was before it, or if its
        file was deleted: who has no part in the sums of the others tells of itself.

        Raises OSError if no file descriptor or memory is left: then nobody can say whether there
        are others.
        """
        path = self._store.path
        if path is None:
            return None
        with self._lock:
            try:
                if self._store.is_removed():
                    raise FileNotFoundError(_REMOVED.format(path))
                sources = sorted(self._sources(path), key=_seniority)
            except FileNotFoundError as error:
                self._complain(path.parent.name, error)
                self._living = []
                return None
            self._living = sorted(
                [(one.header.number, one.header.pid) for one in sources if one.serves]
            )
            self._several = self._several or len(self._living) > 1
            return self._add(sources) if len(sources) > 1 else None

    def tidy(self, directory: Path | None = None) -> None:
        """Fold what the dead left in our directory, or if we have none yet, in this one. Never
        raises, never waits.
        """
        path = self._store.path
        if path is not None:
            directory = path.parent
        if directory is None:
            return
        try:
            deaths = fold(directory, limit=self.limit, now=self._clock(), complain=self._complain)
        except OSError as error:
            self._complain(RETIRED, error)
            return
        for death in deaths:
            self._died(death)

    def workers(self) -> list[tuple[int, int]]:
        """(number, pid) of each living worker, this one among them, as `merged` saw them last."""
        return list(self._living) or [(self._store.number, os.getpid())]

    def _sources(self, path: Path) -> list[Source]:
        """Our own, the others', the retired, as they were at one moment."""
        sources: list[Source] = []
        for attempt in range(_ATTEMPTS):
            retired = self._read_retired(path.parent)
            contained = frozenset() if retired is None else retired.index.names
            sources, left = self._read_all(path, contained)
            if attempt == 0 and (left or not all(source.alive for source in sources)):
                self.tidy()
                continue
            if retired is not None:
                sources.append(retired)
            if generation(path.parent) == (0 if retired is None else retired.header.pid):
                break
        return sources

    def _read_retired(self, directory: Path) -> Source | None:
        try:
            self._retired = read_retired(directory, self._retired)
        except Unreadable as error:
            self._complain(RETIRED, error)
            self._retired = None
        except OSError as error:
            if is_shortage(error):
                raise
            self._complain(RETIRED, error)  # what was read last still holds
        return self._retired

    def _read_all(self, mine: Path, contained: frozenset[str]) -> tuple[list[Source], bool]:
        """What is read beside the retired file, and whether a file that it contains is left."""
        own = Source.of(mine.name, self._store.read(), self._known.get(mine.name), alive=True)
        sources, manager = [own], self._manager()
        # Not by glob, which finds nothing where the folder cannot be read.
        names = {path.name for path in mine.parent.iterdir() if path.name.startswith(WORKER)}
        for name in sorted(names - contained - {mine.name}):
            found = self._read(mine.parent / name)
            if found is not None:
                found.serves = found.alive and found.header.pid != manager
                sources.append(found)
        self._known = {source.name: source.index for source in sources}
        return sources, not names.isdisjoint(contained)

    def _read(self, path: Path) -> Source | None:
        try:
            file = open_regular(path)
            try:
                alive = is_held(file)
                return Source.of(
                    path.name, read_whole(file), self._known.get(path.name), alive=alive
                )
            finally:
                os.close(file)
        except FileNotFoundError:
            return None  # it was folded meanwhile
        except OSError as error:
            if is_shortage(error):
                raise
            self._complain(path.name, error)
            return None

    def _add(self, sources: list[Source]) -> Merged:
        """The layout is made anew when somebody came or went, or took a series off the page."""
        laid = [(one.index, one.alive, one.serves, self.limit) for one in sources]
        if self._merge is None or laid != self._laid:
            self._merge = Merge(self.limit)
            self._laid = laid
        return self._merge.add(sources, several=self._several)

    def _complain(self, name: str, error: OSError) -> None:
        if name not in self._bad:
            self._bad.add(name)
            self._failed(_SITE, error)


def _seniority(source: Source) -> tuple[float, int, str]:
    """An order in which every worker has the same sources: the retired file, which has no start,
    then by the worker's, so that a new one takes no place from those that are there.
    """
    return source.header.started, source.header.number, source.name
