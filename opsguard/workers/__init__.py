"""The workers of one service on one machine: who belongs together, and where they meet."""

from __future__ import annotations

from opsguard.workers.group import Process, manager
from opsguard.workers.seats import Seat, claim, is_taken

__all__ = ["Process", "Seat", "claim", "is_taken", "manager"]
