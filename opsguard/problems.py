"""Error answers of ours: problem details (RFC 9457) with the members that clients look for."""

from __future__ import annotations

import json

from opsguard.http import Response

__all__ = ["problem"]


def problem(
    status: int,
    error: str,
    message: str,
    request_id: str,
    *,
    headers: tuple[tuple[str, str], ...] = (),
    **members: object,
) -> Response:
    """A complete answer. `error` names the kind for programs or people, `message` explains it;
    `headers` come behind those of the body, `members` (JSON values) behind those of the body's own.
    """
    body = json.dumps(
        {
            "status": status,
            "error": error,
            "message": message,
            "request_id": request_id,
            **members,
        }
    ).encode("ascii")
    described = (
        ("Content-Type", "application/problem+json"),
        ("Content-Length", str(len(body))),
    )
    return Response(status, described + headers, body)
