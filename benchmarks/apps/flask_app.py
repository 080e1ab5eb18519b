"""The Flask app."""

from __future__ import annotations

from flask import Flask

from benchmarks.apps.fortunes import Fortunes


def build() -> Flask:
    app = Flask("benchmark")
    fortunes = Fortunes()

    @app.get("/json")
    def greet() -> dict[str, str]:
        return {"message": "Hello, World!"}

    @app.get("/fortunes")
    def page() -> str:
        return fortunes.page()

    return app
