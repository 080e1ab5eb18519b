"""Making, listing, ending and replacing keys, in the code and at the command line."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from opsguard import cli
from opsguard.exceptions import SettingsError
from opsguard.keys import Keys, KeyStoreDown, KeyStoreError, NoSuchKey
from opsguard.settings import Settings, options

NOW = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


def make(folder: Path, clock: Clock | None = None, **said: Any) -> Keys:
    clock = clock or Clock()
    keys = {"store": f"sqlite:///{folder / 'keys.db'}", "pepper": "a pepper of the tests"}
    settings = Settings.load(
        {**said, "keys": keys | said.get("keys", {})}, environ={}, directory=folder
    )
    return Keys(lambda: settings, report=lambda *_: None, clock=clock, wall=clock)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Iterator[Keys]:
    made = make(tmp_path, clock)
    yield made
    made.close()


def id_of(key: str) -> str:
    return key.split("_")[-2]


def works(keys: Keys, key: str) -> bool:
    keys.verifier.clear()
    return keys.verifier.verify(key) is not None


def test_a_key_says_whose_it_is_and_its_secret_is_not_kept(keys: Keys, tmp_path: Path) -> None:
    key = keys.create(tenant_id="customer-123", tier="pro", name="Production")
    assert re.fullmatch(r"ops_pro_[0-9A-Za-z]{12}_[0-9A-Za-z]{43}", key)
    keys.close()
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert id_of(key).encode() in kept
    assert key.split("_")[-1].encode() not in kept


def test_constructors_open_nothing(tmp_path: Path) -> None:
    def fail() -> Settings:
        raise AssertionError("settings were read")

    Keys(fail, report=lambda *_: None).close()
    keys = make(tmp_path)
    assert keys.verifier.verify("ops_pro_" + "a" * 12 + "_" + "b" * 43) is None
    assert keys.list() == []
    keys.guard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["omni", "my_shop", "a-b"])
@pytest.mark.parametrize("tier", ["pro", "pro_plus", "x-y"])
def test_prefix_and_tier_may_have_underscores(prefix: str, tier: str, tmp_path: Path) -> None:
    keys = make(tmp_path, keys={"prefix": prefix})
    key = keys.create("t", tier)
    assert key.startswith(f"{prefix}_{tier}_")
    identity = keys.verifier.verify(key)
    assert identity is not None
    assert (identity.key_id, identity.tier) == (id_of(key), tier)
    keys.close()


def test_what_was_asked_for_is_in_the_list(keys: Keys, clock: Clock) -> None:
    first = keys.create("t1", "pro", "one", scopes=("a", "b", "a"), user_id="u")
    clock.now += 1.0
    keys.create("t2", expires=timedelta(days=1))
    clock.now += 1.0
    keys.create("t3", expires=datetime(2030, 1, 1, tzinfo=UTC))
    one, two, three = keys.list()
    assert (one.key_id, one.tenant_id, one.tier, one.name) == (id_of(first), "t1", "pro", "one")
    assert (one.scopes, one.user_id, one.created, one.expires) == (("a", "b"), "u", NOW, None)
    assert two.expires == NOW + 1.0 + 86400
    assert three.expires == datetime(2030, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tenant_id": ""}, "tenant_id must not be empty"),
        ({"tenant_id": "a\nb"}, "tenant_id must be printable"),
        ({"tenant_id": "x" * 256}, "at most 255"),
        ({"tier": ""}, "tier must be"),
        ({"tier": "a b"}, "tier must be"),
        ({"tier": "_a"}, "tier must be"),
        ({"name": "\x00"}, "name must be"),
        ({"scopes": "read"}, r"write \('read',\)"),
        ({"scopes": ("",)}, "scope must not be empty"),
        ({"user_id": ""}, "user_id must not be empty"),
        ({"expires": timedelta(0)}, "in the future"),
        ({"expires": datetime(2020, 1, 1, tzinfo=UTC)}, "in the future"),
        ({"expires": datetime(2030, 1, 1)}, "time zone"),  # noqa: DTZ001
    ],
)
def test_a_key_that_cannot_be_is_told(asked: dict[str, Any], says: str, keys: Keys) -> None:
    with pytest.raises(ValueError, match=says):
        keys.create(**{"tenant_id": "t", **asked})
    assert keys.list() == []


def test_a_revoked_key_ends_here_at_once(keys: Keys) -> None:
    key = keys.create("t")
    assert keys.verifier.verify(key)
    keys.revoke(id_of(key))
    assert keys.verifier.verify(key) is None
    keys.revoke(id_of(key))
    assert keys.list()[0].revoked == NOW


def test_another_process_sees_a_revocation_within_the_time_of_its_cache(
    keys: Keys, tmp_path: Path, clock: Clock
) -> None:
    key = keys.create("t")
    other = make(tmp_path, clock)
    assert other.verifier.verify(key)
    keys.revoke(id_of(key))
    assert other.verifier.verify(key)
    clock.now += 30.0
    assert other.verifier.verify(key) is None
    other.close()


def test_a_replaced_key_works_until_the_overlap_is_over(keys: Keys, clock: Clock) -> None:
    old = keys.create("t", "pro", "n", scopes=("a",), user_id="u", expires=timedelta(days=9))
    assert keys.verifier.verify(old)
    new = keys.rotate(id_of(old), overlap=timedelta(hours=1))
    before, after = keys.list()
    if before.key_id != id_of(old):
        before, after = after, before
    assert before.expires == NOW + 3600
    assert (
        after.tenant_id,
        after.tier,
        after.name,
        after.scopes,
        after.user_id,
        after.expires,
    ) == (
        *("t", "pro", "n", ("a",), "u"),
        NOW + 9 * 86400,
    )
    assert works(keys, old)
    assert works(keys, new)
    clock.now += 3600
    assert not works(keys, old)
    assert works(keys, new)


def test_an_overlap_of_nothing_ends_the_old_key_at_once(keys: Keys) -> None:
    old = keys.create("t")
    assert keys.verifier.verify(old)
    new = keys.rotate(id_of(old), timedelta(0))
    assert keys.verifier.verify(old) is None
    assert keys.verifier.verify(new)


def test_what_there_is_not_cannot_be_ended_or_replaced(keys: Keys, clock: Clock) -> None:
    key = keys.create("t", expires=timedelta(hours=1))
    for act in (keys.revoke, keys.rotate, keys.last_used):
        with pytest.raises(NoSuchKey, match="no key with the id"):
            act("nothing")
        with pytest.raises(NoSuchKey):
            act("")
    with pytest.raises(ValueError, match="below zero"):
        keys.rotate(id_of(key), timedelta(-1))
    clock.now += 3600
    with pytest.raises(NoSuchKey, match="revoked or expired"):
        keys.rotate(id_of(key))
    revoked = keys.create("t")
    keys.revoke(id_of(revoked))
    with pytest.raises(NoSuchKey, match="revoked or expired"):
        keys.rotate(id_of(revoked))


def test_a_key_of_the_settings_is_ended_there(tmp_path: Path) -> None:
    keys = make(tmp_path, environment="development")
    with pytest.raises(NoSuchKey, match="stands in the settings"):
        keys.revoke("demo-pro")


def test_the_last_use(keys: Keys) -> None:
    key = keys.create("t")
    assert keys.last_used(id_of(key)) is None
    keys.verifier.verify(key)
    assert keys.last_used(id_of(key)) == NOW


def test_the_async_twins(keys: Keys) -> None:
    async def main() -> None:
        key = await keys.acreate("t", "pro", "n", scopes=("a",), expires=timedelta(1), user_id="u")
        assert await keys.verifier.averify(key)
        assert await keys.alast_used(id_of(key)) == NOW
        new = await keys.arotate(id_of(key), timedelta(hours=1))
        await keys.arevoke(id_of(new))
        assert len(await keys.alist()) == 2
        assert await keys.verifier.averify(new) is None

    asyncio.run(main())


def test_outside_development_a_pepper_is_needed(tmp_path: Path) -> None:
    keys = make(tmp_path, keys={"pepper": ""})
    for act in (lambda: keys.create("t"), keys.guard, keys.list, lambda: keys.verifier):
        with pytest.raises(SettingsError, match="OPSGUARD_KEYS__PEPPER"):
            act()
    development = make(tmp_path, environment="development", keys={"pepper": ""})
    assert works(development, development.create("t"))
    assert works(development, "demo-free-key-12345")
    development.close()


def test_a_lost_pepper_is_told(keys: Keys, tmp_path: Path) -> None:
    key = keys.create("t")
    other = make(tmp_path, keys={"pepper": "another pepper altogether"})
    with pytest.raises(KeyStoreError, match="another pepper"):
        other.create("t")
    with pytest.raises(KeyStoreDown):
        other.verifier.verify(key)
    other.close()


def test_what_a_driver_raises_is_an_error_of_ours(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    from opsguard.keys import sqlite

    monkeypatch.setattr(sqlite, "BUSY", 20)
    keys.create("t")
    keys.close()
    other = sqlite3.connect(tmp_path / "keys.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(KeyStoreDown, match="locked"):
        keys.create("t")
    other.rollback()
    other.close()


def test_secrets_are_in_no_repr(tmp_path: Path) -> None:
    settings = Settings.load(
        {
            "environment": "development",
            "keys": {
                "pepper": "pepper-secret-1234",
                "master": "master-secret",
                "store": "postgresql://u:store-secret@h/d",
                "static": {"a": {"key": "static-secret"}},
            },
        },
        environ={},
        directory=tmp_path,
    )
    assert "secret" not in repr(settings)
    assert {key for key, option in options().items() if option.secret} >= {
        *("keys.pepper", "keys.master", "keys.store", "keys.static")
    }


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ({"required": ["x"]}, "keys.required: .*must start with /"),
        ({"public": "/a/{b}"}, "keys.public: .*has a {"),
        ({"prefix": "a b"}, "keys.prefix: .*at most 32"),
        ({"pepper": "hush"}, r"keys.pepper: \*\*\*: must have 16"),
        ({"master": "hush"}, r"keys.master: \*\*\*: must have 8"),
        ({"master": "hush hush hush"}, r"keys.master: \*\*\*: .*without spaces"),
        ({"static": {"a": {"hash": "hush"}}}, r"keys.static: \*\*\*: .*64 hexadecimal"),
        ({"static": {"a": {"key": "hush,hush"}}}, r"keys.static: \*\*\*: .*commas"),
        ({"header": "a b"}, "keys.header"),
        ({"cache": -1}, "keys.cache"),
        ({"max_failures": 0}, "keys.max_failures"),
    ],
)
def test_a_wrong_setting_is_told_and_no_secret_with_it(
    said: dict[str, object], says: str, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        Settings.load({"keys": said}, environ={}, directory=tmp_path)
    assert "hush" not in str(caught.value)


def test_settings_from_the_environment_and_toml(tmp_path: Path) -> None:
    (tmp_path / "opsguard.toml").write_text(
        "[keys]\nrequired = ['/api/*']\n"
        f"[keys.static.ci]\nhash = '{'0' * 64}'\ntier = 'pro'\nscopes = ['ops']\n"
        "expires = 2030-01-01T00:00:00Z\n"
    )
    environ = {"MASTER_API_KEY": "master-secret", "OPSGUARD_KEYS__PUBLIC": "/,/docs"}
    keys = Settings.load({}, environ=environ, directory=tmp_path).keys
    assert (keys.required, keys.public) == (("/api/*",), ("/", "/docs"))
    assert (keys.master, keys.static["ci"].scopes) == ("master-secret", ("ops",))
    assert keys.static["ci"].expires == datetime(2030, 1, 1, tzinfo=UTC)


# The command.


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without settings files, and an environment with a pepper only."""
    monkeypatch.chdir(tmp_path)
    for option in options().values():
        for variable in option.variables:
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("OPSGUARD_KEYS__PEPPER", "a pepper of the tests")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(("keys", *arguments))
    return ended.value.code if isinstance(ended.value.code, int) else 0


def test_the_life_of_a_key_at_the_command_line(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list") == 0
    assert capsys.readouterr().err == "There are no keys yet.\n"
    arguments = ("--tenant", "t1", "--tier", "pro", "--name", "n", "--scope", "a", "--scope", "b")
    assert run("create", *arguments, "--expires", "90d") == 0
    out, err = capsys.readouterr()
    key = out.strip()
    assert key.startswith("ops_pro_")
    assert "only its hash" in err
    assert (place / "opsguard-keys.db").exists()

    assert run("list", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["key_id"], row["tenant_id"], row["scopes"]) == (id_of(key), "t1", ["a", "b"])
    assert datetime.fromisoformat(row["expires"]) - datetime.fromisoformat(row["created"]) == (
        timedelta(days=90)
    )

    assert run("rotate", id_of(key), "--overlap", "1h") == 0
    new = capsys.readouterr().out.strip()
    assert run("revoke", id_of(key)) == 0
    capsys.readouterr()
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert any(re.match(rf"{id_of(new)}  pro   t1 +n ", line) for line in lines)
    assert new.split("_")[-1] not in "".join(lines)


@pytest.mark.parametrize("columns", [60, 110, 200])
def test_the_list_is_a_table_at_any_width(
    columns: int, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    secrets = []
    for tenant, name, scopes in (
        ("t", "", ()),
        ("a-customer-with-a-long-name", "The production key", ("orders:read", "orders:write")),
    ):
        asked = [text for scope in scopes for text in ("--scope", scope)]
        assert run("create", "--tenant", tenant, "--name", name, *asked) == 0
        secrets.append(capsys.readouterr().out.strip())
    assert run("list") == 0
    out = capsys.readouterr().out
    head, *lines = out.splitlines()
    assert max(map(len, [head, *lines])) <= columns
    starts = [found.start() for found in re.finditer(r"(?<!\S)\S", head.replace("last used", "u"))]
    for line in lines:  # no cell reaches over the edge of its column
        assert all(line[at - 1 : at].strip() == "" for at in starts if at), (line, starts)
    for key in secrets:
        assert id_of(key) in out
        assert key.rpartition("_")[2][:8] not in out
    first = next(line for line in lines if line.startswith(id_of(secrets[0])))
    assert first[head.index("tenant") :].startswith("t ")
    assert first[head.index("name") :].startswith("- ")


@pytest.mark.parametrize("file", [None, "service.log"])
def test_each_key_event_at_the_command_line_leaves_an_audit_line(
    file: str | None,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pwd

    if file is not None:
        monkeypatch.setenv("OPSGUARD_LOGGING__FILE", str(place / file))
    monkeypatch.setenv("LOG_LEVEL", "ERROR")
    monkeypatch.setenv("LOGNAME", "somebody-else")
    assert run("create", "--tenant", "t1") == 0
    key, said = capsys.readouterr()
    assert run("rotate", id_of(key.strip())) == 0
    new, err = capsys.readouterr()
    assert run("revoke", id_of(new.strip())) == 0
    said += err + capsys.readouterr().err
    if file is not None:
        assert "keys." not in said
        said = (place / file).read_text()
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines] == ["keys.created", "keys.rotated", "keys.revoked"]
    user = pwd.getpwuid(os.getuid()).pw_name
    for line in lines:
        assert (line["who"], line["how"], line["tenant_id"]) == (user, "cli", "t1")
        assert line["logger"] == "opsguard.audit"
    assert [line["key_id"] for line in lines] == [id_of(one.strip()) for one in (key, new, new)]
    for one in (key, new):
        assert one.strip().rpartition("_")[2] not in said
    assert not logging.getLogger("opsguard.audit").handlers


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("revoke", "nothing"), 1, "no key with the id 'nothing'"),
        (("rotate", "nothing"), 1, "no key with the id"),
        (("create", "--tenant", ""), 1, "tenant_id must not be empty"),
        (("create",), 2, "--tenant"),
        (("create", "--tenant", "t", "--expires", "90"), 2, "as in 90d"),
    ],
)
def test_what_cannot_be_done_is_told(
    arguments: tuple[str, ...],
    status: int,
    says: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*arguments) == status
    assert says in capsys.readouterr().err


def test_the_command_without_a_pepper_names_the_variable(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPSGUARD_KEYS__PEPPER")
    assert run("create", "--tenant", "t") == 1
    assert "OPSGUARD_KEYS__PEPPER" in capsys.readouterr().err


def test_the_hash_for_a_key_of_the_settings(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    monkeypatch.setattr(click, "prompt", lambda *_, **__: "my-own-key")
    assert run("hash") == 0
    digest = capsys.readouterr().out.strip()
    keys = make(place, keys={"static": {"mine": {"hash": digest, "tier": "pro"}}})
    identity = keys.verifier.verify("my-own-key")
    assert identity is not None
    assert (identity.key_id, identity.tier) == ("mine", "pro")


def test_nobody_hears_of_faults_at_the_command_line_but_by_its_error(place: Path) -> None:
    keys = cli.keys_in_force()
    keys.create("t")
    keys.close()
    (place / "opsguard-keys.db").write_bytes(b"no database" * 1000)
    with pytest.raises(KeyStoreDown):
        keys.verifier.verify("ops_pro_" + "a" * 12 + "_" + "b" * 43)
