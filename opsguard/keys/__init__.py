"""API keys: made, kept, verified, and asked for.

- :class:`Keys` is `ops.keys`: it makes, lists, revokes and rotates keys;
- :class:`Verifier` tells whose a credential is, :class:`KeyGuard` what follows for a request;
- :func:`require_key` and :func:`public` mark handlers.

Importing this loads no database driver, and nothing is opened before it is asked.
"""

from __future__ import annotations

from opsguard.keys.credentials import Invalid, credential
from opsguard.keys.decorators import public, require_key
from opsguard.keys.guard import Ask, KeyGuard, Lookup
from opsguard.keys.identity import Identity, KeyRecord
from opsguard.keys.manager import Keys
from opsguard.keys.policy import KeyRequirement
from opsguard.keys.stores import KeyStoreDown, KeyStoreError, NoSuchKey, Store
from opsguard.keys.verifier import Verifier

__all__ = [
    "Ask",
    "Identity",
    "Invalid",
    "KeyGuard",
    "KeyRecord",
    "KeyRequirement",
    "KeyStoreDown",
    "KeyStoreError",
    "Keys",
    "Lookup",
    "NoSuchKey",
    "Store",
    "Verifier",
    "credential",
    "public",
    "require_key",
]
