"""The shop of the demo without its framework: what it sells, and what it makes of an order.

The apps in `opsguard.demo.apps` differ in their framework and in nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["CATALOGUE", "PAUSE", "SLOW", "Order", "read_order", "receipt", "template"]

CATALOGUE: Mapping[str, Mapping[str, object]] = {
    "1": {"item_id": "1", "name": "Green tea", "price": 4.5},
    "2": {"item_id": "2", "name": "Coffee", "price": 7.25},
    "3": {"item_id": "3", "name": "Cocoa", "price": 5.0},
}
SLOW = 0.25
"""Seconds that the slow page takes."""
PAUSE = 0.02
"""Seconds between two lines of a receipt that is streamed."""

_PLAIN = {"/items", "/orders", "/uploads", "/slow", "/boom", "/stream", "/health"}


@dataclass(frozen=True, slots=True)
class Order:
    item_id: str
    quantity: int


def read_order(body: bytes) -> Order | None:
    """The order in a JSON body, or None if there is none that we can fill."""
    try:
        said = json.loads(body)
        order = Order(str(said["item_id"]), int(said["quantity"]))
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    return order if order.item_id in CATALOGUE and order.quantity > 0 else None


def receipt() -> Iterator[bytes]:
    """The lines of a long receipt."""
    for number in range(1, 26):
        yield f"{number:>3}  Green tea  4.50\n".encode("ascii")


def template(path: str) -> str | None:
    """The route of a path; for the raw apps, which have no router that could say it."""
    if path in _PLAIN:
        return path
    rest = path.removeprefix("/items/")
    return "/items/{item_id}" if rest != path and rest and "/" not in rest else None
