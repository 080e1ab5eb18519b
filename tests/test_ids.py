"""Which inbound id is believed, and that fresh ones are unique whatever an app does."""

from __future__ import annotations

import os
import random
import re
import threading

import pytest

from opsguard.ids import fresh, valid


@pytest.mark.parametrize(
    "text",
    ["a", "A.b_c-9", "0" * 128, "3f2504e0-4f89-11d3-9a0c-0305e82c3301", "..", "-"],
    ids=lambda text: text[:12],
)
def test_a_sound_id_is_valid(text: str) -> None:
    assert valid(text)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("0" * 129, id="too long"),
        pytest.param("a b", id="space"),
        pytest.param("a\n", id="trailing newline"),
        pytest.param("a\r\nSet-Cookie: x", id="CR LF"),
        pytest.param("a\0", id="NUL"),
        pytest.param("\x1b[31mred", id="ANSI"),
        pytest.param("a\u2028b", id="line separator"),
        pytest.param("\u0661", id="a digit of another script"),
        pytest.param("é", id="not ASCII"),
        pytest.param("ÿ", id="0xff"),
        pytest.param("a,b", id="a list"),
        pytest.param('"a"', id="quotes"),
        pytest.param("{a}", id="braces"),
        pytest.param("a" * 65_536 + "\n", id="64 KB"),
    ],
)
def test_an_unsound_id_is_not_valid(text: str) -> None:
    assert not valid(text)


def test_fresh_ids_are_32_lower_case_hex_digits_and_valid() -> None:
    for _ in range(300):  # more than one block
        made = fresh()
        assert re.fullmatch(r"[0-9a-f]{32}", made)
        assert valid(made)


def test_an_apps_own_seed_does_not_repeat_ids() -> None:
    random.seed(0)
    first = [fresh() for _ in range(200)]
    random.seed(0)
    assert not set(first) & {fresh() for _ in range(200)}


def test_threads_never_get_the_same_id() -> None:
    found: list[list[str]] = []

    def take() -> None:
        found.append([fresh() for _ in range(1_000)])

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({made for ids in found for made in ids}) == 8_000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_repeat_neither_the_parents_ids_nor_each_others() -> None:
    fresh()  # the pool is filled before the fork
    found: list[str] = []
    for _ in range(2):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, " ".join([fresh() for _ in range(100)]).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            found += pipe.read().split()
        os.waitpid(pid, 0)
    found += [fresh() for _ in range(100)]
    assert len(set(found)) == len(found) == 300
