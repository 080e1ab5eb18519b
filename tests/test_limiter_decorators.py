"""Marks on handlers: how they get there, how they are found, and what stands under them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import pytest

from opsguard import OpsGuard
from opsguard.accelerator import limits
from opsguard.context import current
from opsguard.enforcing import enforcing
from opsguard.exceptions import DeclarationError, OpsGuardError, Refused
from opsguard.http import Response
from opsguard.limiter import exempt, limit
from opsguard.marks import NO_MARKS, Marks, marked, marks_of

ANSWER = Response(429, (), b"")
Text = str


class Plan:
    """Refuses or admits every call that no route's hook has seen."""

    def __init__(self, answer: Response | None) -> None:
        self.answer = answer
        self.asked: list[object] = []

    def enforce(self, exchange: object, wrapper: object) -> Response | None:
        self.asked.append(wrapper)
        return self.answer

    async def aenforce(self, exchange: object, wrapper: object) -> Response | None:
        return self.enforce(exchange, wrapper)


@pytest.fixture
def during() -> Iterator[Callable[[Any, object], None]]:
    """Makes a request of this plan the current one; `handler` is what its route led to."""

    def set_current(plan: object, handler: object = None, closed: bool = False) -> None:
        exchange = SimpleNamespace(plan=plan, marked=handler, method="GET", closed=closed)
        current.set(exchange)  # type: ignore[arg-type]

    yield set_current
    current.set(None)


def texts(marks: Marks) -> list[str]:
    return [rate.text for policy in marks.limits for rate in policy.rates]


# -- kinds --------------------------------------------------------------------------------


@limit("1/minute")
def plain(number: int, *, name: Text = "x") -> str:
    """Say it."""
    return f"{name}{number}"


@limit("1/minute")
async def coroutine(number: int) -> int:
    return number


@limit("1/minute")
def generator(number: int) -> Generator[int, int, str]:
    got = yield number
    yield got
    return "end"


@limit("1/minute")
async def agenerator(number: int) -> AsyncGenerator[int, int]:
    try:
        got = yield number
        yield got
    except KeyError:
        yield -1


def test_a_wrapper_is_of_the_same_kind_with_the_same_signature() -> None:
    assert inspect.iscoroutinefunction(coroutine)
    assert inspect.isgeneratorfunction(generator)
    assert inspect.isasyncgenfunction(agenerator)
    assert not inspect.iscoroutinefunction(plain)
    assert (plain.__name__, plain.__doc__) == ("plain", "Say it.")
    # Resolved where the function is at home, as frameworks may look in the wrapper's module.
    assert inspect.signature(plain).parameters["name"].annotation is str
    assert plain(3, name="y") == "y3"


def test_generators_keep_their_protocol() -> None:
    made = generator(1)
    assert [next(made), made.send(5)] == [1, 5]
    with pytest.raises(StopIteration, match="end"):
        next(made)

    async def run() -> None:
        assert await coroutine(4) == 4
        sent = agenerator(1)
        assert [await anext(sent), await sent.asend(7)] == [1, 7]
        with pytest.raises(StopAsyncIteration):
            await anext(sent)
        thrown = agenerator(1)
        await anext(thrown)
        assert await thrown.athrow(KeyError()) == -1
        await thrown.aclose()

    asyncio.run(run())


def test_a_name_that_cannot_be_resolved_is_left_as_it_stands() -> None:
    @limit("1/minute")
    def view(number: Unheard) -> None:  # type: ignore[name-defined]  # noqa: F821
        ...

    assert inspect.signature(view).parameters["number"].annotation == "Unheard"


def test_fastapi_reads_the_signature_through_the_wrapper() -> None:
    fastapi = pytest.importorskip("fastapi")
    testclient = pytest.importorskip("fastapi.testclient")
    app = fastapi.FastAPI()

    @limit("1/minute")
    async def view(number: int, text: Annotated[str, "a note"] = "t") -> dict[str, object]:
        return {"number": number, "text": text}

    app.get("/{number}")(view)
    client = testclient.TestClient(app)
    assert client.get("/3?text=x").json() == {"number": 3, "text": "x"}
    assert client.get("/x").status_code == 422


# -- marks --------------------------------------------------------------------------------


def test_marks_are_found_under_what_frameworks_wrap() -> None:
    def of_user(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any) -> Any:
            return function(*args)

        wrapper.__dict__.pop("__opsguard_marks__", None)  # a decorator that keeps only __wrapped__
        return wrapper

    class Views:
        @limit("2/minute")
        def method(self) -> None: ...

    for found in (plain, of_user(plain), functools.partial(plain, 1), of_user(of_user(plain))):
        assert texts(marks_of(found)) == ["1 per 1 minute"]
    assert texts(marks_of(Views().method)) == ["2 per 1 minute"]
    assert marks_of(print) is NO_MARKS
    assert marks_of(None) is NO_MARKS


def test_stacked_marks_add_up_and_each_counts_once() -> None:
    @exempt
    @limit("3/minute")
    @limit("2/minute")
    def view() -> None: ...

    marks = marks_of(view)
    assert texts(marks) == ["2 per 1 minute", "3 per 1 minute"]
    assert marks.exempt
    assert [policy.name.rpartition(".")[2] for policy in marks.limits] == ["view", "view#2"]


def test_a_class_is_marked_and_its_methods_count_for_their_method() -> None:
    @limit("9/minute")
    class View:
        @limit("1/minute")
        def get(self) -> None: ...

        def post(self) -> None: ...

    class Child(View): ...

    assert inspect.isclass(View)
    assert texts(marks_of(View)) == ["9 per 1 minute"]
    assert sorted(texts(marks_of(View, "GET"))) == ["1 per 1 minute", "9 per 1 minute"]
    assert marks_of(View, "HEAD") == marks_of(View, "GET")
    assert texts(marks_of(View, "POST")) == ["9 per 1 minute"]
    assert texts(marks_of(Child, "DELETE")) == ["9 per 1 minute"]
    as_view = SimpleNamespace(view_class=View)
    assert sorted(texts(marks_of(as_view, "GET"))) == ["1 per 1 minute", "9 per 1 minute"]


def test_static_and_class_methods_stay_what_they_are() -> None:
    class Views:
        @limit("1/minute")
        @staticmethod
        def static(number: int) -> int:
            return number

        @limit("1/minute")
        @classmethod
        def of_class(cls) -> str:
            return cls.__name__

    assert (Views.static(3), Views.of_class()) == (3, "Views")
    assert texts(marks_of(Views.of_class)) == ["1 per 1 minute"]


def test_what_cannot_be_marked_is_told() -> None:
    with pytest.raises(TypeError, match="cannot be marked"):
        marked(5, public=True)


def test_marks_of_never_raises_and_ends() -> None:
    class Hostile:
        def __getattr__(self, name: str) -> object:
            raise RuntimeError(name)

    class Endless:
        def __getattr__(self, name: str) -> object:
            return Endless()

    assert marks_of(Hostile()) is NO_MARKS
    assert marks_of(Endless()) is NO_MARKS


def test_marks_of_other_rooms_go_the_same_way() -> None:
    view = enforcing(enforcing(lambda: 1, keys="inner"), public=True)
    assert marks_of(view) == Marks(keys="inner", public=True)
    assert marks_of(enforcing(view, keys="outer")).keys == "outer"


@pytest.mark.parametrize("rate", ["0/second", "", "5 per fortnight", "exempt"])
def test_a_wrong_rate_is_told_where_it_stands(rate: str) -> None:
    with pytest.raises(DeclarationError, match="limit"):
        limit(rate)


# -- calls that no route made -------------------------------------------------------------


def test_outside_a_request_nothing_is_enforced() -> None:
    assert plain(1) == "x1"


def test_a_call_after_the_route_s_hook_goes_through(during: Callable[..., None]) -> None:
    plan = Plan(ANSWER)
    for handler in (plain, functools.partial(plain, 1), limit("2/minute")(plain), exempt(plain)):
        during(plan, handler)
        assert plain(1) == "x1"
    during(plan, closed=True)  # background work
    assert plain(1) == "x1"
    assert plan.asked == []


@pytest.mark.skipif(limits is None, reason="opsguard._limits was not built")
@pytest.mark.parametrize("kind", ["plain", "async"])
def test_after_the_route_s_hook_nothing_stands_between(kind: str, tmp_path: Path) -> None:
    """In C a decided call goes by the wrapper; one that was not decided goes through it."""
    flask = pytest.importorskip("flask")
    opsguard_flask = pytest.importorskip("opsguard_flask")
    ops, app, callers = OpsGuard(metrics={"directory": str(tmp_path)}), flask.Flask("s"), []

    def handler(name: str, *, twice: bool = False) -> str:
        callers.append(sys._getframe(1).f_code.co_name)
        return name * (1 + twice)

    async def ahandler(name: str, *, twice: bool = False) -> str:
        callers.append(sys._getframe(1).f_code.co_name)
        return name * (1 + twice)

    view = ops.limit("2/minute")(handler if kind == "plain" else ahandler)
    app.get("/a/<name>")(view)
    app.get("/hidden/<name>")(lambda name: app.ensure_sync(view)(name, twice=True))
    opsguard_flask.install(app, ops)
    client = app.test_client()
    with pytest.raises(TypeError, match="unexpected keyword"):
        asyncio.run(view(nobody=1)) if kind == "async" else view(nobody=1)
    assert [client.get(f"/a/{n}").text for n in "xy"] == ["x", "y"]
    assert not {"call", "acall"} & set(callers)
    assert client.get("/a/z").status_code == 429
    hidden = [client.get("/hidden/z") for _ in range(3)]
    assert [answer.status_code for answer in hidden] == [200, 200, 429]
    assert hidden[0].text == "zz"


def test_a_call_by_a_handler_that_is_not_limited_so_is_decided_here(
    during: Callable[..., None],
) -> None:
    """As a decorator that does not use `functools.wraps` makes it, or a table of a raw app."""
    unhashable = SimpleNamespace()
    for handler in (lambda: plain(1), limit("1/minute")(lambda: None), unhashable):
        plan = Plan(None)
        during(plan, handler)
        assert plain(1) == "x1"
        assert plan.asked == [plain]


def test_a_call_that_the_hook_missed_is_decided_here(during: Callable[..., None]) -> None:
    plan = Plan(None)
    during(plan)
    assert plain(1) == "x1"
    assert plan.asked == [plain]
    during(object())  # a plan without limits
    assert plain(1) == "x1"


def test_a_refusal_carries_its_answer_in_every_kind(during: Callable[..., None]) -> None:
    async def consume() -> None:
        async for _ in agenerator(1):
            raise AssertionError

    during(Plan(ANSWER))
    for call in (
        lambda: plain(1),
        lambda: next(generator(1)),
        lambda: asyncio.run(coroutine(1)),
        lambda: asyncio.run(consume()),
    ):
        with pytest.raises(Refused) as caught:
            call()
        assert caught.value.response is ANSWER
        assert isinstance(caught.value, OpsGuardError)
