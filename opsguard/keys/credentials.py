"""The credential that a request presents, out of its two headers."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from opsguard.keys.minting import LONGEST

__all__ = ["Invalid", "credential"]

# A comma is what joins a header that was sent twice; no key has one.
_TOKEN: Final = re.compile(r"[!-+\--~]{1,%d}\Z" % LONGEST)  # noqa: UP031
_BEARER: Final = re.compile(r"bearer(?: |\Z)", re.IGNORECASE)


class Invalid(NamedTuple):
    """Something that was meant as a credential and can be none. `reason` is for our own logs."""

    reason: str


MALFORMED: Final = Invalid("malformed")
TWO: Final = Invalid("two different ones")


def credential(x_api_key: str, authorization: str) -> str | Invalid | None:
    """The credential of a request with these headers ("" for one that is not there).

    It stands in `X-API-Key` or behind `Bearer` (RFC 6750; any case) in `Authorization`. Another
    scheme is the app's business and passed over. Both headers may say the same. Invalid: `Bearer`
    alone, a header sent twice (protocols join those with a comma), two different credentials, and
    whatever is not 1 to 256 visible ASCII characters. The query is no place for a credential:
    it ends in logs and histories.
    """
    bearer = ""
    if _BEARER.match(authorization):
        bearer = authorization[6:].lstrip(" ")
        if not _TOKEN.match(bearer):
            return MALFORMED
    if not x_api_key:
        return bearer or None
    if not _TOKEN.match(x_api_key):
        return MALFORMED
    if bearer and bearer != x_api_key:
        return TWO
    return x_api_key
