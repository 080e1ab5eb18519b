"""The workers of one service on one machine: who belongs together, and where they meet."""

from __future__ import annotations

from opsguard.workers.seats import Seat, claim, is_taken

__all__ = ["Seat", "claim", "is_taken"]
