"""Every option: its type, its default, its environment names, and one clear error.

- `groups` has the options, `checks` what each value may be, `messages` the words for what is wrong;
- `sources` reads what was said, and where;
- `model` has :class:`Settings`, which puts all that together.

A group is a frozen dataclass, an option is a field of it with its default. To add an option, add a
field; to add a group, add a class and a field of :class:`Settings`. The environment names, the
keywords, the file keys, the error texts and the suggestions follow from that.

The first source that says an option wins, and wins it whole (mappings are not merged):

1. the environment: `OPSGUARD_METRICS__PATH`, else a plain name such as `LOG_LEVEL`;
2. the keywords of `OpsGuard(...)`;
3. `.env` in the working directory, in development only;
4. `opsguard.toml` in the working directory, else `[tool.opsguard]` in `pyproject.toml`;
5. the default.

The environment beats the code because it is what an operator can change at night.
"""

from __future__ import annotations

from opsguard.settings.groups import (
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
    Proxies,
    StaticKey,
)
from opsguard.settings.model import Provenance, Settings, options

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
