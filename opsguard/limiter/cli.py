"""`opsguard limits`: what is limited, and why. Uses click, and rich for tables; both come with an
extra. Nothing here takes a token or connects to a store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from opsguard.clock import elapsed
from opsguard.exceptions import OpsGuardError, SettingsError
from opsguard.limiter.buckets import describe_key
from opsguard.limiter.explain import Coverage, Explanation, Route, describe, explain, match
from opsguard.limiter.limiter import Limiter
from opsguard.limiter.making import can_share, open_store
from opsguard.limiter.rules import Rule
from opsguard.marks import NO_MARKS

if TYPE_CHECKING:
    import click

    from opsguard.settings import Settings

__all__ = ["Inspected", "commands", "limiter_of"]

F = TypeVar("F", bound=Callable[..., Any])
_WIDTH = 110  # columns, where no terminal says how wide it is
_APP = "The app whose routes and decorators count too: module:attribute, or a factory's name."


@dataclass(frozen=True, slots=True)
class Inspected:
    """What the commands show: the limiter (None: it is off or has no policy), the routes of the app
    (None: not known), and the marked functions that no route carries.
    """

    settings: Settings
    limiter: Limiter | None
    routes: Sequence[Route] | None = None
    unrouted: Sequence[str] = ()


def limiter_of(settings: Settings) -> Limiter | None:
    """The limiter that these settings make, for looking at only; None where they switch it off.

    :raises SettingsError: for a strategy that the store cannot do.
    """
    options = settings.limiter
    if not options.enabled:
        return None

    def count(policy: str, outcome: str) -> Callable[[], None]:
        return _nothing

    def report(site: str, error: BaseException | None, *, then: str = "") -> None:
        return None

    try:
        store = open_store(options, full=_nothing, report=report, clock=elapsed)
        name = options.store.partition("://")[0]
        return Limiter(options, store, report=report, count=count, store_name=name)
    except ValueError as error:
        raise SettingsError(f"limiter: {error}") from None


def commands(inspect: Callable[[str], Inspected], *, app: bool = True) -> click.Group:
    """The command `limits` with its sub-commands.

    `inspect` gives what they show, for the app that was named ("": none was). `app`: one can be
    named.

    :raises ModuleNotFoundError: without click.
    """
    import click

    def named(command: F) -> F:
        if not app:
            return command
        return click.option("--app", default="", metavar="MODULE:ATTRIBUTE", help=_APP)(command)

    def inspected(asked: str) -> Inspected:
        try:
            return inspect(asked)
        except (OpsGuardError, ValueError) as error:
            click.echo(f"opsguard: {error}", err=True)
            raise SystemExit(1) from None

    @click.group()
    def limits() -> None:
        """Rate limits: which there are, and which apply to a request."""

    @limits.command()
    @named
    @click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
    def show(as_json: bool, app: str = "") -> None:
        """Show every policy in force, and with an app which of its routes are limited."""
        found = inspected(app)
        if as_json:
            click.echo(json.dumps(_overview(found), indent=2))
            return
        _print_overview(found, click.echo)

    @limits.command("explain")
    @click.argument("path")
    @click.option("--method", default="GET", show_default=True)
    @click.option(
        "--key", help="Whose bucket: an address, a key id, a tenant, as the policy has it."
    )
    @click.option("--tier", help="The tier of the request's API key.")
    @named
    @click.option("--json", "as_json", is_flag=True, help="One JSON array, for programs.")
    def explain_(
        path: str, method: str, key: str | None, tier: str | None, as_json: bool, app: str = ""
    ) -> None:
        """Say which policies apply to a request for PATH, and why."""
        found = inspected(app)
        lines = _explained(found, path, method.upper(), key, tier)
        if as_json:
            click.echo(json.dumps([asdict(line) for line in lines], indent=2))
            return
        if not lines:
            click.echo(_nothing_limited(found))
            return
        _print_table(
            ("stage", "policy", "rate", "strategy", "key", "store down", "why"),
            [_row_of(line) for line in lines],
        )
        for bucket in [bucket for line in lines for bucket in line.buckets]:
            click.echo(f"bucket {bucket}")
        if found.routes is None:
            click.echo("The routes are not known here, so neither are their decorators.")

    return limits


def _explained(
    found: Inspected, path: str, method: str, key: str | None, tier: str | None
) -> tuple[Explanation, ...]:
    if found.limiter is None:
        return ()
    route = match(found.routes or (), path, method)
    return explain(
        found.limiter,
        path,
        method,
        key=key,
        tier=tier,
        endpoint=None if route is None else route.endpoint,
        marks=NO_MARKS if route is None else route.marks,
    )


def _nothing_limited(found: Inspected) -> str:
    settings = found.settings
    if not settings.limiter.enabled:
        return (
            f"Nothing is limited: limiter.enabled is false ({settings.origin('limiter.enabled')})."
        )
    return "Nothing is limited: there are no policies, no decorators and no keys with tiers."


def _overview(found: Inspected) -> dict[str, object]:
    options = found.settings.limiter
    said: dict[str, object] = {
        "enabled": options.enabled,
        "shadow": options.shadow,
        "store": _store_name(found),
        "policies": [] if found.limiter is None else _policies(found.limiter),
    }
    if found.routes is not None:
        coverage = _coverage(found)
        said["routes"] = {
            name: [f"{one.method} {one.endpoint}" for one in getattr(coverage, name)]
            for name in ("limited", "exempt", "uncovered")
        }
        said["unrouted"] = list(found.unrouted)
    return said


def _policies(limiter: Limiter) -> list[dict[str, object]]:
    """Every policy; exempt paths are among them, in their place."""
    found: list[dict[str, object]] = [
        {"stage": "edge", "policy": path.pattern, "rate": "exempt"}
        if path.stage is None
        else _policy_of(path.stage.rules[0])
        for path in limiter.paths
    ]
    shown = {id(rule) for path in limiter.paths if path.stage for rule in path.stage.rules}
    return found + [_policy_of(rule) for rule in limiter.rules() if id(rule) not in shown]


def _policy_of(rule: Rule) -> dict[str, object]:
    return {
        "stage": rule.stage,
        "policy": rule.name,
        "rate": "; ".join(rate.text for rate in rule.policy.rates),
        "strategy": rule.strategy,
        "key": describe_key(rule.key),
        "on_store_error": rule.on_error,
        "shadow": rule.shadow,
        "methods": sorted(rule.policy.methods),
    }


def _store_name(found: Inspected) -> str:
    """The kind of store, without what its URL may hold. `auto` is none that a command could name:
    it depends on how many serve.
    """
    options = found.settings.limiter
    url = options.store if options.store != "auto" else options.redis_url or _auto()
    return url.partition("://")[0]


def _auto() -> str:
    return "auto" if can_share() else "local"


def _coverage(found: Inspected) -> Coverage:
    routes = tuple(found.routes or ())
    if found.limiter is None:
        return Coverage((), (), routes)
    return describe(found.limiter, routes)


def _print_overview(found: Inspected, say: Callable[[str], None]) -> None:
    # The rules of decorators are made when their routes are looked at.
    coverage = None if found.routes is None else _coverage(found)
    if found.limiter is None:
        say(_nothing_limited(found))
    else:
        mode = ", in shadow mode: nothing is refused" if found.settings.limiter.shadow else ""
        store = _store_name(found)
        which = " (local in one process, workers in several)" if store == "auto" else ""
        say(f"store {store}{which}{mode}")
        columns = ("stage", "policy", "rate", "strategy", "key", "store down")
        _print_table(columns, [_policy_row(one) for one in _policies(found.limiter)])
    if coverage is None:
        return
    say(str(coverage))
    kinds = ("limited", "exempt", "uncovered")
    routes = [
        (route.method, route.endpoint, kind) for kind in kinds for route in getattr(coverage, kind)
    ]
    if routes:
        _print_table(("method", "route", ""), routes)
    for name in found.unrouted:
        say(f"no route carries the marks of {name}")


def _policy_row(policy: dict[str, object]) -> tuple[str, ...]:
    name = str(policy["policy"])
    if methods := policy.get("methods"):
        name += f" ({', '.join(methods)})"  # type: ignore[arg-type]  # texts, see _policy_of
    rate = f"{policy['rate']}{' (shadow)' if policy.get('shadow') else ''}"
    rest = [str(policy.get(key, "-")) for key in ("strategy", "key", "on_store_error")]
    return (str(policy["stage"]), name, rate, *rest)


def _row_of(line: Explanation) -> tuple[str, ...]:
    rate = "; ".join(line.rates) + (" (shadow)" if line.shadow else "")
    row = (line.stage, line.policy, rate, line.strategy, line.key, line.on_store_error, line.why)
    return tuple(cell or "-" for cell in row)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _nothing() -> None:
    return None
