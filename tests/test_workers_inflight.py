"""What a worker was serving when it was killed is found in its file, and said once."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opsguard import OpsGuard
from opsguard.accelerator import speed
from opsguard.clock import elapsed
from opsguard.exchange import Exchange
from opsguard.metrics import Death, HttpMetrics, Interrupted, Metrics
from opsguard.metrics.inflight import PLACES, TABLE_AT, WIDTH
from opsguard.metrics.store import Store
from opsguard.settings import Metrics as Options

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Worker:
    """HTTP metrics of one worker, and the deaths it saw."""

    def __init__(self, folder: Path, gil: bool) -> None:
        self.faults: list[str] = []
        self.deaths: list[Death] = []
        self.store = Store(lambda: folder, self._failed, gil=gil)
        self.metrics = Metrics(self.store, failed=self._failed)
        self.metrics.died = self.deaths.append
        http = HttpMetrics(self.metrics, Options())
        self.begin, self.record = http.begin_with(), http.record_with()
        self.progress = http.series("GET", "/a").in_progress

    def _failed(self, site: str, error: BaseException | None) -> None:
        self.faults.append(site)

    def taken(self) -> int:
        cells = self.store.cells
        return len([at for at in range(PLACES) if cells[TABLE_AT + WIDTH * at]])


@pytest.fixture(params=[True, False], ids=["C", "Python"])
def worker(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Worker]:
    if request.param and speed is None:
        pytest.skip("there is no accelerator")
    made = Worker(tmp_path, request.param)
    yield made
    made.store.close()


def exchange(request_id: str = "an-id", endpoint: str = "/a", started: float = 0.0) -> Exchange:
    made: Any = Exchange()
    fields = SimpleNamespace(
        method="GET",
        endpoint=endpoint,
        status=200,
        request_id=request_id,
        started=started or elapsed(),
        first_byte=0.0,
        ended=elapsed(),
        received=0,
        sent=0,
        series=None,
    )
    for name, value in vars(fields).items():
        setattr(made, name, value)
    return made


def killed(work: Any) -> int:
    """The pid of a child that did `work` and was killed by the system then."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    return pid


def test_a_killed_workers_requests_are_told_once(worker: Worker) -> None:
    before = elapsed()

    def work() -> None:
        done = exchange("done")
        worker.begin(done)
        for name in ("one", "x" * 100):
            worker.begin(exchange(name, "/slow/{id}"))
        worker.record(done)

    pid = killed(work)
    for _ in range(3):
        worker.metrics.tidy()
    (death,) = worker.deaths
    assert death.pid == pid
    assert [(r.method, r.endpoint) for r in death.requests] == [("GET", "/slow/{id}")] * 2
    assert sorted(r.request_id for r in death.requests) == ["one", "x" * 64]
    assert all(before <= r.started <= elapsed() for r in death.requests)
    assert worker.faults == []


def test_places_are_given_back(worker: Worker) -> None:
    for _ in range(3):
        requests = [exchange(str(number)) for number in range(PLACES + 40)]
        for request in requests:
            worker.begin(request)
        assert worker.taken() == PLACES
        assert worker.store.cells[worker.progress] == PLACES + 40
        for request in reversed(requests):
            worker.record(request)
        assert worker.taken() == 0
        assert worker.store.cells[worker.progress] == 0.0


def test_a_child_serves_nothing_of_its_parents(worker: Worker) -> None:
    """And what ends in it, of what began before the fork, frees no place of its own requests."""
    inherited = exchange("parent")
    worker.begin(inherited)

    def work() -> None:
        worker.begin(exchange("child"))
        worker.record(inherited)
        worker.begin(exchange("second"))

    killed(work)
    worker.metrics.tidy()
    names = {request.request_id for request in worker.deaths[0].requests}
    assert "parent" not in names
    assert "second" in names
    worker.record(inherited)
    assert worker.taken() == 0


def test_a_route_that_was_never_entered_takes_no_place(worker: Worker) -> None:
    worker.record(exchange())
    assert worker.taken() == 0


def test_ids_of_any_text_are_taken(worker: Worker) -> None:
    worker.begin(exchange("é" * 50))
    assert worker.taken() == 1


def test_the_next_worker_says_what_was_interrupted(caplog: pytest.LogCaptureFixture) -> None:
    ops = OpsGuard("said")
    ops.runtime()
    requests = [Interrupted("GET", f"/{number}", f"id-{number}", elapsed()) for number in range(23)]
    with caplog.at_level(logging.WARNING, "opsguard"):
        ops.metrics.died(Death(4711, 2, tuple(requests)))
    said = [record for record in caplog.records if record.name == "opsguard"]
    assert len(said) == 21
    message = said[0].getMessage()
    assert message.startswith("worker 4711 died while serving GET /0, request id-0, ")
    fields = vars(said[0])
    assert fields["worker_pid"] == 4711
    assert fields["interrupted_request_id"] == "id-0"
    assert fields["age_seconds"] >= 0.0
    assert said[-1].getMessage() == "worker 4711 died while serving 3 further requests"
    page = "".join(text for _, text in ops.metrics.expose(False))
    assert "worker_deaths_total 1.0" in page
