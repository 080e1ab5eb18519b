"""The `opsguard` command. It is made when it is called: click and rich come with an extra."""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from opsguard import OpsGuard, SettingsError, __version__
from opsguard.inspection import inspected
from opsguard.logging import JsonFormatter
from opsguard.settings import Settings, options
from opsguard.workers import living

if TYPE_CHECKING:
    import click

    from opsguard.keys import Keys
    from opsguard.limiter.cli import Inspected

__all__ = [
    "audit_handler",
    "command",
    "folders_in_use",
    "guard_of",
    "keys_in_force",
    "limits_in_force",
    "main",
]

EXTRA = "the extra opsguard-toolkit[{0}] has it; in a checkout: python -m pip install '.[{0}]'"
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
        print(f"opsguard: {lacking} is not installed: {EXTRA.format('cli')}", file=sys.stderr)
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
    from opsguard.keys.cli import commands as keys_commands
    from opsguard.limiter.cli import commands as limits_commands
    from opsguard.logging import level_of_name
    from opsguard.workers.cli import commands as loggers_commands

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
        """Operations for Python web apps: metrics, logs, request ids, rate limits, API keys."""

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
            print(
                f"opsguard: {', '.join(lacking)} is not installed: {EXTRA.format('demo')}",
                file=sys.stderr,
            )
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
            print(
                json.dumps({"settings": rows, "warnings": settings.warnings}, indent=2, default=str)
            )
            return
        table = Table("setting", "value", "from", box=None, pad_edge=False)
        for key, row in rows.items():
            value = row["value"]
            text = value if isinstance(value, str) and value else json.dumps(value, default=str)
            table.add_row(key, Text(text), str(row["origin"]))
        console().print(table)

    opsguard.add_command(keys_commands(keys_in_force, audit_handler))
    opsguard.add_command(limits_commands(limits_in_force))
    opsguard.add_command(loggers_commands(folders_in_use, level_of_name))
    return opsguard


def keys_in_force() -> Keys:
    """The API keys by the settings in force here.

    :raises SettingsError: for wrong settings.
    """
    from opsguard.keys import Keys

    settings = Settings.load({}).with_service()
    audit = {"who": _operator(), "how": "cli"}
    return Keys(lambda: settings, report=_pass_over, audit=audit)


def audit_handler() -> logging.Handler:
    """Where a command leaves its audit lines: in the file of `logging.file`, else on standard
    error, as standard output is for what was asked for. In the form of the service's own lines.

    :raises SettingsError: for wrong settings.
    """
    settings = Settings.load({}).with_service()
    handler: logging.Handler = logging.StreamHandler(sys.stderr)
    if settings.logging.file is not None:
        try:
            handler = logging.FileHandler(settings.logging.file, encoding="utf-8")
        except OSError as error:  # an event without a line would be worse than a line elsewhere
            print(f"opsguard: logging.file: {error}: audit lines go here", file=sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            service=settings.service,
            environment=settings.environment,
            names=settings.logging.names,
            nest_context=settings.logging.nest_context,
        )
    )
    return handler


def _operator() -> str:
    """The name of the system's user; not by environment variables, which anybody can set."""
    try:
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name
    except ImportError:  # Windows
        return getpass.getuser()
    except KeyError:  # a container's user without a name
        return f"uid {os.getuid()}"


def limits_in_force(app: str = "") -> Inspected:
    """What is limited by the settings in force here, or in the app of this name
    (`module:attribute`).

    :raises SettingsError: for wrong settings.
    :raises ValueError: for an app that cannot be found, or has no OpsGuard.
    """
    from opsguard.limiter.cli import Inspected, limiter_of

    if app:
        return inspected(guard_of(app))
    settings = Settings.load({}).with_service()
    return Inspected(settings, limiter_of(settings))


def folders_in_use(service: str = "") -> list[Path]:
    """Where the workers of this service, by default that of the settings here, meet now.

    :raises SettingsError: for wrong settings.
    """
    settings = Settings.load({}).with_service()
    return living(settings.metrics.directory, service or settings.service)


def guard_of(app: str) -> OpsGuard:
    """The OpsGuard of the app of this name, which is imported with the working folder on the path,
    as servers do. It names the app, the OpsGuard itself, or a function that makes one of them.

    :raises ValueError: if there is none.
    """
    module, _, attribute = app.partition(":")
    if "" not in map(str.strip, (module, attribute)):
        sys.path.insert(0, "")
        try:
            found = functools.reduce(getattr, attribute.split("."), import_module(module))
        except (ImportError, AttributeError) as error:
            raise ValueError(f"{app}: {error}") from error
        guard = _guard_in(found)
        if guard is None and callable(found):
            guard = _guard_in(found())
        if guard is not None:
            return guard
        raise ValueError(f"{app}: no OpsGuard is installed on it")
    raise ValueError(f"an app is named like module:attribute, not {app!r}")


def _guard_in(app: Any) -> OpsGuard | None:
    """Where the adapters keep it."""
    places = (
        app,
        getattr(app, "ops", None),
        getattr(getattr(app, "state", None), "opsguard", None),
        (getattr(app, "extensions", None) or {}).get("opsguard"),
    )
    return next((place for place in places if isinstance(place, OpsGuard)), None)


def _pass_over(site: str, error: BaseException | None) -> None:
    """Whoever types a command is told by its error."""


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
