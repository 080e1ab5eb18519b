"""Type-checked, never run: installing on Flask."""

from __future__ import annotations

from typing import assert_type

from flask import Flask

from opsguard import OpsGuard
from opsguard_flask import init_app, install

ops = OpsGuard(service="checkout")

assert_type(install(Flask(__name__), ops), OpsGuard)
assert_type(init_app(Flask(__name__)), OpsGuard)
install(Flask(__name__).wsgi_app, ops)  # type: ignore[arg-type]
