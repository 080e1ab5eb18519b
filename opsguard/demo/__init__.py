"""`opsguard demo`: a real service, real traffic, and what came out.

- `apps` has the service, once for each framework; `shop` is what they share.
- `server` runs it in a child process, `traffic` and `client` are its customers.
- `scrape` reads its metrics and its log, `checks` compares them with what was sent.
- `overhead` measures, `report` shows, `play` does one after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsguard.demo.server import FRAMEWORKS, missing

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FRAMEWORKS", "missing", "run"]


def run(framework: str, console: Console, *, port: int = 0, once: bool = False) -> int:
    """Run the demo and return its exit status, as `play.play` does.

    What shows it is imported here: the shop's own process has no use for it.
    """
    from opsguard.demo.play import play

    return play(framework, console, port=port, once=once)
