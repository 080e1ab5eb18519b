"""The numbers of all workers as one: sums at the scrape, gauges by their mode, no count lost at a
death, whatever lies in the folder.

Several stores in one process are workers of one group too: each has a file and a lock of its own.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from ast import literal_eval
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text

from opsguard.exceptions import DeclarationError
from opsguard.metrics import Death, Metrics, gathering, retired
from opsguard.metrics.layout import SERIES, pack_header, read_records
from opsguard.metrics.store import Store

NEEDS_FORK = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Worker:
    """One worker's metrics, and what it complained of."""

    def __init__(self, folder: Path, *, limit: int = 2_000, manager: int = 0) -> None:
        self.faults: list[str] = []
        self.deaths: list[Death] = []
        self.store = Store(lambda: folder, self._failed)
        self.metrics = Metrics(
            self.store, limit=limit, failed=self._failed, manager=lambda: manager
        )
        self.metrics.died = self.deaths.append

    def _failed(self, site: str, error: BaseException | None) -> None:
        self.faults.append(site)

    def count(self, amount: float, *labels: str) -> None:
        self.metrics.counter("jobs_total", "Jobs.", ("queue",)).labels(*labels).inc(amount)

    def page(self, form: bool = False) -> str:
        return "".join([block for _, block in self.metrics.expose(form)]) + "# EOF\n" * form

    def samples(self, form: bool = False) -> Samples:
        read: Any = openmetrics if form else text
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in read(self.page(form))
            for sample in family.samples
        }

    def jobs(self, queue: str = "a") -> float | None:
        return self.samples().get(("jobs_total", (("queue", queue),)))

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples().get((name, tuple(sorted(labels.items()))))

    def die(self) -> None:
        """End as by `kill -9`: the lock is free, the file says nothing of a good end."""
        self.store._let_go()


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def more(**options: Any) -> Worker:
        made.append(Worker(tmp_path, **options))
        return made[-1]

    yield more
    for worker in made:
        worker.store.close()


Crew = Callable[..., Worker]


def files(folder: Path) -> list[str]:
    return sorted([path.name for path in folder.glob("worker-*")])


# --- sums


def test_any_worker_tells_the_sum_of_all(crew: Crew) -> None:
    workers = [crew() for _ in range(3)]
    for number, worker in enumerate(workers, 1):
        worker.count(number, "a")
        times = worker.metrics.histogram("seconds", "", ("q",), (1, 2))
        times.labels("x").observe(0.5)
        times.labels("x").observe(number)
    workers[0].count(5, "only here")
    for worker in workers:
        found = worker.samples()
        assert worker.samples(form=True)
        assert found["jobs_total", (("queue", "a"),)] == 6.0
        assert found["jobs_total", (("queue", "only here"),)] == 5.0
        buckets = [found["seconds_bucket", (("le", le), ("q", "x"))] for le in ("1.0", "2.0")]
        assert buckets == [4.0, 5.0]
        assert found["seconds_count", (("q", "x"),)] == 6.0
        assert found["seconds_sum", (("q", "x"),)] == 7.5
        assert worker.faults == []


def test_prometheus_client_collects_the_same(crew: Crew) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    second.count(2, "a")
    second.metrics.gauge("other").set(4)
    (jobs, other) = [m for m in first.metrics.collect() if m.name in ("jobs", "other")]
    assert [sample.value for sample in jobs.samples] == [3.0]
    assert [sample.value for sample in other.samples] == [4.0]


def test_a_family_that_only_another_worker_knows_is_there_too(crew: Crew) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    second.metrics.counter("rare_total", 'A "rare"\nthing.', ("why",)).labels('a"\\\n').inc()
    assert '# HELP rare_total A "rare"\\nthing.\n' in first.page()
    assert first.value("rare_total", why='a"\\\n') == 1.0


def test_series_made_between_scrapes_are_found(crew: Crew) -> None:
    first, second = crew(), crew()
    for number in range(30):
        first.count(1, "a")
        second.count(1, "a")
        second.count(1, f"new {number}")
        assert first.jobs() == 2.0 * (number + 1)
        assert first.jobs(f"new {number}") == 1.0


def test_what_was_read_together_stays_together(crew: Crew) -> None:
    """A page that is still written does not see the series of a reading that came after."""
    first, second = crew(), crew()
    first.count(1, "a")
    second.count(1, "a")
    before = first.metrics._gathering.merged()
    second.count(1, "new")
    after = first.metrics._gathering.merged()
    (jobs,) = [one for one in before.places if one.name == "jobs_total"]
    for merged, queues in ((before, ["a"]), (after, ["a", "new"])):
        numbers = merged.numbers(jobs)
        assert [values for (values,) in numbers.series] == queues
        assert [numbers.cells[at] for at in numbers.series.values()] == [2.0, 1.0][: len(queues)]


def test_one_worker_alone_reads_no_file(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    only = crew()
    only.count(1, "a")

    def never(*args: object, **named: object) -> None:
        raise AssertionError("not asked for")

    monkeypatch.setattr(gathering.Merge, "add", never)
    assert only.jobs() == 1.0
    assert only.metrics.workers() == [(0, os.getpid())]


def test_the_living_workers_are_known_by_number_and_pid(crew: Crew) -> None:
    workers = [crew() for _ in range(3)]
    for worker in workers:
        worker.count(1, "a")
    list(workers[1].metrics.expose(openmetrics=False))
    assert workers[1].metrics.workers() == [(number, os.getpid()) for number in range(3)]
    workers[0].die()
    list(workers[1].metrics.expose(openmetrics=False))
    assert [number for number, _ in workers[1].metrics.workers()] == [1, 2]


def test_the_same_name_with_another_definition_is_left_out(crew: Crew) -> None:
    """In a rolling deploy: each worker shows the metric as it knows it, of those that agree."""
    old, new, third = crew(), crew(), crew()
    old.metrics.counter("x_total", "Old.", ("a",)).labels("1").inc(1)
    new.metrics.counter("x_total", "New.", ("a", "b")).labels("1", "2").inc(10)
    third.metrics.counter("x_total", "Same, other words.", ("a",)).labels("1").inc(100)
    assert old.value("x_total", a="1") == 101.0
    assert new.value("x_total", a="1", b="2") == 10.0
    assert old.page().count("# TYPE x_total") == new.page().count("# TYPE x_total") == 1
    stranger = crew()
    stranger.count(1, "a")
    assert stranger.page().count("# TYPE x_total") == 1


def test_the_page_is_as_bounded_as_each_workers(crew: Crew) -> None:
    workers = [crew(limit=10) for _ in range(3)]
    for number, worker in enumerate(workers):
        for place in range(10):
            worker.count(1, f"{number}-{place}")
    found = [key for key in workers[0].samples() if key[0] == "jobs_total"]
    assert len(found) == 11
    assert workers[0].jobs("<overflow>") == 20.0
    total = sum(value for key, value in workers[0].samples().items() if key[0] == "jobs_total")
    assert total == 30.0


def shown(worker: Worker) -> Samples:
    return {key: value for key, value in worker.samples().items() if key[0] == "jobs_total"}


def test_beyond_the_limit_every_worker_folds_the_same_label_sets(crew: Crew) -> None:
    """Whoever answers, nothing goes up or down by it: those of the dead have their places, then
    those of the worker that started first. When one ends, it may be others' turn.
    """
    workers = [crew(limit=3) for _ in range(3)]
    for number, worker in enumerate(workers):
        for place in range(3):
            worker.count(10**number, f"{number}-{place}")
    assert shown(workers[0]) == shown(workers[1]) == shown(workers[2])
    assert (workers[2].jobs("0-0"), workers[2].jobs("<overflow>")) == (1.0, 330.0)
    workers.pop(1).die()
    assert shown(workers[0]) == shown(workers[1])
    assert (workers[0].jobs("1-0"), workers[0].jobs("<overflow>")) == (10.0, 303.0)
    late = crew(limit=3)
    late.count(5, "late")
    assert shown(workers[0]) == shown(workers[1]) == shown(late)
    assert late.jobs("<overflow>") == 308.0


def test_beyond_the_limit_it_does_not_matter_when_a_worker_looked(crew: Crew) -> None:
    """One has seen the label sets come one by one, the other sees all of them at once."""
    first, second = crew(limit=3), crew(limit=3)
    for place in range(3):
        for number, worker in enumerate((second, first)):
            worker.count(10**number, f"{number}-{place}")
            shown(second)
        second.count(100, f"1-{place}")  # which the elder one has too
        shown(second)
    found = shown(first)
    assert found == shown(second)
    assert sum(found.values()) == 333.0
    assert len(found) == 4
    first.count(1, "0-0")  # at its limit: it folds this one itself
    assert shown(first) == shown(second)


def test_what_a_worker_forgets_is_its_own_part_only(crew: Crew) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    second.count(2, "a")
    second.count(2, "b")
    assert first.jobs() == 3.0
    second.metrics.counter("jobs_total", "Jobs.", ("queue",)).remove("a")
    assert first.jobs() == second.jobs() == 1.0
    second.count(5, "a")
    assert first.jobs() == second.jobs() == 6.0
    second.metrics.counter("jobs_total", "Jobs.", ("queue",)).clear()
    assert (first.jobs(), first.jobs("b")) == (1.0, None)


def test_the_newest_exemplar_of_any_worker_is_shown(crew: Crew) -> None:
    first, second = crew(), crew()
    for name, worker in (("old", first), ("new", second)):
        jobs = worker.metrics.counter("jobs_total", "Jobs.", ("queue",))
        jobs.labels("a").inc(1, {"trace_id": name})
        times = worker.metrics.histogram("seconds", "", (), (1, 2))
        times.observe(1.5, {"trace_id": f"{name}  é"})
        time.sleep(0.002)  # the moment is what decides
    for worker in (first, second):
        shown = [line for line in worker.page(form=True).splitlines() if " # {" in line]
        assert len(shown) == 2
        assert all('trace_id="new' in line for line in shown)
        assert worker.samples(form=True)


def test_the_exemplars_of_the_dead_are_kept_until_there_are_newer(
    tmp_path: Path, crew: Crew
) -> None:
    first = crew()
    first.count(1, "a")
    for name in ("one", "two"):
        dead = crew()
        times = dead.metrics.histogram("seconds", "", ("q",), (1, 2))
        times.labels("x").observe(1.5, {"trace_id": f"{name} é"})
        times.labels(name).observe(9.0, {"trace_id": name})
        dead.die()
        time.sleep(0.002)
        first.metrics.tidy()
    assert len(files(tmp_path)) == 1

    def shown() -> list[str]:
        return sorted([line for line in first.page(form=True).splitlines() if " # {" in line])

    assert [line.partition(" # ")[0] for line in shown()] == [
        'seconds_bucket{q="one",le="+Inf"} 1',
        'seconds_bucket{q="two",le="+Inf"} 1',
        'seconds_bucket{q="x",le="2.0"} 2',
    ]
    assert 'trace_id="two é"' in shown()[-1]
    times = first.metrics.histogram("seconds", "", ("q",), (1, 2))
    times.labels("x").observe(1.5, {"trace_id": "mine"})
    assert 'trace_id="mine"' in shown()[-1]
    assert first.samples(form=True)


def test_a_torn_exemplar_is_not_shown(crew: Crew) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    jobs = second.metrics.counter("jobs_total", "Jobs.", ("queue",))
    jobs.labels("a").inc(1, {"trace_id": "whole"})
    assert 'trace_id="whole"' in first.page(form=True)
    assert second.store.path is not None
    data = second.store.path.read_bytes()
    with second.store.path.open("r+b") as file:
        file.seek(data.index(b'"whole"'))
        file.write(b'"torn!"')
    assert "trace_id" not in first.page(form=True)
    assert first.jobs() == 2.0


# --- gauges


@pytest.mark.parametrize(
    ("mode", "expected"), [("sum", 6.0), ("max", 4.0), ("min", -1.0), ("latest", -1.0)]
)
def test_a_gauge_shows_what_its_mode_says(mode: str, expected: float, crew: Crew) -> None:
    workers = [crew() for _ in range(3)]
    for worker, value in zip(workers, (3.0, 4.0, -1.0), strict=True):
        worker.metrics.gauge("g", "", mode=mode).set(value)
    assert {worker.value("g") for worker in workers} == {expected}


def test_a_latest_gauge_is_of_the_worker_that_changed_it_last(crew: Crew) -> None:
    first, second = crew(), crew()
    gauges = [worker.metrics.gauge("g", "", ("x",), mode="latest") for worker in (first, second)]
    gauges[1].labels("1").set(5)
    gauges[0].labels("1").inc(7)
    assert first.value("g", x="1") == second.value("g", x="1") == 7.0


def test_a_live_gauge_has_a_series_for_each_living_worker(crew: Crew) -> None:
    alone, other, dead = crew(), crew(), crew()
    alone.metrics.gauge("g", "", ("x",), mode="live").labels("1").set(1)
    assert alone.value("g", x="1") == 1.0
    for worker, value in ((other, 2.0), (dead, 3.0)):
        worker.metrics.gauge("g", "", ("x",), mode="live").labels("1").set(value)
    assert [other.value("g", x="1", worker=str(n)) for n in range(3)] == [1.0, 2.0, 3.0]
    dead.die()
    assert [other.value("g", x="1", worker=str(n)) for n in range(3)] == [1.0, 2.0, None]


@pytest.mark.parametrize("mode", ["sum", "max", "min", "latest", "live"])
def test_a_dead_workers_gauges_vanish(mode: str, crew: Crew) -> None:
    first, dead = crew(), crew()
    first.count(1, "a")
    dead.metrics.gauge("g", "", mode=mode).set(3)
    assert "g" in first.page()
    dead.die()
    assert not [key for key in first.samples() if key[0] == "g"]


def test_a_manager_that_loaded_the_app_is_no_worker(crew: Crew) -> None:
    """With `gunicorn --preload` it has a file as well, in which nobody ever sets anything again."""
    worker = crew(manager=os.getpid())
    for mode in ("sum", "max", "min", "latest", "live"):
        worker.metrics.gauge(f"of_{mode}", mode=mode).set(3)
    worker.count(2, "a")
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            for mode in ("sum", "max", "min", "latest", "live"):
                worker.metrics.gauge(f"of_{mode}", mode=mode).set(2)
            worker.count(5, "a")
            os.write(writing, repr((worker.samples(), worker.metrics.workers())).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found, workers = literal_eval(pipe.read())
    assert workers == [(1, pid)]
    assert found["jobs_total", (("queue", "a"),)] == 7.0
    assert [found[f"of_{mode}", ()] for mode in ("sum", "max", "min")] == [5.0, 3.0, 2.0]
    assert [found[f"of_{mode}", ()] for mode in ("latest", "live")] == [2.0, 2.0]


def test_a_function_is_asked_in_the_worker_that_answers_and_stands_for_all(crew: Crew) -> None:
    first, second = crew(), crew()
    for worker in (first, second):
        worker.metrics.gauge("g").set_function(lambda: 42)
        assert worker.value("g") == 42.0
    assert first.value("g") == second.value("g") == 42.0


def test_modes_that_are_none_are_refused(crew: Crew) -> None:
    metrics = crew().metrics
    with pytest.raises(DeclarationError, match="'average' is not a mode for g: sum, max"):
        metrics.gauge("g", mode="average")
    with pytest.raises(DeclarationError, match="label worker"):
        metrics.gauge("g", "", ("worker",), mode="live")
    metrics.gauge("g", mode="max")
    with pytest.raises(DeclarationError, match="twice"):
        metrics.gauge("g", mode="min")


# --- deaths


def test_what_a_dead_worker_counted_stays_and_its_file_goes(tmp_path: Path, crew: Crew) -> None:
    first, dead = crew(), crew()
    first.count(1, "a")
    dead.count(2, "a")
    dead.metrics.histogram("seconds", "", (), (1, 2)).observe(1.5)
    assert len(files(tmp_path)) == 2
    dead.die()
    for _ in range(3):
        assert first.jobs() == 3.0
        assert first.value("seconds_sum") == 1.5
        assert len(files(tmp_path)) == 1
    later = crew()
    later.count(4, "a")
    assert later.jobs() == first.jobs() == 7.0
    assert later.value("seconds_count") == 1.0


def test_a_worker_that_starts_folds_what_it_finds(tmp_path: Path, crew: Crew) -> None:
    dead, starting = crew(), crew()
    dead.count(2, "a")
    dead.die()
    starting.count(1, "a")
    starting.metrics.tidy()
    assert len(files(tmp_path)) == 1
    assert [death.pid for death in starting.deaths] == [os.getpid()]
    assert starting.jobs() == 3.0


def test_a_worker_that_has_counted_nothing_yet_folds_too(tmp_path: Path, crew: Crew) -> None:
    """So files do not pile up where nobody asks for the page."""
    dead, starting = crew(), crew()
    dead.count(2, "a")
    dead.die()
    starting.metrics.tidy(tmp_path)
    assert files(tmp_path) == []
    starting.count(1, "a")
    assert starting.jobs() == 3.0


def test_a_worker_that_closed_its_file_did_not_die(crew: Crew) -> None:
    first, gone, never_used = crew(), crew(), crew()
    first.count(1, "a")
    gone.count(2, "a")
    gone.store.close()
    never_used.metrics.counter("zero_total").inc(0)
    never_used.die()
    assert first.jobs() == 3.0
    assert first.deaths == []


def test_a_file_that_is_just_being_made_is_not_locked(
    tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To ask who holds it takes its lock for a moment: its owner would find it taken, and count in
    private memory from then on.
    """
    first, other = crew(), crew()
    first.count(1, "a")
    other.count(1, "a")
    new = tmp_path / "new-1"
    new.touch()
    asked: list[int] = []

    def is_held(file: int) -> bool:
        asked.append(os.fstat(file).st_ino)
        return True

    monkeypatch.setattr(retired, "is_held", is_held)
    first.metrics.tidy()
    assert asked
    assert new.stat().st_ino not in asked


def test_the_retired_file_names_no_more_files_than_there_are(tmp_path: Path, crew: Crew) -> None:
    first = crew()
    first.count(1, "a")
    sizes = []
    for number in range(30):
        dead = crew()
        dead.count(1, "a")
        dead.die()
        assert first.jobs() == number + 2.0
        sizes.append((tmp_path / "retired").stat().st_size)
    assert len(set(sizes[5:])) == 1
    assert sorted(path.name for path in tmp_path.iterdir() if "worker" not in path.name) == [
        "fold",
        "retired",
        "seats",
    ]


def test_what_is_retired_is_as_bounded_as_a_family(crew: Crew) -> None:
    first = crew(limit=10)
    first.count(1, "a")
    for number in range(5):
        dead = crew(limit=10)
        for place in range(8):
            dead.count(1, f"{number}-{place}")
        dead.die()
        first.page()
    jobs = {key: value for key, value in first.samples().items() if key[0] == "jobs_total"}
    assert len(jobs) <= 12
    assert sum(jobs.values()) == 41.0


class Cut(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("step", ["open", "replace", "unlink"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_fold_that_is_cut_off_loses_nothing_and_counts_nothing_twice(
    step: str, after: bool, tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *dead = (crew() for _ in range(4))
    first.count(1, "a")
    for worker in dead:
        worker.count(10, "a")
    dead[0].die()
    assert first.jobs() == 31.0  # there is a retired file from here on
    dead[1].die()
    dead[2].die()

    with monkeypatch.context() as patch:
        owner, real = (os, os.open) if step == "open" else (Path, getattr(Path, step))

        def cut(target: Any, *args: Any, **named: Any) -> Any:
            if step == "open" and "retired-" not in str(target):
                return real(target, *args, **named)
            if after:
                real(target, *args, **named)
            raise Cut

        patch.setattr(owner, step, cut)
        with pytest.raises(Cut):
            first.metrics.tidy()
    other = crew()
    other.count(100, "a")
    assert first.jobs() == other.jobs() == 131.0
    assert len(files(tmp_path)) == 2
    assert not list(tmp_path.glob("retired-*"))
    assert len(first.deaths) + len(other.deaths) in (2, 3)


def test_a_stopped_folder_keeps_nobody_waiting(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is held for ever: files are read as they lie, and nothing is lost."""
    import fcntl

    first, dead = crew(), crew()
    first.count(1, "a")
    dead.count(10, "a")
    dead.metrics.gauge("g").set(3)
    dead.die()
    with (tmp_path / "fold").open("w") as stopped:
        fcntl.flock(stopped, fcntl.LOCK_EX)
        for _ in range(3):
            assert first.jobs() == 11.0
            assert first.value("g") is None
        assert len(files(tmp_path)) == 2
    assert first.jobs() == 11.0
    assert len(files(tmp_path)) == 1


def test_a_full_disk_keeps_the_files_of_the_dead(
    crew: Crew, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, dead = crew(), crew()
    first.count(1, "a")
    dead.count(10, "a")
    dead.die()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(retired, "_replace", full)
        for _ in range(3):
            assert first.jobs() == 11.0
    assert first.faults == ["metrics file of a worker"]
    assert len(files(tmp_path)) == 2
    assert first.jobs() == 11.0
    assert len(files(tmp_path)) == 1


# --- whatever lies in the folder


def as_file(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path.write_bytes(data), None)[1]


LYING: dict[str, tuple[Callable[[Path], None], bool]] = {
    "nothing": (as_file(b""), True),
    "less than a header": (as_file(b"OPSGUARD"), True),
    "random bytes": (as_file(random.Random(1).randbytes(5_000)), True),
    "an older version": (as_file(b"OPSGUARD\1\0\0\0" + bytes(52)), True),
    "a header that promises more": (as_file(pack_header(pid=1, used=1 << 60)), True),
    "a link": (lambda path: path.symlink_to("/dev/zero"), False),
    "a folder": (Path.mkdir, False),
    "a pipe": (lambda path: os.mkfifo(path), False),
}


@pytest.mark.parametrize("name", ["worker-7-1-aa", "retired", "worker-"])
@pytest.mark.parametrize("lying", LYING)
def test_what_is_no_file_of_ours_is_ignored(
    lying: str, name: str, tmp_path: Path, crew: Crew
) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    put, removed = LYING[lying]
    put(tmp_path / name)
    second.count(2, "a")
    for _ in range(3):
        assert first.jobs() == second.jobs() == 3.0
    assert len(first.faults) <= 1
    second.die()
    assert first.jobs() == 3.0
    if removed and name != "retired":
        assert not (tmp_path / name).exists()
    assert first.jobs() == 3.0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_cannot_be_read_is_ignored(tmp_path: Path, crew: Crew) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    second.count(2, "a")
    assert second.store.path is not None
    second.store.path.chmod(0)
    assert first.jobs() == 1.0
    assert first.faults == ["metrics file of a worker"]


@pytest.mark.parametrize("size", [0, 63, 64, 20_000, 30_000])
def test_a_living_workers_file_that_is_cut_short_costs_only_that_worker(
    size: int, tmp_path: Path, crew: Crew
) -> None:
    first, second = crew(), crew()
    first.count(1, "a")
    second.count(2, "a")
    assert first.jobs() == 3.0
    assert second.store.path is not None
    data = second.store.path.read_bytes()
    copy = tmp_path / "worker-9-1-cut"
    copy.write_bytes(data[:size])  # dead, and not mapped by anybody
    assert first.jobs() in (3.0, 5.0)
    assert first.jobs() == first.jobs()


def test_the_folder_may_vanish(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    first = Worker(folder)
    first.count(1, "a")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert first.jobs() == 1.0
    first.count(1, "a")
    first.metrics.tidy()
    assert first.jobs() == 2.0
    first.store.close()


def test_a_worker_whose_file_was_deleted_says_so_and_tells_of_itself(
    tmp_path: Path, crew: Crew
) -> None:
    """A cleaner of old files, or an operator. Its number goes to the next worker that starts."""
    first, second = crew(), crew()
    first.count(1, "a")
    second.count(2, "a")
    for path in tmp_path.iterdir():
        path.unlink()
    late = crew()
    late.count(4, "a")
    for _ in range(2):
        assert [one.jobs() for one in (first, second, late)] == [1.0, 2.0, 4.0]
    assert [one.faults for one in (first, second)] == [["metrics file of a worker"]] * 2
    assert first.metrics.workers() == [(0, os.getpid())]
    assert late.faults == []


# --- a shortage


@contextmanager
def no_descriptors() -> Iterator[None]:
    """A block in which this process cannot open anything."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def two_after_a_third(crew: Crew) -> tuple[Worker, Worker]:
    """Workers that counted 1 and 10, after one that counted 100 and died."""
    first, second, dead = crew(), crew(), crew()
    first.count(1, "a")
    second.count(10, "a")
    dead.count(100, "a")
    dead.die()
    return first, second


@pytest.mark.parametrize("known", [True, False], ids=["read before", "never read"])
def test_without_a_file_descriptor_counters_are_not_told_rather_than_too_low(
    known: bool, crew: Crew
) -> None:
    """To Prometheus a gap; a part of the sum would be a restart, and then a burst."""
    first, _second = two_after_a_third(crew)
    if known:
        assert first.jobs() == 111.0
    with no_descriptors():
        assert first.page() == ""
        assert list(first.metrics.collect()) == []
    assert first.faults[-1] == "collector:workers"
    assert first.jobs() == 111.0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("what", ["worker-", "retired", "the folder"])
def test_what_cannot_be_opened_for_a_moment_is_a_gap(
    what: str, number: int, tmp_path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _second = two_after_a_third(crew)
    assert first.jobs() == 111.0
    real: dict[str, Callable[..., Any]] = {"open": os.open, "iterdir": Path.iterdir}

    def short(way: str, path: Any, *args: Any, **named: Any) -> Any:
        target = Path(path)
        if target == tmp_path if what == "the folder" else target.name.startswith(what):
            raise OSError(number, "too little of something")
        return real[way](path, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", partial(short, "open"))
        patch.setattr(Path, "iterdir", lambda path: short("iterdir", path))
        assert first.jobs() is None
    assert first.jobs() == 111.0


def test_a_worker_that_cannot_look_whether_it_is_alone_tells_nothing(crew: Crew) -> None:
    first = crew()
    first.count(1, "a")
    with no_descriptors():
        assert first.jobs() is None
        first.count(1, "a")
    assert first.jobs() == 2.0


# --- processes


def forked(work: Callable[[], object], *, kill: bool = False) -> int:
    """Run `work` in a child and end it there: in good order by default. Returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(code)
    return pid


@NEEDS_FORK
def test_workers_killed_in_the_middle_of_their_counting_lose_nothing(
    tmp_path: Path, crew: Crew
) -> None:
    first = crew()
    first.count(0, "a")
    told, telling = os.pipe()

    def work(name: bytes) -> None:
        for _ in range(1_000_000):
            first.count(1, "a")
            os.write(telling, name)

    pids = [forked(partial(work, b"%d" % number)) for number in range(4)]
    os.close(telling)
    told_of, by = 0, set[int]()
    try:
        while told_of < 2_000 or len(by) < len(pids):
            block = os.read(told, 4096)
            told_of += len(block)
            by |= set(block)
            assert first.jobs() is not None
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    while block := os.read(told, 65536):
        told_of += len(block)
    os.close(told)
    after = first.jobs()
    assert after is not None
    assert told_of <= after <= told_of + len(pids)  # one may be counted and not told of
    assert first.jobs() == after
    assert len(files(tmp_path)) == 1
    assert {death.pid for death in first.deaths} == set(pids)


@NEEDS_FORK
def test_counters_never_go_backwards_while_workers_come_and_go(crew: Crew) -> None:
    first = crew()
    first.count(0, "a")
    done = threading.Event()
    seen: list[float] = []

    def scrape() -> None:
        while not done.is_set():
            seen.append(first.jobs() or 0.0)

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        for _ in range(40):
            os.waitpid(forked(lambda: first.count(1, "a"), kill=True), 0)
    finally:
        done.set()
        thread.join()
    assert first.jobs() == 40.0
    assert seen == sorted(seen)


@NEEDS_FORK
def test_folders_at_the_same_time_count_everything_once(tmp_path: Path, crew: Crew) -> None:
    first = crew()
    first.count(1, "a")
    for _ in range(20):
        os.waitpid(forked(lambda: first.count(1, "a"), kill=True), 0)

    def fold() -> None:
        for _ in range(20):
            first.metrics.tidy()
            first.page()

    pids = [forked(fold) for _ in range(4)]
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    assert first.jobs() == 21.0
    assert len(files(tmp_path)) == 1


def recycled(crew: Crew, tmp_path: Path, times: int) -> None:
    first = crew()
    counter = first.metrics.counter("jobs_total", "Jobs.", ("queue",))
    for number in range(200):
        counter.labels(str(number)).inc(0)

    def work() -> None:
        first.metrics.tidy()
        counter.labels("7").inc()

    most = 0
    for number in range(times):
        os.waitpid(forked(work, kill=number % 2 == 0), 0)
        most = max(most, len(list(tmp_path.iterdir())))
    assert first.jobs("7") == times
    assert most <= 6
    assert (tmp_path / "retired").stat().st_size < 64_000


@NEEDS_FORK
def test_recycling_leaves_no_growth(tmp_path: Path, crew: Crew) -> None:
    recycled(crew, tmp_path, 40)


@NEEDS_FORK
@pytest.mark.full
def test_recycling_of_a_thousand_leaves_no_growth(tmp_path: Path, crew: Crew) -> None:
    recycled(crew, tmp_path, 1_000)


@NEEDS_FORK
def test_the_last_values_of_the_dead_are_in_the_retired_file(tmp_path: Path, crew: Crew) -> None:
    first = crew()
    first.count(0, "a")
    os.waitpid(forked(lambda: first.count(3, "a"), kill=True), 0)
    first.metrics.tidy()
    records = list(read_records((tmp_path / "retired").read_bytes()))
    assert [record.cells for record in records if record.kind == SERIES] == [(3.0,)]


@NEEDS_FORK
def test_a_child_forked_for_something_else_is_no_death(crew: Crew) -> None:
    """A gauge that it has from its parent is nothing that it counted."""
    first = crew()
    first.metrics.gauge("g", "", mode="live").set(7)
    first.count(1, "a")

    def helper() -> None:
        first.metrics.gauge("g", "", mode="live").set(7)

    os.waitpid(forked(helper, kill=True), 0)
    first.page()
    assert first.deaths == []


def test_what_cannot_be_read_for_a_moment_is_not_lost(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file descriptor is left while somebody folds: the retired counts stay."""
    from opsguard.metrics import retired as module

    first, second, third = crew(), crew(), crew()
    first.count(0, "a")
    second.count(100, "a")
    second.die()
    assert first.jobs() == 100.0
    third.count(1, "a")
    third.die()
    real = module.read_retired

    def full(directory: Path, known: object) -> object:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(module, "read_retired", full)
    first.metrics.tidy()
    monkeypatch.setattr(module, "read_retired", real)
    assert first.jobs() == 101.0
