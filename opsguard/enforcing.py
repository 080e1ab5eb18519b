"""Marks that hold: a marked handler in a wrapper that is the last line of defence under them.

The route's hook reads the marks and decides before body, dependencies and handler. A wrapper asks
whether that happened to its own marks, and only if not (the app calls the view in some other way,
or hides it from the hook) decides itself. It is of the same kind as what it wraps, and has the same
signature. A class is marked and not wrapped, as what is called of it is the framework's business.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import FunctionType
from typing import Any, TypeVar, cast

from opsguard.accelerator import limits
from opsguard.context import current
from opsguard.exceptions import Refused
from opsguard.http import Response
from opsguard.marks import layers, marked, marks_of

__all__ = ["enforcing"]

F = TypeVar("F", bound=Callable[..., Any])


_KNOWN = "__opsguard_covered__"
_MOST_DECIDED = 64
"""Handlers that one wrapper remembers; nearly always there is one."""


def enforcing(target: F, **changes: Any) -> F:
    """`target` in a wrapper of its own kind, with these marks on top of those it has. A class is
    itself marked.
    """
    if isinstance(target, staticmethod | classmethod):
        kind = type(target)
        return cast("F", kind(enforcing(target.__func__, **changes)))
    if inspect.isclass(target):
        return cast("F", marked(target, **changes))
    wrapper = _wrapper(target)
    wrapper.__wrapped__ = target
    return cast("F", marked(wrapper, **changes))


def _wrapper(function: Callable[..., Any]) -> Any:
    if inspect.isasyncgenfunction(function):

        async def agenerate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            await _aenforce(wrapper)
            inner = function(*args, **kwargs)
            try:
                value = await anext(inner)
                while True:
                    try:
                        sent = yield value
                    except GeneratorExit:
                        raise
                    except BaseException as error:
                        value = await inner.athrow(error)
                    else:
                        value = await inner.asend(sent)
            except StopAsyncIteration:
                return
            finally:
                await inner.aclose()

        wrapper: Any = agenerate
    elif inspect.iscoroutinefunction(function):

        async def acall(*args: Any, **kwargs: Any) -> Any:
            # The usual request, without a coroutine more: its route's hook has decided.
            if (exchange := current.get()) is None or exchange.marked is not wrapper:
                await _aenforce(wrapper)
            return await function(*args, **kwargs)

        wrapper = acall
        if isinstance(function, FunctionType) and function.__code__.co_flags & inspect.CO_COROUTINE:
            _shorten(wrapper)  # what is only marked as one may give another kind of awaitable
    elif inspect.isgeneratorfunction(function):

        def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            _enforce(wrapper)
            return (yield from function(*args, **kwargs))

        wrapper = generate
    else:

        def call(*args: Any, **kwargs: Any) -> Any:
            if (exchange := current.get()) is None or exchange.marked is not wrapper:
                _enforce(wrapper)
            return function(*args, **kwargs)

        wrapper = call
        _shorten(wrapper)
    functools.update_wrapper(wrapper, function)
    _keep_signature(wrapper, function)
    return wrapper


def _shorten(wrapper: Callable[..., Any]) -> None:
    """Let calls of the wrapper, whose first free variable is what it wraps, pass it by in C where
    its route's hook has decided: what is left of it then costs less than a call. That is asked
    when it is called, by a coroutine function's wrapper too.
    """
    if limits is not None:
        assert wrapper.__code__.co_freevars[0] == "function"
        limits.shorten(wrapper, current)


def _keep_signature(wrapper: Any, function: Callable[..., Any]) -> None:
    # Annotations that are text are resolved here, where the function's own module is known: some
    # frameworks would look them up in ours.
    try:
        wrapper.__signature__ = inspect.signature(function, eval_str=True)
    except Exception:  # a name that exists for type checkers only, or comes later
        return


def _enforce(wrapper: object) -> None:
    enforce = _missed("enforce", wrapper)
    if enforce is not None and (response := enforce(current.get(), wrapper)) is not None:
        raise Refused(cast("Response", response))


async def _aenforce(wrapper: object) -> None:
    enforce = _missed("aenforce", wrapper)
    if enforce is not None:
        answer: Awaitable[Response | None] = enforce(current.get(), wrapper)
        response = await answer
        if response is not None:
            raise Refused(response)


def _missed(verb: str, wrapper: object) -> Callable[..., Any] | None:
    """What decides here, if there is a request and nothing has decided about this handler: its
    route's hook never ran, or could not find the handler (a raw app's own table, a decorator
    that hides what it wraps).
    """
    exchange = current.get()
    if exchange is None or exchange.marked is wrapper or exchange.closed:
        return None
    try:
        if exchange.marked is not None and _covered(exchange.marked, wrapper, exchange.method):
            return None
    except TypeError:  # it cannot be hashed: then it is no handler that a route led to
        pass
    enforce: Callable[..., Any] | None = getattr(exchange.plan, verb, None)
    return enforce


def _covered(decided: object, wrapper: Any, method: str) -> bool:
    """As `_covers`, remembered by the wrapper itself, so that it goes with its app."""
    known: dict[tuple[object, str], bool] = wrapper.__dict__.setdefault(_KNOWN, {})
    try:
        return known[decided, method]
    except KeyError:
        found = _covers(decided, wrapper, method)
        if len(known) < _MOST_DECIDED:
            known[decided, method] = found
        return found


def _covers(decided: object, wrapper: object, method: str) -> bool:
    """Whether a decision about the handler `decided` was one about all that `wrapper` asks for."""
    known, ours = marks_of(decided, method), marks_of(wrapper)
    limited = known.exempt or all(
        any(one is other for other in known.limits) for one in ours.limits
    )
    # Of two requirements on one handler the outer one counts; a helper's own may ask for more.
    keyed = ours.keys is None or known.keys == ours.keys or wrapper in layers(decided, method)
    return limited and keyed
