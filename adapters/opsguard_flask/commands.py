"""``flask opsguard``: the commands of opsguard for this app."""

from __future__ import annotations

from typing import Any

from flask.cli import AppGroup

from opsguard import OpsGuard

__all__ = ["commands"]


def commands(ops: OpsGuard) -> AppGroup:
    """The group `opsguard`; what it consists of is loaded when it is asked for."""
    return _Commands(ops)


class _Commands(AppGroup):
    def __init__(self, ops: OpsGuard) -> None:
        super().__init__("opsguard", help="Operations of this app: what is limited, and how.")
        self._ops = ops

    def list_commands(self, ctx: object) -> list[str]:
        return ["limits"]

    def get_command(self, ctx: object, cmd_name: str) -> Any:
        return self._ops.limiter.commands() if cmd_name == "limits" else None
