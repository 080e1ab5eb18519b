"""The `opsguard` command: what it prints, and the status it exits with."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

import opsguard
from opsguard import cli
from opsguard.demo import FRAMEWORKS
from opsguard.settings import Option, Settings, options


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without settings files, and an environment without settings."""
    place = tmp_path / "storefront"
    place.mkdir()
    monkeypatch.chdir(place)
    for option in options().values():
        for variable in option.variables:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "110")


def run(*arguments: str) -> int:
    """The exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code if isinstance(ended.value.code, int) else 0


def test_version_names_opsguard_and_python(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert re.fullmatch(
        rf"opsguard {re.escape(opsguard.__version__)} \(Python 3\.\d+\.\S+\)\n",
        capsys.readouterr().out,
    )


def test_config_shows_every_setting_and_where_it_came_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOG_LEVEL", "debug")
    Path("opsguard.toml").write_text("[metrics]\npath = '/[red]internal'\n")

    assert run("config") == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[1:]}

    assert set(options()) <= set(rows)
    assert rows["logging.level"].split(maxsplit=1) == ["DEBUG", "environment LOG_LEVEL".ljust(21)]
    assert rows["metrics.path"].split()[:2] == ["/[red]internal", "opsguard.toml"]
    assert rows["service"].split() == ["storefront", "folder"]
    assert rows["metrics.directory"].split() == ["null", "default"]


def test_config_as_json_is_one_object_with_values_origins_and_variables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSGUARD_PROXIES__TRUSTED", "10.0.0.0/8")
    monkeypatch.setenv("OPSGUARD_METRICS__PATT", "x")

    assert run("config", "--json") == 0
    said = json.loads(capsys.readouterr().out)

    assert list(said["settings"]) == list(options())
    assert said["settings"]["proxies.trusted"] == {
        "value": ["10.0.0.0/8"],
        "origin": "environment OPSGUARD_PROXIES__TRUSTED",
        "variables": ["OPSGUARD_PROXIES__TRUSTED"],
    }
    assert len(said["warnings"]) == 1


def test_config_with_wrong_settings_is_one_message_and_no_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSGUARD_METRICS__PATH", "metrics")

    assert run("config") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "OPSGUARD_METRICS__PATH: 'metrics': must start with '/'" in err
    assert "Traceback" not in err


def test_a_secret_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Option(key="service", variables=("OPSGUARD_SERVICE",), default="", secret=True)
    monkeypatch.setattr(cli, "options", lambda: {"service": secret})

    rows = cli.settings_in_force(Settings(service="hunter2"))

    assert rows["service"]["value"] == "***"
    assert "hunter2" not in repr(rows)


@pytest.mark.parametrize("module", ["click", "rich"])
def test_without_click_or_rich_it_says_which_extra_has_them(
    module: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)

    assert run("--version") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{module} is not installed" in line
    assert "opsguard-toolkit[cli]" in line


@pytest.mark.parametrize(
    ("framework", "module"),
    [(framework, module) for framework, needed in FRAMEWORKS.items() for module in needed],
)
def test_the_demo_without_its_framework_or_server_says_which_extra_has_it(
    framework: str,
    module: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    assert run("demo", "--framework", framework) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{module} is not installed" in line
    assert "opsguard-toolkit[demo]" in line


def test_another_missing_module_is_no_matter_of_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation must not be explained away."""

    def broken() -> None:
        raise ModuleNotFoundError("No module named 'xyz'", name="xyz")

    monkeypatch.setattr(cli, "command", broken)
    with pytest.raises(ModuleNotFoundError, match="xyz"):
        cli.main(["--version"])


@pytest.mark.parametrize(
    "arguments",
    [("demo", "--framework", "rails"), ("demo", "--port", "70000"), ("dance",)],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    assert "Usage: opsguard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ending", "status"),
    [(0, 0), (1, 1), (KeyboardInterrupt(), 130), (SystemExit(143), 143)],
    ids=["right", "wrong", "ctrl-c", "terminated"],
)
def test_the_demo_exits_as_it_went(
    ending: int | BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was asked for reaches it."""
    asked = {}

    def play(framework: str, console: object, *, port: int, once: bool) -> int:
        asked.update(framework=framework, port=port, once=once)
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr("opsguard.demo.play.play", play)

    assert run("demo", "--framework", "wsgi", "--port", "8123", "--once") == status
    assert asked == {"framework": "wsgi", "port": 8123, "once": True}


def test_loggers_changes_the_levels_of_a_service_that_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In all groups of the service, and in none of another."""
    monkeypatch.setenv("OPSGUARD_METRICS__DIRECTORY", str(tmp_path))
    first, second, other = (opsguard.OpsGuard(name) for name in ("storefront", "storefront", "x"))
    for ops in (first, second, other):
        ops.metrics.counter("a_total", "A.").inc()

    assert run("loggers", "set", "shop", "debug", "--minutes", "5") == 0
    assert run("loggers", "set", "root", "ERROR") == 0
    assert capsys.readouterr().out.splitlines() == [
        "shop: DEBUG within about a second",
        "root: ERROR within about a second",
    ]
    for ops in (first, second, other):
        ops.board.refresh()
    told = {"shop": "DEBUG", "": "ERROR"}
    assert [ops.board.levels for ops in (first, second, other)] == [told, told, {}]

    assert run("loggers", "reset", "root") == 0
    capsys.readouterr()
    assert run("loggers") == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith(" ")] == ["  shop  DEBUG"] * 2
    assert sum(str(tmp_path) in line for line in shown) == 2
    for ops in (first, second):
        ops.board.set_level("shop", None)
        ops.board.set_level("", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("loggers",), "no such service runs here"),
        (("loggers", "set", "shop", "DEBUG"), "no such service runs here"),
        (("loggers", "set", "shop", "loud"), "'loud' is no log level"),
        (("loggers", "reset", "shop", "--service", "elsewhere"), "no such service runs here"),
    ],
)
def test_loggers_says_what_cannot_be(
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OPSGUARD_METRICS__DIRECTORY", str(tmp_path))
    (tmp_path / f"opsguard-{os.getuid()}" / "storefront").mkdir(parents=True)
    (tmp_path / f"opsguard-{os.getuid()}" / "storefront" / "stray").touch()
    assert run(*arguments) == 1
    assert said in capsys.readouterr().err
