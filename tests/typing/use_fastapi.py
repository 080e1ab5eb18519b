"""Type-checked, never run: installing on FastAPI and Starlette."""

from __future__ import annotations

from typing import assert_type

from fastapi import FastAPI
from starlette.applications import Starlette

from opsguard import OpsGuard
from opsguard_fastapi import install

ops = OpsGuard(service="checkout")


class Shop(FastAPI):
    """An app of a class of one's own."""


assert_type(install(FastAPI(), ops), OpsGuard)
assert_type(install(Starlette()), OpsGuard)
install(Shop(), ops)
install(object(), ops)  # type: ignore[arg-type]
install(FastAPI(), "checkout")  # type: ignore[arg-type]
