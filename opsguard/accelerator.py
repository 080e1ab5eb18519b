"""Whether the request path runs in C.

`speed` is the module `opsguard._speed` where it was built and may be used, else None: then the
Python code beside each use of it does the same. `limits` is `opsguard._limits` on top of it: the
usual limit and the usual API key. `shared` is `opsguard._shared`, which needs neither: the memory
in which workers share limits. All need the GIL, the main interpreter, and `elapsed` to be the clock
that they read themselves. ``OPSGUARD_PURE=1`` in the environment leaves them out, and in a checkout
of the sources one that was built before they changed is left out, too.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from opsguard.clock import elapsed

__all__ = ["limits", "shared", "speed"]

_HERE = Path(__file__).parent


def _outdated(name: str, folder: Path) -> bool:
    """Whether a module is older than its sources, which lie beside it in a checkout only."""
    try:
        source = (folder / f"{name}.c").stat()  # first: a wheel has none
        sources = [source, *(header.stat() for header in folder.glob("_c/*.h"))]
        built = (folder / f"{name}{EXTENSION_SUFFIXES[0]}").stat()
    except OSError:
        return False
    if built.st_mtime >= max(one.st_mtime for one in sources):
        return False
    warnings.warn(
        f"opsguard.{name} was built before its sources changed and is left out: build it anew with"
        " pip install -e .",
        RuntimeWarning,
        stacklevel=2,
    )
    return True


def _found(name: str, environ: Mapping[str, str]) -> Any:
    gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    if not gil or environ.get("OPSGUARD_PURE", "0") not in ("", "0") or _outdated(name, _HERE):
        return None
    try:
        found = import_module(f"opsguard.{name}")
    except ImportError:  # it was not built, or this is no main interpreter
        return None
    before, there, after = elapsed(), found.now(), elapsed()
    return found if before <= there <= after else None


def _on_top(name: str) -> Any:
    """Another module in C, which needs `speed`."""
    if speed is None or _outdated(name, _HERE):
        return None
    try:
        return import_module(f"opsguard.{name}")
    except ImportError:
        return None


speed = _found("_speed", os.environ)
limits = _on_top("_limits")
shared = _found("_shared", os.environ)
