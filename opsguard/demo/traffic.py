"""What the demo sends: the good, the bad and the slow, and what has to come of each."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from opsguard.demo.client import ID_HEADER, Answer, ask

__all__ = ["SCRAPE", "START", "UNMATCHED", "Outcome", "Visit", "drive", "pay", "script"]

UNMATCHED = "<unmatched>"
CLIENTS = 6
UPLOAD = 300_000


@dataclass(frozen=True, slots=True)
class Visit:
    """One request to send. `endpoint` and `status` are what metrics and access line must say."""

    method: str
    target: str
    endpoint: str
    status: int
    headers: tuple[tuple[str, str], ...] = ()
    own_id: str = ""
    """The id that has to come back; empty: a fresh one."""
    body: bytes | None = None
    chunked: bool = False
    leaves: bool = False
    """The client goes away in the middle of the answer."""
    refusable: bool = False
    """Some servers refuse it on their own, before any app sees it."""
    says: str = ""
    """The line that the shop itself logs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A visit and what the client saw of it; `error` if that was no answer."""

    visit: Visit
    answer: Answer | None
    error: str = ""

    @property
    def refused(self) -> bool:
        """The server refused it, so that no app has seen it: it is in no metric and no log."""
        answer = self.answer
        return self.visit.refusable and (
            answer is None or (answer.status in (400, 405, 501) and not answer.ids)
        )


SCRAPE = Visit("GET", "/metrics", "/metrics", 200)
START = Visit("GET", "/health", "/health", 200)


def script(seed: int = 1) -> list[Visit]:
    """All visits, in an order that looks like life; the same for the same seed."""
    chance = random.Random(seed)
    visits = [*_good(), *_bad(), *_slow(), *_strangers(chance), *_hostile()]
    chance.shuffle(visits)
    return visits


def drive(port: int, visits: Iterable[Visit]) -> list[Outcome]:
    """Pay the visits, a few at a time."""
    with ThreadPoolExecutor(CLIENTS, "client") as clients:
        return list(clients.map(lambda visit: pay(port, visit), visits))


def pay(port: int, visit: Visit) -> Outcome:
    """Pay one visit."""
    headers = visit.headers
    if visit.own_id and not any(visit.own_id == value for _, value in headers):
        headers = (*headers, (ID_HEADER, visit.own_id))
    try:
        answer = ask(
            port,
            visit.method,
            visit.target,
            headers=headers,
            body=visit.body,
            chunked=visit.chunked,
            leave=visit.leaves,
        )
    except OSError as error:
        return Outcome(visit, None, f"{type(error).__name__}: {error}")
    return Outcome(visit, answer)


def _good() -> Iterable[Visit]:
    for number in range(120):
        item = "/items/{item_id}"
        yield Visit("GET", f"/items/{number % 3 + 1}", item, 200, own_id=f"demo-{number}")
    for _ in range(30):
        yield Visit("GET", "/items", "/items", 200)
        yield Visit("GET", "/items?page=2&q=%E2%98%95", "/items", 200)
    for number in range(24):
        body = json.dumps({"item_id": number % 3 + 1, "quantity": number + 1}).encode("ascii")
        yield Visit("POST", "/orders", "/orders", 201, body=body, says="order placed")
    for chunked in (False, True):
        yield Visit("POST", "/uploads", "/uploads", 201, body=b"x" * UPLOAD, chunked=chunked)
    for _ in range(10):
        yield Visit("GET", "/health", "/health", 200)


def _bad() -> Iterable[Visit]:
    for _ in range(8):
        yield Visit("GET", "/items/999", "/items/{item_id}", 404)
        yield Visit("POST", "/orders", "/orders", 422, body=b'{"item_id": 1, "quantity": "many')
        yield Visit("POST", "/items/1", "/items/{item_id}", 405, body=b"")
    for _ in range(5):
        yield Visit("GET", "/boom", "/boom", 500)


def _slow() -> Iterable[Visit]:
    for _ in range(8):
        yield Visit("GET", "/slow", "/slow", 200, says="report ready")
    for _ in range(3):
        yield Visit("GET", "/stream", "/stream", 200)
        yield Visit("GET", "/stream", "/stream", 499, leaves=True)


def _strangers(chance: random.Random) -> Iterable[Visit]:
    """Scanners: any number of paths that nobody serves."""
    for _ in range(120):
        target = f"/{chance.randrange(1 << 64):x}/{chance.choice(('.env', 'wp-login.php', 'a/b'))}"
        yield Visit("GET", target, UNMATCHED, 404)
    for target in ("/%ff%fe", "/%00", "/%E2%80%A8", "/caf%C3%83%C2%A9"):
        yield Visit("GET", target, UNMATCHED, 404)
    yield Visit("GET", "/items/%ff", "/items/{item_id}", 404)


def _hostile() -> Iterable[Visit]:
    def item(*headers: tuple[str, str], own_id: str = "", refusable: bool = False) -> Visit:
        return Visit(
            *("GET", "/items/1", "/items/{item_id}", 200),
            headers=headers,
            own_id=own_id,
            refusable=refusable,
        )

    for bad in (
        *("a" * 129, "x" * 4000, "two words", "semi;colon", "../../etc/passwd", "<script>"),
        *("${jndi:ldap://127.0.0.1/a}", '{"json": true}', "caf\xe9", "\xff\xfe", "%0d%0aInjected"),
    ):
        yield item((ID_HEADER, bad))
    for control in ("\x1b[31mred\x1b[0m", "null\0byte", "\x7fdelete"):
        yield item((ID_HEADER, control), refusable=True)
    yield item((ID_HEADER, "first"), (ID_HEADER, "second"), refusable=True)
    yield item((ID_HEADER, "no good"), ("X-Correlation-ID", "demo-corr"), own_id="demo-corr")

    for junk in (
        "unknown, 999.1.1.1, [::1%eth0]:80, 10.0.0.1:99, ' OR 1=1 --",
        ", ".join(f"10.{n // 256}.{n % 256}.1" for n in range(400)),
        "203.0.113.7",
    ):
        yield item(("X-Forwarded-For", junk))

    yield Visit("PROPFIND", "/items", "/items", 405)
    for odd in ("FROBNICATE", "get", "X" * 200):
        yield Visit(odd, "/items", "/items", 405, refusable=True)
