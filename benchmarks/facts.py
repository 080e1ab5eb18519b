"""Where and with what a figure was taken."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opsguard.accelerator import speed

PACKAGES = (
    "fastapi",
    "starlette",
    "flask",
    "django",
    "sqlalchemy",
    "jinja2",
    "uvicorn",
    "uvloop",
    "httptools",
    "gunicorn",
    "orjson",
    "prometheus-client",
    "prometheus-fastapi-instrumentator",
    "prometheus-flask-exporter",
    "django-prometheus",
    "asgi-correlation-id",
    "python-json-logger",
    "limits",
    "slowapi",
    "flask-limiter",
    "redis",
)


def machine() -> dict[str, Any]:
    """Interpreter, machine and package versions, JSON-able."""
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "path": _path(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _path() -> str:
    """What serves the requests here."""
    if speed is None:
        return "Python"
    return "C, laid out by a profile" if speed.trained else "C, without a profile"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    for line in text.splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
