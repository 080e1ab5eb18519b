"""Request ids: which inbound id is believed, and where fresh ones come from.

An inbound id counts only if it fully matches ``[A-Za-z0-9._-]{1,128}``: it is echoed in a header
and written in logs, so nothing that could end a line, drive a terminal or grow without bound may
pass. A fresh id is 128 random bits in 32 hexadecimal digits from the system's generator, cut from
blocks because one call for 128 ids costs a fraction of 128 calls.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from opsguard.forks import in_each_child

__all__ = ["fresh", "valid"]

_BLOCK = 128
_HEX = 32

valid: Callable[[str], object] = re.compile(r"[A-Za-z0-9._-]{1,128}").fullmatch
"""Truthy if the text may serve as an id."""

_pool: list[str] = []
_take = _pool.pop


def fresh() -> str:
    """A new id, unpredictable and unique. Safe in threads (`list.pop` is atomic, with or without
    the GIL) and over a fork (the child forgets the pool, so it never repeats the parent's ids).
    """
    try:
        return _take()
    except IndexError:
        digits = os.urandom(_BLOCK * _HEX // 2).hex()
        block = [digits[at : at + _HEX] for at in range(0, _BLOCK * _HEX, _HEX)]
        mine = block.pop()
        _pool.extend(block)
        return mine


def _after_fork() -> None:
    _pool.clear()


in_each_child(_after_fork)
