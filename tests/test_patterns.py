"""Path patterns: no spelling dodges a rule, none borrows an exemption."""

from __future__ import annotations

import time

import pytest

from opsguard.patterns import Patterns, check, exactness, forms, is_plain

RULES = Patterns([("/admin/*", "admin"), ("/Login/", "login"), ("/a", "a"), ("*", "rest")])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/admin", "admin"),
        ("/admin/", "admin"),
        ("/admin/users", "admin"),
        ("/ADMIN/users", "admin"),
        ("//admin/users", "admin"),
        ("/admin//users", "admin"),
        ("/./admin", "admin"),
        ("/x/../admin", "admin"),
        ("/admin/../x", "admin"),
        ("/x//../admin", "admin"),
        ("//admin//..//x", "admin"),
        ("/%2e/admin", "admin"),
        ("/%61dmin", "admin"),
        ("/%2561dmin", "admin"),
        ("/%25252561dmin", "admin"),
        ("/x/%2e%2e/admin", "admin"),
        ("\\admin\\x", "admin"),
        ("/x\\..\\admin", "admin"),
        ("admin", "admin"),
        ("/login", "login"),
        ("/login/", "login"),
        ("/a", "a"),
        ("/administrator", "rest"),
        ("/a/b", "rest"),
        ("/", "rest"),
        ("", "rest"),
        ("*", "rest"),
    ],
)
def test_a_rule_counts_however_the_path_is_spelled(path: str, value: str) -> None:
    assert RULES.first(path) == value
    assert RULES.first(path) == value  # from memory, too


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("/docs", "docs"),
        ("/docs/Intro", "docs"),
        ("/docs/", "docs"),
        ("/health", "health"),
        ("/health/", None),
        ("/Health", None),
        ("//health", None),
        ("/healthz-admin", None),
        ("/health/../admin", None),
        ("/docs/../admin", None),
        ("/docs/%2e%2e/admin", None),
        ("/docs//x", None),
        ("/docs\\..\\admin", None),
        ("/health\x00", None),
        ("/docs/\r\nx", None),
        ("health", None),
        ("/docs2", None),
    ],
)
def test_an_exemption_is_for_the_spelling_in_the_pattern_alone(
    path: str, value: str | None
) -> None:
    assert Patterns([("/docs/*", "docs"), ("/health", "health")]).plain(path) == value


def test_everything_but_odd_paths_may_be_exempt() -> None:
    assert Patterns([("*", 1)]).plain("/x") == 1
    assert Patterns([("*", 1)]).plain("//x") is None


def test_the_first_match_wins_among_exact_paths_and_sub_trees() -> None:
    assert Patterns([("/a/*", 1), ("/a/b", 2)]).first("/a/b") == 1
    assert Patterns([("/a/b", 2), ("/a/*", 1)]).first("/a/b") == 2
    assert Patterns([("/a", 1), ("/a", 2)]).first("/a") == 1
    assert Patterns([("/a", 1)]).first("/b") is None


def test_each_gives_what_every_form_would_be_given() -> None:
    rules = Patterns([("/cheap", "loose"), ("/admin/*", "strict")])
    assert rules.each("/admin/../cheap") == ("loose", "strict")
    assert rules.each("/cheap") == ("loose",)
    assert rules.each("/other") == ()


def test_no_rules_are_falsy_and_match_nothing() -> None:
    rules: Patterns[int] = Patterns([])
    assert not rules
    assert rules.first("/") is None
    assert RULES


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("", "must start with /"),
        ("x", "must start with /"),
        ("/*/x", "only at its end"),
        ("/x*", "only at its end"),
        ("/**", "only at its end"),
        ("//x", "plain path"),
        ("/x/../y", "plain path"),
        ("/%2e", "plain path"),
        ("/x\n", "plain path"),
        ("/items/{id}", "has a {"),
        ("/x?y=1", "has a ?"),
        ("/<int:x>", "has a <"),
    ],
)
def test_a_pattern_that_cannot_mean_what_it_says_is_refused(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match="path pattern") as caught:
        Patterns([(pattern, 1)])
    assert says in str(caught.value)


@pytest.mark.parametrize("pattern", ["*", "/*", "/", "/x", "/x/", "/x/*", "/.well-known/*", "/ü"])
def test_what_a_pattern_may_be(pattern: str) -> None:
    check(pattern)


def test_the_narrower_pattern_is_above() -> None:
    ordered = sorted(["*", "/a/*", "/a/b/*", "/a", "/a/b"], key=exactness)
    assert ordered[:3] == ["*", "/a/*", "/a/b/*"]
    assert exactness("/a") == exactness("/a/b")


def test_the_memory_of_paths_is_bounded() -> None:
    rules = Patterns([("/x/*", 1)])
    for number in range(5000):
        assert rules.first(f"/x/{number}") == 1
    assert rules.first("/x/" + "y" * 1000) == 1
    assert len(rules._seen) <= 1024
    assert max(map(len, rules._seen)) <= 256


@pytest.mark.parametrize(
    "path", ["/a" * 32_768, "/../" * 16_384, "%25" * 21_845, "%2%35" * 13_000, "//" * 32_768]
)
def test_a_path_of_64_kilobytes_takes_no_time(path: str) -> None:
    rules = Patterns([("/x/*", 1), ("/y", 2)])
    before = time.process_time()
    rules.first(path)
    assert time.process_time() - before < 0.5
    assert len(forms(path)) <= 4


def test_a_plain_path_has_one_form() -> None:
    assert forms("/Some/Path/") == ("/some/path",)
    assert is_plain("/100%/x")
