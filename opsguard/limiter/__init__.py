"""Rate limits: what is wanted (policies), what applies (rules), what is left (stores).

Nothing here loads a storage driver or the `limits` package; a remote store does, when it is made.
"""

from __future__ import annotations

from opsguard.limiter.buckets import Ask
from opsguard.limiter.decorators import exempt, limit
from opsguard.limiter.explain import Coverage, Explanation, Route, describe, explain, table
from opsguard.limiter.limiter import Limiter, is_preflight
from opsguard.limiter.local import LocalStore
from opsguard.limiter.rates import Rate, parse_rates
from opsguard.limiter.rules import Count, Report
from opsguard.limiter.stages import Decision, tighter
from opsguard.limiter.stores import Charge, GuardedStore, RemoteStore, Store, StoreDown, Verdict
from opsguard.policies import Policy

__all__ = [
    "Ask",
    "Charge",
    "Count",
    "Coverage",
    "Decision",
    "Explanation",
    "GuardedStore",
    "Limiter",
    "LocalStore",
    "Policy",
    "Rate",
    "RemoteStore",
    "Report",
    "Route",
    "Store",
    "StoreDown",
    "Verdict",
    "describe",
    "exempt",
    "explain",
    "is_preflight",
    "limit",
    "parse_rates",
    "table",
    "tighter",
]
