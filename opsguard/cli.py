"""The `opsguard` command. It is made when it is called: click and rich come with an extra."""

from __future__ import annotations

import functools
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from opsguard import SettingsError, __version__
from opsguard.settings import Settings, options

if TYPE_CHECKING:
    import click

__all__ = ["command", "main"]

EXTRA = "the extra opsguard-toolkit[demo] has it; in a checkout: python -m pip install '.[demo]'"
MASK = "***"
_WIDTH = 110  # columns, where no terminal says how wide it is


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command with `arguments`, by default those of the process, and exit."""
    try:
        group = command()
    except ModuleNotFoundError as error:
        lacking = (error.name or "").partition(".")[0]
        if lacking not in ("click", "rich"):
            raise
        print(f"opsguard: {lacking} is not installed: {EXTRA}", file=sys.stderr)
        sys.exit(2)
    group.main(args=None if arguments is None else list(arguments), prog_name="opsguard")
    raise AssertionError("click ends the process by itself")


def command() -> click.Group:
    """The command with its subcommands.

    :raises ModuleNotFoundError: without click or rich.
    """
    import click
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from opsguard.demo import FRAMEWORKS, missing, run

    def console() -> Console:
        found = Console(highlight=False)
        return found if found.is_terminal else Console(highlight=False, width=_WIDTH)

    @click.group(context_settings={"help_option_names": ["-h", "--help"]})
    @click.version_option(
        __version__,
        prog_name="opsguard",
        message=f"%(prog)s %(version)s (Python {platform.python_version()})",
    )
    def opsguard() -> None:
        """Operations for Python web apps: metrics, request ids, access logs."""

    @opsguard.command()
    @click.option(
        "--framework",
        type=click.Choice(list(FRAMEWORKS)),
        default="fastapi",
        show_default=True,
        help="What the demo's shop is written in.",
    )
    @click.option(
        "--port",
        type=click.IntRange(0, 65535),
        default=0,
        help="Where it listens on 127.0.0.1; by default a free port.",
    )
    @click.option("--once", is_flag=True, help="End by itself; exit 0 only if all was right.")
    def demo(framework: str, port: int, once: bool) -> None:
        """Start a real service, send it real traffic, show what came out.

        It stays up until Ctrl-C, unless --once is given.
        """
        lacking = missing(framework)
        if lacking:
            print(f"opsguard: {', '.join(lacking)} is not installed: {EXTRA}", file=sys.stderr)
            sys.exit(2)
        try:
            sys.exit(run(framework, console(), port=port, once=once))
        except KeyboardInterrupt:
            sys.exit(130)

    @opsguard.command()
    @click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
    def config(as_json: bool) -> None:
        """Show every setting in force here: its value and where that came from.

        Keywords that an app gives to OpsGuard(...) are not known here.
        """
        try:
            settings = Settings.load({}).with_service()
        except SettingsError as error:
            print(f"opsguard: {error}", file=sys.stderr)
            sys.exit(1)
        rows = settings_in_force(settings)
        if as_json:
            print(json.dumps({"settings": rows, "warnings": settings.warnings}, indent=2))
            return
        table = Table("setting", "value", "from", box=None, pad_edge=False)
        for key, row in rows.items():
            value = row["value"]
            text = value if isinstance(value, str) and value else json.dumps(value)
            table.add_row(key, Text(text), str(row["origin"]))
        console().print(table)

    return opsguard


def settings_in_force(settings: Settings) -> Mapping[str, Mapping[str, object]]:
    """Every option by its dotted key: its value, masked if it is a secret, its origin, and the
    environment variables that would change it.
    """
    return {
        key: {
            "value": MASK if option.secret else functools.reduce(getattr, key.split("."), settings),
            "origin": settings.origin(key),
            "variables": option.variables,
        }
        for key, option in options().items()
    }


if __name__ == "__main__":
    main()
