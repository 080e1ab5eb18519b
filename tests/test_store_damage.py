"""Somebody damages a metrics file under the process that counts in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from opsguard.accelerator import shared
from opsguard.metrics import Metrics
from opsguard.metrics.store import Store

NET = pytest.mark.skipif(shared is None, reason="it takes the module in C to survive this")
DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: os.truncate(path, 0),
    "one page": lambda path: os.truncate(path, 4096),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "random": lambda path: path.write_bytes(b"\xa5" * 8192),
}


def counted(metrics: Metrics) -> str:
    return dict(metrics.expose(openmetrics=False))["x_total"]


@NET
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_file_that_is_damaged_ends_no_process(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    """It begins again at zero in private memory, says so once, and every old index counts on."""
    complaints: list[str] = []
    store = Store(lambda: tmp_path, lambda site, error: complaints.append(f"{site}: {error}"))
    metrics = Metrics(store, failed=lambda site, error: complaints.append(site))
    counter = metrics.counter("x_total", "", ("a",))
    for number in range(1500):
        counter.labels(str(number)).inc()
    assert store.path is not None
    damage(store.path)

    counter.labels("1499").inc()  # on a page that may be gone
    counter.labels("new").inc()
    counted(metrics)
    counter.labels("7").inc(3)
    counter.labels("newer").inc()

    text = counted(metrics)
    assert 'x_total{a="7"} 3.0\n' in text
    assert 'x_total{a="newer"} 1.0\n' in text
    assert 'x_total{a="8"} 0.0\n' in text
    assert store.path is None
    (complaint,) = complaints
    assert "somebody damaged the file" in complaint


@NET
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_series_are_cleared_and_made_again_in_a_damaged_file(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    """Before the damage is seen, and after."""
    store = Store(lambda: tmp_path, lambda site, error: None)
    metrics = Metrics(store, failed=lambda site, error: None)
    counter = metrics.counter("x_total", "", ("a",))
    for number in range(1500):
        counter.labels(str(number)).inc()
    assert store.path is not None
    damage(store.path)
    for _ in range(2):
        counter.clear()
        for value in ("7", "new"):
            counter.labels(value).inc(3)
        counter.remove("new")
        text = counted(metrics)
    assert text.splitlines()[2:] == ['x_total{a="7"} 3.0']
    assert store.path is None


@NET
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_with_a_damaged_file_counts(tmp_path: Path) -> None:
    store = Store(lambda: tmp_path, lambda site, error: None)
    metrics = Metrics(store, failed=lambda site, error: None)
    counter = metrics.counter("x_total", "", ("a",))
    counter.labels("1").inc()
    assert store.path is not None
    os.truncate(store.path, 0)
    counted(metrics)
    child = os.fork()
    if child == 0:  # pragma: no cover
        counter.labels("1").inc(2)
        counter.labels("2").inc(5)
        text = counted(metrics)
        os._exit(0 if 'a="1"} 2.0' in text and 'a="2"} 5.0' in text else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@NET
@pytest.mark.parametrize("handler", ["", "import faulthandler; faulthandler.enable()"])
def test_every_other_bus_error_ends_the_process_as_before(handler: str, tmp_path: Path) -> None:
    """Only our own mapping is caught; whoever handled the signal before us still does."""
    program = f"""
        {handler}
        import mmap, os, sys
        from opsguard.accelerator import shared
        ours = open(sys.argv[1], "w+b"); ours.truncate(8192); ours = mmap.mmap(ours.fileno(), 8192)
        net = shared.Net(ours)
        os.truncate(sys.argv[1], 0)
        ours[5000] = 7
        print(ours[5000], flush=True)
        other = open(sys.argv[2], "w+b"); other.truncate(8192)
        mapped = mmap.mmap(other.fileno(), 8192)
        os.truncate(sys.argv[2], 0)
        mapped[5000] = 7
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "7\n"
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) is bool(handler)


@NET
def test_a_net_that_is_gone_catches_nothing(tmp_path: Path) -> None:
    program = """
        import mmap, os, sys
        from opsguard.accelerator import shared
        with open(sys.argv[1], "w+b") as file:
            file.truncate(8192)
            mapped = mmap.mmap(file.fileno(), 8192)
        for _ in range(1000):
            shared.Net(mapped)
        os.truncate(sys.argv[1], 0)
        mapped[0]
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "a")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGBUS
