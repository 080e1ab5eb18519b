"""Serving leaves nothing behind, whatever the request: no memory, and no reference in a build of
Python that counts them (``--with-pydebug``).
"""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opsguard.testing import Answer, Request
from tests.contract.admission import admitted
from tests.contract.harness import guard, request_of
from tests.contract.scenarios import ADAPTERS, SCENARIOS

pytestmark = [
    pytest.mark.full,
    # Django's ASGI handler leaves the spooled body open when an answer breaks off.
    pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*"),
    pytest.mark.skipif(sys.getallocatedblocks() == 0, reason="another allocator, not counted"),
]
REQUESTS = 20
BATCHES = 40
EVERYWHERE = pytest.mark.parametrize("adapter", ADAPTERS)
MASTER, STATIC = "the-master-key", "pro-key-12345"


def held() -> tuple[int, int]:
    """Blocks of memory, and references where they are counted, once the garbage is gone."""
    gc.collect()
    references: Callable[[], int] = getattr(sys, "gettotalrefcount", lambda: 0)
    return sys.getallocatedblocks(), references()


def left(send: Callable[[Request], Answer], request: Request, clear: Callable[[], None]) -> str:
    """What each of the requests leaves; empty if a batch is there after which less is held than
    one for each. Caches fill and tables grow, but not with every request for ever.
    """
    grown: list[tuple[int, int]] = []
    for _ in range(BATCHES):
        before = held()
        for _ in range(REQUESTS):
            send(request)
        clear()
        after = held()
        grown.append((after[0] - before[0], after[1] - before[1]))
        if max(grown[-1]) < REQUESTS:
            return ""
    return f"{request.method} {request.path}: blocks and references of {REQUESTS}: {grown[-8:]}"


def forget_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps all that is logged, by handlers that it sets when a test is called."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])


@EVERYWHERE
def test_no_scenario_leaves_anything(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_records(monkeypatch)
    guarded = guard(adapter, tmp_path)

    def clear() -> None:
        guarded.ops.runtime().sink.flush()
        guarded.shop.after_ids.clear()

    for scenario in SCENARIOS:
        if adapter in scenario.only and scenario.in_process:
            assert left(guarded.send, request_of(scenario, adapter), clear) == "", scenario.name


@EVERYWHERE
def test_no_answer_to_a_key_and_no_limit_leaves_anything(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_records(monkeypatch)
    gate = admitted(
        adapter,
        tmp_path,
        environment="development",
        keys={
            "master": MASTER,
            "required": ["/admin/*"],
            "static": {"pro": {"key": STATIC, "tier": "pro"}},
        },
        limiter={
            "store": "local",
            "default": "1000000/minute",
            "policies": {"/auth/*": "2/minute", "/chat": "1000000/minute; 1000000/hour"},
            "tiers": {"pro": "1000000/minute"},
        },
    )

    def clear() -> None:
        gate.ops.runtime().sink.flush()
        gate.desk.calls.clear()

    for path in ("/open", "/auth/login", "/chat", "/limited", "/several", "/admin/users"):
        for headers in (
            (),
            (("X-API-Key", STATIC),),
            (("Authorization", f"Bearer {MASTER}"),),
            (("X-API-Key", "wrong"),),
        ):
            assert left(gate.send, Request(path, "GET", headers), clear) == "", headers
