"""Whatever bytes the other files of a group hold, the scrape answers, and a sound worker counts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text

from opsguard.metrics import Metrics
from opsguard.metrics.layout import FAMILY, HEADER_SIZE, SERIES, pack_header, pack_record
from opsguard.metrics.store import Store

KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
DEFINITIONS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["mine_total", "other", "", "a b", 7]),
        "type": st.sampled_from(["counter", "gauge", "histogram", "unknown", "x", None]),
        "help": st.text(max_size=5) | st.none(),
        "labels": st.lists(st.sampled_from(["a", "le", "worker", "\0", 1]), max_size=2),
        "buckets": st.lists(st.floats() | st.text(max_size=2), max_size=3),
        "mode": st.sampled_from(["sum", "max", "min", "latest", "live", "x", []]),
    }
)
CELLS = st.lists(st.binary(min_size=8, max_size=8), max_size=6).map(b"".join)
RECORDS = st.builds(
    pack_record,
    st.integers(0, 8),
    KEYS | st.lists(st.integers(-1, 3) | st.text(max_size=3), max_size=3),
    CELLS,
) | st.builds(pack_record, st.just(FAMILY), DEFINITIONS, st.just(b""))
BODIES = st.lists(RECORDS, max_size=8).map(b"".join) | st.binary(max_size=300)


def faults(site: str, error: BaseException | None) -> None:
    return None


def worker(folder: Path) -> Metrics:
    return Metrics(Store(lambda: folder, faults), failed=faults)


def sound() -> bytes:
    with tempfile.TemporaryDirectory() as name:
        other = worker(Path(name))
        other.counter("theirs_total", "", ("a",)).labels("x").inc()
        other.histogram("seconds", "", (), (1, 2)).observe(1.5, {"trace_id": "t"})
        other.gauge("g", mode="live").set(1)
        data = other.store.read()
        other.store.close()
    return data


SOUND = sound()
FILES = st.one_of(
    st.binary(max_size=300),
    BODIES.map(lambda body: pack_header(pid=1, used=HEADER_SIZE + len(body)) + body),
    st.integers(0, len(SOUND)).map(lambda length: SOUND[:length]),
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=20).map(
        lambda changes: altered(changes)
    ),
)


def altered(changes: list[tuple[int, int]]) -> bytes:
    data = bytearray(SOUND)
    for at, value in changes:
        data[at] = value
    return bytes(data)


@settings(max_examples=150, deadline=None)
@given(FILES, st.sampled_from(["worker-5-1-aa", "retired"]), FILES)
def test_any_bytes_in_any_file(data: bytes, name: str, more: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        first, second = worker(folder), worker(folder)
        for number, metrics in enumerate((first, second), 1):
            metrics.counter("jobs_total", "", ("queue",)).labels("a").inc(number)
        (folder / name).write_bytes(data)
        (folder / "worker-6-1-bb").write_bytes(more)
        for _ in range(2):
            page = "".join([block for _, block in first.expose(False)])
            assert 'jobs_total{queue="a"} 3.0' in page
            list(text(page))
        list(openmetrics("".join([block for _, block in second.expose(True)]) + "# EOF\n"))
        first.store.close()
        second.store.close()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(min_size=8, max_size=8), min_size=3, max_size=3).map(b"".join))
def test_any_numbers_in_a_histogram(cells: bytes) -> None:
    """Counts that are none leave the histogram out; they never break the page."""
    definition = pack_record(
        FAMILY,
        {"name": "h", "type": "histogram", "help": "", "labels": [], "buckets": [1], "mode": "sum"},
        b"",
    )
    body = definition + pack_record(SERIES, [0], cells)
    with tempfile.TemporaryDirectory() as place:
        metrics = worker(Path(place))
        metrics.histogram("h", "", (), (1,)).observe(0.5)
        header = pack_header(pid=1, used=HEADER_SIZE + len(body))
        (Path(place) / "worker-5-1-aa").write_bytes(header + body)
        for _ in range(2):
            page = "".join([block for _, block in metrics.expose(False)])
            assert "h_count" in page
        metrics.store.close()
