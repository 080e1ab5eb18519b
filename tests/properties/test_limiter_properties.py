"""What holds for every limiter, whatever comes in whatever order and whatever the clock does."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from limits import parse_many

from opsguard.limiter import Charge, LocalStore
from opsguard.limiter.rates import Rate, Strategy, parse_rates
from tests.limits import Manual

RATES = st.builds(
    lambda amount, period: Rate(amount, period, ""), st.integers(1, 12), st.integers(1, 20)
)
BURSTS = st.builds(
    lambda amount, period, burst: Rate(amount, period, "", burst),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 20),
)
STEPS = st.lists(
    st.tuples(st.floats(0, 15, allow_nan=False), st.integers(1, 4), st.sampled_from("ab")),
    max_size=60,
)
JUMPS = st.lists(
    st.tuples(st.floats(-100, 100, allow_nan=False), st.integers(1, 4), st.sampled_from("ab")),
    max_size=60,
)
HOW = st.sampled_from(["fixed", "sliding", "gcra"])
ANY = st.sampled_from(["fixed", "sliding", "gcra", "concurrency"])


def admitted(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]], max_keys: int = 100
) -> list[tuple[float, int]]:
    """When and how much was admitted of one client, in the presence of another."""
    clock = Manual()
    store = LocalStore(clock=clock, max_keys=max_keys)
    found = []
    for pause, cost, key in steps:
        clock.now += pause
        verdict = store.take([Charge(key, rate, how, cost)])
        assert verdict.remaining >= 0
        assert verdict.reset >= 0
        assert (verdict.retry_after > 0) is not verdict.allowed
        if verdict.allowed and key == "a":
            found.append((clock.now, cost))
    return found


@given(RATES, STEPS)
def test_a_fixed_window_admits_its_limit(rate: Rate, steps: list[tuple[float, int, str]]) -> None:
    """N in each window, and so 2 N in any stretch of one window's length."""
    found = admitted(rate, "fixed", steps)
    for start, _ in found:
        assert sum(cost for at, cost in found if start <= at < start + rate.period) <= (
            2 * rate.amount
        )
    origin = 1000.0 + (steps[0][0] if steps else 0.0)  # the first use starts the first window
    windows: dict[float, int] = {}
    for at, cost in found:
        window = (at - origin) // rate.period
        # A moment that rounding puts on the other side of the border is in either.
        if abs((at - origin) / rate.period - round((at - origin) / rate.period)) > 1e-9:
            windows[window] = windows.get(window, 0) + cost
    assert all(count <= rate.amount for count in windows.values())


@given(RATES, STEPS)
def test_a_sliding_window_keeps_its_estimate(
    rate: Rate, steps: list[tuple[float, int, str]]
) -> None:
    found = admitted(rate, "sliding", steps)
    origin = 1000.0 + (steps[0][0] if steps else 0.0)
    for now, _ in found:
        window = (now - origin) // rate.period
        share = (now - origin) / rate.period - window
        if share < 1e-9 or share > 1 - 1e-9:
            continue  # rounding may put it into either window
        count = sum(
            cost for at, cost in found if (at - origin) // rate.period == window and at <= now
        )
        before = sum(cost for at, cost in found if (at - origin) // rate.period == window - 1)
        assert count + before * (1 - share) <= rate.amount + 1e-5


@given(BURSTS, STEPS)
def test_gcra_admits_a_burst_and_the_rate(rate: Rate, steps: list[tuple[float, int, str]]) -> None:
    found = admitted(rate, "gcra", steps)
    for number, (start, _) in enumerate(found):
        total = 0
        for at, cost in found[number:]:
            total += cost
            assert total <= rate.most + (at - start) * rate.amount / rate.period + 1e-5


@given(RATES, st.lists(st.tuples(st.booleans(), st.floats(0, 5)), max_size=60))
def test_no_more_is_in_flight_than_the_limit(rate: Rate, steps: list[tuple[bool, float]]) -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    one = Charge("a", rate, "concurrency", 1)
    flying: list[float] = []
    for ends, pause in steps:
        clock.now += pause
        flying = [at for at in flying if at + rate.period > clock.now]
        if ends and flying:
            store.give_back([one])
            flying.pop(0)
        elif store.take([one]).allowed:
            flying.append(clock.now)
        assert len(flying) <= rate.amount


@given(RATES, HOW, JUMPS)
def test_no_jump_of_the_clock_admits_more(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]]
) -> None:
    """Time that goes back never gives quota: a full bucket for the start and one, in a fixed
    window, for each whole window that went by.
    """
    found = admitted(rate, how, steps)
    forwards = sum(max(pause, 0.0) for pause, _, _ in steps)
    windows = forwards / rate.period + 2
    assert sum(cost for _, cost in found) <= rate.amount * windows + 1e-5


@given(RATES, ANY, JUMPS)
def test_nobody_is_kept_out_for_longer_than_the_limit_says(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]]
) -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    for pause, cost, key in steps:
        clock.now += pause
        store.take([Charge(key, rate, how, cost)])
    waited = 0.0
    while not (verdict := store.take([Charge("a", rate, how, 1)])).allowed:
        assert 0 < verdict.retry_after <= 2 * rate.period
        # By the clock's smallest step at least: less than that would not move it.
        clock.now = max(clock.now + verdict.retry_after, math.nextafter(clock.now, math.inf))
        waited += verdict.retry_after
    windows = 2 if how == "sliding" else 1
    assert waited <= windows * rate.period + 1 + 1e-6  # one second: the wait of concurrency


@given(RATES, HOW, STEPS, st.integers(1, 4))
def test_the_wait_is_enough_and_no_longer_than_needed(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]], cost: int
) -> None:
    """Enough for all; to the microsecond for fixed windows and GCRA."""
    cost = min(cost, rate.amount)
    for early in (0.0, 1e-3):
        clock = Manual()
        store = LocalStore(clock=clock)
        for pause, taken, key in steps:
            clock.now += pause
            store.take([Charge(key, rate, how, taken)])
        charge = Charge("a", rate, how, cost)
        verdict = store.take([charge])
        if verdict.allowed or verdict.retry_after <= 1e-2:
            return
        clock.now += verdict.retry_after - early + (0.0 if early else 1e-6)
        assert store.take([charge]).allowed is not bool(early) or (early and how == "sliding")


@given(
    st.lists(st.tuples(RATES, ANY), min_size=1, max_size=4),
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1), max_size=30),
)
def test_of_several_charges_all_are_taken_or_none(
    rates: list[tuple[Rate, Strategy]], requests: list[list[tuple[int, int]]]
) -> None:
    """Beside a store that is charged only what was admitted, no difference is seen."""
    store, model = LocalStore(clock=Manual()), LocalStore(clock=Manual())
    for request in requests:
        charges = [
            Charge(f"{at % len(rates)}", *rates[at % len(rates)], cost) for at, cost in request
        ]
        if store.take(charges).allowed:
            for charge in charges:
                assert model.take([charge]).allowed
    for at, (rate, how) in enumerate(rates):
        charge = Charge(f"{at}", rate, how, 1)
        assert store.take([charge]) == model.take([charge])


@given(BURSTS, ANY, STEPS, st.integers(1, 4))
def test_what_is_given_back_was_never_taken(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]], cost: int
) -> None:
    clock = Manual()
    stores = LocalStore(clock=clock), LocalStore(clock=clock)
    for pause, taken, key in steps:
        clock.now += pause
        for store in stores:
            store.take([Charge(key, rate, how, taken)])
    charge = Charge("a", rate, how, cost)
    if stores[0].take([charge]).allowed:
        stores[0].give_back([charge])
    after = [store.take([charge]) for store in stores]
    assert after[0].allowed == after[1].allowed
    assert abs(after[0].remaining - after[1].remaining) <= (how == "gcra")


@settings(max_examples=50)
@given(RATES, HOW, st.integers(1, 30), st.lists(st.integers(0, 200), max_size=300))
def test_a_full_store_never_forgets_who_is_refused(
    rate: Rate, how: Strategy, max_keys: int, keys: list[int]
) -> None:
    """In whatever order keys come, one that was refused is refused until its time has come."""
    store = LocalStore(clock=Manual(), max_keys=max_keys)
    refused: set[int] = set()
    for key in keys:
        allowed = store.take([Charge(f"{key}", rate, how, 1)]).allowed
        assert not (allowed and key in refused)
        if not allowed:
            refused.add(key)
    assert len(store) <= max_keys + 1024


@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,3} ?(/|per) ?[a-z0-9 ]{1,8}", fullmatch=True))
def test_a_text_is_a_rate_as_limits_reads_it_or_an_error(text: str) -> None:
    try:
        ours = [(rate.amount, rate.period) for rate in parse_rates(text)]
    except ValueError:
        return
    assert ours == [(one.amount, one.get_expiry()) for one in parse_many(text)]
    assert all(amount > 0 and period > 0 for amount, period in ours)
    texts = [rate.text for rate in parse_rates(text)]
    assert [rate.text for rate in parse_rates("; ".join(texts))] == texts


@given(BURSTS, ANY, STEPS)
def test_the_quota_is_whole_when_it_was_said_to_be(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]]
) -> None:
    """All of it can be taken at once then, and after any longer pause."""
    rate = rate if how == "gcra" else Rate(rate.amount, rate.period, "")
    for later in (1e-6, 3.3 * rate.period):
        clock = Manual()
        store = LocalStore(clock=clock)
        for pause, cost, key in steps:
            clock.now += pause
            store.take([Charge(key, rate, how, cost)])
        reset = store.take([Charge("a", rate, how, 1)]).reset
        clock.now += reset + later
        assert store.take([Charge("a", rate, how, rate.most)]).allowed
