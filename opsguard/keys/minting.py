"""What a key looks like, and the one form in which it is kept.

``<prefix>_<tier>_<id>_<secret>``: the id is 12 letters and digits, the secret 43, which is 256
random bits. Neither has a ``_``, so the last two parts of a key are they, whatever underscores the
prefix and the tier contain. Prefix and tier are there for people and for secret scanners; which
tier a key has is what the store says.

A key is kept as HMAC-SHA-256 under a pepper. A slow password hash would add nothing: it protects
secrets that can be guessed, and 256 random bits cannot. The pepper does add something: with the
database alone nobody can so much as tell whether a key is in it.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable

__all__ = ["LONGEST", "Random", "is_shaped", "mint", "pepper_check", "peppered", "sealed"]

LONGEST = 256
"""Characters that a credential may have."""

Random = Callable[[int], bytes]
"""So many bytes that nobody can guess; `secrets.token_bytes`."""

_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_SECRET = 43  # digits: 62**43 is just above 2**256
_ID = 12  # digits, the last of 9 bytes: among a million keys no two are alike
_SHAPE = re.compile(r"[!-~]+_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}\Z")
_DEVELOPMENT_PEPPER = "opsguard development pepper"  # no secret, and good for no secret


def mint(prefix: str, tier: str, random: Random) -> tuple[str, str]:
    """A new key's id, and the key."""
    key_id = _base62(random(9), _ID)
    return key_id, f"{prefix}_{tier}_{key_id}_{_base62(random(32), _SECRET)}"


def is_shaped(credential: str) -> bool:
    """Whether this could be a key that was minted here, under any prefix."""
    return _SHAPE.match(credential) is not None


def peppered(pepper: str) -> bytes:
    """The key of the HMACs; without a pepper a constant one, for development."""
    return (pepper or _DEVELOPMENT_PEPPER).encode("utf-8", "surrogatepass")


def sealed(pepper: bytes, credential: str) -> bytes:
    """What is kept of a key: 32 bytes. The credential must be ASCII."""
    return hmac.digest(pepper, credential.encode("ascii"), "sha256")


def pepper_check(pepper: bytes) -> str:
    """What a store keeps to tell whether it is asked with the pepper that it was filled with."""
    return hmac.digest(pepper, b"opsguard: which pepper is this?", "sha256").hex()


def _base62(data: bytes, width: int) -> str:
    number = int.from_bytes(data)
    digits = []
    for _ in range(width):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))
