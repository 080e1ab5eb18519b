"""The decision in C is that of the Python code, to the last bit of every header."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsguard.accelerator import limits
from opsguard.limiter import Decision, LocalStore, stages
from opsguard.limiter.rules import Rule
from tests.limits import Bench, Request

pytestmark = pytest.mark.skipif(limits is None, reason="opsguard._limits was not built")

CLIENTS = ("198.51.100.4", "2001:db8::1", "10.0.0.1", "", "a" * 70, "\u00e9", "::ffff:10.0.0.1")
PAUSES = st.one_of(
    st.just(0.0),
    st.floats(0.0, 30.0),
    st.floats(30.0, 200.0),
    st.sampled_from([1e-9, 1.0, 60.0, 120.0, -1.0, -3600.0, 1e9]),
)
STEPS = st.lists(
    st.tuples(PAUSES, st.sampled_from(["ask", "back", "beside"]), st.sampled_from(CLIENTS)),
    min_size=1,
    max_size=60,
)
RATES = st.tuples(
    st.integers(1, 40), st.sampled_from([1, 7, 60, 3600]), st.sampled_from([None, 1, 3, 50])
)


def bench(monkeypatch: pytest.MonkeyPatch, pure: bool, most: int, **policy: Any) -> Bench:
    made = Bench(policies={"/x": policy}, max_keys=most)
    made.store = LocalStore(clock=made.clock, max_keys=most)
    with monkeypatch.context() as patch:
        if pure:
            patch.setattr(stages, "limits", None)
        made.limiter = type(made.limiter)(
            made.options,
            made.store,
            report=lambda site, error: made.reports.append((site, error)),
            count=made.count,
            wall=lambda: 1_700_000_000.25 + made.clock.now,
        )
    return made


def plain(decision: Decision | None) -> object:
    assert decision is not None
    charges, rules = decision.charges, [one for one in decision.taken if isinstance(one, Rule)]
    return (
        (decision.allowed, decision.headers, decision.response, decision.remaining),
        (charges, decision.slots, decision.taken[1:], [rule.name for rule in rules]),
        (decision.says, [(name, text) for name, text in decision.headers]),
    )


@settings(max_examples=300, deadline=None)
@given(
    rate=RATES,
    strategy=st.sampled_from(["fixed", "sliding", "gcra"]),
    key=st.sampled_from(["address", "global", "key"]),
    cost=st.integers(1, 3),
    most=st.sampled_from([2, 100]),
    steps=STEPS,
)
def test_it_decides_as_the_reference_does(
    rate: tuple[int, int, int | None],
    strategy: str,
    key: str,
    cost: int,
    most: int,
    steps: list[tuple[float, str, str]],
) -> None:
    amount, period, burst = rate
    policy: dict[str, Any] = {
        "rate": f"{max(amount, cost)} per {period} seconds",
        "strategy": strategy,
        "key": key,
        "cost": cost,
    }
    if strategy == "gcra" and burst is not None:
        policy["burst"] = max(burst, cost)
    with pytest.MonkeyPatch.context() as patch:
        both = [bench(patch, pure, most, **policy) for pure in (False, True)]
    for pause, what, client in steps:
        found = []
        for one in both:
            one.clock.now += pause
            decision = one.limiter.edge(Request(path="/x", client=client))
            assert decision is not None
            if what == "back":
                one.limiter.give_back(decision)
            elif what == "beside" and decision.allowed:  # the same buckets, not by the stage
                one.store.take(decision.charges)
            found.append(plain(decision))
        assert found[0] == found[1]
        assert both[0].counts == both[1].counts
        assert len(both[0].store) == len(both[1].store)  # type: ignore[arg-type]
