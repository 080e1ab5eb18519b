"""Users' own prometheus_client metrics across real worker processes: sums, modes, deaths."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from opsguard.metrics import Metrics

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform"),
    pytest.mark.skipif(not hasattr(Metrics, "workers"), reason="each worker shows its own"),
]

# A manager that counts, forks three workers that count, and is asked for its page by lines: "page",
# or "kill N". Every answer is one line of JSON: the samples of the users' metrics.
PROGRAM = """
    import json, os, signal, sys
    from pathlib import Path
    from prometheus_client import Counter, Gauge, Histogram, Info, Summary, REGISTRY
    from opsguard.metrics import Metrics, adoption
    from opsguard.metrics.exposition import Exposition
    from opsguard.metrics.store import Store

    failed = lambda site, error: print(site, error, file=sys.stderr)
    orders = Counter("orders", "", ["plan"])
    orders.labels("pro").inc(1000)
    metrics = Metrics(Store(lambda: Path(sys.argv[1]), failed), failed=failed)
    adoption.adopt(metrics, failed)
    exposition = Exposition((metrics, REGISTRY), failures=failed, covered=adoption.covers)
    built = Gauge("built", "", ["version"])
    built.labels("1.2").set(1)
    busy = Gauge("busy", "", multiprocess_mode="livesum")
    peak = Gauge("peak", "", multiprocess_mode="max")
    last = Gauge("last", "", multiprocess_mode="mostrecent")
    price = Histogram("price", "", buckets=(1, 10))
    size = Summary("size", "", ["kind"])

    def page():
        text = exposition.render("GET", "", "").body.decode()
        lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
        names = ("orders", "built", "busy", "peak", "last", "price", "size")
        print(json.dumps({n: float(v) for n, v in lines if n.startswith(names)}), flush=True)

    pids = []
    for number in (1, 2, 3):
        down, up = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            orders.labels("pro").inc(number)
            orders.labels(f"only-{number}").inc()
            busy.inc(number)
            peak.set(number * 10)
            last.set(number)
            price.observe(number * 3)
            size.labels("a").observe(number)
            os.write(up[1], b"+")
            while os.read(down[0], 1):
                page()
                os.write(up[1], b"+")
            os._exit(0)
        os.read(up[0], 1)
        pids.append((pid, down[1], up[0]))
    for line in sys.stdin:
        order, number = line.split()
        pid, down, up = pids[int(number) - 1]
        if order == "page":
            os.write(down, b"+")
            os.read(up, 1)
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    for pid, *_ in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


def pages(folder: Path, orders: str) -> list[dict[str, float]]:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)],
        input=orders,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_any_worker_shows_the_sums_of_all(tmp_path: Path) -> None:
    """Counters, histograms and summaries are added up, what only one worker has included."""
    first, third = pages(tmp_path, "page 1\npage 3\n")
    assert first == third
    assert first['orders_total{plan="pro"}'] == 1006
    assert first['orders_total{plan="only-2"}'] == 1
    assert (first['price_bucket{le="1.0"}'], first['price_bucket{le="10.0"}']) == (0, 3)
    assert (first["price_count"], first["price_sum"]) == (3, 18)
    assert (first['size_count{kind="a"}'], first['size_sum{kind="a"}']) == (3, 6)


def test_gauges_follow_their_mode(tmp_path: Path) -> None:
    """Without a mode: a series for each worker, with what it was set to before the fork."""
    (page,) = pages(tmp_path, "page 2\n")
    assert (page["busy"], page["peak"], page["last"]) == (6, 30, 3)
    built = {name: value for name, value in page.items() if name.startswith("built")}
    assert set(built.values()) == {1}
    assert len(built) == 4  # the manager has counted as well
    assert all('version="1.2",worker="' in name for name in built)


def test_a_killed_worker_takes_its_gauges_and_leaves_its_counts(tmp_path: Path) -> None:
    """-9, and nothing that was counted is gone."""
    before, after, again = pages(tmp_path, "page 1\nkill 3\npage 1\npage 2\n")
    assert after == again
    sums = [name for name in before if name.startswith(("orders", "price", "size"))]
    assert {name: after[name] for name in sums} == {name: before[name] for name in sums}
    assert (after["busy"], after["peak"], after["last"]) == (3, 20, 2)
    assert len([name for name in after if name.startswith("built")]) == 3
