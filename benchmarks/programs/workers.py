"""Several workers as one: the scrape beside MultiProcessCollector, after many deaths, and an
observation beside prometheus_client's in multi-process mode.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.estimates import Interval, bootstrap, judge
from benchmarks.harness import Plan
from benchmarks.program import Program, Record, Table, figure

WORKERS, SERIES, DEAD = 8, 2_000, 1_000
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
SCRAPE_LIMIT_MS, SCRAPE_LIMIT_RATIO = 150.0, 0.1
DEAD_LIMIT_RATIO, OBSERVE_LIMIT_RATIO = 1.2, 0.2
SCRAPES, THEIR_SCRAPES, OBSERVATIONS, BLOCKS = 21, 5, 20_000, 15


def measure(case: str, plan: Plan) -> Record:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        found = {"scrape": _scrape, "dead": _dead, "observe": _observe}[case](Path(folder))
    return found | {"case": case, "objections": []}


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _scrape(folder: Path) -> Record:
    ours, theirs = folder / "ours", folder / "theirs"
    ours.mkdir()
    theirs.mkdir()
    workers = [_worker(ours) for _ in range(WORKERS)]
    for worker in workers:
        _fill(worker, range(SERIES // 2))
    for number in range(WORKERS):
        _write_theirs(theirs, number)
    gc.collect()
    gc.freeze()
    (first,) = _times(lambda: _text(workers[0]), 1)
    mine = _times(lambda: _text(workers[0]), SCRAPES)
    other = _times(lambda: _their_text(theirs), THEIR_SCRAPES)
    assert _counted(_text(workers[0])) == _counted(_their_text(theirs)), "not the same numbers"
    ms = bootstrap(mine, median)
    ratio = _ratio(mine, other)
    passed = judge(ms, SCRAPE_LIMIT_MS), judge(ratio, SCRAPE_LIMIT_RATIO)
    return {
        "verdict": _worst(*passed),
        "verdicts": [str(one) for one in passed],
        "ms": _plain(ms),
        "first_ms": first,
        "theirs_ms": median(other),
        "ratio": _plain(ratio),
    }


def _dead(folder: Path) -> Record:
    """Each of the dead counted a tenth of the series; one is found at a time, as when recycling."""
    workers = [_worker(folder) for _ in range(WORKERS)]
    for worker in workers:
        _fill(worker, range(SERIES // 2))
    _text(workers[0])
    before = _times(lambda: _text(workers[0]), SCRAPES)
    began = time.process_time()
    for number in range(DEAD):
        gone = _worker(folder)
        _fill(gone, range(number % 10 * 100, number % 10 * 100 + 100))
        gone.store.close()
        workers[1].tidy()
    seconds = time.process_time() - began
    _text(workers[0])
    after = _times(lambda: _text(workers[0]), SCRAPES)
    ratio = _ratio(after, before)
    return {
        "verdict": str(judge(ratio, DEAD_LIMIT_RATIO)),
        "ratio": _plain(ratio),
        "before_ms": median(before),
        "after_ms": median(after),
        "fold_ms": 1e3 * seconds / DEAD,
        "files": len(list(folder.iterdir())),
        "bytes": (folder / "retired").stat().st_size,
    }


def _observe(folder: Path) -> Record:
    mine = _worker(folder).histogram("ours", "", ("route",), BUCKETS).labels("/a").observe
    other = _their_histogram(folder).labels("/a").observe
    ours, theirs = [], []
    gc.collect()
    gc.freeze()
    for _ in range(BLOCKS):
        ours.append(_each(mine))
        theirs.append(_each(other))
    ratio = _ratio(ours, theirs)
    return {
        "verdict": str(judge(ratio, OBSERVE_LIMIT_RATIO)),
        "ratio": _plain(ratio),
        "ours_us": median(ours),
        "theirs_us": median(theirs),
    }


def _each(observe: Callable[[float], None]) -> float:
    """Microseconds of CPU of one."""
    began = time.process_time_ns()
    for _ in repeat(None, OBSERVATIONS):
        observe(0.03)
    return (time.process_time_ns() - began) / OBSERVATIONS / 1e3


def _worker(folder: Path) -> Any:
    from opsguard.metrics import Metrics
    from opsguard.metrics.store import Store

    def failed(site: str, error: BaseException | None) -> None:
        raise RuntimeError(site) from error

    return Metrics(Store(lambda: folder, failed), failed=failed)


def _fill(worker: Any, numbers: Sequence[int]) -> None:
    jobs = worker.counter("jobs_total", "Jobs.", ("queue", "outcome"))
    times = worker.histogram("job_seconds", "Seconds.", ("queue", "outcome"), BUCKETS)
    for number in numbers:
        jobs.labels(f"queue-{number}", "done").inc(number)
        times.labels(f"queue-{number}", "done").observe(0.03)


def _text(worker: Any) -> str:
    return "".join([text for _, text in worker.expose(False)])


def _write_theirs(folder: Path, number: int) -> None:
    """The files that a worker of prometheus_client writes."""
    from prometheus_client.mmap_dict import MmapedDict, mmap_key
    from prometheus_client.utils import floatToGoString

    names = ["queue", "outcome"]
    counters = MmapedDict(str(folder / f"counter_{number}.db"))
    histograms = MmapedDict(str(folder / f"histogram_{number}.db"))
    for place in range(SERIES // 2):
        labels = [f"queue-{place}", "done"]
        key = mmap_key("jobs_total", "jobs_total", names, labels, "Jobs.")
        counters.write_value(key, place, 0.0)
        key = mmap_key("job_seconds", "job_seconds_sum", names, labels, "Seconds.")
        histograms.write_value(key, 0.03, 0.0)
        for bound in (*BUCKETS, float("inf")):
            le = [*labels, floatToGoString(bound)]
            key = mmap_key("job_seconds", "job_seconds_bucket", [*names, "le"], le, "Seconds.")
            histograms.write_value(key, float(bound == 0.05), 0.0)
    counters.close()
    histograms.close()


def _their_text(folder: Path) -> str:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
    return generate_latest(registry).decode()


def _their_histogram(folder: Path) -> Any:
    from prometheus_client import CollectorRegistry, Histogram, values

    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue()  # type: ignore[no-untyped-call]
    return Histogram("theirs", "", ["route"], buckets=BUCKETS, registry=CollectorRegistry())


def _counted(text: str) -> float:
    """All counts of both families."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return sum([float(line.rpartition(" ")[2]) for line in lines if "_sum{" not in line])


def _times(work: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of CPU of each."""
    found = []
    for _ in range(times):
        began = time.process_time_ns()
        work()
        found.append((time.process_time_ns() - began) / 1e6)
    return found


def _ratio(ours: list[float], theirs: list[float]) -> Interval:
    base = median(theirs)
    return bootstrap([one / base for one in ours], median)


def _worst(*verdicts: Any) -> str:
    names = [str(one) for one in verdicts]
    return next((name for name in ("fail", "undecided") if name in names), names[0])


def _plain(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    rows: list[tuple[str, ...]] = []
    for one in records:
        rows += _ROWS[one["case"]](one)
    return [Table(("what", "measured", "limit", "verdict"), tuple(rows))]


def _scrape_rows(one: Record) -> list[tuple[str, ...]]:
    what = f"scrape of {WORKERS} workers × {SERIES:,} series"
    theirs = f"{one['theirs_ms']:,.0f} ms"
    return [
        (f"{what}, ms of CPU", figure(one["ms"], 1), f"{SCRAPE_LIMIT_MS:g}", one["verdicts"][0]),
        (
            f"the same / MultiProcessCollector ({theirs})",
            figure(one["ratio"], 3),
            f"{SCRAPE_LIMIT_RATIO:g}",
            one["verdicts"][1],
        ),
        ("the first scrape of a worker, ms of CPU", f"{one['first_ms']:.1f}", "–", "info"),
    ]


def _dead_rows(one: Record) -> list[tuple[str, ...]]:
    left = f"{one['files']} files, {one['bytes'] / 1e3:,.0f} kB retired"
    return [
        (
            f"scrape after {DEAD:,} dead workers / before ({left})",
            figure(one["ratio"], 2),
            f"{DEAD_LIMIT_RATIO:g}",
            one["verdict"],
        ),
        (
            "a worker of 200 series, born to folded, ms of CPU",
            f"{one['fold_ms']:.1f}",
            "–",
            "info",
        ),
    ]


def _observe_rows(one: Record) -> list[tuple[str, ...]]:
    pair = f"{one['ours_us']:.2f} µs and {one['theirs_us']:.2f} µs"
    return [
        (
            f"histogram observation / prometheus_client, multi-process ({pair})",
            figure(one["ratio"], 3),
            f"{OBSERVE_LIMIT_RATIO:g}",
            one["verdict"],
        )
    ]


_ROWS = {"scrape": _scrape_rows, "dead": _dead_rows, "observe": _observe_rows}

PROGRAM = Program(
    name="workers",
    title="Several workers",
    question=(
        "Eight workers, each with 1,000 counters and 1,000 histograms of 16 cells, read as one; "
        "prometheus_client's files hold the same numbers. Then 1,000 workers come, count and end. "
        "Last, one observation, with prometheus_client in multi-process mode."
    ),
    cases=("scrape", "dead", "observe"),
    measure=measure,
    tables=tables,
)
