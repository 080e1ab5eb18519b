"""What a caller is told who may not pass.

Unknown, wrong, malformed, revoked and expired get one and the same answer: which it was is nobody's
business but the owner's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from opsguard.http import Response
from opsguard.problems import problem

__all__ = ["Answers"]


class Answers:
    """The answers of one service. `realm` is its name, `header` the one that keys come in."""

    def __init__(self, realm: str, header: str) -> None:
        shown = "".join(c for c in realm if " " <= c <= "~" and c not in '"\\')
        self._challenge = f'Bearer realm="{shown}"'
        self._missing = (
            f"This needs an API key: send it as {header}, or as Authorization: Bearer <key>."
        )

    def missing(self, request_id: str) -> Response:
        headers = (("WWW-Authenticate", self._challenge),)
        return problem(401, "missing_api_key", self._missing, request_id, headers=headers)

    def invalid(self, request_id: str) -> Response:
        message = "This API key is not valid."
        headers = (
            ("WWW-Authenticate", f'{self._challenge}, error="invalid_token"'),
        )  # RFC 6750 3.1
        return problem(401, "invalid_api_key", message, request_id, headers=headers)

    def wrong_tier(self, tiers: Iterable[str], request_id: str) -> Response:
        message = f"This needs an API key of the tier {' or '.join(tiers)}."
        return problem(403, "insufficient_tier", message, request_id)

    def lacks_scopes(self, scopes: Iterable[str], request_id: str) -> Response:
        message = f"This API key lacks the scope {' and '.join(scopes)}."
        headers = (("WWW-Authenticate", f'{self._challenge}, error="insufficient_scope"'),)
        return problem(403, "insufficient_scope", message, request_id, headers=headers)

    def unavailable(self, request_id: str) -> Response:
        message = "API keys cannot be verified at the moment."
        headers = (("Retry-After", "1"),)
        return problem(503, "key_store_unavailable", message, request_id, headers=headers)

    def too_many_failures(self, seconds: float, request_id: str) -> Response:
        message = "Too many invalid API keys came from this address."
        wait = max(1, math.ceil(seconds))
        headers = (("Retry-After", str(wait)),)
        return problem(
            *(429, "too_many_failures", message, request_id), headers=headers, retry_after=wait
        )
