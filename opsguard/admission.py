"""Who sends a request, whether they may, and how often: keys and limits at the two hook points.

At the edge: whose credential it is, then the limits by path. At the route: what the handler's marks
ask for, then its limits, or the tier's, or the default. Both are written once, as flows that yield
what takes a look outside of this process; where nothing does, they end at once.

A fault of the limiter lets a request pass and is counted. A fault of the keys never does: where a
key may be needed it is answered 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from functools import partial
from typing import Any, Literal, Protocol, cast

from opsguard.accelerator import limits
from opsguard.exchange import Exchange, asettled, settled
from opsguard.failures import Failures
from opsguard.http import Pending, Response
from opsguard.keys import Identity, KeyGuard
from opsguard.limiter import Decision, GuardedStore, Limiter, tighter
from opsguard.marks import Marks, marks_of

__all__ = ["Admission"]

_MOST_HANDLERS = 16_384
_OUTCOMES = {429: "too_many_failures", 503: "store_error"}
Flow = Generator["Look", Any, Response | None]
Always = Callable[[Any], Decision | None] | None | Literal[False]
"""What decides about all requests of a kind; None: nothing, False: that cannot be said."""


class Look(Protocol):
    """Something that takes a look outside: blocking, or awaited."""

    def run(self) -> Any: ...

    async def arun(self) -> Any: ...


class Admission:
    """Keys (or None) and limits (or None) of one plan. Immutable but for what it remembers; for all
    threads.

    `failures` hears of faults of ours, which never raise here. `count` makes of outcome and tier
    what counts a checked key; needed with keys.
    """

    def __init__(
        self,
        guard: KeyGuard | None,
        limiter: Limiter | None,
        failures: Failures,
        count: Callable[[str, str], Callable[[], None]] | None,
        *,
        marked: bool = True,
    ) -> None:
        self.guard = guard
        self.limiter = limiter
        self.marked = marked
        """Handlers may be marked; else the route has less to ask."""
        self._failures = failures
        self._count = count
        self._counts: dict[tuple[str, str], Callable[[], None]] = {}
        self._blocking = limiter is not None and limiter.store.blocking
        self._paths = limiter is not None and bool(limiter.paths)
        routes = limiter is not None and (marked or limiter.options.default is not None)
        self._accepted: dict[str, Callable[[], None]] = {}
        # A stage with nothing to decide is no step at all.
        self.at_edge = self._edge_step() if guard is not None or self._paths else None
        self.at_route = self._route_step() if guard is not None or routes else None
        # The marks of a handler, by it and the method: looked for once.
        self._marks: dict[tuple[object, str], Marks] = {}
        self._returning: set[asyncio.Task[None]] = set()

    def covers(self, *, limits: bool, keys: bool) -> bool:
        """Whether handlers' marks for limits, and for keys, are enforced here."""
        return (
            self.marked
            and (self.limiter is not None or not limits)
            and (self.guard is not None or not keys)
        )

    def edge(self, exchange: Exchange) -> Response | Pending | None:
        """The step at the edge."""
        try:
            guard, credentials = self.guard, exchange.credentials
            if guard is not None and (credentials is not None or guard.requires):
                key, authorization = credentials or ("", "")
                found = guard.judge(cast("Any", exchange), key, authorization)
                if found is not None and not isinstance(found, Identity | Response):
                    return self._begun(exchange, self._at_edge(exchange, found))
                self._checked(found, credentials is not None)
                if isinstance(found, Response):
                    return found
                exchange.identity = found
            return self._limits_at_edge(exchange) if self._paths else None
        except Exception as fault:
            return self._shut(exchange, fault)

    def route(self, exchange: Exchange) -> Response | Pending | None:
        """The step at the route."""
        try:
            marks = self._marks_of(exchange.marked, exchange.method)
            if self._blocking:
                if (decision := self._at_hand(exchange, marks)) is not None:
                    return self._charged(exchange, decision)
                return self._begun(exchange, self._at_route(exchange, marks))
            refused = self._may_not(exchange, marks)
            limiter = self.limiter
            if refused is None and limiter is not None:
                return self._charged_at_route(exchange, limiter.route(exchange, marks))
            return self._given_back(exchange, refused)
        except Exception as fault:
            return self._shut(exchange, fault)

    def spared(self, exchange: Exchange) -> Response | None:
        """The edge of an endpoint of ours, in a thread that may block: it needs no key, and only a
        policy that names its very path limits it.
        """
        if self.limiter is None:
            return None
        try:
            return self._charged(exchange, self.limiter.edge(exchange, spared=True))
        except Exception as fault:
            self._failures.report("limiter", fault)
            return None

    def enforce(self, exchange: Exchange, handler: object) -> Response | None:
        """The route's step for a handler that was called without its hook. Blocks."""
        refused = settled(self._late(exchange, handler))
        if refused is None:  # only then: the app may catch a refusal, and call the handler again
            exchange.marked = handler  # the wrappers inside need not ask
        return refused

    async def aenforce(self, exchange: Exchange, handler: object) -> Response | None:
        refused = await asettled(self._late(exchange, handler))
        if refused is None:
            exchange.marked = handler
        return refused

    def release(self, exchange: Exchange) -> None:
        """The request has ended: return what it held. Never waits in an event loop."""
        held, exchange.held = exchange.held, None
        if not held or self.limiter is None:
            return
        loop = _running_loop() if self._blocking else None
        for decision in held:
            if loop is None:
                self.limiter.release(decision)
                continue
            task = loop.create_task(self.limiter.arelease(decision))
            self._returning.add(task)  # a loop holds its tasks weakly
            task.add_done_callback(self._returning.discard)

    def close(self, *, keys: bool) -> None:
        """Close the connections of the limits, and of the keys if asked; the next request opens
        them again. Those of a running event loop are closed by it soon, others' with their loop.
        """
        if keys and self.guard is not None:
            self.guard.verifier.close()
        if self.limiter is None or not self._blocking:
            return
        store = cast("GuardedStore", self.limiter.store)
        store.close()
        loop = _running_loop()
        if loop is not None:
            task = loop.create_task(store.aclose())
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)

    # -- the steps in C, with what they are to leave to us ------------------------------------

    def _edge_step(self) -> Callable[[Exchange], Response | Pending | None]:
        guard = self.guard
        believed = None if guard is None else guard.verifier.believed
        if limits is None or (guard is not None and believed is None):
            return self.edge
        step: Callable[[Exchange], Response | Pending | None] = limits.Edge(
            good=believed,
            accepted=self._accepted,
            identity=Identity,
            requires=guard is not None and guard.requires,
            paths={} if self._paths else None,
            find=self._always_at_edge,
            whole=self.edge,
            limit=self._limits_at_edge,
            settle=self._charged,
            shut=self._shut,
        )
        return step

    def _route_step(self) -> Callable[[Exchange], Response | Pending | None]:
        if limits is None:
            return self.route
        step: Callable[[Exchange], Response | Pending | None] = limits.Route(
            identity=Identity,
            find=self._always_at_route,
            whole=self.route,
            settle=self._charged_at_route,
            shut=self._shut,
            known_pass=self.limiter is None and not self.marked,
        )
        return step

    def _always_at_edge(self, exchange: Exchange) -> Always:
        """What decides about every request for this path."""
        return cast("Limiter", self.limiter).by_path(exchange.routed)

    def _always_at_route(self, exchange: Exchange) -> Always:
        """What decides about every request like this one in handler, method, route and tier."""
        guard, limiter = self.guard, self.limiter
        marks = self._marks_of(exchange.marked, exchange.method)
        if guard is not None and (marks.keys is not None or guard.requires):
            needs, has = marks.keys, exchange.identity is not None
            anybody = has if needs is None else has and not getattr(needs, "scopes", True)
            if not anybody or self._may_not(exchange, marks) is not None:
                return False
        if limiter is None:
            return None
        return limiter.by_handler(exchange, marks)

    # -- the flows ------------------------------------------------------------------------

    def _limits_at_edge(self, exchange: Exchange) -> Response | Pending | None:
        """The limits by path, of which there are some."""
        limiter = cast("Limiter", self.limiter)
        if not self._blocking:
            return self._charged(exchange, limiter.edge(exchange))
        stage = limiter.edge_stage(exchange)
        if stage is None:
            return None
        if stage.at_hand is not None and (decision := stage.at_hand(exchange)) is not None:
            return self._charged(exchange, decision)
        return self._begun(exchange, self._by_path(exchange))

    def _at_hand(self, exchange: Exchange, marks: Marks) -> Decision | None:
        """What a store that blocks decides at the route without a look outside, if it can."""
        limiter = cast("Limiter", self.limiter)
        if self._may_not(exchange, marks) is not None:
            return None
        stage = limiter.route_stage(exchange, marks)
        return None if stage is None or stage.at_hand is None else stage.at_hand(exchange)

    def _charged_at_route(self, exchange: Exchange, decision: Decision | None) -> Response | None:
        return self._given_back(exchange, self._charged(exchange, decision))

    def _given_back(self, exchange: Exchange, refused: Response | None) -> Response | None:
        """The route's answer. To who is refused goes back what he was charged before."""
        if refused is not None and self.limiter is not None:
            for decision in _uncharged(exchange, exchange.charged):
                self.limiter.give_back(decision)
        return refused

    def _at_edge(self, exchange: Exchange, lookup: Look) -> Flow:
        """Whose credential it is, which only the key store knows; then the limits by path."""
        found: Identity | Response | None = yield lookup
        self._checked(found, True)
        if isinstance(found, Response):
            return found
        exchange.identity = found
        if not self._paths:
            return None
        if not self._blocking:
            return self._charged(exchange, cast("Limiter", self.limiter).edge(exchange))
        return (yield from self._by_path(exchange))

    def _by_path(self, exchange: Exchange) -> Flow:
        limiter = cast("Limiter", self.limiter)
        stage = limiter.edge_stage(exchange)
        if stage is None:
            return None
        decision = yield _Call(lambda: stage.decide(exchange), lambda: stage.adecide(exchange))
        return self._charged(exchange, decision)

    def _at_route(self, exchange: Exchange, marks: Marks) -> Flow:
        before = exchange.charged
        refused = self._may_not(exchange, marks)
        limiter = self.limiter
        if refused is None and limiter is not None:
            stage = limiter.route_stage(exchange, marks)
            if stage is None:
                return None
            decision = yield _Call(lambda: stage.decide(exchange), lambda: stage.adecide(exchange))
            refused = self._charged(exchange, decision)
        if refused is not None and limiter is not None:
            for one in _uncharged(exchange, before):
                yield _Call(partial(limiter.give_back, one), partial(limiter.agive_back, one))
        return refused

    def _checked(self, found: Identity | Response | None, came: bool) -> None:
        """Count what came of a request's key: none is `missing` where one is needed."""
        if isinstance(found, Identity):
            self._counted("accepted", found.tier)
        elif isinstance(found, Response):
            self._counted(_OUTCOMES.get(found.status, "refused") if came else "missing", "")
        elif came:
            self._counted("unknown", "")

    def _counted(self, outcome: str, tier: str) -> None:
        count = self._counts.get((outcome, tier))
        if count is None:
            made = cast("Callable[[str, str], Callable[[], None]]", self._count)
            count = self._counts[outcome, tier] = made(outcome, tier)
            if outcome == "accepted":
                self._accepted[tier] = count
        count()

    def _may_not(self, exchange: Exchange, marks: Marks) -> Response | None:
        """The answer to somebody who may not use this handler."""
        guard = self.guard
        if guard is None or (marks.keys is None and not guard.requires):
            return None
        return guard.route(cast("Any", exchange), marks)

    def _charged(self, exchange: Exchange, decision: Decision | None) -> Response | None:
        """Note what a request was charged, and what its client is told; or the refusal."""
        if decision is None:
            return None
        if decision.response is not None:
            return decision.response
        before, said = exchange.charged, decision
        for one in before:
            said = tighter(one, said) or said
        exchange.charged = (*before, decision)
        exchange.extra = said.headers
        taken = decision.taken
        held = taken[0].strategy == "concurrency" if len(taken) == 3 else _holds(taken)
        if held:
            exchange.held = (*(exchange.held or ()), decision)
        return None

    def _late(self, exchange: Exchange, handler: object) -> Response | Pending | None:
        try:
            return self._begun(exchange, self._at_route(exchange, marks_of(handler)), handler)
        except Exception as fault:
            return self._shut(exchange, fault, handler)

    def _begun(
        self, exchange: Exchange, flow: Flow, handler: object = None
    ) -> Response | Pending | None:
        """The flow up to its first look outside; about `handler`, if that is not the route's."""
        try:
            look = next(flow)
        except StopIteration as stop:
            ended: Response | None = stop.value
            return ended
        return _Rest(self, exchange, flow, look, handler)

    def _shut(
        self, exchange: Exchange, fault: BaseException, handler: object = None
    ) -> Response | None:
        """A fault of ours: nobody passes for it who needs a key. If the keys can say that somebody
        may, it was the limiter's, and nobody is refused for that.
        """
        guard, ask = self.guard, cast("Any", exchange)
        try:
            if guard is None or (exchange.endpoint is None and exchange.identity is not None):
                refused = None
            elif exchange.endpoint is None:
                refused = guard.unavailable(ask)
            else:
                about = exchange.marked if handler is None else handler
                refused = guard.route(ask, marks_of(about, exchange.method))
        except Exception as again:
            self._failures.report_keys("keys", again)
            return cast("KeyGuard", guard).broken(ask)
        if refused is None:
            self._failures.report("limiter", fault)
        else:
            self._failures.report_keys("keys", fault)
        return refused

    def _marks_of(self, handler: object, method: str) -> Marks:
        try:
            return self._marks[handler, method]
        except KeyError:
            marks = marks_of(handler, method)
            if len(self._marks) < _MOST_HANDLERS:
                self._marks[handler, method] = marks
            return marks
        except TypeError:  # it cannot be hashed
            return marks_of(handler, method)


class _Call:
    """A look outside by two functions, one blocking and one awaited."""

    __slots__ = ("_arun", "_run")

    def __init__(self, run: Callable[[], Any], arun: Callable[[], Awaitable[Any]]) -> None:
        self._run = run
        self._arun = arun

    def run(self) -> Any:
        return self._run()

    async def arun(self) -> Any:
        return await self._arun()


class _Rest:
    """The rest of a flow, from its first look outside on; a :class:`~opsguard.http.Pending`."""

    __slots__ = ("_admission", "_exchange", "_flow", "_handler", "_look")

    def __init__(
        self,
        admission: Admission,
        exchange: Exchange,
        flow: Flow,
        look: Look,
        handler: object,
    ) -> None:
        self._handler = handler
        self._admission = admission
        self._exchange = exchange
        self._flow = flow
        self._look = look

    def run(self) -> Response | None:
        look = self._look
        try:
            while True:
                look = self._flow.send(look.run())
        except StopIteration as stop:
            found: Response | None = stop.value
            return found
        except Exception as fault:
            return self._admission._shut(self._exchange, fault, self._handler)

    async def arun(self) -> Response | None:
        look = self._look
        try:
            while True:
                look = self._flow.send(await look.arun())
        except StopIteration as stop:
            found: Response | None = stop.value
            return found
        except Exception as fault:
            return self._admission._shut(self._exchange, fault, self._handler)


def _uncharged(exchange: Exchange, charged: Sequence[Decision]) -> Sequence[Decision]:
    """What to give back for a request that is refused after all, at whatever stage: it consumes
    nothing, and its answer says what its refusal says.
    """
    exchange.charged, exchange.extra, exchange.held = (), None, None
    return charged


def _holds(taken: tuple[Any, ...]) -> bool:
    """Whether a slot is among what was taken: rule, client and cost, one after the other."""
    return any(rule.strategy == "concurrency" for rule in taken[::3])


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
