"""One output for all loggers of the process: joined, not doubled, and put back as it was."""

from __future__ import annotations

import io
import json
import logging
import logging.config
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opsguard.keys.audit import Audit
from opsguard.logging import Sink, configure
from opsguard.logging.setup import JOINED, SILENCED, SinkHandler
from opsguard.settings import Logging


class Lines(Sink):
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.urgent: list[bool] = []
        self.resumed = 0

    def write(self, line: str, urgent: bool = False) -> None:
        self.lines.append(line)
        self.urgent.append(urgent)

    def resume(self) -> None:
        self.resumed += 1

    @property
    def terminal(self) -> bool:
        return False

    @property
    def messages(self) -> list[str]:
        return [json.loads(line)["message"] for line in self.lines]


State = dict[str, tuple[list[logging.Handler], int, bool, bool, list[Any]]]


def state() -> State:
    """The whole tree as it is now."""
    loggers = {name: logging.getLogger(name) for name in (*JOINED, *SILENCED, "app.also")}
    return {
        name: (list(log.handlers), log.level, log.propagate, log.disabled, list(log.filters))
        for name, log in {"": logging.getLogger(), **loggers}.items()
    }


@pytest.fixture(autouse=True)
def tree() -> Iterator[None]:
    """Every test begins and ends with the tree as it was."""
    before = state()
    yield
    for name, (handlers, level, propagate, disabled, filters) in before.items():
        logger = logging.getLogger(name or None)
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
        logger.disabled = disabled
        logger.filters[:] = filters


@pytest.fixture
def sink() -> Lines:
    return Lines()


Configure = Callable[..., Callable[[], None]]


@pytest.fixture
def join(sink: Lines) -> Iterator[Configure]:
    """`configure` with its other arguments filled in; undone at the end."""
    undos: list[Callable[[], None]] = []

    def call(settings: Logging | None = None, **options: Any) -> Callable[[], None]:
        arguments = {"service": "checkout", "environment": "production", "sink": sink} | options
        undos.append(
            configure(settings or Logging(format="json"), environ={}, **arguments)  # type: ignore[arg-type]
        )
        return undos[-1]

    yield call
    for undo in undos:
        undo()


def ours(logger: logging.Logger | None = None) -> list[logging.Handler]:
    handlers = (logger or logging.getLogger()).handlers
    return [handler for handler in handlers if isinstance(handler, SinkHandler)]


# Root ---------------------------------------------------------------------------------------------


def test_application_records_become_json_lines(join: Configure, sink: Lines) -> None:
    join()
    logging.getLogger("app").info("hello %s", "you", extra={"n": 1})
    logging.getLogger("app").debug("too quiet")
    logging.getLogger("app").error("urgent")
    first = json.loads(sink.lines[0])
    assert (first["message"], first["n"], first["service"]) == ("hello you", 1, "checkout")
    assert sink.urgent == [False, True]


@pytest.mark.parametrize("stream", ["stdout", "stderr", "__stdout__", "__stderr__"])
def test_console_handlers_of_root_are_replaced(
    stream: str, join: Configure, capfd: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    handler = logging.StreamHandler(getattr(sys, stream))
    root.addHandler(handler)
    undo = join()
    logging.getLogger("app").warning("once")
    assert handler not in root.handlers
    assert "once" not in "".join(capfd.readouterr())
    undo()
    assert handler in root.handlers


def test_a_handler_on_a_descriptor_of_the_console_is_one(join: Configure) -> None:
    """A wrapped stream is not the same object, but it is the same output."""
    with open(1, "w", closefd=False) as stream:
        handler = logging.StreamHandler(stream)
        logging.getLogger().addHandler(handler)
        join()
        assert handler not in logging.getLogger().handlers


def test_handlers_that_write_elsewhere_stay(
    join: Configure, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = logging.StreamHandler(io.StringIO())
    file = logging.FileHandler(tmp_path / "app.log")
    for handler in (buffer, file):
        logging.getLogger().addHandler(handler)
    join()
    logging.getLogger("app").warning("everywhere")
    assert buffer.stream.getvalue() == "everywhere\n"
    assert (tmp_path / "app.log").read_text() == "everywhere\n"
    assert "everywhere" in caplog.text
    file.close()


def test_development_on_request_gives_console_lines(join: Configure, sink: Lines) -> None:
    join(Logging(format="console"))
    logging.getLogger("app").info("hello")
    assert sink.lines[0].endswith("INFO  app: hello")


def test_a_formatter_that_fails_costs_its_line_only(join: Configure, sink: Lines) -> None:
    join()

    class Broken(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            raise RuntimeError("no")

    ours()[0].setFormatter(Broken())
    logging.getLogger("app").warning("lost")
    assert sink.messages == ["a record was lost: RuntimeError"]


def test_a_filter_on_our_handler_is_heard(join: Configure, sink: Lines) -> None:
    join()
    ours()[0].addFilter(lambda record: record.getMessage() != "no")
    logging.getLogger("app").warning("no")
    logging.getLogger("app").warning("yes")
    assert sink.messages == ["yes"]


# Repair, layers and undo --------------------------------------------------------------------------


def test_undo_restores_the_whole_tree() -> None:
    logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
    logging.getLogger("uvicorn").setLevel(logging.DEBUG)
    logging.getLogger("django").disabled = True
    before = state()
    undo = configure(
        Logging(format="json"), service="s", environment="e", sink=Lines(), also=("app.also",)
    )
    assert state() != before
    undo()
    assert state() == before
    undo()
    assert state() == before


def test_configuring_again_changes_nothing_and_one_undo_is_enough(
    join: Configure, sink: Lines
) -> None:
    before = state()
    undo = join()
    once = {name: (len(s[0]), *s[1:]) for name, s in state().items()}
    join()
    assert {name: (len(s[0]), *s[1:]) for name, s in state().items()} == once
    logging.getLogger("app").warning("once")
    assert sink.messages == ["once"]
    undo()
    assert state() == before


def test_configuring_again_makes_a_stopped_sink_batch_again(join: Configure, sink: Lines) -> None:
    join()
    join()
    assert sink.resumed == 2


def test_of_two_in_a_process_the_last_owns_the_root_logger_until_it_is_undone(
    join: Configure, sink: Lines
) -> None:
    other = Lines()
    before = state()
    undo_first = join()
    undo_other = join(sink=other)
    logging.getLogger("app").warning("other's")
    undo_other()
    logging.getLogger("app").warning("first's")
    assert (sink.messages, other.messages) == (["first's"], ["other's"])
    undo_first()
    assert state() == before


def test_undoing_in_the_other_order_restores_as_well(join: Configure, sink: Lines) -> None:
    other = Lines()
    before = state()
    undo_first = join()
    undo_other = join(sink=other)
    undo_first()
    logging.getLogger("app").warning("other's")
    assert (sink.messages, other.messages) == ([], ["other's"])
    undo_other()
    assert state() == before


def test_a_level_that_somebody_set_after_us_survives_undo(join: Configure) -> None:
    undo = join()
    logging.getLogger().setLevel(logging.ERROR)
    undo()
    assert logging.getLogger().level == logging.ERROR


# Servers ------------------------------------------------------------------------------------------


def server_lines(sink: Lines, capfd: pytest.CaptureFixture[str], *names: str) -> None:
    """Each logger's warning arrives once with us, and nowhere else."""
    sink.lines.clear()
    capfd.readouterr()
    for name in names:
        logging.getLogger(name).error("from %s", name)
    assert sink.messages == [f"from {name}" for name in names]
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize("first", ["uvicorn", "opsguard"])
def test_uvicorn_joins_whoever_configures_first(
    first: str, join: Configure, sink: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    import uvicorn

    if first == "opsguard":
        join()
    uvicorn.Config(app=lambda: None)
    join()
    assert not logging.getLogger("uvicorn.access").hasHandlers()
    server_lines(sink, capfd, "uvicorn", "uvicorn.error", "uvicorn.asgi")


@pytest.mark.parametrize("again", [False, True], ids=["first", "after a repair"])
def test_gunicorn_joins(
    again: bool, join: Configure, sink: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    from gunicorn.config import Config
    from gunicorn.glogging import Logger

    if again:
        join()
    config = Config()
    config.set("accesslog", "-")
    Logger(config)
    join()
    server_lines(sink, capfd, "gunicorn.error")
    logging.getLogger("gunicorn.access").info("GET /")
    assert len(sink.lines) == 1
    assert "".join(capfd.readouterr()) == ""


def test_granian_joins(join: Configure, sink: Lines, capfd: pytest.CaptureFixture[str]) -> None:
    from granian.log import LogLevels, configure_logging

    configure_logging(LogLevels.info)
    join()
    server_lines(sink, capfd, "_granian")
    logging.getLogger("granian.access").info("GET /")
    assert "".join(capfd.readouterr()) == ""


def test_django_joins_and_its_4xx_warnings_do_not_double_the_access_line(
    join: Configure,
    sink: Lines,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from django.conf import settings
    from django.utils.log import DEFAULT_LOGGING

    from tests.contract.apps.django_app import configure

    configure()  # once for all tests of this process
    monkeypatch.setattr(settings, "DEBUG", True)  # else Django's own handlers are silent
    logging.config.dictConfig(DEFAULT_LOGGING)
    join()
    server_lines(sink, capfd, "django", "django.request", "django.security.csrf")
    sink.lines.clear()
    logging.getLogger("django.request").warning("Not Found: /x")
    logging.getLogger("django.server").error('"GET / HTTP/1.1" 500')
    assert sink.lines == []
    assert "".join(capfd.readouterr()) == ""


def test_djangos_mails_to_admins_stay(join: Configure) -> None:
    from django.utils.log import DEFAULT_LOGGING

    logging.config.dictConfig(DEFAULT_LOGGING)
    join()
    assert [type(handler).__name__ for handler in logging.getLogger("django").handlers] == [
        "AdminEmailHandler"
    ]


def test_the_request_lines_of_werkzeug_are_dropped_and_its_news_are_not(
    join: Configure, sink: Lines
) -> None:
    join()
    werkzeug = logging.getLogger("werkzeug")
    werkzeug.info('127.0.0.1 - - [20/Nov/2026] "%s" %s %s', "GET / HTTP/1.1", 200, "-")
    werkzeug.info(" * Running on http://127.0.0.1:5000")
    assert sink.messages == [" * Running on http://127.0.0.1:5000"]


def test_a_logger_named_in_also_joins(
    join: Configure, sink: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    """Flask's app.logger, whose default handler is on a proxy of standard error."""
    from flask.logging import default_handler

    logger = logging.getLogger("app.also")
    logger.addHandler(default_handler)
    join(also=("app.also",))
    server_lines(sink, capfd, "app.also")
    assert default_handler not in logger.handlers


def test_a_server_is_not_louder_than_our_level(join: Configure, sink: Lines) -> None:
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    undo = join(Logging(format="json", level="WARNING"))
    logging.getLogger("uvicorn.error").info("started")
    logging.getLogger("uvicorn.error").warning("careful")
    assert sink.messages == ["careful"]
    undo()
    assert logging.getLogger("uvicorn.error").level == logging.INFO


def test_a_server_may_be_quieter_than_our_level(join: Configure, sink: Lines) -> None:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    join(Logging(format="json", level="DEBUG"))
    logging.getLogger("uvicorn.error").info("started")
    assert sink.messages == []


def test_an_access_log_somebody_sends_to_a_file_stays(
    join: Configure, sink: Lines, tmp_path: Path
) -> None:
    file = logging.FileHandler(tmp_path / "access.log")
    join()
    logger = logging.getLogger("uvicorn.access")
    logger.addHandler(file)
    join()
    logger.warning("GET /")
    assert (tmp_path / "access.log").read_text() == "GET /\n"
    assert sink.messages == []
    logger.removeHandler(file)
    file.close()


def test_loggers_that_a_configuration_disabled_speak_again(
    join: Configure, sink: Lines, capfd: pytest.CaptureFixture[str]
) -> None:
    join()
    for name in ("uvicorn.error", "opsguard"):
        logging.getLogger(name).disabled = True
    join()
    server_lines(sink, capfd, "uvicorn.error", "opsguard")


def test_a_configuration_that_disables_all_loggers_costs_no_audit_line(
    join: Configure, sink: Lines
) -> None:
    """As `dictConfig` does by itself with those that it does not name."""
    quiet = Logging(format="json", level="ERROR")
    join(quiet)
    audit = Audit(lambda: 0.0)
    for name in ("opsguard.access", "opsguard.audit"):
        logging.getLogger(name).disabled = True
    join(quiet)
    audit.event("keys.created", "An API key was created")
    assert sink.messages == ["An API key was created"]
    assert not logging.getLogger("opsguard.access").disabled


# Together -----------------------------------------------------------------------------------------


def test_a_whole_process_writes_one_kind_of_line_and_loses_none() -> None:
    """`logging.config` closes our handler, the process ends by itself, all lines are there."""
    script = """
        import logging, logging.config, sys
        from opsguard.logging import Logger, access_line, configure, open_sink
        from opsguard.settings import Logging
        settings = Logging()
        sink = open_sink(settings)
        def go():
            configure(settings, service="s", environment="production", sink=sink)
        logging.basicConfig()
        go()
        log = Logger("app")
        log.info("one", n=1)
        logging.config.dictConfig({"version": 1, "disable_existing_loggers": False})
        go()
        log.info("two")
        line = access_line(
            settings, service="s", environment="production", sink=sink, clock=lambda: 0.0
        )
        line("GET", "/", "/", 200, 0.1, 2, None, "r", "r", None)
        try:
            1 / 0
        except ZeroDivisionError:
            log.exception("three")
        log.info("four")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, timeout=60, check=True
    )
    assert done.stderr == b""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["message"] for line in lines] == [
        "one",
        "two",
        "request_completed",
        "three",
        "four",
    ]
    assert lines[3]["exception"]["type"] == "ZeroDivisionError"
