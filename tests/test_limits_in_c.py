"""The usual limit and the usual key, under threads and beside the Python code."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest

from opsguard.accelerator import limits
from opsguard.limiter import Charge, LocalStore
from tests.limits import Bench, Request


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("strategy", ["fixed", "sliding", "gcra"])
def test_threads_are_admitted_to_the_last_one_whoever_decides(strategy: str) -> None:
    """Half of them by the stage, in C where it was built, half by the store in Python."""
    bench = Bench(policies={"/x": {"rate": "1000/hour", "strategy": strategy}})
    store, request = bench.store, Request(path="/x")
    assert isinstance(store, LocalStore)
    first = bench.limiter.edge(request)
    assert first is not None
    (charge,) = first.charges
    admitted: Counter[int] = Counter()
    start = threading.Barrier(8)

    def work(number: int) -> None:
        start.wait()
        for _ in range(300):
            allowed = bench.passes(request) if number % 2 else store.take([charge]).allowed
            admitted[number] += allowed

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 1 + sum(admitted.values()) == 1000


def test_who_holds_the_lock_is_waited_for() -> None:
    """A decision in Python that is half done is not overtaken."""
    bench = Bench(policies={"/x": "3/minute"})
    store, request = bench.store, Request(path="/x")
    assert isinstance(store, LocalStore)
    assert bench.passes(request)
    done = threading.Event()

    def decide() -> None:
        assert bench.passes(request)
        done.set()

    with store.lock:
        thread = threading.Thread(target=decide)
        thread.start()
        assert not done.wait(0.05)
        assert bench.counts["/x", "allowed"] == 1
    assert done.wait(10)
    thread.join()
    assert bench.passes(request)
    assert not bench.passes(request)


@pytest.mark.skipif(limits is None, reason="opsguard._limits was not built")
def test_what_it_decided_reads_like_a_decision() -> None:
    bench = Bench(policies={"/x": {"rate": "5/minute", "cost": 2}})
    decision: Any = bench.limiter.edge(Request(path="/x"))
    assert type(decision) is limits.Decided
    assert decision.allowed
    assert decision.says
    assert decision.response is None
    assert decision.slots == ()
    assert decision.remaining == 3
    rule, client, cost = decision.taken
    assert (rule.name, client, cost) == ("/x", "203.0.113.7", 2)
    assert decision.charges == (
        Charge(rule.prefixes[0] + client, rule.policy.rates[0], rule.strategy, 2),
    )
    assert tuple(decision) == decision.headers
    told: list[tuple[bytes, bytes]] = []
    decision(told, lambda name: name.lower().encode())
    assert told == [(name.lower().encode(), text.encode()) for name, text in decision.headers]
