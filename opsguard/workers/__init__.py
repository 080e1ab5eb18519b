"""The workers of one service on one machine: who belongs together, and where they meet."""

from __future__ import annotations

from opsguard.workers.board import Board
from opsguard.workers.group import Process, manager, several
from opsguard.workers.place import Place, is_held, living
from opsguard.workers.seats import Seat, claim, is_taken

__all__ = [
    "Board",
    "Place",
    "Process",
    "Seat",
    "claim",
    "is_held",
    "is_taken",
    "living",
    "manager",
    "several",
]
