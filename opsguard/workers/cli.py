"""`opsguard loggers`: log levels of a service that runs here. Uses click, from an extra."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from opsguard.clock import wall
from opsguard.exceptions import OpsGuardError
from opsguard.workers.board import Board

if TYPE_CHECKING:
    import click

__all__ = ["commands"]

_MINUTES = 15.0


def commands(
    folders: Callable[[str], list[Path]], level_of_name: Callable[[str], str]
) -> click.Group:
    """The command `loggers` with its sub-commands.

    `folders` gives those of the running groups of a service ("": the one of the settings here), and
    `level_of_name` the name of a level, or raises ValueError.

    :raises ModuleNotFoundError: without click.
    """
    import click

    def boards(service: str) -> list[tuple[str, Board]]:
        try:
            found = folders(service)
        except OpsGuardError as error:
            raise click.ClickException(str(error)) from None
        if not found:
            raise click.ClickException(
                "no such service runs here under this user; --service says which one is meant"
            )
        return [(str(folder), _board(folder)) for folder in found]

    named = click.option("--service", default="", help="By default that of the settings here.")

    @click.group(invoke_without_command=True)
    @named
    @click.pass_context
    def loggers(context: click.Context, service: str) -> None:
        """Log levels of a service that runs here: show, set and reset them in all its workers."""
        if context.invoked_subcommand is None:
            for folder, board in boards(service):
                click.echo(folder)
                for name, level in sorted(board.levels.items()):
                    click.echo(f"  {name or 'root'}  {level}")

    def tell(service: str, name: str, level: str | None, until: float | None) -> None:
        logger = "" if name == "root" else name
        told = [board.set_level(logger, level, until) for _, board in boards(service)]
        if not all(told):
            raise click.ClickException("the workers' board could not be written")
        click.echo(f"{name}: {level or 'its own level'} within about a second")

    @loggers.command("set")
    @click.argument("name")
    @click.argument("level")
    @click.option("--minutes", type=float, default=_MINUTES, show_default=True)
    @named
    def set_level(name: str, level: str, minutes: float, service: str) -> None:
        """Give the logger NAME (root: the root logger) a LEVEL for some minutes."""
        try:
            known = level_of_name(level)
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        tell(service, name, known, wall() + 60.0 * minutes)

    @loggers.command()
    @click.argument("name")
    @named
    def reset(name: str, service: str) -> None:
        """Give the logger NAME its own level again."""
        tell(service, name, None, None)

    return loggers


def _board(folder: Path) -> Board:
    board = Board(lambda: folder, lambda site, error: None, lambda levels: None)
    board.refresh()
    return board
