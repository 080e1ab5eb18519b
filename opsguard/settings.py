"""Every option: its type, its default, its environment names, and one clear error.

A group is a frozen dataclass, an option is a field of it with its default; the type, made
stricter by the `Annotated` validators below, is what pydantic checks. To add an option, add a
field; to add a group, add a class and a field of :class:`Settings`. The environment names, the
keywords, the file keys, the error texts and the suggestions follow from that.

The first source that says an option wins, and wins it whole (mappings are not merged):

1. the environment: `OPSGUARD_METRICS__PATH`, else a plain name such as `LOG_LEVEL`;
2. the keywords of `OpsGuard(...)`;
3. `.env` in the working directory, in development only;
4. `opsguard.toml` in the working directory, else `[tool.opsguard]` in `pyproject.toml`;
5. the default.

The environment beats the code because it is what an operator can change at night. The sources
are read here rather than by pydantic-settings' own, which can tell neither where a value came
from nor a service variable of Kubernetes from one of ours.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import logging as std_logging
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from importlib import metadata
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from opsguard.addresses import MAX_ENTRIES, network
from opsguard.exceptions import SettingsError
from opsguard.patterns import check as check_pattern
from opsguard.policies import KEYS, Policy, policy_from
from opsguard.rates import OnStoreError, Strategy

__all__ = [
    "HTTP_LABEL_NAMES",
    "HTTP_METRIC_NAMES",
    "LOG_FIELD_NAMES",
    "Group",
    "Ids",
    "Keys",
    "Limiter",
    "Logging",
    "Metrics",
    "Option",
    "Provenance",
    "Proxies",
    "Settings",
    "StaticKey",
    "options",
]

HTTP_METRIC_NAMES = (
    "http_requests_total",
    "http_request_duration_seconds",
    "http_request_first_byte_seconds",
    "http_requests_in_progress",
    "service_info",
    "http_errors_total",
    "http_request_size_bytes",
    "http_response_size_bytes",
    "websocket_connections_in_progress",
    "websocket_connections_total",
)
"""What `metrics.names` can rename: the names as they are before `metrics.prefix` is applied."""

HTTP_LABEL_NAMES = ("method", "endpoint", "status", "error_type")
"""What `metrics.labels` can rename."""

LOG_FIELD_NAMES = (
    *("timestamp", "level", "logger", "message", "service", "environment"),
    *("request_id", "correlation_id", "tenant_id", "trace_id", "span_id", "context", "exception"),
    *("method", "path", "endpoint", "status_code", "duration_ms", "size", "client"),
)
"""The keys of a log line that are ours; `logging.names` can rename these and a user's own."""

# ---------------------------------------------------------------------------
# Checks. Each takes a value of any source and is idempotent: `Settings.merged`
# checks values again that have passed before.


def _list_from_text(value: object) -> object:
    """`a,b` or a JSON array as a list; empty pieces are dropped. Other values pass through."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return _pieces(value)


def _pieces(text: str) -> list[str]:
    return [piece for piece in map(str.strip, text.split(",")) if piece]


def _mapping_from_text(value: object) -> object:
    """`a=b,c=d` or a JSON object as a dict. Other values pass through."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value)
    found: dict[str, str] = {}
    for piece in _pieces(value):
        name, separator, target = (part.strip() for part in piece.partition("="))
        if not separator:
            raise ValueError("must be a JSON object or name=value pairs with commas between them")
        if name in found:
            raise ValueError(f"must not name {name!r} twice")
        found[name] = target
    return found


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be valid JSON as it begins like JSON ({error})") from None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable text: no line breaks, control or surrogate characters")
    return text.strip()


def _environment(text: str) -> str:
    text = _printable(text).lower()
    if not text:
        raise ValueError("must not be empty: 'production', 'development' or a name of your own")
    return text


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def _header(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise ValueError("must be a header name (RFC 9110: letters, digits and !#$%&'*+-.^_`|~)")
    return name


def _optional_header(name: str) -> str:
    return _header(name) if name else name


def _network(text: str) -> str:
    try:
        return str(network(text))
    except ValueError as error:
        raise ValueError(f"must be an address or a network like '10.0.0.0/8' ({error})") from None


def _path(path: str) -> str:
    if not path.startswith("/"):
        raise ValueError("must start with '/'")
    if not path.isascii() or not path.isprintable() or set(path) & set(" ?#"):
        raise ValueError("must be a plain path: printable ASCII without spaces, '?' and '#'")
    return path


_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_RESERVED_LABELS = ("le", "quantile")


def _metric_name(name: str) -> str:
    if not _METRIC_NAME.fullmatch(name):
        raise ValueError(
            "must be a Prometheus metric name: letters, digits, '_' and ':', not a digit first"
        )
    return name


def _label_name(name: str) -> str:
    if not _LABEL_NAME.fullmatch(name) or name.startswith("__"):
        raise ValueError(
            "must be a Prometheus label name: letters, digits and '_', not a digit or '__' first"
        )
    if name in _RESERVED_LABELS:
        raise ValueError(f"must not be {name!r}: Prometheus uses that label itself")
    return name


def _renames_of(
    known: tuple[str, ...], *, others: bool = False
) -> Callable[[dict[str, str]], dict[str, str]]:
    """A check that a mapping renames `known` names only, and gives no two the same name.

    With `others` it may rename names that are not known here as well.
    """

    def check(renames: dict[str, str]) -> dict[str, str]:
        for name in renames:
            if name not in known and not others:
                raise ValueError(
                    f"cannot rename {name}{_nearest(name, known)}; known are {', '.join(known)}"
                )
        taken: dict[str, str] = {}
        for name, target in ({name: name for name in known} | renames).items():
            if target in taken:
                raise ValueError(f"must not give {taken[target]} and {name} the name {target}")
            taken[target] = name
        return renames

    return check


def _field_name(name: str) -> str:
    if not name or not name.isprintable():
        raise ValueError("must be a name: printable text, not empty")
    return name


def _buckets(bounds: tuple[float, ...]) -> tuple[float, ...]:
    if bounds and math.isinf(bounds[-1]):  # prometheus_client's habit; ours is implied
        bounds = bounds[:-1]
    finite = bool(bounds) and all(map(math.isfinite, bounds))
    if not finite or bounds[0] <= 0 or any(b <= a for a, b in itertools.pairwise(bounds)):
        raise ValueError("must be seconds above 0, each more than the one before (+Inf is implied)")
    return bounds


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_LEVEL_ALIASES = {"WARN": "WARNING", "FATAL": "CRITICAL"} | {
    str(getattr(std_logging, level)): level for level in _LEVELS
}


def _level(value: object) -> object:
    """A level by name in any case or by its standard number, as its name."""
    text = str(value).strip().upper()
    level = _LEVEL_ALIASES.get(text, text)
    if level not in _LEVELS or not isinstance(value, str | int):
        raise ValueError(f"must be one of {', '.join(_LEVELS)}")
    return level


def _file(value: object) -> object:
    """A path as text; an empty text, which is what an empty variable gives, means none."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return None if value == "" else value


def _whole(value: object) -> object:
    """Refuse a bool, which Python counts among the numbers."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def _pattern(text: str) -> str:
    check_pattern(text)
    return text


_KEY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_KEY_HASH = re.compile(r"[0-9a-f]{64}")


def _key_part(text: str) -> str:
    if not _KEY_PART.fullmatch(text):
        raise ValueError("must be at most 32 letters, digits, '_' and '-', not '_' or '-' first")
    return text


def _key_hash(text: str) -> str:
    if text and not _KEY_HASH.fullmatch(text):
        raise ValueError("must be 64 hexadecimal digits, as `opsguard keys hash` prints them")
    return text


def _credential(text: str) -> str:
    if text and not re.fullmatch(r"[!-+\--~]{1,256}", text):
        raise ValueError("must be at most 256 ASCII characters without spaces and commas")
    return text


def _pepper(text: str) -> str:
    if text and len(text) < 16:
        raise ValueError("must have 16 characters or more: it is what makes the hashes secret")
    return text


def _master(text: str) -> str:
    if text and len(text) < 8:
        raise ValueError("must have 8 characters or more: it opens every door")
    return _credential(text)


def _policy(value: object) -> object:
    """A policy as people write it; an empty text, which an empty variable gives, is none."""
    return None if value is None or value == "" else policy_from(value)


def _policies(value: object) -> object:
    """A mapping of names to policies as people write them."""
    value = _mapping_from_text(value)
    if not isinstance(value, Mapping):
        return value
    found: dict[object, Policy] = {}
    for name, written in value.items():
        try:
            found[name] = policy_from(written).named(str(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def _paths(policies: dict[str, Policy]) -> dict[str, Policy]:
    for pattern in policies:
        check_pattern(pattern)
    return policies


def _tiers(policies: dict[str, Policy]) -> dict[str, Policy]:
    for name, policy in policies.items():
        if policy.exempt or policy.methods:
            raise ValueError(f"{name}: a tier has a rate, for all methods")
    return policies


def _default_policy(policy: Policy | None) -> Policy | None:
    if policy is not None and (policy.exempt or policy.methods):
        raise ValueError("must be a rate, for all methods")
    return policy


_STORES = ("auto", "local", "workers")


def _limiter_store(text: str) -> str:
    if text not in _STORES and "://" not in text:
        raise ValueError(f"must be one of {', '.join(_STORES)}, or a URL like redis://host:6379/0")
    return text


def _redis_url(text: str) -> str:
    if text and not text.startswith(_REDIS_SCHEMES):
        raise ValueError(
            f"must begin with one of {', '.join(_REDIS_SCHEMES)}; the URL of another store, say "
            "redis+cluster://, goes into limiter.store"
        )
    return text


_REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "valkey://", "valkeys://")


def _limit_key(text: str) -> str:
    if text not in KEYS:
        raise ValueError(f"must be one of {', '.join(KEYS)}")
    return text


Text = Annotated[str, AfterValidator(_printable)]
List = BeforeValidator(_list_from_text)
Renames = BeforeValidator(_mapping_from_text)
Whole = BeforeValidator(_whole)
File = Annotated[str | None, BeforeValidator(_file)]

# ---------------------------------------------------------------------------
# The model.


def _plain(*names: str) -> dict[str, tuple[str, ...]]:
    """Field metadata: environment names people already have, for want of an `OPSGUARD_` one."""
    return {"plain": names}


class Group:
    """A group of options; remembers which of them its maker gave.

    A group made by hand is a way to write keywords with completion and type checks. Its values
    are judged when :meth:`Settings.load` takes it, so that all errors come in one message.
    A secret is a field with `repr=False`: neither `repr` nor an error message shows it.
    Mappings in it are not copied on access: treat them as read-only.
    """

    _given: frozenset[str]

    def __new__(cls, **given: object) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_given", frozenset(given))
        return self


@dataclass(frozen=True, kw_only=True)
class Ids(Group):
    """Request ids: the two header names, and whether a client's own id is taken."""

    request_header: Annotated[str, AfterValidator(_header)] = "X-Request-ID"
    correlation_header: Annotated[str, AfterValidator(_optional_header)] = "X-Correlation-ID"
    """Empty turns the second header off."""
    answer_correlation: Literal["sent", "always"] = "sent"
    """Answer with the second header where the client sent it, or always."""
    trust_inbound: bool = True


@dataclass(frozen=True, kw_only=True)
class Proxies(Group):
    """Which proxies are believed about the client's address; see :mod:`opsguard.addresses`."""

    trusted: Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], List] = ()
    hops: Annotated[int, Whole, Field(ge=0, le=MAX_ENTRIES)] = 0


@dataclass(frozen=True, kw_only=True)
class Metrics(Group):
    """HTTP metrics: on or off, where they are read, and what they are called."""

    enabled: bool = field(default=True, metadata=_plain("ENABLE_METRICS"))
    path: Annotated[str, AfterValidator(_path)] = "/metrics"
    prefix: Annotated[str, AfterValidator(_metric_name)] = "http"
    names: Annotated[
        dict[str, Annotated[str, AfterValidator(_metric_name)]],
        Renames,
        AfterValidator(_renames_of(HTTP_METRIC_NAMES)),
    ] = field(default_factory=dict, hash=False)
    labels: Annotated[
        dict[str, Annotated[str, AfterValidator(_label_name)]],
        Renames,
        AfterValidator(_renames_of(HTTP_LABEL_NAMES)),
    ] = field(default_factory=dict, hash=False)
    buckets: Annotated[tuple[float, ...], List, AfterValidator(_buckets)] = (
        0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    )  # fmt: skip
    """Upper bounds in seconds; +Inf is implied."""
    max_series: Annotated[int, Whole, Field(ge=1, le=1_000_000)] = 2000
    """Label sets per metric; the next ones share one overflow series."""
    adopt: bool = True
    """Keep the app's own metrics of prometheus_client beside ours, right across workers."""
    schema: Literal["prometheus", "otel"] = "prometheus"
    directory: File = None
    """Where the workers keep their numbers; None means that a place is found."""
    protected: bool = False


@dataclass(frozen=True, kw_only=True)
class Logging(Group):
    """Log lines: level, form, place, and how much of the access log is written."""

    level: Annotated[str, BeforeValidator(_level)] = field(
        default="INFO", metadata=_plain("LOG_LEVEL")
    )
    format: Literal["auto", "json", "console"] = "auto"
    file: File = None
    names: Annotated[
        dict[str, Annotated[str, AfterValidator(_field_name)]],
        Renames,
        AfterValidator(_renames_of(LOG_FIELD_NAMES, others=True)),
    ] = field(default_factory=dict, hash=False)
    nest_context: bool = False
    access: Literal["all", "errors", "off"] = "all"
    durability: Literal["batch", "line"] = "batch"


_TIERS: dict[str, Policy] = {
    name: policy_from(rate).named(name)
    for name, rate in (
        ("free", "100/minute"),
        ("pro", "1000/minute"),
        ("enterprise", "10000/minute"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Limiter(Group):
    """Rate limits: how much from whom, and where it is counted; see :mod:`opsguard.policies`."""

    enabled: bool = field(
        default=True, metadata=_plain("RATELIMIT_ENABLED", "ENABLE_RATE_LIMITING")
    )
    store: Annotated[Text, AfterValidator(_limiter_store)] = field(default="auto", repr=False)
    """`auto` (Redis if `redis_url` is set, else `workers` in a group of workers, else `local`),
    one of these, or the URL of a store, which may hold a password."""
    redis_url: Annotated[Text, AfterValidator(_redis_url)] = field(
        default="", repr=False, metadata=_plain("REDIS_URL")
    )
    """Also from REDIS_HOST and REDIS_PORT."""
    strategy: Strategy = "sliding"
    key: Annotated[str, AfterValidator(_limit_key)] = "address"
    """Whose bucket, where a policy does not say; tiers go by API key."""
    default: Annotated[Policy | None, BeforeValidator(_policy), AfterValidator(_default_policy)] = (
        None
    )
    policies: Annotated[dict[str, Policy], BeforeValidator(_policies), AfterValidator(_paths)] = (
        field(default_factory=dict, hash=False)
    )
    """By path pattern; the first that matches counts."""
    tiers: Annotated[dict[str, Policy], BeforeValidator(_policies), AfterValidator(_tiers)] = field(
        default_factory=lambda: dict(_TIERS), hash=False
    )
    on_store_error: OnStoreError = "local"
    timeout: Annotated[float, Field(gt=0, le=5)] = 0.025
    """Seconds that a decision may take in a remote store, and that one waits for another worker."""
    lease: Annotated[int, Whole, Field(ge=1, le=1_000_000)] = 1
    """Tokens that a worker takes from a remote store at once."""
    max_keys: Annotated[int, Whole, Field(ge=1, le=100_000_000)] = 100_000
    """Buckets of the store in the process, and of the table that workers share."""
    shadow: bool = False
    """Count what would be refused, and refuse nothing."""
    error: Text = "rate_limit_exceeded"
    message: Text = "Rate limit exceeded: {rate}"
    """Of the answer 429; `{rate}` stands for the rate that was exceeded."""


@dataclass(frozen=True, slots=True)
class StaticKey:
    """An API key that stands in the settings: its HMAC as `opsguard keys hash` prints it, or in
    development the key itself.
    """

    hash: Annotated[str, AfterValidator(_key_hash)] = field(default="", repr=False)
    key: Annotated[str, AfterValidator(_credential)] = field(default="", repr=False)
    tenant_id: Text = ""
    tier: Annotated[str, AfterValidator(_key_part)] = "free"
    scopes: Annotated[tuple[Text, ...], List] = ()
    expires: datetime | None = None
    """Without an offset it is UTC."""


@dataclass(frozen=True, kw_only=True)
class Keys(Group):
    """API keys: where one is needed, where they are kept, and what makes them ours."""

    required: Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], List] = ()
    public: Annotated[tuple[Annotated[str, AfterValidator(_pattern)], ...], List] = ()
    """Exceptions from `required`: of two patterns the narrower counts, of equals `required`."""
    header: Annotated[str, AfterValidator(_header)] = "X-API-Key"
    store: Text = field(default="sqlite:///opsguard-keys.db", repr=False)
    """A database URL, which may hold a password. The file is made with the first key."""
    prefix: Annotated[str, AfterValidator(_key_part)] = "ops"
    pepper: Annotated[str, AfterValidator(_pepper)] = field(default="", repr=False)
    """The secret of the HMACs that are stored; must be set outside development."""
    master: Annotated[str, AfterValidator(_master)] = field(
        default="", repr=False, metadata=_plain("MASTER_API_KEY")
    )
    demo: bool = True
    """The demo keys work, in development only."""
    static: Annotated[dict[str, StaticKey], Renames] = field(
        default_factory=dict, hash=False, repr=False
    )
    """Keys by name that need no database."""
    cache: Annotated[float, Field(ge=0, le=3600)] = 30.0
    """Seconds until another process sees that a key was revoked."""
    max_failures: Annotated[int, Whole, Field(ge=1, le=1_000_000)] = 30
    """Wrong credentials a minute from one address; after these none of its unknown ones is
    looked up.
    """


@dataclass(frozen=True, slots=True)
class Provenance:
    """What loading found out beside the values."""

    origins: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Where each option that is not at its default came from, by its dotted key."""
    warnings: tuple[str, ...] = ()
    folder: str = ""
    """The name of the working directory, the last resort for the service's name."""


@dataclass(frozen=True, kw_only=True)
class Settings(Group):
    """All options of one OpsGuard. Make it with :meth:`load`, which alone checks the values.

    Immutable and hashable, so it may be shared by threads and inherited over a fork.
    """

    service: Text = field(default="", metadata=_plain("OTEL_SERVICE_NAME"))
    """Empty until :meth:`with_service` fills it, if nobody said."""
    version: Text = ""
    """`git_sha` if nobody said."""
    environment: Annotated[str, AfterValidator(_environment)] = field(
        default="production", metadata=_plain("ENVIRONMENT")
    )
    git_sha: Text = field(default="", metadata=_plain("GIT_SHA"))
    ids: Ids = field(default_factory=Ids)
    proxies: Proxies = field(default_factory=Proxies)
    metrics: Metrics = field(default_factory=Metrics)
    logging: Logging = field(default_factory=Logging)
    limiter: Limiter = field(default_factory=Limiter)
    keys: Keys = field(default_factory=Keys)
    provenance: Provenance = field(default_factory=Provenance, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        keywords: Mapping[str, object],
        *,
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> Settings:
        """The settings from all sources; warnings are logged to the logger `opsguard`.

        `keywords` has the top-level options and the groups, each group as a mapping or as its
        typed model; None at the top level means not said. `environ` is the process
        environment if None, `directory` (of `.env` and `opsguard.toml`) the working directory.

        :raises SettingsError: for any number of wrong values, all in one message.
        """
        reading = _Reading()
        directory = _working_directory() if directory is None else directory
        code = reading.table(keywords, "keyword", reading.problems)
        shell = reading.variables(os.environ if environ is None else environ)
        toml = reading.toml(directory)
        said = toml | code | shell
        # What stands in .env cannot decide whether .env is read: a file forgotten in an image
        # would turn development on in production.
        if "environment" in said and _means_development(said["environment"].value):
            said = toml | reading.dotenv(directory) | code | shell
        settings = reading.settings(said)
        for warning in reading.warnings:
            std_logging.getLogger("opsguard").warning("%s", warning)
        provenance = Provenance(
            origins={key: one.origin for key, one in said.items()},
            warnings=tuple(reading.warnings),
            folder=directory.name if directory else "",
        )
        settings = dataclasses.replace(settings, provenance=provenance)
        if settings.git_sha and not settings.version:
            return settings._with("version", settings.git_sha, settings.origin("git_sha"))
        return settings

    @property
    def development(self) -> bool:
        """Whether this is a developer's machine; everywhere else the safe choices are taken."""
        return self.environment == "development"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd but no reason to stop, such as an unknown `OPSGUARD_` variable."""
        return self.provenance.warnings

    def origin(self, key: str) -> str:
        """Where the option `key` (`"metrics.path"`) got its value.

        One of `environment <VARIABLE>`, `keyword`, `.env`, `opsguard.toml`, `pyproject.toml`,
        `default`, `app` and `folder` (from :meth:`with_service`), `package` (the version of
        the installed distribution) and `override`.

        :raises KeyError: if there is no such option.
        """
        if key not in options():
            raise KeyError(f"no option {key!r}{_nearest(key, options())}")
        return self.provenance.origins.get(key, "default")

    def with_service(self, name: str | None = None, version: str | None = None) -> Settings:
        """The same with an empty service name and version filled in; what was said stays.

        `name` and `version` are what the app calls itself. Without a name the working folder's
        is taken, without a version that of an installed distribution with the service's name.
        """
        filled = self
        if not filled.service:
            if text := _clean(name):
                filled = filled._with("service", text, "app")
            elif text := _clean(self.provenance.folder):
                filled = filled._with("service", text, "folder")
            else:
                filled = filled._with("service", "unknown_service", "default")
        if not filled.version:
            if text := _clean(version):
                filled = filled._with("version", text, "app")
            elif text := _distribution_version(filled.service):
                filled = filled._with("version", text, "package")
        return filled

    def merged(self, overrides: Mapping[str, object]) -> Settings:
        """The same with `overrides`, in the form of the keywords, on top of everything.

        :raises SettingsError: for wrong values, all in one message.
        """
        reading = _Reading()
        said = reading.table(overrides, "override", reading.problems)
        current = {key: _Said(_value(self, key), self.origin(key), key) for key in options()}
        settings = reading.settings(current | said)
        origins = {**self.provenance.origins, **dict.fromkeys(said, "override")}
        return dataclasses.replace(
            settings, provenance=dataclasses.replace(self.provenance, origins=origins)
        )

    def _with(self, name: str, text: str, origin: str) -> Settings:
        origins = {**self.provenance.origins, name: origin}
        values: dict[str, Any] = {name: text}
        return dataclasses.replace(
            self, **values, provenance=dataclasses.replace(self.provenance, origins=origins)
        )


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its dotted key, its environment names (the first is ours), its default."""

    key: str
    variables: tuple[str, ...]
    default: object
    secret: bool


@cache
def options() -> Mapping[str, Option]:
    """Every option by its dotted key, in the order of the model."""
    found: dict[str, Option] = {}
    defaults = Settings()
    for holder, prefix in ((defaults, ""), *((getattr(defaults, g), g) for g in _groups())):
        for one in dataclasses.fields(holder):
            if one.name in _groups() or one.name == "provenance":
                continue
            variable = f"OPSGUARD_{prefix}__{one.name}" if prefix else f"OPSGUARD_{one.name}"
            key = f"{prefix}.{one.name}" if prefix else one.name
            found[key] = Option(
                key=key,
                variables=(variable.upper(), *one.metadata.get("plain", ())),
                default=getattr(holder, one.name),
                secret=not one.repr,
            )
    return found


@cache
def _groups() -> Mapping[str, type[Group]]:
    """The model of each group, by the group's name."""
    defaults = vars(Settings())
    return {name: type(value) for name, value in defaults.items() if isinstance(value, Group)}


@cache
def _adapter() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)


# ---------------------------------------------------------------------------
# The sources.


@dataclass(frozen=True, slots=True)
class _Said:
    """A value as a source gave it, and how to name that place to a person."""

    value: object
    origin: str
    place: str


_PLAIN_TEXTS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
}
"""Pydantic's error types in words for an operator."""


class _Reading:
    """One reading of the sources; collects what is wrong and what is odd."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def table(
        self, table: Mapping[str, object], origin: str, unknown: list[str]
    ) -> dict[str, _Said]:
        """What nested keywords or a TOML table say; unknown names are added to `unknown`."""
        found: dict[str, _Said] = {}
        for name, value in table.items():
            if value is None:
                continue
            if name not in _groups():
                self._take(found, str(name), value, origin, unknown)
                continue
            model = _groups()[name]
            if isinstance(value, model):
                value = {one: getattr(value, one) for one in value._given}
            if not isinstance(value, Mapping):
                self.problems.append(
                    f"{origin} {name}: {_shown(value)}: must be a mapping or a {model.__name__}"
                )
                continue
            for key, one in value.items():
                self._take(found, f"{name}.{key}", one, origin, unknown)
        return found

    def _take(
        self, found: dict[str, _Said], key: str, value: object, origin: str, unknown: list[str]
    ) -> None:
        if key in options():
            found[key] = _Said(value, origin, f"{origin} {key}")
        else:
            unknown.append(f"{origin} {key}: no such option{_nearest(key, _keys())}")

    def variables(self, environ: Mapping[str, str], file: str = "") -> dict[str, _Said]:
        """What environment variables say, or variables that stand in `file`."""

        def said(variable: str, value: object) -> _Said:
            return _Said(value, file or f"environment {variable}", f"{file} {variable}".strip())

        found: dict[str, _Said] = {}
        known = {variable for option in options().values() for variable in option.variables}
        known.add("OPSGUARD_PURE")  # read at import: see opsguard.accelerator
        for key, option in options().items():
            for variable in option.variables:
                text = environ.get(variable)
                if text is None or _injected(variable, text):
                    continue
                # An empty plain variable is nobody's wish; an empty one of ours may be.
                if text.strip() or variable == option.variables[0]:
                    found[key] = said(variable, text.strip())
                    break
        for variable, text in environ.items():
            ours = variable.upper().startswith("OPSGUARD_")
            if ours and variable not in known and not _injected(variable, text):
                near = _nearest(variable.upper(), known)
                self.warnings.append(
                    f"{said(variable, text).place}: no such option, passed over{near}"
                )
        self._redis(environ, said, found)
        self._development(said("DEV_MODE", environ.get("DEV_MODE", "").strip()), found)
        return found

    def _redis(
        self,
        environ: Mapping[str, str],
        said: Callable[[str, object], _Said],
        found: dict[str, _Said],
    ) -> None:
        """REDIS_HOST and REDIS_PORT name a server, if nobody gave its URL."""
        host, port = (environ.get(name, "").strip() for name in ("REDIS_HOST", "REDIS_PORT"))
        if not host or "limiter.redis_url" in found:
            return
        if _injected("REDIS_PORT", port):
            port = ""
        if port and not (port.isascii() and port.isdigit() and int(port) < 65536):
            place = said("REDIS_PORT", port).place
            self.problems.append(f"{place}: {_shown(port)}: must be a port number")
            return
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        url = f"redis://{name}:{port or 6379}/0"
        found["limiter.redis_url"] = said("REDIS_HOST", url)

    def _development(self, mode: _Said, found: dict[str, _Said]) -> None:
        """`DEV_MODE=true` means development; it cannot stand beside another environment."""
        if not mode.value:
            return
        try:
            if not TypeAdapter(bool).validate_python(mode.value):
                return
        except ValidationError:
            self.problems.append(f"{mode.place}: {_shown(mode.value)}: must be true or false")
            return
        other = found.get("environment")
        if other is None:
            found["environment"] = dataclasses.replace(mode, value="development")
        elif not _means_development(other.value):
            self.problems.append(
                f"{mode.place}: {_shown(mode.value)}: means development, but {other.place} says "
                f"{_shown(other.value)}: set one of the two"
            )

    def dotenv(self, directory: Path | None) -> dict[str, _Said]:
        """What `.env` says. `${NAME}` in it is not expanded."""
        text = self._text(directory, ".env")
        if text is None:
            return {}
        from dotenv import dotenv_values  # production never needs it

        pairs = dotenv_values(stream=StringIO(text), interpolate=False)
        environ = {name: value for name, value in pairs.items() if value is not None}
        found = self.variables(environ, ".env")
        environment = found.pop("environment", None)
        if environment is not None and not _means_development(environment.value):
            self.warnings.append(
                f"{environment.place}: passed over, as the environment must be known "
                "before this file is read"
            )
        return found

    def toml(self, directory: Path | None) -> dict[str, _Said]:
        """What `opsguard.toml` says, or if there is none, `[tool.opsguard]`.

        An unknown name in it is a warning: the file may be mounted apart from the code, and
        an older version of the code must start with it.
        """
        name = "opsguard.toml"
        text = self._text(directory, name)
        if text is None:
            name = "pyproject.toml"
            text = self._text(directory, name)
            if text is None or "opsguard" not in text:  # most of them; no need to parse it
                return {}
        try:
            table: object = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            self.problems.append(f"{name}: is not valid TOML: {error}")
            return {}
        if name == "pyproject.toml":
            for part in ("tool", "opsguard"):
                table = table.get(part, {}) if isinstance(table, dict) else {}
        return self.table(table, name, self.warnings) if isinstance(table, dict) else {}

    def _text(self, directory: Path | None, name: str) -> str | None:
        if directory is None:
            return None
        try:
            return (directory / name).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None  # a directory called .env is somebody's virtual environment
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{name}: cannot be read: {error}")
            return None

    def settings(self, said: Mapping[str, _Said]) -> Settings:
        """The checked settings; raises one SettingsError for all problems there are."""
        nested: dict[str, Any] = {}
        for key, one in said.items():
            group, _, name = key.rpartition(".")
            (nested.setdefault(group, {}) if group else nested)[name] = one.value
        try:
            settings = _adapter().validate_python(nested)
        except ValidationError as error:
            for detail in error.errors(include_url=False, include_context=False):
                parts = detail["loc"][: 2 if detail["loc"][0] in _groups() else 1]
                key = ".".join(map(str, parts))
                shown = "***" if options()[key].secret else _shown(detail["input"])
                text = _PLAIN_TEXTS.get(detail["type"]) or (
                    detail["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
                )
                self.problems.append(f"{said[key].place}: {shown}: {text}")
            raise self._error() from None
        self._contradictions(settings, said)
        if self.problems:
            raise self._error()
        # Made again from all their values, so that a loaded group used as a keyword counts whole.
        groups: dict[str, Any] = {
            name: dataclasses.replace(getattr(settings, name)) for name in _groups()
        }
        return dataclasses.replace(settings, **groups)

    def _error(self) -> SettingsError:
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        return SettingsError(f"wrong settings, nothing was started:\n{lines}")

    def _contradictions(self, settings: Settings, said: Mapping[str, _Said]) -> None:
        if settings.proxies.trusted and settings.proxies.hops:
            self.problems.append(
                f"{said['proxies.trusted'].place} and {said['proxies.hops'].place}: "
                "must not both be set, as they can name different clients"
            )


# What Kubernetes puts into a container for each service of the namespace; a service called
# `opsguard` or `opsguard-…` gives names in our own room.
_SERVICE_VARIABLE = re.compile(
    r"[A-Z0-9_]+_(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://")


def _injected(variable: str, text: str) -> bool:
    """Whether a variable is Kubernetes' description of a service rather than a setting."""
    if variable.endswith("_PORT") and _SERVICE_ADDRESS.match(text):
        return True
    return _SERVICE_VARIABLE.fullmatch(variable) is not None


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted: no files then, and no name
        return None


def _distribution_version(name: str) -> str:
    try:
        return _clean(metadata.version(name))
    except (metadata.PackageNotFoundError, ValueError, OSError):
        return ""


def _clean(text: object) -> str:
    """A name that an app gave itself, without what may not stand in a label; never an error."""
    if not isinstance(text, str):
        return ""
    return "".join(character for character in text if character.isprintable()).strip()


def _means_development(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() == "development"


def _keys() -> list[str]:
    return [*options(), *_groups()]


def _value(settings: Settings, key: str) -> object:
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # a value's own repr is not ours to trust
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
