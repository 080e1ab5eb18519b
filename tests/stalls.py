"""How much longer than a time limit a test must allow for."""

from __future__ import annotations

from typing import Final

STALL: Final = 1.5
"""Seconds for which a shared machine was seen to stop a process, or let others run before it.

What a test calls too long must take at least so much longer than what it calls in time.
"""
