"""What is called for each request, without a frame of Python that only calls on.

`Front` holds in `_serve` what serves now. A class below it defines `__call__` as a call of that and
is marked `straight`: with the accelerator a call of its instances goes to `_serve` at once. Its
`__call__` stays what servers look at to learn the protocol, what classes below it override and
call, and the path without the accelerator. One that is put in its place later, as tracing libraries
do, is what is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from opsguard.accelerator import speed

__all__ = ["Front", "straight"]

C = TypeVar("C", bound=type["Front"])


if TYPE_CHECKING or speed is None:

    class Front:
        """Where `_serve` is; the accelerator has a type of this name."""

        __slots__ = ("_serve",)

        _serve: Callable[..., Any]

    def straight(cls: C) -> C:
        """Mark a class whose `__call__` says nothing but ``return self._serve(...)``."""
        return cls

else:
    Front, straight = speed.Front, speed.straight
