"""Memory of this process (Linux)."""

from __future__ import annotations

import re
from pathlib import Path


def resident() -> int:
    """Private memory in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1_024
