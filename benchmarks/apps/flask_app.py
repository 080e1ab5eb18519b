"""The Flask app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask

from benchmarks.apps.fortunes import Fortunes


def build(around: Callable[[Any], Any] | None = None) -> Flask:
    """`around` decorates the JSON handler."""
    app = Flask("benchmark")
    fortunes = Fortunes()

    def greet() -> dict[str, str]:
        return {"message": "Hello, World!"}

    app.get("/json")(greet if around is None else around(greet))

    @app.get("/fortunes")
    def page() -> str:
        return fortunes.page()

    return app
