"""Settings: their sources, their checks, and what an operator is told."""

from __future__ import annotations

import copy
import logging
import pickle
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

import opsguard.settings.model as module
from opsguard.exceptions import SettingsError
from opsguard.settings import (
    Ids,
    Keys,
    Limiter,
    Logging,
    Metrics,
    Option,
    Proxies,
    Settings,
    options,
)

SAMPLES = {"MASTER_API_KEY": "a-master-key-of-ours", "REDIS_URL": "redis://cache:6379/0"}
"""For variables of options that take no text at all and not any text."""

DOCS = Path(__file__).parent.parent / "docs" / "reference" / "settings.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty working directory with a known name."""
    made = tmp_path / "checkout-service"
    made.mkdir()
    return made


def load(
    folder: Path | None = None, environ: dict[str, str] | None = None, /, **keywords: object
) -> Settings:
    """Settings of these sources only, whatever stands around the test run."""
    nowhere = Path("/nonexistent/nowhere")
    return Settings.load(keywords, environ=environ or {}, directory=folder or nowhere)


def value(settings: Settings, key: str) -> object:
    found: object = settings
    for name in key.split("."):
        found = getattr(found, name)
    return found


def error(folder: Path | None, environ: dict[str, str], **keywords: object) -> str:
    """The message that these sources stop the start with."""
    with pytest.raises(SettingsError) as caught:
        load(folder, environ, **keywords)
    return str(caught.value)


# Sources.


def test_defaults_are_the_documented_ones() -> None:
    """Without any source there is production, JSON-or-console, and nobody to trust."""
    settings = load()
    assert settings == Settings()
    assert settings.environment == "production"
    assert not settings.development
    assert settings.proxies == Proxies(trusted=(), hops=0)
    assert settings.metrics.buckets[0] == 0.005
    assert settings.metrics.buckets[-1] == 10.0
    assert settings.warnings == ()
    assert {settings.origin(key) for key in options()} == {"default"}


SOURCES = {
    "environment OPSGUARD_LOGGING__LEVEL": "DEBUG",
    "environment LOG_LEVEL": "INFO",
    "keyword": "WARNING",
    ".env": "ERROR",
    "opsguard.toml": "CRITICAL",
}


@pytest.mark.parametrize("first", range(len(SOURCES)), ids=list(SOURCES))
def test_the_first_source_wins(folder: Path, first: int) -> None:
    """Environment, keyword, .env, opsguard.toml: each wins over all behind it."""
    said = dict(list(SOURCES.items())[first:])
    environ = {"ENVIRONMENT": "development"}
    if level := said.get("environment OPSGUARD_LOGGING__LEVEL"):
        environ["OPSGUARD_LOGGING__LEVEL"] = level
    if level := said.get("environment LOG_LEVEL"):
        environ["LOG_LEVEL"] = level
    keywords = {"logging": {"level": said["keyword"]}} if "keyword" in said else {}
    if level := said.get(".env"):
        (folder / ".env").write_text(f"LOG_LEVEL={level}\n")
    (folder / "opsguard.toml").write_text(f'[logging]\nlevel = "{said["opsguard.toml"]}"\n')

    settings = load(folder, environ, **keywords)

    origin, level = next(iter(said.items()))
    assert (settings.logging.level, settings.origin("logging.level")) == (level, origin)


def test_pyproject_stands_in_for_opsguard_toml(folder: Path) -> None:
    """`[tool.opsguard]` is read if there is no opsguard.toml, and not at all if there is."""
    (folder / "pyproject.toml").write_text('[tool.opsguard]\nservice = "a"\nversion = "1"\n')
    settings = load(folder)
    assert (settings.service, settings.origin("service")) == ("a", "pyproject.toml")

    (folder / "opsguard.toml").write_text('service = "b"\n')
    settings = load(folder)
    assert (settings.service, settings.version) == ("b", "")


@pytest.mark.parametrize(
    "text",
    ['[project]\nname = "other"\n', '[tool]\nx = "opsguard"\n', "broken [", 'tool = "opsguard"\n'],
    ids=["no-tool", "no-table", "broken-but-without-us", "tool-is-no-table"],
)
def test_a_pyproject_without_our_table_says_nothing(folder: Path, text: str) -> None:
    """Somebody else's file is not ours to complain about."""
    (folder / "pyproject.toml").write_text(text)
    assert load(folder) == Settings()


@pytest.mark.parametrize("environment", ["production", "staging", "dev"])
def test_dotenv_counts_in_development_only(folder: Path, environment: str) -> None:
    """Elsewhere the file is not even read, so that one in an image does nothing."""
    (folder / ".env").write_text("LOG_LEVEL=nonsense\nDEV_MODE=true\nENVIRONMENT=development\n")
    assert load(folder, {"ENVIRONMENT": environment}).logging.level == "INFO"
    assert load(folder).environment == "production"


def test_dotenv_cannot_change_the_environment(folder: Path) -> None:
    """What decides whether the file is read cannot stand in it; that is a warning."""
    (folder / ".env").write_text("ENVIRONMENT=production\nOPSGUARD_METRICS__PATH=/m\n")
    settings = load(folder, environment="development")
    assert (settings.environment, settings.metrics.path) == ("development", "/m")
    assert settings.origin("metrics.path") == ".env"
    assert settings.warnings == (
        ".env ENVIRONMENT: passed over, as the environment must be known before this file is read",
    )


def test_dotenv_may_repeat_the_environment(folder: Path) -> None:
    """The usual file of a developer, who starts the server with it as well, is no warning."""
    (folder / ".env").write_text("export DEV_MODE=true\nEMPTY\nGIT_SHA='abc'  # here\n")
    settings = load(folder, {"DEV_MODE": "true"})
    assert (settings.git_sha, settings.warnings) == ("abc", ())


def test_dotenv_is_taken_literally(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` is not expanded: the value would come from an environment we were not given."""
    monkeypatch.setenv("WHO", "somebody")
    (folder / ".env").write_text("OPSGUARD_SERVICE=${WHO}\n")
    assert load(folder, environment="development").service == "${WHO}"


def test_a_directory_called_dotenv_is_no_file(folder: Path) -> None:
    """Virtual environments are called that."""
    (folder / ".env").mkdir()
    assert load(folder, environment="development").development


@pytest.mark.parametrize("name", ["opsguard.toml", "pyproject.toml"])
def test_broken_toml_stops(folder: Path, name: str) -> None:
    """A file of ours that cannot be understood is named."""
    (folder / name).write_text("[tool.opsguard\n")
    assert f"  {name}: is not valid TOML: " in error(folder, {})


def test_an_unreadable_file_stops(folder: Path) -> None:
    """A file that is there but cannot be read is named, not passed over."""
    (folder / "opsguard.toml").write_bytes(b"service = '\xff'\n")
    assert "  opsguard.toml: cannot be read: " in error(folder, {})


def test_a_file_with_a_byte_order_mark_is_read(folder: Path) -> None:
    """Editors on Windows write one."""
    (folder / "opsguard.toml").write_bytes(b"\xef\xbb\xbfservice = 'a'\n")
    assert load(folder).service == "a"


def test_the_process_environment_and_the_working_directory_are_the_defaults(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without arguments the real ones are read."""
    for option in options().values():
        for variable in option.variables:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("DEV_MODE", raising=False)
    monkeypatch.setenv("OPSGUARD_VERSION", "7")
    monkeypatch.chdir(folder)
    (folder / "opsguard.toml").write_text('service = "a"\n')
    settings = Settings.load({})
    assert (settings.service, settings.version) == ("a", "7")


def test_a_deleted_working_directory_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no files then, and no folder to take the name from."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    settings = Settings.load({}, environ={"ENVIRONMENT": "development"})
    assert settings.with_service().service == "unknown_service"


@pytest.mark.parametrize(
    ("option", "variable"),
    [(option, name) for option in options().values() for name in option.variables],
    ids=lambda given: given if isinstance(given, str) else None,
)
def test_every_option_is_reachable_by_each_of_its_variables(option: Option, variable: str) -> None:
    """A variable with the default's own text is taken, and named as the origin."""
    text = _text(option.default)
    given = text
    if text == "" and not variable.startswith("OPSGUARD_"):
        given = SAMPLES.get(variable, "x")
    settings = load(None, {variable: given})
    assert settings.origin(option.key) == f"environment {variable}"
    if given == text:
        assert value(settings, option.key) == option.default


def _text(default: object) -> str:
    match default:
        case None:
            return ""
        case bool():
            return str(default).lower()
        case tuple():
            return ",".join(map(str, default))
        case dict():
            return ",".join(f"{name}={target}" for name, target in default.items())
        case _:
            return str(default)


def test_every_option_is_in_the_reference_as_it_is() -> None:
    """Key, default and environment names in the docs are those of the model, in its order."""
    rows = re.findall(
        r"^\| `([a-z_.]+)` \| (.+?) \| (`[A-Z].*?) \| .+ \|$", DOCS.read_text(), re.MULTILINE
    )
    assert rows == [
        (
            option.key,
            ("none" if option.default is None else f"`{_text(option.default)}`")
            if _text(option.default) or option.default is None
            else "empty",
            ", ".join(f"`{name}`" for name in option.variables),
        )
        for option in options().values()
    ]


def test_an_empty_plain_variable_is_not_set_and_an_empty_one_of_ours_is() -> None:
    """`LOG_LEVEL=` comes out of compose files; `OPSGUARD_…=` is somebody's wish."""
    environ = {"LOG_LEVEL": "", "ENVIRONMENT": " ", "OTEL_SERVICE_NAME": "", "DEV_MODE": ""}
    assert load(None, environ) == Settings()
    assert load(None, {"OPSGUARD_IDS__CORRELATION_HEADER": ""}).ids.correlation_header == ""
    settings = load(None, {"OPSGUARD_LOGGING__FILE": ""}, logging={"file": "/tmp/x.log"})
    assert settings.logging.file is None
    assert "OPSGUARD_LOGGING__LEVEL: ''" in error(None, {"OPSGUARD_LOGGING__LEVEL": ""})


# Keywords.


def test_a_group_is_a_mapping_or_its_typed_model() -> None:
    """Both say the same."""
    assert load(metrics={"path": "/m", "max_series": 5}) == load(
        metrics=Metrics(path="/m", max_series=5)
    )


def test_a_typed_model_says_only_what_it_was_given(folder: Path) -> None:
    """Its other fields leave the file's values alone; a default that was given does not."""
    (folder / "opsguard.toml").write_text('[metrics]\npath = "/toml"\nprefix = "toml"\n')
    settings = load(folder, metrics=Metrics(path="/metrics"))
    assert (settings.metrics.path, settings.metrics.prefix) == ("/metrics", "toml")


def test_a_typed_model_is_judged_with_everything_else() -> None:
    """It is a way to write keywords; a wrong value in it comes in the same message."""
    message = error(None, {"LOG_LEVEL": "loud"}, metrics=Metrics(path="m"))
    assert "keyword metrics.path: 'm'" in message
    assert "LOG_LEVEL: 'loud'" in message


def test_a_loaded_group_counts_whole(folder: Path) -> None:
    """Another OpsGuard's group as a keyword brings its defaults along."""
    (folder / "opsguard.toml").write_text('[metrics]\npath = "/toml"\n')
    assert load(folder, metrics=load().metrics).metrics.path == "/metrics"


def test_a_typed_model_keeps_what_it_was_given_when_copied() -> None:
    """Copies and pickles of it mean the same keywords."""
    given = Metrics(path="/m")
    for twin in (copy.copy(given), copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert twin == given
        assert load(metrics=twin).provenance.origins == {"metrics.path": "keyword"}


def test_none_at_the_top_means_not_said() -> None:
    """So a factory can hand its own optional arguments on."""
    assert load(None, {}, service=None, metrics=None) == Settings()


@pytest.mark.parametrize(
    ("keywords", "line"),
    [
        ({"metric": {}}, "keyword metric: no such option; did you mean metrics?"),
        ({"servce": "a"}, "keyword servce: no such option; did you mean service?"),
        ({"zzzz": 1}, "keyword zzzz: no such option"),
        (
            {"metrics": {"pth": "/m"}},
            "keyword metrics.pth: no such option; did you mean metrics.path?",
        ),
        ({"metrics": {1: "/m"}}, "keyword metrics.1: no such option"),
        ({"provenance": {}}, "keyword provenance: no such option"),
        ({"metrics": "on"}, "keyword metrics: 'on': must be a mapping or a Metrics"),
        ({"logging": Ids()}, "must be a mapping or a Logging"),
    ],
    ids=["group", "top", "unlike-any", "key", "not-text", "internal", "scalar", "other-model"],
)
def test_an_unknown_keyword_stops(keywords: dict[str, object], line: str) -> None:
    """A typo in code is an error that suggests what was meant."""
    assert line in error(None, {}, **keywords)


# Wrong values.


@pytest.mark.parametrize(
    ("key", "wrong", "allowed"),
    [
        ("service", 3, "must be text"),
        ("service", "a\nb", "must be printable text"),
        ("service", "\ud800", "must be printable text"),
        ("environment", " ", "must not be empty"),
        ("ids.request_header", "", "must be a header name"),
        ("ids.request_header", "X Request", "must be a header name"),
        ("ids.request_header", "Content-Length", "must be a header of your own"),
        ("ids.correlation_header", "connection", "must be a header of your own"),
        ("ids.correlation_header", "X-\u00e4", "must be a header name"),
        ("ids.correlation_header", "X:\r\n", "must be a header name"),
        ("ids.trust_inbound", "maybe", "must be true or false"),
        ("proxies.trusted", "10.0.0.0/33", "must be an address or a network"),
        ("proxies.trusted", "10.0.0.1/8", "has host bits set"),
        ("proxies.trusted", ["*"], "must be an address or a network"),
        ("proxies.trusted", 7, "must be a list"),
        ("proxies.hops", "x", "must be a whole number"),
        ("proxies.hops", -1, "greater than or equal to 0"),
        ("proxies.hops", 101, "less than or equal to 100"),
        ("proxies.hops", True, "must be a whole number"),
        ("metrics.enabled", 2, "must be true or false"),
        ("metrics.path", "metrics", "must start with '/'"),
        ("metrics.path", "", "must start with '/'"),
        ("metrics.path", "/a?b", "must be a plain path"),
        ("metrics.path", "/a b", "must be a plain path"),
        ("metrics.path", "/\u00e4", "must be a plain path"),
        ("metrics.path", None, "must be text"),
        ("metrics.prefix", "", "must be a Prometheus metric name"),
        ("metrics.prefix", "9x", "must be a Prometheus metric name"),
        ("metrics.prefix", "my-app", "must be a Prometheus metric name"),
        ("metrics.prefix", "a\n", "must be a Prometheus metric name"),
        ("metrics.names", {"http_requests_total": "a b"}, "must be a Prometheus metric name"),
        ("metrics.names", {"http_request_total": "a"}, "did you mean http_requests_total?"),
        ("metrics.names", "http_requests_total", "name=value pairs"),
        ("metrics.names", "http_requests_total=a,http_requests_total=b", "twice"),
        ("metrics.names", "{", "must be valid JSON"),
        ("metrics.names", 3, "must be a mapping"),
        ("metrics.names", {"service_info": 3}, "must be text"),
        (
            "metrics.names",
            {"http_requests_total": "x", "http_errors_total": "x"},
            "must not give http_requests_total and http_errors_total the name x",
        ),
        ("metrics.names", {"http_requests_total": "http_errors_total"}, "must not give"),
        ("metrics.labels", {"code": "x"}, "cannot rename code"),
        ("metrics.labels", {"status": "status:code"}, "must be a Prometheus label name"),
        ("metrics.labels", {"status": "__status"}, "must be a Prometheus label name"),
        ("metrics.labels", {"status": "le"}, "Prometheus uses that label itself"),
        ("metrics.labels", {"method": "endpoint"}, "must not give method and endpoint the name"),
        ("metrics.buckets", "1,x", "must be a number"),
        ("metrics.buckets", "", "must be seconds above 0"),
        ("metrics.buckets", [0, 1], "must be seconds above 0"),
        ("metrics.buckets", [-1.0, 1], "must be seconds above 0"),
        ("metrics.buckets", [1, 1], "must be seconds above 0"),
        ("metrics.buckets", [2, 1], "must be seconds above 0"),
        ("metrics.buckets", [float("nan"), 1], "must be seconds above 0"),
        ("metrics.buckets", [1, float("inf"), float("inf")], "must be seconds above 0"),
        ("metrics.buckets", [float("inf")], "must be seconds above 0"),
        ("metrics.max_series", "many", "must be a whole number"),
        ("metrics.max_series", 0, "greater than or equal to 1"),
        ("metrics.max_series", 1.5, "must be a whole number"),
        ("metrics.max_series", 10**9, "less than or equal to 1000000"),
        ("metrics.schema", "otlp", "must be 'prometheus' or 'otel'"),
        ("metrics.directory", 3, "must be text"),
        ("logging.level", "loud", "must be one of DEBUG, INFO, WARNING, ERROR, CRITICAL"),
        ("logging.level", 15, "must be one of DEBUG"),
        ("logging.level", None, "must be one of DEBUG"),
        ("logging.format", "xml", "must be 'auto', 'json' or 'console'"),
        ("logging.names", {"message": ""}, "must be a name"),
        ("logging.names", {"message": "level"}, "must not give level and message the name"),
        ("logging.access", "some", "must be 'all', 'errors' or 'off'"),
        ("logging.durability", "disk", "must be 'batch' or 'line'"),
    ],
    ids=lambda given: ascii(given).strip("'")[:30],
)
def test_a_wrong_value_stops_and_says_what_is_allowed(
    key: str, wrong: object, allowed: str
) -> None:
    """One readable line names the place, shows the value and says what it may be."""
    group, _, name = key.rpartition(".")
    keywords: dict[str, object] = {group: {name: wrong}} if group else {name: wrong}
    message = error(None, {}, **keywords)
    (line,) = message.splitlines()[1:]
    assert line.startswith(f"  keyword {key}: ")
    assert allowed in line


def test_several_wrong_values_come_in_one_message(folder: Path) -> None:
    """Each source's own mistake is listed under the name it has there."""
    (folder / "opsguard.toml").write_text("[metrics]\nmax_series = 'x'\n[logging]\naccess = 1\n")
    (folder / ".env").write_text("OPSGUARD_METRICS__SCHEMA=x\n")
    message = error(
        folder,
        {"DEV_MODE": "true", "LOG_LEVEL": "loud"},
        metric={},
        ids={"request_header": ""},
    )
    places = [line.split(": ")[0].strip() for line in message.splitlines()[1:]]
    assert sorted(places) == [
        ".env OPSGUARD_METRICS__SCHEMA",
        "LOG_LEVEL",
        "keyword ids.request_header",
        "keyword metric",
        "opsguard.toml logging.access",
        "opsguard.toml metrics.max_series",
    ]


def test_only_the_value_that_wins_is_checked() -> None:
    """At night an operator can replace a wrong value without touching the code."""
    assert load(None, {"LOG_LEVEL": "ERROR"}, logging={"level": "x"}).logging.level == "ERROR"


def test_trusted_networks_and_hops_contradict_each_other() -> None:
    """They can name different clients, so there is no safe reading of both."""
    message = error(None, {"OPSGUARD_PROXIES__HOPS": "1"}, proxies={"trusted": ["10.0.0.0/8"]})
    assert "keyword proxies.trusted and OPSGUARD_PROXIES__HOPS: must not both be set" in message


def test_a_secret_is_not_shown_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The place and the reason are enough."""
    secret = replace(options()["service"], secret=True)
    known = {**options(), "service": secret}
    monkeypatch.setattr(module, "options", lambda: known)
    message = error(None, {}, service="swordfish\n")
    assert "keyword service: ***: must be printable text" in message
    assert "swordfish" not in message


def test_a_long_value_is_shortened_and_a_broken_repr_is_survived() -> None:
    """The message stays readable whatever was passed."""

    class Broken:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    message = error(None, {"LOG_LEVEL": "x" * 10_000}, service=Broken())
    assert "LOG_LEVEL: 'xxxx" in message
    assert "keyword service: <Broken>: must be text" in message
    assert len(message) < 400


@pytest.mark.parametrize("text", ["[" * 100_000, "{" + '"a":{' * 100_000], ids=["list", "mapping"])
def test_deep_json_is_a_wrong_value_and_not_a_crash(text: str) -> None:
    """The parser's own limit becomes an ordinary line of the message."""
    key = "OPSGUARD_PROXIES__TRUSTED" if text[0] == "[" else "OPSGUARD_METRICS__NAMES"
    assert f"  {key}: " in error(None, {key: text})


# Values as they are understood.


@pytest.mark.parametrize(
    ("key", "given", "understood"),
    [
        ("service", " a b ", "a b"),
        ("environment", "Development", "development"),
        ("ids.correlation_header", "", ""),
        ("proxies.trusted", "10.0.0.0/8, ::ffff:10.1.0.0/112,", ("10.0.0.0/8", "10.1.0.0/16")),
        ("proxies.trusted", '["10.0.0.1"]', ("10.0.0.1/32",)),
        ("proxies.hops", "2", 2),
        ("metrics.enabled", "off", False),
        ("metrics.prefix", "shop:http", "shop:http"),
        ("metrics.names", "http_requests_total = a", {"http_requests_total": "a"}),
        ("metrics.names", '{"http_requests_total": "a"}', {"http_requests_total": "a"}),
        ("metrics.names", "", {}),
        (
            "metrics.labels",
            {"method": "endpoint", "endpoint": "method"},
            {"method": "endpoint", "endpoint": "method"},
        ),
        ("metrics.labels", {"status": "status_code"}, {"status": "status_code"}),
        ("metrics.buckets", "0.1, 1,10", (0.1, 1.0, 10.0)),
        ("metrics.buckets", "[0.1, 1]", (0.1, 1.0)),
        ("metrics.buckets", [1, 2, float("inf")], (1.0, 2.0)),
        ("metrics.directory", Path("/run/x"), "/run/x"),
        ("logging.level", "warn", "WARNING"),
        ("logging.level", logging.DEBUG, "DEBUG"),
        ("logging.level", "40", "ERROR"),
        ("logging.level", "Fatal", "CRITICAL"),
        ("logging.names", "message=event,my=mine", {"message": "event", "my": "mine"}),
    ],
    ids=lambda given: str(given)[:30],
)
def test_values_are_understood_in_their_usual_forms(
    key: str, given: object, understood: object
) -> None:
    """Text forms are the same for every source, and a checked value passes the check again."""
    group, _, name = key.rpartition(".")
    keywords: dict[str, object] = {group: {name: given}} if group else {name: given}
    settings = load(None, {}, **keywords)
    assert value(settings, key) == understood
    assert value(settings.merged({}), key) == understood
    if isinstance(given, str):
        variable = options()[key].variables[0]
        assert value(load(None, {variable: given}), key) == understood


# The environment's name.


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"DEV_MODE": "true"}, "environment DEV_MODE"),
        ({"DEV_MODE": "1", "ENVIRONMENT": "development"}, "environment ENVIRONMENT"),
        ({"OPSGUARD_ENVIRONMENT": "development"}, "environment OPSGUARD_ENVIRONMENT"),
        (
            {"OPSGUARD_ENVIRONMENT": "development", "ENVIRONMENT": "production"},
            "environment OPSGUARD_ENVIRONMENT",
        ),
    ],
    ids=["dev-mode", "both-agree", "ours", "ours-wins"],
)
def test_development_is_said_in_several_ways(environ: dict[str, str], expected: str) -> None:
    """The environment wins over a keyword that says production."""
    settings = load(None, environ, environment="production")
    assert settings.development
    assert settings.origin("environment") == expected


@pytest.mark.parametrize("name", ["ENVIRONMENT", "OPSGUARD_ENVIRONMENT"])
@pytest.mark.parametrize("environment", ["production", "Production", "prod", "staging"])
def test_dev_mode_contradicts_another_environment(name: str, environment: str) -> None:
    """Both cannot be true, and development would show details of errors."""
    message = error(None, {"DEV_MODE": "true", name: environment})
    assert f"DEV_MODE: 'true': means development, but {name} says {environment!r}" in message


def test_dev_mode_false_says_nothing() -> None:
    """Only true means something."""
    assert load(None, {"DEV_MODE": "false"}).environment == "production"
    assert load(None, {"DEV_MODE": "false", "ENVIRONMENT": "development"}).development


def test_a_wrong_dev_mode_stops() -> None:
    """It is neither true nor false."""
    assert "DEV_MODE: 'maybe': must be true or false" in error(None, {"DEV_MODE": "maybe"})


# Unknown and injected variables.


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("OPSGUARD_METRICS_PATH", "OPSGUARD_METRICS__PATH"),
        ("OPSGUARD_LOGING__LEVEL", "OPSGUARD_LOGGING__LEVEL"),
        ("opsguard_service", "OPSGUARD_SERVICE"),
        ("OPSGUARD_METRICS__PREFIXES", "OPSGUARD_METRICS__PREFIX"),
    ],
    ids=["one-underscore", "typo", "lower-case", "plural"],
)
def test_an_unknown_variable_is_a_warning(
    variable: str, nearest: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The start goes on; the log and the settings say what was probably meant."""
    settings = load(None, {variable: "secret-value"})
    warning = f"{variable}: no such option, passed over; did you mean {nearest}?"
    assert settings.warnings == (warning,)
    assert caplog.record_tuples == [("opsguard", logging.WARNING, warning)]
    assert settings == Settings()


def test_an_unknown_name_in_a_file_is_a_warning(folder: Path) -> None:
    """A file mounted for a newer version must not stop an older one."""
    (folder / "opsguard.toml").write_text("[redaction]\nip = true\n[metrics]\npaths = '/x'\n")
    assert load(folder).warnings == (
        "opsguard.toml redaction: no such option",
        "opsguard.toml metrics.paths: no such option; did you mean metrics.path?",
    )


INJECTED = {
    "OPSGUARD_SERVICE_HOST": "10.0.0.7",
    "OPSGUARD_SERVICE_PORT": "80",
    "OPSGUARD_SERVICE_PORT_HTTP": "80",
    "OPSGUARD_PORT": "tcp://10.0.0.7:80",
    "OPSGUARD_PORT_8080_TCP": "tcp://10.0.0.7:8080",
    "OPSGUARD_PORT_8080_TCP_PROTO": "tcp",
    "OPSGUARD_PORT_8080_TCP_PORT": "8080",
    "OPSGUARD_PORT_8080_TCP_ADDR": "10.0.0.7",
    "OPSGUARD_PORT_53_UDP_ADDR": "10.0.0.7",
    "OPSGUARD_METRICS_SERVICE_HOST": "10.0.0.8",
    "OPSGUARD_METRICS_PORT": "udp://10.0.0.8:53",
    "OPSGUARD_SERVICE_SERVICE_PORT_GRPC_WEB": "81",
}


def test_variables_of_kubernetes_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    """A service called `opsguard` in the namespace neither warns nor sets anything."""
    settings = load(None, INJECTED)
    assert settings == Settings()
    assert settings.warnings == ()
    assert caplog.records == []


def test_variables_of_kubernetes_do_not_set_an_option_of_the_same_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A service called `metrics` gives METRICS_PORT; an option with that name is untouched."""
    option = replace(options()["version"], variables=("OPSGUARD_OPS__PORT", "METRICS_PORT"))
    known = {**options(), "version": option}
    monkeypatch.setattr(module, "options", lambda: known)
    assert load(None, {"METRICS_PORT": "tcp://10.0.0.7:9090"}).version == ""
    assert load(None, {"METRICS_PORT": "9090"}).version == "9090"


def test_a_port_that_is_no_service_address_is_unknown() -> None:
    """Only the value tells a service from a name that somebody guessed."""
    assert len(load(None, {"OPSGUARD_PORT": "8080"}).warnings) == 1


# What is done with settings.


def test_origin_of_an_unknown_option_is_an_error() -> None:
    """A typo in a caller is told apart from a default."""
    with pytest.raises(KeyError, match=r"metrics\.path"):
        load().origin("metrics.pth")


def test_settings_are_frozen_and_hashable() -> None:
    """Equal settings are one key, whatever their mappings."""
    one = load(metrics={"names": {"service_info": "a"}})
    two = load(metrics={"names": {"service_info": "a"}})
    assert one == two
    assert len({one, two}) == 1
    with pytest.raises(FrozenInstanceError):
        one.metrics.path = "/x"  # type: ignore[misc]


def test_settings_survive_a_pickle() -> None:
    """A worker started by spawn gets the same, origins included."""
    settings = load(None, {"LOG_LEVEL": "DEBUG"}, service="a")
    twin = pickle.loads(pickle.dumps(settings))
    assert twin == settings
    assert twin.origin("logging.level") == "environment LOG_LEVEL"


def test_git_sha_is_the_version_if_nobody_says_another() -> None:
    """And never overrides one that somebody said."""
    settings = load(None, {"GIT_SHA": "abc"})
    assert (settings.version, settings.origin("version")) == ("abc", "environment GIT_SHA")
    settings = load(None, {"GIT_SHA": "abc"}, version="1.2")
    assert (settings.version, settings.git_sha) == ("1.2", "abc")


def test_an_empty_service_name_is_filled_by_the_app_then_by_the_folder(folder: Path) -> None:
    """What somebody said stays; the working folder is the last resort."""
    said = load(folder, {}, service="said").with_service("Shop", "2")
    assert (said.service, said.origin("service"), said.version) == ("said", "keyword", "2")

    app = load(folder).with_service("Shop\n", "2")
    assert (app.service, app.origin("service"), app.origin("version")) == ("Shop", "app", "app")

    last = load(folder).with_service()
    assert (last.service, last.origin("service")) == ("checkout-service", "folder")
    assert load(Path("/")).with_service("").service == "unknown_service"


def test_the_version_is_that_of_the_distribution_in_the_last_resort() -> None:
    """A service installed as a package has its version there."""
    settings = load(service="pytest").with_service()
    assert (settings.version, settings.origin("version")) == (pytest.__version__, "package")
    assert load(service="no such distribution").with_service().version == ""
    assert load(service="pytest", version="1").with_service().version == "1"


def test_merged_puts_values_on_top_of_everything() -> None:
    """Even of the environment; the rest keeps its value and its origin."""
    settings = load(None, {"LOG_LEVEL": "ERROR", "OPSGUARD_METRICS__PATH": "/env"}, service="a")
    merged = settings.merged({"logging": {"level": "debug"}, "metrics": Metrics(prefix="api")})
    assert (merged.logging.level, merged.origin("logging.level")) == ("DEBUG", "override")
    assert (merged.metrics.path, merged.metrics.prefix) == ("/env", "api")
    assert merged.origin("metrics.path") == "environment OPSGUARD_METRICS__PATH"
    assert (merged.service, merged.origin("service")) == ("a", "keyword")
    assert settings.logging.level == "ERROR"
    assert settings.merged({}) == settings


def test_merged_checks_as_loading_does() -> None:
    """A wrong override is named as one."""
    with pytest.raises(SettingsError) as caught:
        load().merged({"metrics": {"path": "m"}, "loging": {}})
    assert "override metrics.path: 'm': must start with '/'" in str(caught.value)
    assert "override loging: no such option; did you mean logging?" in str(caught.value)


def test_a_new_group_needs_a_class_and_a_field() -> None:
    """The tables that everything else follows from are made from the model."""
    assert list(module._groups().items()) == [
        ("ids", Ids),
        ("proxies", Proxies),
        ("metrics", Metrics),
        ("logging", Logging),
        ("limiter", Limiter),
        ("keys", Keys),
    ]
