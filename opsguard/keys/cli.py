"""`opsguard keys`: what an operator does with keys. Uses click, which comes with an extra."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from opsguard.exceptions import OpsGuardError
from opsguard.keys.audit import LOGGER
from opsguard.keys.manager import Keys

if TYPE_CHECKING:
    import click

    from opsguard.keys.identity import KeyRecord

__all__ = ["commands"]

_SPAN = re.compile(r"(\d{1,6})([smhdw])")
_WIDTH = 160  # columns, where neither a terminal nor COLUMNS says how wide it is
_HEADS = {"key_id": "id", "tenant_id": "tenant", "last_used": "last used"}
_TIMES = ("created", "expires", "revoked", "last_used")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def commands(make: Callable[[], Keys], audit: Callable[[], logging.Handler]) -> click.Group:
    """The command `keys` with its sub-commands; `make` gives the keys they work on, and `audit`
    what writes the audit lines of a command.

    :raises ModuleNotFoundError: without click.
    """
    import click

    def span(text: str) -> timedelta:
        found = _SPAN.fullmatch(text)
        if found is None:
            raise click.BadParameter("must be a number with s, m, h, d or w, as in 90d")
        return timedelta(**{_UNITS[found[2]]: int(found[1])})

    @contextmanager
    def keys_at_work() -> Generator[Keys]:
        try:
            found = make()
            with closing(found), _heard_by(audit()):
                yield found
        except (OpsGuardError, ValueError) as error:
            click.echo(f"opsguard: {error}", err=True)
            raise SystemExit(1) from None

    @click.group()
    def keys() -> None:
        """API keys: create, list, revoke, rotate."""

    @keys.command()
    @click.option("--tenant", required=True, help="Whose key it is.")
    @click.option("--tier", default="free", show_default=True)
    @click.option("--name", default="", help="What its owner calls it.")
    @click.option("--scope", "scopes", multiple=True, help="What it may do; may be repeated.")
    @click.option("--expires", type=span, help="When it ends, from now: 90d, 12h.")
    def create(
        tenant: str, tier: str, name: str, scopes: tuple[str, ...], expires: timedelta | None
    ) -> None:
        """Make a key and print it, this once."""
        with keys_at_work() as found:
            click.echo(found.create(tenant, tier, name, scopes=scopes, expires=expires))
            click.echo("Keep it now: only its hash was stored.", err=True)

    @keys.command("list")
    @click.option("--json", "as_json", is_flag=True, help="One JSON array, for programs.")
    def list_(as_json: bool) -> None:
        """Show every key, without its secret."""
        with keys_at_work() as found:
            rows = [_row(record) for record in found.list()]
        if as_json:
            click.echo(json.dumps(rows, indent=2))
            return
        if rows:
            _print_table(rows)
        else:
            click.echo("There are no keys yet.", err=True)

    @keys.command()
    @click.argument("key_id")
    def revoke(key_id: str) -> None:
        """End the key of this id."""
        with keys_at_work() as found:
            found.revoke(key_id)
            click.echo(f"{key_id} is revoked.", err=True)

    @keys.command()
    @click.argument("key_id")
    @click.option(
        "--overlap",
        type=span,
        default="24h",
        show_default=True,
        help="For how long the old key goes on working.",
    )
    def rotate(key_id: str, overlap: timedelta) -> None:
        """Replace the key of this id by a new one, and print that."""
        with keys_at_work() as found:
            click.echo(found.rotate(key_id, overlap))
            click.echo("Keep it now: only its hash was stored.", err=True)

    @keys.command("hash")
    def hash_() -> None:
        """Print the hash of a key of your own for keys.static; the key is asked for."""
        with keys_at_work() as found:
            click.echo(found.hash(click.prompt("Key", hide_input=True, err=True)))

    return keys


@contextmanager
def _heard_by(handler: logging.Handler) -> Generator[None]:
    """Audit lines go to `handler` meanwhile."""
    logger = logging.getLogger(LOGGER)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _print_table(
    rows: Sequence[Mapping[str, object]], environ: Mapping[str, str] = os.environ
) -> None:
    """A column for each thing that any key has. Where it does not fit, cells are folded and never
    cut; an id, which is there to be copied, stays whole.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in environ:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in shown:
        table.add_column(_HEADS.get(name, name), no_wrap=name == "key_id", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(name, row[name])) for name in shown))
    console.print(table)


def _cell(name: str, value: object) -> str:
    if name in _TIMES and isinstance(value, str):
        return value[:16].replace("T", " ")  # UTC, to the minute; --json has the seconds
    if isinstance(value, list):
        return ", ".join(value)
    return str(value or "-")


def _row(record: KeyRecord) -> dict[str, object]:
    return {
        "key_id": record.key_id,
        "tier": record.tier,
        "tenant_id": record.tenant_id,
        "name": record.name,
        "scopes": list(record.scopes),
        "created": _date(record.created),
        "expires": _date(record.expires),
        "revoked": _date(record.revoked),
        "last_used": _date(record.last_used),
    }


def _date(at: float | None) -> str | None:
    return None if at is None else datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
