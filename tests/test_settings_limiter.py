"""The settings of the limiter: how policies are written, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsguard.exceptions import SettingsError
from opsguard.settings import Limiter, Settings


def load(environ: dict[str, str] | None = None, **limiter: object) -> Limiter:
    nowhere = Path("/nonexistent/nowhere")
    keywords = {"limiter": limiter}
    return Settings.load(keywords, environ=environ or {}, directory=nowhere).limiter


def test_defaults() -> None:
    limiter = load()
    assert (limiter.enabled, limiter.store, limiter.strategy) == (True, "auto", "sliding")
    assert (limiter.default, limiter.policies) == (None, {})
    assert {name: str(policy) for name, policy in limiter.tiers.items()} == {
        "free": "100 per 1 minute",
        "pro": "1000 per 1 minute",
        "enterprise": "10000 per 1 minute",
    }
    assert (limiter.on_store_error, limiter.timeout, limiter.lease) == ("local", 0.025, 1)
    assert load() == load()


def test_policies_are_rates_or_mappings_and_keep_their_order() -> None:
    limiter = load(
        policies={
            "/login": "10/minute; 100/hour",
            "/static/*": "exempt",
            "/api/*": {"rate": "5/second", "strategy": "gcra", "burst": 20, "key": "tenant"},
        }
    )
    assert list(limiter.policies) == ["/login", "/static/*", "/api/*"]
    login, static, api = limiter.policies.values()
    assert (login.name, str(login)) == ("/login", "10 per 1 minute; 100 per 1 hour")
    assert (static.exempt, str(static)) == (True, "exempt")
    assert (api.strategy, api.key, api.rates[0].burst) == ("gcra", "tenant", 20)


def test_policies_come_from_the_environment_as_pairs_or_json() -> None:
    name = "OPSGUARD_LIMITER__POLICIES"
    pairs = load({name: "/login=10/minute, *=100/minute"}).policies
    assert {path: str(policy) for path, policy in pairs.items()} == {
        "/login": "10 per 1 minute",
        "*": "100 per 1 minute",
    }
    as_json = load({name: '{"/a": {"rate": "5/hour", "methods": ["post"]}}'}).policies
    assert as_json["/a"].methods == {"POST"}


def test_an_override_keeps_the_policies_there_are() -> None:
    settings = Settings.load({"limiter": {"policies": {"*": "1/hour"}}}, environ={})
    merged = settings.merged({"limiter": {"shadow": True}})
    assert merged.limiter.policies == settings.limiter.policies
    assert merged.limiter.shadow


@pytest.mark.parametrize("variable", ["RATELIMIT_ENABLED", "ENABLE_RATE_LIMITING"])
def test_a_plain_variable_turns_it_off(variable: str) -> None:
    assert not load({variable: "false"}).enabled


@pytest.mark.parametrize(
    ("environ", "url"),
    [
        ({}, ""),
        ({"REDIS_URL": "redis://:pw@cache:6380/1"}, "redis://:pw@cache:6380/1"),
        ({"REDIS_HOST": "cache"}, "redis://cache:6379/0"),
        ({"REDIS_HOST": "cache", "REDIS_PORT": "6380"}, "redis://cache:6380/0"),
        ({"REDIS_HOST": "2001:db8::1"}, "redis://[2001:db8::1]:6379/0"),
        ({"REDIS_HOST": "cache", "REDIS_PORT": "tcp://10.0.0.1:6379"}, "redis://cache:6379/0"),
        ({"REDIS_PORT": "6380"}, ""),
        ({"REDIS_URL": "rediss://a", "REDIS_HOST": "b"}, "rediss://a"),
    ],
    ids=["none", "url", "host", "host-port", "ipv6", "kubernetes", "port-only", "url-first"],
)
def test_redis_is_where_the_usual_variables_say(environ: dict[str, str], url: str) -> None:
    assert load(environ).redis_url == url


def test_where_redis_is_is_never_shown() -> None:
    limiter = load({"REDIS_URL": "redis://:geheim@cache"}, store="redis://:geheim@cache")
    assert "geheim" not in repr(limiter)
    with pytest.raises(SettingsError) as caught:
        load(redis_url="http://:geheim@cache")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("limiter", "told"),
    [
        ({"policies": {"/x": "0/second"}}, "limiter.policies: .*/x: '0/second': the amount"),
        ({"policies": {"/x": "-1/s"}}, "limiter.policies: .*/x: '-1/s'"),
        ({"policies": {"/x": "5 per fortnight"}}, "limiter.policies: .*fortnight"),
        ({"policies": {"/x": ""}}, "limiter.policies: .*not an empty text"),
        ({"policies": {"x": "5/minute"}}, "limiter.policies: .*'x' must start with /"),
        ({"policies": {"/x": {"rate": "5/minute", "kye": "user"}}}, "did you mean key"),
        ({"policies": "5/minute"}, "limiter.policies: .*name=value"),
        ({"policies": ["5/minute"]}, "limiter.policies: .*must be a mapping"),
        ({"default": "0/second"}, "limiter.default: '0/second': '0/second': the amount"),
        ({"default": "exempt"}, "limiter.default: 'exempt': must be a rate"),
        ({"default": 5}, "limiter.default: 5: must be a rate"),
        ({"tiers": {"pro": "5 per fortnight"}}, "limiter.tiers: .*pro: .*fortnight"),
        ({"tiers": {"pro": "exempt"}}, "limiter.tiers: .*pro: a tier has a rate"),
        ({"strategy": "leaky"}, "limiter.strategy: 'leaky'"),
        ({"key": "ip"}, "limiter.key: 'ip': must be one of address"),
        ({"store": "redis"}, r"limiter.store: \*\*\*: must be one of auto, local, workers"),
        ({"on_store_error": "panic"}, "limiter.on_store_error: 'panic'"),
        ({"timeout": 0}, "limiter.timeout: 0"),
        ({"lease": 0}, "limiter.lease: 0"),
        ({"max_keys": True}, "limiter.max_keys: True: must be a whole number"),
    ],
    ids=str,
)
def test_a_wrong_value_stops_the_start_and_names_the_setting(
    limiter: dict[str, object], told: str
) -> None:
    with pytest.raises(SettingsError, match=told):
        load(None, **limiter)


def test_a_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"OPSGUARD_LIMITER__DEFAULT: '0/second'"):
        load({"OPSGUARD_LIMITER__DEFAULT": "0/second"})
    with pytest.raises(SettingsError, match=r"REDIS_PORT: 'x': must be a port number"):
        load({"REDIS_HOST": "cache", "REDIS_PORT": "x"})
    assert load({"OPSGUARD_LIMITER__DEFAULT": ""}, default="5/minute").default is None
