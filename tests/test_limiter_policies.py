"""Which policies apply to a request, who is charged how much, and what the client is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence

import pytest

from opsguard.limiter import (
    Charge,
    LocalStore,
    Route,
    Verdict,
    describe,
    exempt,
    explain,
    is_preflight,
    limit,
    table,
    tighter,
)
from opsguard.limiter.buckets import of_address
from opsguard.limiter.headers import structured_name
from opsguard.limiter.rates import OnStoreError
from opsguard.marks import NO_MARKS, marks_of
from tests.limits import EPOCH, Bench, Request, Who

PREFLIGHT = {"origin": "https://shop.example", "access-control-request-method": "POST"}


# -- by path ------------------------------------------------------------------------------


def test_the_first_pattern_that_matches_counts() -> None:
    bench = Bench(policies={"/login": "1/minute", "/api/*": "2/minute", "*": "3/minute"})
    assert bench.admitted(Request("/login"), 9) == 1
    assert bench.admitted(Request("/api/items/3"), 9) == 2
    assert bench.admitted(Request("/"), 9) == 3
    assert bench.counts["/login", "refused"] == 8
    assert bench.counts["/api/*", "allowed"] == 2


def test_nothing_applies_to_other_paths() -> None:
    assert Bench(policies={"/login": "1/minute"}).limiter.edge(Request("/about")) is None


@pytest.mark.parametrize(
    "path",
    ["//login", "/LOGIN", "/login/", "/x/../login", "/./login", "/%6cogin", "/x//../..//login"],
)
def test_an_odd_spelling_does_not_dodge_a_policy(path: str) -> None:
    bench = Bench(policies={"/login": "1/minute"})
    assert bench.passes(Request("/login"))
    assert not bench.passes(Request(path))


@pytest.mark.parametrize(
    "path", ["/static//../login", "/static/../login", "/STATIC/x", "//static/x", "/static/%2e%2e/x"]
)
def test_an_odd_spelling_does_not_borrow_an_exemption(path: str) -> None:
    bench = Bench(policies={"/static/*": "exempt", "*": "1/minute"})
    assert bench.admitted(Request("/static/x"), 5) == 5
    assert bench.admitted(Request(path), 5) == 1


def test_an_odd_spelling_is_charged_by_all_it_may_mean() -> None:
    bench = Bench(policies={"/admin/*": "1/minute", "/login": "5/minute"})
    assert bench.admitted(Request("/admin/../login"), 5) == 1
    assert bench.limiter.edge(Request("/login")).remaining == 3  # type: ignore[union-attr]


def test_an_exempt_path_has_no_default_either() -> None:
    bench = Bench(policies={"/static/*": "exempt"}, default="1/minute")
    assert bench.limiter.route(Request("/static/x"), NO_MARKS) is None
    assert bench.limiter.route(Request("/STATIC/x"), NO_MARKS) is not None


def test_a_policy_may_name_methods() -> None:
    bench = Bench(policies={"/items": {"rate": "1/minute", "methods": ["POST"]}, "*": "3/minute"})
    assert bench.admitted(Request("/items", "POST"), 5) == 1
    assert bench.admitted(Request("/items", "GET"), 5) == 3
    assert bench.limiter.edge(Request("/x", "BREW")) is not None


def test_a_preflight_costs_nothing() -> None:
    bench = Bench(policies={"/login": "1/minute", "*": "1/minute"}, default="1/minute")
    preflight = Request("/api", "OPTIONS", headers=PREFLIGHT)
    assert is_preflight(preflight)
    assert bench.limiter.edge(preflight) is None
    assert bench.limiter.route(preflight, NO_MARKS) is None
    assert bench.limiter.edge(Request("/login", "OPTIONS", headers=PREFLIGHT)) is None
    assert bench.admitted(Request("/api", "OPTIONS"), 5) == 1
    assert bench.limiter.route(Request("/api", "OPTIONS"), NO_MARKS) is not None


def test_a_spared_request_costs_nothing_unless_its_path_is_named() -> None:
    bench = Bench(policies={"*": "1/minute"})
    assert bench.limiter.edge(Request("/health"), spared=True) is None
    named = Bench(policies={"*": "1/minute", "/health": "60/minute"})
    assert named.limiter.edge(Request("/health"), spared=True) is not None


# -- by route -----------------------------------------------------------------------------


def test_a_decorator_counts_before_the_tier_and_the_tier_before_the_default() -> None:
    bench = Bench(default="7/minute", tiers={"pro": "8/minute"})
    marks = marks_of(limit("9/minute")(lambda: None))
    pro = Request(endpoint="/x", identity=Who("pro"))
    left = [
        bench.limiter.route(request, with_marks).remaining  # type: ignore[union-attr]
        for request, with_marks in (
            (pro, marks),
            (pro, NO_MARKS),
            (Request(identity=Who("unheard-of")), NO_MARKS),
            (Request(), NO_MARKS),
        )
    ]
    assert left == [8, 7, 6, 5]


def test_the_master_key_has_only_decorators() -> None:
    bench = Bench(default="1/minute")
    master = Request(endpoint="/x", identity=Who("master", master=True))
    assert bench.limiter.route(master, NO_MARKS) is None
    assert bench.limiter.route(master, marks_of(limit("9/minute")(lambda: None))) is not None


def test_exempt_switches_the_route_off_and_leaves_the_path() -> None:
    bench = Bench(default="1/minute", policies={"*": "1/minute"})
    marks = marks_of(exempt(limit("1/minute")(lambda: None)))
    assert bench.limiter.route(Request(endpoint="/x"), marks) is None
    assert bench.admitted(Request("/x"), 5) == 1


def test_a_decorator_has_a_bucket_for_each_route_and_a_shared_scope_has_one() -> None:
    bench = Bench()

    def passes(endpoint: str, function: Callable[[], None]) -> bool:
        return bench.limiter.route(Request(endpoint=endpoint), marks_of(function)).allowed  # type: ignore[union-attr]

    own = limit("1/minute")(lambda: None)
    assert [passes(endpoint, own) for endpoint in ("/a", "/b", "/a")] == [True, True, False]
    first = limit("1/minute", scope="auth")(lambda: None)
    second = limit("1/minute", scope="auth")(lambda: None)
    assert [passes("/c", first), passes("/d", second)] == [True, False]


def test_stacked_decorators_are_decided_as_one() -> None:
    bench = Bench()

    @limit("1/minute", key="global")
    @limit("5/minute")
    def view() -> None: ...

    marks = marks_of(view)
    request = Request(endpoint="/x")
    assert bench.limiter.route(request, marks).allowed  # type: ignore[union-attr]
    assert not bench.limiter.route(request, marks).allowed  # type: ignore[union-attr]
    names = sorted({name for name, _ in bench.counts})
    assert [name.rpartition(".")[2] for name in names] == ["view", "view#2"]
    assert bench.counts[names[0], "allowed"] == 1
    assert bench.counts[names[1], "refused"] == 1


def test_a_refusal_at_the_route_gives_back_what_the_edge_took() -> None:
    bench = Bench(policies={"*": "5/minute"}, default="1/minute")
    bench.limiter.route(Request(), NO_MARKS)
    edge = bench.limiter.edge(Request())
    assert edge is not None
    assert not bench.limiter.route(Request(), NO_MARKS).allowed  # type: ignore[union-attr]
    bench.limiter.give_back(edge)
    assert bench.limiter.edge(Request()).remaining == 4  # type: ignore[union-attr]


def test_the_headers_are_those_of_the_tighter_stage() -> None:
    bench = Bench(policies={"*": "5/minute"}, default="9/minute")
    edge, route = bench.limiter.edge(Request()), bench.limiter.route(Request(), NO_MARKS)
    assert tighter(edge, route) is edge
    assert tighter(None, route) is route
    assert tighter(edge, None) is edge
    assert tighter(route, edge) is edge


# -- whose --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "bucket"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("testclient", "testclient"),
        (None, "-"),
        ("", "-"),
        ("unix:/run/app.sock", "-"),
        ("x" * 1000, "-"),
        ("1:" * 1000, "-"),
    ],
    ids=lambda text: str(text)[:24],
)
def test_an_address_is_a_customer(client: str | None, bucket: str) -> None:
    assert of_address(Request(client=client)) == bucket


@pytest.mark.parametrize("key", ["key", "tenant", "user"])
def test_an_identity_has_its_bucket_and_strangers_go_by_address(key: str) -> None:
    bench = Bench(policies={"*": {"rate": "1/minute", "key": key}})

    def who(name: str) -> Who:
        return Who(key_id=name, tenant_id=name, user_id=name)

    assert bench.passes(Request(identity=who("a"), client="1.1.1.1"))
    assert bench.passes(Request(identity=who("b"), client="1.1.1.1"))
    assert not bench.passes(Request(identity=who("a"), client="2.2.2.2"))
    assert bench.passes(Request(identity=who("ä" * 100)))
    assert not bench.passes(Request(identity=who("ä" * 100)))
    assert bench.passes(Request(client="1.1.1.1"))
    assert not bench.passes(Request(client="1.1.1.1"))
    assert bench.passes(Request(client="2.2.2.2"))


def test_a_global_policy_has_one_bucket() -> None:
    bench = Bench(policies={"*": {"rate": "1/minute", "key": "global"}})
    assert bench.passes(Request(client="1.1.1.1"))
    assert not bench.passes(Request(client="2.2.2.2"))


@pytest.mark.parametrize(
    "answer",
    [None, "", b"bytes", "x" * 1_000_000, object(), True, 1.5, ZeroDivisionError()],
    ids=["none", "empty", "bytes", "1MB", "object", "bool", "float", "raises"],
)
def test_a_key_function_that_fails_gives_a_bucket_apart_and_is_counted(answer: object) -> None:
    def key(request: object) -> object:
        if isinstance(answer, Exception):
            raise answer
        return answer

    bench = Bench(policies={"/f": {"rate": "1/minute", "key": key}, "/a": "1/minute"})
    assert bench.passes(Request("/a"))
    assert bench.admitted(Request("/f"), 5) == 1
    assert bench.passes(Request("/f", client="9.9.9.9"))
    assert bench.counts["/f", "key_fallback"] == 6
    raised = [answer] * 6 if isinstance(answer, Exception) else []
    assert [error for _, error in bench.reports] == raised


def test_a_key_function_takes_the_framework_s_request_or_nothing() -> None:
    seen: list[object] = []

    def of_request(request: object) -> str:
        seen.append(request)
        return "r"

    policies = {
        "/r": {"rate": "1/minute", "key": of_request},
        "/n": {"rate": "1/minute", "key": lambda: 42},
        "/b": {"rate": "1/minute", "key": dict},
    }
    bench = Bench(policies=policies)
    for path in policies:
        assert bench.admitted(Request(path, source="theirs"), 3) == 1
    assert seen == ["theirs"] * 3


def test_no_key_is_secret_long_or_like_another() -> None:
    secret = "sk_live_" + "s" * 3000
    bench = Bench(
        policies={
            "/" + "p" * 300: {"rate": "5/minute; 9/hour", "key": lambda: secret},
            "/s": {"rate": "5/minute", "scope": "s" * 300},
            "/t": {"rate": "5/minute", "scope": "3:a"},
            "/u": {"rate": "5/minute", "scope": "a"},
        }
    )
    keys = [
        charge.key
        for path in bench.options.policies
        for charge in bench.limiter.edge(Request(path)).charges  # type: ignore[union-attr]
    ]
    assert len(set(keys)) == 5
    assert max(map(len, keys)) <= 200
    assert not any("sk_live" in key for key in keys)


# -- how much -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cost", "admitted", "outcome"),
    [
        (lambda: 3, 3, "allowed"),
        (lambda: 2.5, 3, "allowed"),
        (lambda: 0, 20, "free"),
        (lambda: -1, 10, "cost_fallback"),
        (lambda: 1 / 0, 10, "cost_fallback"),
        (lambda: None, 10, "cost_fallback"),
        (lambda: True, 10, "cost_fallback"),
        (lambda: float("nan"), 10, "cost_fallback"),
        (lambda: 11, 0, "refused"),
        (lambda: float("inf"), 0, "refused"),
    ],
    ids=["3", "2.5", "0", "-1", "raises", "none", "bool", "nan", "11", "inf"],
)
def test_a_cost_function_s_answers(cost: object, admitted: int, outcome: str) -> None:
    bench = Bench(policies={"*": {"rate": "10/minute", "cost": cost}})
    assert bench.admitted(Request(), 20) == admitted
    assert bench.counts["*", outcome]


def test_what_can_never_be_admitted_is_not_told_to_come_again() -> None:
    bench = Bench(policies={"*": {"rate": "10/minute", "cost": lambda: 11}})
    answer = bench.limiter.edge(Request()).response  # type: ignore[union-attr]
    assert answer is not None
    assert answer.status == 429
    assert "Retry-After" not in dict(answer.headers)
    assert "retry_after" not in json.loads(answer.body)


# -- the answer ---------------------------------------------------------------------------


def test_the_answer_429() -> None:
    bench = Bench(policies={"/auth/login": "10/minute"}, strategy="fixed")
    assert bench.admitted(Request("/auth/login", "POST"), 10) == 10
    bench.clock.now += 12.5
    decision = bench.limiter.edge(Request("/auth/login", "POST"))
    assert decision is not None
    assert (decision.allowed, decision.headers, decision.charges) == (False, (), ())
    answer = decision.response
    assert answer is not None
    assert (answer.status, json.loads(answer.body)) == (
        429,
        {
            "status": 429,
            "error": "rate_limit_exceeded",
            "message": "Rate limit exceeded: 10 per 1 minute",
            "request_id": "rid-1",
            "retry_after": 48,
        },
    )
    assert dict(answer.headers) == {
        "Content-Type": "application/problem+json",
        "Content-Length": str(len(answer.body)),
        "Retry-After": "48",
        "X-RateLimit-Limit": "10",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": f"{EPOCH + 48:.0f}",
        "RateLimit-Policy": '"/auth/login";q=10;w=60',
        "RateLimit": '"/auth/login";r=0;t=48',
    }


def test_the_texts_of_the_answer_are_settings() -> None:
    bench = Bench(policies={"*": "1/hour"}, error="slow_down", message="Only {rate}!")
    assert bench.admitted(Request(), 1) == 1
    answer = bench.limiter.edge(Request()).response  # type: ignore[union-attr]
    assert answer is not None
    body = json.loads(answer.body)
    assert (body["error"], body["message"]) == ("slow_down", "Only 1 per 1 hour!")


def test_an_admitted_request_is_told_what_is_left() -> None:
    bench = Bench(policies={"*": "10/minute"}, strategy="fixed")
    bench.limiter.edge(Request())
    for passed, second in ((0.0, 60), (0.25, 60), (1.0, 59)):
        bench.clock.now = 1000.0 + passed
        told = dict(bench.limiter.edge(Request()).headers)  # type: ignore[union-attr]
        assert told["X-RateLimit-Reset"] == f"{EPOCH + second:.0f}"
        assert told["RateLimit"].endswith(f";t={second}")
    assert told["X-RateLimit-Remaining"] == "6"


def test_several_rates_are_told_by_the_tightest() -> None:
    bench = Bench(policies={"*": "2/second; 100/hour"}, strategy="fixed")
    told = dict(bench.limiter.edge(Request()).headers)  # type: ignore[union-attr]
    assert told["X-RateLimit-Limit"] == "2"
    assert told["RateLimit"] == '"* 2 per 1 second";r=1;t=1'
    assert told["RateLimit-Policy"] == (
        '"* 2 per 1 second";q=2;w=1, "* 100 per 1 hour";q=100;w=3600'
    )
    assert bench.admitted(Request(), 5) == 1
    assert bench.counts["*", "refused"] == 4


def test_the_structured_fields_parse() -> None:
    http_sfv = pytest.importorskip("http_sfv")
    name = '/a"b\\c é'
    bench = Bench(policies={"*": {"rate": "10/minute; 20/hour"}})
    told = dict(bench.limiter.edge(Request()).headers)  # type: ignore[union-attr]
    policies, rest = http_sfv.List(), http_sfv.List()
    policies.parse(told["RateLimit-Policy"].encode())
    rest.parse(told["RateLimit"].encode())
    assert [(one.params["q"], one.params["w"]) for one in policies] == [(10, 60), (20, 3600)]
    assert rest[0].value in [one.value for one in policies]
    assert set(rest[0].params) == {"r", "t"}
    item = http_sfv.Item()
    item.parse(structured_name(name).encode())
    assert item.value == '/a"b\\c ?'


def test_clients_are_told_routes_and_never_where_code_is() -> None:
    http_sfv = pytest.importorskip("http_sfv")
    bench = Bench()

    @limit("3/minute", key="global")
    @limit("3/minute")
    @limit("9/minute", scope="together")
    def view() -> None: ...

    decision = bench.limiter.route(Request(endpoint="/items/{id}"), marks_of(view))
    assert decision is not None
    policies, state = http_sfv.List(), http_sfv.List()
    policies.parse(dict(decision.headers)["RateLimit-Policy"].encode())
    state.parse(dict(decision.headers)["RateLimit"].encode())
    names = [one.value for one in policies]
    assert names == [
        "together",
        "/items/{id} 3 per 1 minute",
        "/items/{id} 3 per 1 minute #2",
    ]
    assert state[0].value == names[1]
    (marks,) = [bench.limiter.route(Request(endpoint="/a"), marks_of(limit("1/hour")(lambda: 0)))]
    assert marks is not None
    assert dict(marks.headers)["RateLimit-Policy"] == '"/a";q=1;w=3600'


def test_concurrency_is_told_without_a_window_and_returned_at_the_end() -> None:
    bench = Bench(policies={"*": {"rate": "1/minute", "strategy": "concurrency"}})
    decision = bench.limiter.edge(Request())
    assert decision is not None
    assert bench.limiter.holds
    assert dict(decision.headers)["RateLimit-Policy"] == '"*";q=1;qu="concurrent-requests"'
    assert not bench.passes(Request())
    bench.limiter.release(decision)
    assert bench.passes(Request())


def test_the_end_of_a_request_returns_slots_only() -> None:
    bench = Bench(policies={"*": "5/minute"})
    decision = bench.limiter.edge(Request())
    assert decision is not None
    assert not bench.limiter.holds
    bench.limiter.release(decision)
    assert bench.limiter.edge(Request()).remaining == 3  # type: ignore[union-attr]


# -- shadow mode --------------------------------------------------------------------------


def test_shadow_mode_refuses_nothing_and_counts() -> None:
    bench = Bench(policies={"*": "2/minute"}, shadow=True)
    decisions = [bench.limiter.edge(Request()) for _ in range(5)]
    assert all(one is None or (one.allowed and not one.headers) for one in decisions)
    assert bench.counts["*", "allowed"] == 2
    assert bench.counts["*", "shadow_refused"] == 3


def test_a_policy_in_shadow_stands_beside_those_in_force() -> None:
    bench = Bench()

    @limit("1/minute", shadow=True, cost=lambda: next(costs))
    @limit("3/minute")
    def view() -> None: ...

    costs = iter([1, 0, 5, 1])
    marks = marks_of(view)
    decisions = [bench.limiter.route(Request(endpoint="/x"), marks) for _ in range(4)]
    assert [one is not None and one.allowed for one in decisions] == [True, True, True, False]
    shadow = next(name for name, _ in bench.counts if name.endswith("#2"))
    assert bench.counts[shadow, "allowed"] == 1
    assert bench.counts[shadow, "free"] == 1
    assert bench.counts[shadow, "shadow_refused"] == 1


# -- a store that blocks ------------------------------------------------------------------


class Remote:
    """A guarded store as another process would be; notes who decides if it is down."""

    blocking = True
    strategies = LocalStore.strategies

    def __init__(self, inner: LocalStore) -> None:
        self._inner = inner
        self.asked: list[str] = []

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        self.asked.append(f"take {on_error}")
        return self._inner.take(charges)

    async def atake(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        self.asked.append(f"atake {on_error}")
        return self._inner.take(charges)

    def give_back(self, charges: Sequence[Charge]) -> None:
        self.asked.append("give_back")
        self._inner.give_back(charges)

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        self.asked.append("agive_back")
        self._inner.give_back(charges)

    def close(self) -> None:
        self.asked.append("close")

    async def aclose(self) -> None:
        self.asked.append("aclose")


def test_a_store_that_blocks_is_asked_with_and_without_await() -> None:
    store = Remote(LocalStore())
    policy = {"rate": "2/minute", "on_store_error": "deny"}
    bench = Bench(store, policies={"*": policy}, default="1/hour")
    limiter = bench.limiter
    edge = limiter.edge(Request())
    assert edge is not None
    limiter.give_back(edge)

    async def one() -> None:
        edge = await limiter.aedge(Request())
        route = await limiter.aroute(Request(), NO_MARKS)
        again = await limiter.aroute(Request(), NO_MARKS)
        assert edge is not None
        assert route is not None
        assert again is not None
        assert (edge.remaining, route.allowed, again.allowed) == (1, True, False)
        await limiter.agive_back(edge)
        await limiter.agive_back(again)
        await limiter.arelease(edge)

    asyncio.run(one())
    asked = ["take deny", "give_back", "atake deny", "atake local", "atake local", "agive_back"]
    assert store.asked == asked


def test_a_store_that_does_not_block_serves_async_apps_directly() -> None:
    bench = Bench(policies={"/x": {"rate": "1/minute", "strategy": "concurrency"}})

    async def one() -> None:
        assert await bench.limiter.aedge(Request("/y")) is None
        assert await bench.limiter.aroute(Request("/y"), NO_MARKS) is None
        for _ in range(3):
            decision = await bench.limiter.aedge(Request("/x"))
            assert decision is not None
            assert decision.allowed
            await bench.limiter.arelease(decision)

    asyncio.run(one())


def test_a_strategy_that_the_store_cannot_do_stops_the_start() -> None:
    store = Remote(LocalStore())
    store.strategies = frozenset({"fixed"})
    with pytest.raises(ValueError, match=r"\*.*'gcra'"):
        Bench(
            store,
            policies={"*": {"rate": "1/minute", "strategy": "gcra"}},
            strategy="fixed",
            tiers={},
        )
    bench = Bench(store, strategy="fixed")
    marks = marks_of(limit("1/minute", strategy="concurrency")(lambda: None))
    with pytest.raises(ValueError, match="concurrency"):
        describe(bench.limiter, [Route("/x", "GET", marks)])


# -- what applies, and why ----------------------------------------------------------------


def test_the_start_says_which_routes_are_limited() -> None:
    bench = Bench(policies={"/api/*": "5/minute", "/static/*": "exempt"})
    routes = [
        Route("/api/items/{id}", "GET"),
        Route("/login", "POST", marks_of(limit("1/minute")(lambda: None))),
        Route("/ping", "GET", marks_of(exempt(lambda: None))),
        Route("/static/{file}", "GET"),
        Route("/about", "GET"),
    ]
    coverage = describe(bench.limiter, routes)
    assert str(coverage) == "limiter: 2 routes limited, 2 exempt, 1 uncovered: GET /about"
    assert len(bench.limiter.rules()) == 5  # the path's, the login's, three tiers
    assert str(describe(bench.limiter, routes[1:2])) == (
        "limiter: 1 route limited, 0 exempt, 0 uncovered"
    )
    many = describe(bench.limiter, [Route(f"/{number}", "GET") for number in range(12)])
    assert str(many).endswith("GET /9 and 2 more")
    covered = describe(Bench(default="1/minute").limiter, routes)
    assert covered.uncovered == ()


def test_explain_names_what_applies_and_why() -> None:
    bench = Bench(policies={"/api/*": "5/minute; 9/hour"}, default="7/minute")
    edge, route = explain(bench.limiter, "/api/x", "get", key="203.0.113.7")
    assert (edge.stage, edge.policy, edge.rates) == (
        "edge",
        "/api/*",
        ("5 per 1 minute", "9 per 1 hour"),
    )
    assert edge.why == "the path is /api/*"
    taken = bench.limiter.edge(Request("/api/x"))
    assert taken is not None
    assert edge.buckets == tuple(charge.key for charge in taken.charges)
    assert (route.stage, route.policy, route.why) == ("route", "default", "nothing else applies")
    shown = table([edge, route])
    assert "STAGE  POLICY" in shown
    assert "sliding" in shown


@pytest.mark.parametrize(
    ("options", "question", "why"),
    [
        ({}, {}, "no decorator, no tier and no default"),
        ({}, {"master": True}, "the master key has no tier's limit"),
        ({}, {"marks": marks_of(exempt(lambda: None))}, "the handler is exempt"),
        ({"policies": {"/x": "exempt"}}, {}, "the path is exempt"),
    ],
    ids=["nothing", "master", "exempt-handler", "exempt-path"],
)
def test_explain_says_why_nothing_applies(
    options: dict[str, object], question: dict[str, object], why: str
) -> None:
    edge, route = explain(Bench(**options).limiter, "/x", **question)  # type: ignore[arg-type]
    assert edge.policy == route.policy == ""
    assert route.why == why
    assert "-" in table([edge, route])


def test_explain_knows_tiers_functions_and_other_buckets() -> None:
    bench = Bench(
        policies={
            "/f": {"rate": "1/minute", "key": lambda: "secret", "shadow": True},
            "/g": {"rate": "1/minute", "key": "global"},
        }
    )
    assert explain(bench.limiter, "/x", tier="pro", key="k1")[1].buckets[0].endswith(":k:=k1")
    function = explain(bench.limiter, "/f", key="secret")[0]
    assert function.key.startswith("function ")
    assert "secret" not in function.buckets[0]
    assert "(shadow)" in table([function])
    assert explain(bench.limiter, "/f")[0].buckets[0].endswith("<client>")
    assert explain(bench.limiter, "/g", key="k")[0].buckets[0].endswith(":g:*")
    six = explain(Bench(default="1/minute").limiter, "/", key="2001:db8::1")[1]
    assert six.buckets[0].endswith(":a:2001:db8::/64")
