"""Error answers of ours: problem details (RFC 9457) with the members that clients look for."""

from __future__ import annotations

import json

from opsguard.http import Response

__all__ = ["problem"]


def problem(status: int, error: str, message: str, request_id: str) -> Response:
    """A complete answer. `error` names the kind for programs or people, `message` explains it."""
    body = json.dumps(
        {"status": status, "error": error, "message": message, "request_id": request_id}
    ).encode("ascii")
    headers = (
        ("Content-Type", "application/problem+json"),
        ("Content-Length", str(len(body))),
    )
    return Response(status, headers, body)
