"""The groups of options: a frozen dataclass each, with a field for each option.

The type of a field, made stricter by what stands in its `Annotated`, is what pydantic checks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field

from opsguard.addresses import MAX_ENTRIES
from opsguard.policies import Policy, policy_from
from opsguard.rates import OnStoreError, Strategy
from opsguard.settings import checks
from opsguard.settings.checks import File, List, Renames, Text, Whole

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
    "Proxies",
    "StaticKey",
    "given",
    "plain",
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


def plain(*names: str) -> dict[str, tuple[str, ...]]:
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


def given(group: Group) -> dict[str, object]:
    """What the maker of `group` said, by the name of the option."""
    return {name: getattr(group, name) for name in group._given}


@dataclass(frozen=True, slots=True)
class Option:
    """One option: its dotted key, its environment names (the first is ours), its default."""

    key: str
    variables: tuple[str, ...]
    default: object
    secret: bool


@dataclass(frozen=True, kw_only=True)
class Ids(Group):
    """Request ids: the two header names, and whether a client's own id is taken."""

    request_header: Annotated[str, AfterValidator(checks.id_header)] = "X-Request-ID"
    correlation_header: Annotated[str, AfterValidator(checks.optional_id_header)] = (
        "X-Correlation-ID"
    )
    """Empty turns the second header off."""
    answer_correlation: Literal["sent", "always"] = "sent"
    """Answer with the second header where the client sent it, or always."""
    trust_inbound: bool = True


@dataclass(frozen=True, kw_only=True)
class Proxies(Group):
    """Which proxies are believed about the client's address; see :mod:`opsguard.addresses`."""

    trusted: Annotated[tuple[Annotated[str, AfterValidator(checks.network)], ...], List] = ()
    hops: Annotated[int, Whole, Field(ge=0, le=MAX_ENTRIES)] = 0


@dataclass(frozen=True, kw_only=True)
class Metrics(Group):
    """HTTP metrics: on or off, where they are read, and what they are called."""

    enabled: bool = field(default=True, metadata=plain("ENABLE_METRICS"))
    path: Annotated[str, AfterValidator(checks.path)] = "/metrics"
    prefix: Annotated[str, AfterValidator(checks.metric_name)] = "http"
    names: Annotated[
        dict[str, Annotated[str, AfterValidator(checks.metric_name)]],
        Renames,
        AfterValidator(checks.renames_of(HTTP_METRIC_NAMES)),
    ] = field(default_factory=dict, hash=False)
    labels: Annotated[
        dict[str, Annotated[str, AfterValidator(checks.label_name)]],
        Renames,
        AfterValidator(checks.renames_of(HTTP_LABEL_NAMES)),
    ] = field(default_factory=dict, hash=False)
    buckets: Annotated[tuple[float, ...], List, AfterValidator(checks.buckets)] = (
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

    level: Annotated[str, BeforeValidator(checks.level)] = field(
        default="INFO", metadata=plain("LOG_LEVEL")
    )
    format: Literal["auto", "json", "console"] = "auto"
    file: File = None
    names: Annotated[
        dict[str, Annotated[str, AfterValidator(checks.field_name)]],
        Renames,
        AfterValidator(checks.renames_of(LOG_FIELD_NAMES, others=True)),
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

    enabled: bool = field(default=True, metadata=plain("RATELIMIT_ENABLED", "ENABLE_RATE_LIMITING"))
    store: Annotated[Text, AfterValidator(checks.limiter_store)] = field(default="auto", repr=False)
    """`auto` (Redis if `redis_url` is set, else `workers` in a group of workers, else `local`),
    one of these, or the URL of a store, which may hold a password."""
    redis_url: Annotated[Text, AfterValidator(checks.redis_url)] = field(
        default="", repr=False, metadata=plain("REDIS_URL")
    )
    """Also from REDIS_HOST and REDIS_PORT."""
    strategy: Strategy = "sliding"
    key: Annotated[str, AfterValidator(checks.limit_key)] = "address"
    """Whose bucket, where a policy does not say; tiers go by API key."""
    default: Annotated[
        Policy | None, BeforeValidator(checks.policy), AfterValidator(checks.default_policy)
    ] = None
    policies: Annotated[
        dict[str, Policy], BeforeValidator(checks.policies), AfterValidator(checks.path_policies)
    ] = field(default_factory=dict, hash=False)
    """By path pattern; the first that matches counts."""
    tiers: Annotated[
        dict[str, Policy], BeforeValidator(checks.policies), AfterValidator(checks.tier_policies)
    ] = field(default_factory=lambda: dict(_TIERS), hash=False)
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

    hash: Annotated[str, AfterValidator(checks.key_hash)] = field(default="", repr=False)
    key: Annotated[str, AfterValidator(checks.credential)] = field(default="", repr=False)
    tenant_id: Text = ""
    tier: Annotated[str, AfterValidator(checks.key_part)] = "free"
    scopes: Annotated[tuple[Text, ...], List] = ()
    expires: datetime | None = None
    """Without an offset it is UTC."""


@dataclass(frozen=True, kw_only=True)
class Keys(Group):
    """API keys: where one is needed, where they are kept, and what makes them ours."""

    required: Annotated[tuple[Annotated[str, AfterValidator(checks.pattern)], ...], List] = ()
    public: Annotated[tuple[Annotated[str, AfterValidator(checks.pattern)], ...], List] = ()
    """Exceptions from `required`: of two patterns the narrower counts, of equals `required`."""
    header: Annotated[str, AfterValidator(checks.header)] = "X-API-Key"
    store: Text = field(default="sqlite:///opsguard-keys.db", repr=False)
    """A database URL, which may hold a password. The file is made with the first key."""
    prefix: Annotated[str, AfterValidator(checks.key_part)] = "ops"
    pepper: Annotated[str, AfterValidator(checks.pepper)] = field(default="", repr=False)
    """The secret of the HMACs that are stored; must be set outside development."""
    master: Annotated[str, AfterValidator(checks.master)] = field(
        default="", repr=False, metadata=plain("MASTER_API_KEY")
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
