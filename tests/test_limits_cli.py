"""`opsguard limits`: what it shows of settings and of apps, and what a wrong name of an app is."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from opsguard import OpsGuard, cli
from opsguard.settings import options

APP = """
    from fastapi import FastAPI
    from opsguard import OpsGuard
    from opsguard_fastapi import install

    class Holder:
        pass

    app = FastAPI(openapi_url=None)
    ops = OpsGuard("s", logging={"file": "log"}, limiter={
        "policies": {
            "/auth/*": {"rate": "2/minute; 9/hour", "methods": ["POST"]}, "/free": "exempt"},
    })
    install(app, ops)

    @app.get("/items/{id}")
    @ops.limit("1/minute")
    def item(id: int): ...

    @app.get("/items/special")
    @ops.exempt
    def special(): ...

    @app.get("/files/{name:path}")
    def files(name: str): ...

    @app.get("/free")
    def free(): ...

    @ops.limit("3/hour")
    def helper(): ...

    def make():
        return app

    holder = Holder()
    holder.ops = ops
    nothing = object()
    boring = lambda: None
"""


@pytest.fixture(autouse=True)
def _empty_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without settings files, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for option in options().values():
        for variable in option.variables:
            monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with a small app."""
    text = textwrap.dedent(APP)
    (tmp_path / "small_shop.py").write_text(text)
    monkeypatch.delitem(sys.modules, "small_shop", raising=False)
    return "small_shop"


def run(*arguments: str) -> int:
    """The exit status of the command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["limits", *arguments])
    return ended.value.code if isinstance(ended.value.code, int) else 0


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_show_tells_what_the_settings_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSGUARD_LIMITER__DEFAULT", "7/minute")
    Path("opsguard.toml").write_text("[limiter.policies]\n'/auth/*' = '5/hour'\n")

    assert run("show") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "store auto (local in one process, workers in several)"
    found = rows(out)
    assert ["edge", "/auth/*", "5", "per", "1", "hour"] in [row[:6] for row in found]
    assert ["route", "default", "7", "per", "1", "minute"] in [row[:6] for row in found]
    assert ["route", "tier:pro", "1000"] in [row[:3] for row in found]
    assert "uncovered" not in out


def test_show_of_an_app_tells_which_routes_are_limited(
    shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "--app", f"{shop}:app") == 0
    out = capsys.readouterr().out
    assert "limiter: 1 route limited, 2 exempt, 1 uncovered: GET /files/{name}" in out
    found = rows(out)
    assert ["GET", "/items/{id}", "limited"] in found
    assert ["GET", "/items/special", "exempt"] in found
    assert ["GET", "/files/{name}", "uncovered"] in found
    assert ["edge", "/auth/*", "(POST)", "2", "per", "1"] in [row[:6] for row in found]
    assert ["edge", "/free", "exempt"] in [row[:3] for row in found]
    assert "no route carries the marks of small_shop.helper" in out


def test_show_as_json(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "--app", f"{shop}:app", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["enabled"] is True
    assert said["store"] == "auto"
    assert said["routes"]["exempt"] == ["GET /items/special", "GET /free"]
    assert said["unrouted"] == ["small_shop.helper"]
    by_path = {one["policy"]: one for one in said["policies"]}
    assert by_path["/auth/*"]["methods"] == ["POST"]
    assert by_path["/auth/*"]["rate"] == "2 per 1 minute; 9 per 1 hour"


@pytest.mark.parametrize("name", ["app", "ops", "make", "holder"])
def test_the_app_may_be_named_in_many_ways(
    name: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "--app", f"{shop}:{name}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["routes"]["limited"] == ["GET /items/{id}"]
    assert isinstance(cli.guard_of(f"{shop}:{name}"), OpsGuard)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("small_shop", "named like module:attribute"),
        (":app", "named like module:attribute"),
        ("no_such_module:app", "No module named 'no_such_module'"),
        ("small_shop:absent", "no attribute 'absent'"),
        ("small_shop:nothing", "no OpsGuard is installed on it"),
        ("small_shop:boring", "no OpsGuard is installed on it"),
    ],
)
def test_a_wrong_name_is_one_line(
    name: str, says: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "--app", name) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("path", "policy", "why"),
    [
        ("/items/7", "small_shop.item", "the handler is decorated"),
        ("/items/{id}", "small_shop.item", "the handler is decorated"),
        ("/items/special", "", "the handler is exempt"),
        ("/files/a/b/c", "", "no decorator, no tier and no default"),
        ("/nowhere", "", "no decorator, no tier and no default"),
        ("/free", "", "the path is exempt"),
    ],
)
def test_explain_finds_the_route_of_a_path(
    path: str, policy: str, why: str, shop: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", path, "--app", f"{shop}:app", "--json") == 0
    (route,) = [one for one in json.loads(capsys.readouterr().out) if one["stage"] == "route"]
    assert route["policy"] == policy
    assert route["why"].startswith(why)


def test_explain_takes_method_key_and_tier(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("explain", "/auth/login", "--app", f"{shop}:app", "--method", "post")
    assert run(*asked, "--key", "10.0.0.9", "--tier", "pro") == 0
    out = capsys.readouterr().out
    assert "the path is /auth/*" in out
    assert "the key's tier is pro" in out
    assert [line for line in out.splitlines() if line.startswith("bucket ") and "10.0.0.9" in line]

    assert run("explain", "/auth/login", "--app", f"{shop}:app") == 0
    assert "no policy matches" in capsys.readouterr().out


def test_explain_without_an_app_says_that_routes_are_not_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("explain", "/x") == 0
    assert "The routes are not known here" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [("show",), ("explain", "/x")], ids=" ".join)
def test_a_limiter_that_is_off_says_who_said_so(
    arguments: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RATELIMIT_ENABLED", "false")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert "limiter.enabled is false (environment RATELIMIT_ENABLED)" in out


def test_an_app_without_any_limit_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quiet_shop.py").write_text(
        "from fastapi import FastAPI\n"
        "import opsguard_fastapi\n"
        "app = FastAPI(openapi_url=None)\n"
        "app.get('/a')(lambda: None)\n"
        "opsguard_fastapi.install(app)\n"
    )
    monkeypatch.delitem(sys.modules, "quiet_shop", raising=False)
    assert run("show", "--app", "quiet_shop:app") == 0
    out = capsys.readouterr().out
    assert "there are no policies, no decorators and no keys with tiers" in out
    assert "0 routes limited, 0 exempt, 1 uncovered" in out


def test_shadow_mode_shows(
    shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSGUARD_LIMITER__SHADOW", "true")
    assert run("show", "--app", f"{shop}:app") == 0
    assert "in shadow mode: nothing is refused" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"OPSGUARD_LIMITER__DEFAULT": "often"}, "OPSGUARD_LIMITER__DEFAULT"),
        (
            {
                "OPSGUARD_LIMITER__STORE": "redis+cluster://127.0.0.1:1",
                "OPSGUARD_LIMITER__STRATEGY": "gcra",
            },
            "the strategy 'gcra', which the store redis+cluster cannot do",
        ),
    ],
    ids=["a rate that is none", "an impossible pair"],
)
def test_what_would_stop_the_start_is_said_here_too(
    variables: dict[str, str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run("show") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err


def test_the_password_of_a_store_is_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@127.0.0.1:1/0")
    assert run("show") == 0
    out = capsys.readouterr().out
    assert out.startswith("store redis\n")
    assert "hunter2" not in out
