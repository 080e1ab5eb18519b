"""Every option: its type, its default, its environment names, and one clear error."""

from __future__ import annotations

from opsguard.settings.model import (
    HTTP_LABEL_NAMES,
    HTTP_METRIC_NAMES,
    LOG_FIELD_NAMES,
    Group,
    Ids,
    Keys,
    Limiter,
    Logging,
    Metrics,
    Option,
    Provenance,
    Proxies,
    Settings,
    StaticKey,
    options,
)

__all__ = [
    "HTTP_LABEL_NAMES",
    "HTTP_METRIC_NAMES",
    "LOG_FIELD_NAMES",
    "Group",
    "Ids",
    "Keys",
    "Limiter",
    "Logging",
    "Metrics",
    "Option",
    "Provenance",
    "Proxies",
    "Settings",
    "StaticKey",
    "options",
]
