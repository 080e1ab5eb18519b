"""Type-checked, never run: installing on a raw ASGI app, typed by hand or by asgiref."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, assert_type

from opsguard import OpsGuard
from opsguard_asgi import Guarded, install

ops = OpsGuard(service="checkout")
Message = MutableMapping[str, Any]


async def app(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[Message]],
    send: Callable[[Message], Awaitable[None]],
) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


class Shop:
    """An app that is an object."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        return None


def endpoint(scope: MutableMapping[str, Any]) -> str | None:
    return "/items/{item_id}" if scope["path"].startswith("/items/") else None


guarded = assert_type(install(app, ops, endpoint=endpoint), Guarded)
install(Shop(), ops)
install(guarded, ops)  # a guarded app is an app
install(app)  # type: ignore[call-arg]
install(app, ops, endpoint="/items")  # type: ignore[arg-type]
