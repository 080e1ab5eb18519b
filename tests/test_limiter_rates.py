"""Rates and policies as people write them."""

from __future__ import annotations

import pytest
from limits import parse_many

from opsguard.limiter.stores import check_strategy
from opsguard.policies import policy, policy_from
from opsguard.rates import Rate, parse_rates


@pytest.mark.parametrize(
    "text",
    [
        "10/minute",
        "10 per 1 minute",
        "5/2 hours",
        "100 per hour; 5/second",
        "1/day,2/month|3/year",
        "7PerMinutes",
        " 3 / second ",
    ],
)
def test_a_rate_means_what_it_means_to_limits(text: str) -> None:
    theirs = [(one.amount, one.get_expiry(), str(one)) for one in parse_many(text)]
    assert [(one.amount, one.period, one.text) for one in parse_rates(text)] == theirs


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not an empty text"),
        ("  ", "not an empty text"),
        ("0/second", "the amount must be from 1"),
        ("-1/s", "'s' is not one of second, minute"),
        ("-1/second", "the amount must be from 1"),
        ("5/0 minutes", "the number of units must be from 1"),
        ("5 per fortnight", "'fortnight' is not one of"),
        ("10", "is not a rate"),
        ("ten/minute", "is not a rate"),
        ("10/minute;", "'' is not a rate"),
        ("9" * 5000 + "/second", "the amount must be from 1"),
        ("x" * 5000, "xxx...' is not a rate"),
    ],
    ids=lambda text: text[:20],
)
def test_a_wrong_rate_is_told_to_its_author(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told.replace("...", r"\.\.\.")):
        parse_rates(text)


def test_a_burst_is_for_gcra_and_sets_the_most_at_once() -> None:
    made = policy("10/minute", strategy="gcra", burst=20)
    assert made.rates == (Rate(10, 60, "10 per 1 minute", 20),)
    assert made.rates[0].most == 20
    with pytest.raises(ValueError, match="gcra"):
        policy("10/minute", burst=20)
    with pytest.raises(ValueError, match="burst must be from 1"):
        policy("10/minute", strategy="gcra", burst=0)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (5, "must be a rate"),
        ({}, "needs a rate"),
        ({"rate": 5}, "rate must be text"),
        ({"rate": "5/minute", "stratgy": "gcra"}, "did you mean strategy"),
        ({"rate": "5/minute", "zzz": 1}, "'zzz' is no part of a policy"),
        ({"rate": "5/minute", "strategy": "leaky"}, "strategy must be one of"),
        ({"rate": "5/minute", "on_store_error": "panic"}, "on_store_error must be one of"),
        ({"rate": "5/minute", "key": "ip"}, "key must be one of"),
        ({"rate": "5/minute", "key": 5}, "or a function"),
        ({"rate": "5/minute", "cost": 0}, "cost must be from 1 to 5"),
        ({"rate": "5/minute", "cost": -1}, "cost must be from 1 to 5"),
        ({"rate": "5/minute; 9/hour", "cost": 6}, "cost must be from 1 to 5"),
        ({"rate": "5/minute", "cost": True}, "cost must be a whole number"),
        ({"rate": "5/minute", "cost": "2"}, "cost must be a whole number"),
        ({"rate": "5/minute", "scope": 5}, "scope must be text"),
        ({"rate": "5/minute", "methods": ["PO ST"]}, "methods must be names"),
        ({"rate": "5/minute", "shadow": "yes"}, "shadow must be true or false"),
    ],
    ids=str,
)
def test_a_wrong_policy_is_told_to_its_author(written: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        policy_from(written)


def test_a_key_or_cost_function_may_not_wait() -> None:
    async def function() -> str:
        return ""

    with pytest.raises(ValueError, match="key must be a plain function"):
        policy("5/minute", key=function)
    with pytest.raises(ValueError, match="cost must be a plain function"):
        policy("5/minute", cost=function)


def test_a_policy_for_get_is_one_for_head_too() -> None:
    assert policy("5/minute", methods="get, post").methods == {"GET", "HEAD", "POST"}
    assert policy("5/minute", methods=["POST"]).methods == {"POST"}


def test_what_is_in_flight_is_not_told_as_a_rate_in_time() -> None:
    assert policy("5/minute", strategy="concurrency").rates[0].text == "5 at once"


def test_a_strategy_that_the_store_cannot_do_is_named_with_what_it_can() -> None:
    with pytest.raises(ValueError, match=r"/login .* 'gcra'.* memcached .* fixed"):
        check_strategy("memcached", frozenset({"fixed"}), "gcra", "/login")
