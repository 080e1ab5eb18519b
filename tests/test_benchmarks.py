"""The benchmarks' judgement: figures, verdicts and the controls that make a run void.

Everything here is made-up data with a fixed seed; nothing is measured.
"""

from __future__ import annotations

import itertools
import json
import random
import socketserver
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import guarding, report
from benchmarks.apps import Served, make_all
from benchmarks.drivers import direct
from benchmarks.drivers.request import HEADERS, KEY, KEYED, environs, scopes, wire, with_encoding
from benchmarks.estimates import (
    Controls,
    Interval,
    Pair,
    Round,
    Verdict,
    added_percent,
    added_ratio,
    added_us,
    arm_ratio,
    bootstrap,
    judge,
    percentile,
)
from benchmarks.harness import (
    Claim,
    InProcess,
    Plan,
    assess,
    in_teams,
    interleaved,
    one_round,
    requests_per_block,
    run,
)
from benchmarks.inprocess import counted_requests, different_answers
from benchmarks.load import complete, reading, to_one_worker
from benchmarks.planted import aim, spend
from benchmarks.program import DEFAULT_PLAN, Program, Record, Table, finished
from benchmarks.programs import code, gate, quick, replaced
from benchmarks.redis_server import NoRedis, redis
from benchmarks.registry import PROGRAMS
from benchmarks.served import CONTROL, AsgiControl, WsgiControl
from benchmarks.turns import Turns
from opsguard.logging.batches import BATCH

BARE_US = 400.0
LIMIT = 2.0


def rounds_of(
    count: int = 64,
    *,
    guarded: float = 5.0,
    twin: float = 0.0,
    planted: float = 30.0,
    noise: float = 2.0,
    drift: float = 0.0,
) -> list[Round]:
    """Rounds as a machine would give them, from true costs in µs and a standard deviation."""
    draw = random.Random(7)
    found: list[Round] = []
    for number in range(count):
        one = {}
        for name, added in (("guarded", guarded), ("twin", twin), ("planted", planted)):
            bare = BARE_US + drift * number
            one[name] = Pair(
                1_000 * draw.gauss(bare, noise), 1_000 * draw.gauss(bare + added, noise)
            )
        found.append(one)
    return found


CLAIMS = [Claim("added %", added_percent("guarded"), LIMIT)]


def verdict_of(rounds: Sequence[Round]) -> Verdict:
    return assess(rounds, CLAIMS, Controls()).verdict


# Statistics ---------------------------------------------------------------------------------------


def test_an_added_cost_is_found_in_noise_larger_than_itself() -> None:
    """With a cost of 5 µs in noise of 10 µs the interval holds the truth and stays useful."""
    interval = bootstrap(rounds_of(400, noise=10.0), added_us("guarded"))
    assert interval.contains(5.0)
    assert interval.high - interval.low < 5.0


def test_drift_of_the_machine_does_not_enter_the_difference() -> None:
    """Bare that gets slower through the whole run leaves the paired difference alone."""
    interval = bootstrap(rounds_of(drift=3.0, noise=0.5), added_us("guarded"))
    assert interval.value == pytest.approx(5.0, abs=0.5)


def test_a_few_wild_rounds_do_not_move_the_figure() -> None:
    rounds = rounds_of(noise=0.5)
    wild: list[Round] = [
        {name: Pair(pair.bare, pair.arm * 10) for name, pair in one.items()} for one in rounds[:6]
    ]
    assert added_us("guarded")([*wild, *rounds[6:]]) == pytest.approx(5.0, abs=0.5)


def test_percent_is_of_the_bare_app() -> None:
    assert added_percent("guarded")(rounds_of(noise=0.01)) == pytest.approx(1.25, abs=0.01)


def test_ratio_is_of_what_two_arms_add() -> None:
    rounds = rounds_of(noise=0.01)
    assert added_ratio("guarded", "planted")(rounds) == pytest.approx(1 / 6, abs=0.001)


def test_a_whole_request_is_compared_with_one_taken_beside_it() -> None:
    """Through any drift; the planted 30 µs on 400 are more than the 5 % that scale allows."""
    ratio = bootstrap(rounds_of(noise=0.5, drift=3.0), arm_ratio("planted"))
    assert ratio.low > 1.05
    assert bootstrap(rounds_of(noise=0.5), arm_ratio("planted")).contains(1.075)
    assert bootstrap(rounds_of(noise=0.5), arm_ratio("twin")).contains(1.0)


def test_the_same_rounds_give_the_same_interval() -> None:
    rounds = rounds_of()
    assert bootstrap(rounds, added_us("guarded")) == bootstrap(rounds, added_us("guarded"))


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 intervals of 95 % over fresh samples, 90 % or more hold the true mean."""
    draw = random.Random(3)
    held = 0
    for seed in range(200):
        sample = [draw.gauss(1.0, 1.0) for _ in range(40)]
        mean = bootstrap(sample, lambda s: sum(s) / len(s), seed=seed, resamples=200)
        held += mean.contains(1.0)
    assert held >= 180


def test_no_rounds_are_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        bootstrap([], added_us("guarded"))


# Verdicts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        pytest.param(Interval(1.0, 0.5, 1.5), Verdict.PASS, id="all within"),
        pytest.param(Interval(1.5, 1.0, 2.0), Verdict.PASS, id="upper end on the limit"),
        pytest.param(Interval(1.9, 1.5, 2.1), Verdict.UNDECIDED, id="upper end above"),
        pytest.param(Interval(2.5, 2.0, 3.0), Verdict.UNDECIDED, id="lower end on the limit"),
        pytest.param(Interval(2.5, 2.1, 3.0), Verdict.FAIL, id="all above"),
    ],
)
def test_only_a_whole_interval_decides(interval: Interval, verdict: Verdict) -> None:
    assert judge(interval, 2.0) is verdict


@pytest.mark.parametrize(
    ("costs", "verdict"),
    [
        pytest.param({"guarded": 5.0}, Verdict.PASS, id="1.25 %"),
        pytest.param({"guarded": 12.0}, Verdict.FAIL, id="3 %"),
        pytest.param({"guarded": 8.0}, Verdict.UNDECIDED, id="2 % exactly"),
        pytest.param({"guarded": 5.0, "twin": 4.0}, Verdict.VOID, id="bias in the twin"),
        pytest.param({"guarded": 5.0, "twin": -4.0}, Verdict.VOID, id="bias the other way"),
        pytest.param({"guarded": 5.0, "planted": 0.0}, Verdict.VOID, id="planted cost lost"),
        pytest.param({"guarded": 5.0, "planted": 15.0}, Verdict.VOID, id="half of it lost"),
        pytest.param({"guarded": 5.0, "planted": 60.0}, Verdict.VOID, id="counted twice"),
        pytest.param({"guarded": 12.0, "twin": 4.0}, Verdict.VOID, id="void comes before fail"),
        pytest.param({"guarded": 5.0, "twin": 1.0}, Verdict.PASS, id="a trace in the twin"),
    ],
)
def test_a_run_is_judged_by_its_claims_and_its_controls(
    costs: dict[str, float], verdict: Verdict
) -> None:
    assert verdict_of(rounds_of(128, **costs)) is verdict


def test_noise_that_hides_the_planted_cost_makes_the_run_void() -> None:
    """An interval from nothing to twice the planted cost holds 30, and still has seen nothing."""
    rounds = rounds_of(8, noise=150.0)
    interval = bootstrap(rounds, added_us("planted"))
    assert interval.contains(30.0)
    assert any("planted" in one for one in Controls().objections(rounds))


def test_a_void_run_says_what_it_read() -> None:
    (objection,) = Controls().objections(rounds_of(twin=10.0, noise=0.1))
    assert objection.startswith("the bare app against itself reads +10.0")


# The harness --------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """An arm that costs what it is told and notes when it ran."""

    name: str
    cost_us: float
    diary: list[str] = field(default_factory=list)

    def block(self, requests: int) -> float:
        self.diary.append(self.name)
        return requests * self.cost_us * 1_000


def test_bare_and_arm_alternate_and_change_places_each_round() -> None:
    diary: list[str] = []
    bare, arm = Scripted("a", 400.0, diary), Scripted("b", 405.0, diary)
    first = one_round(bare, [arm], 10, turned=False)
    second = one_round(bare, [arm], 10, turned=True)
    assert "".join(diary) == "abbabaab"
    assert first == second == {"b": Pair(400_000.0, 405_000.0)}


def test_steady_drift_cancels_in_a_block_order() -> None:
    """The machine that gets 10 µs slower with each block still shows the arm's 5 µs."""

    class Tiring(Scripted):
        slower = 0.0

        def block(self, requests: int) -> float:
            Tiring.slower += 10.0
            return requests * (self.cost_us + Tiring.slower) * 1_000

    pair = one_round(Tiring("a", 400.0), [Tiring("b", 405.0)], 10, turned=False)["b"]
    assert pair.added == pytest.approx(5_000.0)


def test_deferred_work_is_on_the_account_of_its_block() -> None:
    now = [0]

    def serve(requests: int) -> None:
        now[0] += requests * 100

    def drain() -> None:
        now[0] += 55

    arm = InProcess("guarded", serve, drain, clock=lambda: now[0])
    assert arm.block(10) == 1_055.0


def test_a_block_is_as_many_requests_as_fill_its_time() -> None:
    assert requests_per_block(Scripted("a", 100.0), seconds=0.03) == 300


def test_arms_are_run_once_before_they_count() -> None:
    diary: list[str] = []
    rounds = in_teams([(Scripted("a", 400.0, diary), Scripted("b", 405.0, diary))], 10)
    next(rounds)
    assert "".join(diary) == "ab" + "abba"


def test_a_team_takes_turns_within_its_blocks_and_finishes_on_its_own_account() -> None:
    diary: list[str] = []

    @dataclass
    class Late(Scripted):
        """Puts 1 µs a request off, and once 50 from before; each is 9 µs dearer for a cold one."""

        owed_us: float = 50.0

        def part(self, requests: int, warm: int = 0) -> float:
            self.owed_us += requests
            return self.block(requests) + (3 - warm) * 9_000

        def rest(self) -> float:
            self.diary.append(self.name.upper())
            owed, self.owed_us = self.owed_us, 0.0
            return owed * 1_000

    rounds = interleaved([(Late("a", 400.0, diary), Late("b", 405.0, diary))], 10, 5, warm=3)
    found, again = next(rounds), next(rounds)
    assert "".join(diary) == "ab" + "ABabbaabbaAB" + "BAbaabbaabBA"
    assert found == again == {"b": Pair(401_000.0, 406_000.0)}


def test_the_two_halves_of_a_block_of_the_quick_gate_are_whole_batches_of_lines() -> None:
    turns, odd = divmod(2 * quick.STEP, quick.TURN)
    assert odd == 0
    assert turns * (quick.WARM + quick.TURN) % BATCH == 0


def test_where_a_batch_of_the_quick_gate_is_full_moves_through_its_turns() -> None:
    """What is put off is counted in the same part as the requests are."""
    length = quick.WARM + quick.TURN
    full = [line % length for line in range(BATCH - 1, BATCH * length, BATCH)]
    assert sum(place < quick.WARM for place in full) * length == quick.WARM * len(full)


def test_a_turn_of_workers_apart_is_a_batch_of_lines() -> None:
    assert replaced.WARM + replaced.TURN == BATCH


def test_warm_requests_and_what_they_put_off_are_on_nobodys_account() -> None:
    now = [0]
    owed = [0]

    def serve(requests: int) -> None:
        now[0] += requests * 100
        owed[0] += requests

    def drain() -> None:
        now[0] += owed[0]
        owed[0] = 0

    arm = InProcess("guarded", serve, drain, clock=lambda: now[0], warm=4)
    assert arm.block(10) == 1_010.0
    assert arm.part(10, warm=4) == 1_000.0
    assert arm.rest() == 14.0


def test_a_worker_leaves_out_the_warm_requests_and_what_they_put_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0]
    owed = [0]

    def app(environ: Any, start_response: Any) -> list[bytes]:
        now[0] += 100
        owed[0] += 1
        return []

    def drain() -> None:
        now[0] += owed[0]
        owed[0] = 0

    monkeypatch.setattr("benchmarks.served.process_time_ns", lambda: now[0])
    control = WsgiControl({"guarded": Served(app, "wsgi", drain)})

    def ask(path: str, query: str = "") -> bytes:
        environ = {"PATH_INFO": path, "QUERY_STRING": query}
        return b"".join(control(environ, lambda status, headers: None))

    def spent(query: str = "") -> tuple[int, int]:
        told = json.loads(ask(CONTROL, query))
        return told["cpu_ns"], told["requests"]

    ask("/page")
    assert spent("warm=4") == (101, 1)
    for _ in range(4 + 10):
        ask("/page")
    assert spent() == (101 + 1_010, 15)
    ask("/page")
    assert spent() == (101 + 1_111, 16)


def test_a_worker_with_several_apps_serves_with_the_one_it_is_told() -> None:
    drained: list[str] = []

    def made(name: str) -> Served:
        def app(environ: Any, start_response: Any) -> list[bytes]:
            return [name.encode()]

        return Served(app, "wsgi", lambda: drained.append(name))

    control = WsgiControl({name: made(name) for name in ("bare", "guarded again")})

    def ask(path: str, query: str = "") -> bytes:
        environ = {"PATH_INFO": path, "QUERY_STRING": query}
        return b"".join(control(environ, lambda status, headers: None))

    assert ask("/page") == b"bare"
    ask(CONTROL, "arm=guarded+again")
    assert ask("/page") == b"guarded again"
    ask(CONTROL, "arm=bare&warm=1")
    assert ask("/page") == b"bare"
    assert drained == ["bare", "guarded again"]  # what is put off is on the account of its own


def served_by(turns: Turns, chosen: list[str], requests: int) -> list[str]:
    """Who serves them."""
    found = []
    for _ in range(requests):
        turns.arrived()
        found.append(chosen[-1])
    return found


def test_two_arms_take_turns_whose_first_requests_do_not_count() -> None:
    now, chosen = [0], list[str]()
    turns = Turns(("bare", "guarded"), 2, 1, chosen.append, lambda: now[0])
    costs = {"bare": 100, "guarded": 107}
    for _ in range(4 * 3 + 1):
        turns.arrived()
        now[0] += costs[chosen[-1]]
    assert chosen == ["bare", "guarded", "guarded", "bare", "bare"]
    assert turns.counted == {"bare": 4, "guarded": 4}
    assert turns.spent == {"bare": 400, "guarded": 428}
    assert served_by(turns, chosen, 3) == ["bare", "bare", "guarded"]


def test_what_is_done_late_is_charged_to_who_put_it_off() -> None:
    now, chosen = [0], list[str]()
    turns = Turns(("bare", "guarded"), 2, 1, chosen.append, lambda: now[0])

    def later(arm: str) -> None:
        now[0] += 9
        turns.late(arm, 9)

    for number in range(4 * 3 + 1):
        turns.arrived()
        if number in (0, 1, 4):  # bare: one that does not count, one that does; guarded
            later("guarded")
        if number == 5:
            later("another")
        now[0] += 100
    assert turns.spent == {"bare": 400, "guarded": 400 + 9 + 9}


def test_turns_without_a_request_are_refused() -> None:
    with pytest.raises(ValueError, match="one request at least"):
        Turns(("bare", "guarded"), 16, 0, lambda arm: None)


def test_the_timer_of_an_app_is_on_its_own_account(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]

    class Sink:
        def _tick(self) -> bool:
            now[0] += 9
            return True

        def flush(self) -> None:
            pass

    def app(environ: Any, start_response: Any) -> list[bytes]:
        now[0] += 100
        return []

    monkeypatch.setattr("benchmarks.served.process_time_ns", lambda: now[0])
    monkeypatch.setattr(Turns.__init__, "__defaults__", (lambda: now[0],))
    sink = Sink()
    arms = {"bare": Served(app, "wsgi", lambda: None), "guarded": Served(app, "wsgi", sink.flush)}
    control = WsgiControl(arms)

    def ask(path: str, query: str = "") -> bytes:
        environ = {"PATH_INFO": path, "QUERY_STRING": query}
        return b"".join(control(environ, lambda status, headers: None))

    assert sink._tick()
    ask(CONTROL, "turns=bare,guarded&turn=1&warm=1")
    for _ in range(4 * 2 + 1):
        ask("/page")
        assert sink._tick()
    told = json.loads(ask(CONTROL))
    assert told["counted"] == {"bare": 2, "guarded": 2}
    assert told["spent"] == {"bare": 200, "guarded": 200 + 4 * 9}
    assert "spent" not in json.loads(ask(CONTROL))


def test_a_full_batch_of_lines_moves_through_the_turns_of_the_gate() -> None:
    """So that what it costs is counted in the same part as the requests are."""
    length = gate.WARM + gate.TURN
    full = [line % length for line in range(BATCH - 1, BATCH * length, BATCH)]
    assert sum(place < gate.WARM for place in full) * length == gate.WARM * len(full)


def test_start_and_stop_of_such_a_worker_are_told_to_the_app_with_opsguard() -> None:
    def made(name: str) -> Served:
        return Served(lambda scope, receive, send: name, "asgi", lambda: None)

    control = AsgiControl({name: made(name) for name in ("bare", "guarded", "planted")})
    assert control({"type": "lifespan"}, None, None) == "guarded"
    assert control({"type": "http", "path": "/"}, None, None) == "bare"
    alone = AsgiControl({"bare": made("bare")})
    assert alone({"type": "lifespan"}, None, None) == "bare"


def test_turns_that_leave_a_part_of_a_block_out_are_refused() -> None:
    with pytest.raises(ValueError, match="turns of 7 do not divide a block of 10 requests"):
        next(interleaved([], 10, 7))


def test_a_block_may_be_a_whole_number_of_batches() -> None:
    assert requests_per_block(Scripted("a", 100.0), seconds=0.03, step=96) == 288
    assert requests_per_block(Scripted("a", 900.0), seconds=0.03, step=96) == 96


def test_an_arm_is_compared_with_the_one_it_is_teamed_with() -> None:
    """What a part adds is measured beside the app without that part, not beside the bare app."""
    bare, guarded = Scripted("bare", 400.0), Scripted("guarded", 405.0)
    limited, planted = Scripted("limited", 406.0), Scripted("planted", 430.0)
    found = next(in_teams([(guarded, limited), (bare, planted)], 10))
    assert found["limited"] == Pair(405_000.0, 406_000.0)
    assert found["planted"] == Pair(400_000.0, 430_000.0)


def endless(rounds: Sequence[Round]) -> Iterator[Round]:
    while True:
        yield from rounds


def test_a_clear_case_ends_with_the_first_look() -> None:
    outcome = run(endless(rounds_of()), CLAIMS, Controls(), Plan(first=32, cap=256))
    assert (outcome.verdict, outcome.rounds) == (Verdict.PASS, 32)


def test_a_close_case_is_looked_at_longer_and_reported_undecided() -> None:
    rounds = endless(rounds_of(256, guarded=8.0))
    outcome = run(rounds, CLAIMS, Controls(), Plan(first=32, cap=200))
    assert (outcome.verdict, outcome.rounds) == (Verdict.UNDECIDED, 200)


def test_a_void_start_is_looked_at_longer_too() -> None:
    """Bad luck at the start is outvoted; a control that stays off is not."""
    lucky = run(iter([*rounds_of(8, twin=10.0), *rounds_of(300)]), CLAIMS, Controls(), Plan(8, 256))
    assert lucky.verdict is Verdict.PASS
    biased = run(endless(rounds_of(twin=10.0)), CLAIMS, Controls(), Plan(8, 64))
    assert (biased.verdict, biased.rounds) == (Verdict.VOID, 64)


def test_a_plan_in_seconds_ends_in_time() -> None:
    clock = iter(range(1_000))
    plan = Plan(first=1_000, cap=1_000, seconds=10.0)
    outcome = run(
        endless(rounds_of()), CLAIMS, Controls(), plan, monotonic=lambda: float(next(clock))
    )
    assert outcome.rounds == 10


def test_an_outcome_survives_json() -> None:
    record = assess(rounds_of(), CLAIMS, Controls()).as_record()
    back = json.loads(json.dumps(record))
    assert back["verdict"] == "pass"
    assert back["verdicts"] == {"added %": "pass"}
    assert set(back["figures"]["added %"]) == {"value", "low", "high"}


@pytest.mark.parametrize(("part", "value"), [(0.0, 1.0), (0.5, 51.0), (0.99, 100.0), (1.0, 101.0)])
def test_a_percentile_is_one_of_the_values(part: float, value: float) -> None:
    assert percentile([float(number) for number in range(101, 0, -1)], part) == value


def test_no_values_have_no_percentile() -> None:
    with pytest.raises(ValueError, match="take some"):
        percentile([], 0.99)


# The request --------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [HEADERS, KEYED], ids=["plain", "with a key"])
def test_every_driver_sends_the_same_request(headers: tuple[tuple[str, str], ...]) -> None:
    head, _, _ = wire("/json", headers).decode("ascii").partition("\r\n\r\n")
    on_the_wire = [tuple(line.split(": ", 1)) for line in head.split("\r\n")[1:]]
    scope = scopes(headers)("/json")
    environ = environs(None, headers)("/json")
    named = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers}
    assert on_the_wire == list(headers)
    assert [(name.decode(), value.decode()) for name, value in scope["headers"]] == list(headers)
    assert {name: value for name, value in environ.items() if name.startswith("HTTP_")} == named
    assert scope["path"] == environ["PATH_INFO"] == "/json"


def test_an_app_is_given_no_object_twice() -> None:
    make = scopes(KEYED)
    assert make("/")["headers"][0][1] is not make("/")["headers"][0][1]


def test_only_the_encoding_is_exchanged() -> None:
    changed = dict(with_encoding(KEYED, "identity"))
    assert changed == dict(KEYED) | {"accept-encoding": "identity"}


# The planted cost ---------------------------------------------------------------------------------


class CostlyClock:
    """A clock whose every look costs 500 ns."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        self.now += 500
        return self.now


def test_the_planted_cost_includes_that_of_looking_at_the_clock() -> None:
    clock = CostlyClock()
    asked = aim(30_000, clock)
    began = clock.now
    spend(asked, clock)
    assert clock.now - began == pytest.approx(30_000, abs=500)


# Proof that the guarded app works -----------------------------------------------------------------


def test_requests_are_counted_over_all_series_of_the_endpoint() -> None:
    exposition = "\n".join(
        [
            "# TYPE http_requests_total counter",
            'http_requests_total{method="GET",endpoint="/json",status="200"} 40.0',
            'http_requests_total{method="HEAD",endpoint="/json",status="200"} 2.0',
            'http_requests_total{method="GET",endpoint="/json/more",status="200"} 7.0',
            'other_http_requests_total{endpoint="/json"} 9.0',
        ]
    )
    assert counted_requests(exposition, "/json") == 42.0


LIMITED_ANSWERS = ("bare", "limit by path", "limit by default", "key", "limits and keys")


def test_limits_and_keys_of_the_variants_are_on() -> None:
    """No complaint about what is on; one about each variant that only bears its name."""
    loop = direct.new_loop()
    served = make_all("asgi", LIMITED_ANSWERS)
    loops = dict.fromkeys(served, loop)
    assert different_answers(served, "/json", loops, KEYED) == []
    idle = served | dict.fromkeys(
        ("limit by path", "key"), make_all("asgi", ("guarded",))["guarded"]
    )
    assert different_answers(idle, "/json", loops, KEYED) == [
        "limit by path sends no X-RateLimit-Remaining: is it on?",
        "key lets somebody in without a key",
    ]
    loop.close()


def test_the_variants_use_the_key_that_the_load_client_sends() -> None:
    from opsguard.keys.minting import is_shaped, peppered, sealed

    options = guarding.settings("limits and keys")["keys"]
    stored = options["static"]["benchmark"]["hash"]
    assert is_shaped(KEY)
    assert sealed(peppered(guarding.PEPPER), KEY).hex() == stored
    assert KEY in dict(KEYED).values()


def test_the_redis_of_the_benchmarks_is_real_and_ends_even_frozen() -> None:
    import socket

    try:
        with redis() as server:
            port = int(server.url.rpartition(":")[2].partition("/")[0])
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                connection.sendall(b"PING\r\n")
                assert connection.recv(64) == b"+PONG\r\n"
                server.freeze()
                connection.settimeout(0.1)
                connection.sendall(b"PING\r\n")
                with pytest.raises(TimeoutError):
                    connection.recv(64)
    except NoRedis as reason:
        pytest.skip(str(reason))
    assert server.process.poll() is not None


def test_an_objection_makes_a_passed_record_void() -> None:
    record: Record = {"verdict": "pass", "objections": []}
    assert finished(record, ["no access lines"])["verdict"] == "void"


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        pytest.param(b"content-length: 2\r\n\r\n{}", True, id="length"),
        pytest.param(b"Content-Length: 2\r\n\r\n{", False, id="a byte short"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", True, id="chunks"),
        pytest.param(b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", False, id="no last chunk"),
        pytest.param(b"Content-Length: 0\r\n", False, id="in the head"),
        pytest.param(b"Server: x\r\n\r\n{}", False, id="until the connection ends"),
    ],
)
def test_the_load_client_knows_where_an_answer_ends(answer: bytes, whole: bool) -> None:
    assert complete(b"HTTP/1.1 200 OK\r\n" + answer) is whole


@pytest.fixture
def three_workers() -> Iterator[int]:
    """The port of a server whose connections are taken by one of three workers in turn."""
    pids = itertools.cycle((11, 12, 13))

    class Takes(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            body = json.dumps({"pid": next(pids)}).encode()
            while self.request.recv(65_536):
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                self.request.sendall(head.encode() + body)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Takes) as server:
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        yield server.server_address[1]
        server.shutdown()
        serving.join()


def test_the_load_client_can_keep_to_one_worker(three_workers: int) -> None:
    connections, pids = to_one_worker(three_workers, 4, 3)
    with connections:
        assert pids == {11, 12, 13}
        assert connections.spare == 4
        assert len({reading(connections)["pid"] for _ in range(8)}) == 1


def test_workers_that_do_not_answer_are_not_waited_for_without_end(three_workers: int) -> None:
    with pytest.raises(RuntimeError, match="3 of 4 workers"):
        to_one_worker(three_workers, 1, 4, seconds=0.5)


# The command --------------------------------------------------------------------------------------


def program(name: str = "gate", *, lenient: bool = False) -> Program:
    def measure(case: str, plan: Plan) -> Record:
        raise NotImplementedError

    def tables(records: Sequence[Record]) -> Sequence[Table]:
        rows = tuple((one["case"], str(one["bare"]), one["verdict"]) for one in records)
        return [Table(("framework", "bare µs", "verdict"), rows)]

    return Program(name, "A gate", "Why?", ("a",), measure, tables, DEFAULT_PLAN, lenient)


def records(*verdicts: str) -> list[Record]:
    return [
        {"case": "a", "bare": 400, "verdict": verdict, "objections": []} for verdict in verdicts
    ]


def test_a_held_limit_fails_only_what_is_wholly_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Until the limit is met no change may make it worse; a void run proves nothing either way."""
    monkeypatch.setattr(command, "HELD", tmp_path / "held.json")
    command.HELD.write_text('{"a": 8}')

    def record(verdict: str, low: float) -> Any:
        return {"case": "a", "verdict": verdict, "figures": {"added %": {"low": low}}}

    assert command.held_code([record("fail", 7.9)]) == 0
    assert "within the 8 % held" in capsys.readouterr().out
    assert command.held_code([record("fail", 8.1), record("pass", 0.1)]) == 1
    assert command.held_code([record("void", 9.0)]) == 0


@pytest.mark.parametrize(
    ("verdicts", "lenient", "code"),
    [
        pytest.param(("pass", "info"), False, 0, id="all hold"),
        pytest.param(("pass", "fail"), False, 1, id="one missed"),
        pytest.param(("fail", "void"), False, 3, id="void outranks"),
        pytest.param(("pass", "undecided"), False, 4, id="undecided does not hold"),
        pytest.param(("pass", "undecided"), True, 0, id="the quick gate lets undecided pass"),
        pytest.param(("fail",), True, 1, id="the quick gate fails what is certain"),
        pytest.param(("void",), True, 3, id="a void quick gate proves nothing"),
    ],
)
def test_the_exit_code_is_the_gravest_verdict(
    verdicts: tuple[str, ...], lenient: bool, code: int
) -> None:
    assert command.exit_code([(program(lenient=lenient), records(*verdicts))]) == code


class Answers:
    """What processes of the quick gate find, one after the other."""

    def __init__(self, *added: float, objections: Sequence[str] = ()) -> None:
        self.records = [
            {
                "bare": {"value": 400.0},
                "figures": {
                    "guarded added µs": {"value": more},
                    "twin added µs": {"value": 0.0},
                    "planted added µs": {"value": 30.0},
                },
                "guarded_requests": 7,
                "objections": list(objections),
            }
            for more in added
        ]

    def __call__(self, program: Program, case: str, plan: Plan) -> Record:
        assert (program, case, plan) == (quick.START, "asgi", quick.START.plan)
        return self.records.pop(0)


def test_each_process_is_one_sample_of_the_quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "answer", Answers(3.0, 3.5, 4.0, 2.5))
    found = quick.measure("asgi", Plan(first=4, cap=4), quick.START)
    assert found["figures"]["added µs"] == {"value": 3.25, "low": 2.5, "high": 4.0}
    assert (found["rounds"], found["starts"], found["requests"]) == (4, 4, 28)
    assert found["verdict"] == "pass"


def test_a_process_that_did_not_do_its_work_voids_the_quick_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(quick, "answer", Answers(3.0, 3.0, objections=["guarded sends no id"]))
    found = quick.measure("asgi", Plan(first=2, cap=2), quick.START)
    assert (found["verdict"], found["objections"]) == ("void", ["guarded sends no id"] * 2)


def test_a_process_that_crashed_ends_the_quick_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    crashed = {"case": "asgi", "verdict": "void", "objections": ["ended with code 1"]}
    monkeypatch.setattr(quick, "answer", lambda *_: crashed)
    with pytest.raises(ChildProcessError, match="ended with code 1"):
        quick.measure("asgi", Plan(first=2, cap=2), quick.START)


def test_an_unknown_program_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match="no such program: nonsense"):
        command.main(["--only", "nonsense"])


def test_a_case_can_be_chosen_alone() -> None:
    arguments = command.parser().parse_args(["--only", "gate:asgi", "--only", "gate:wsgi"])
    assert command.chosen(arguments) == {"gate": ("asgi", "wsgi")}


def test_every_program_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert set(listed) == set(PROGRAMS)
    assert {"gate", "gate-limits", "quick", "quick-limits", "limits", "keys"} <= set(listed)


def test_the_page_is_made_from_the_saved_results(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    facts = {
        "implementation": "CPython",
        "python": "3.11.7",
        "gil": True,
        "processor": "a processor",
        "cores": 2,
        "system": "Linux",
        "packages": {"fastapi": "1.0"},
    }
    one = program()
    report.save(one, records("pass"), facts, "2026-11-20")
    page = report.page([one, program("never run")])
    assert "| a | 400 | pass |" in page
    assert "Taken 2026-11-20 on CPython 3.11.7, a processor, 2 cores, Linux; fastapi 1.0." in page
    assert page.count("## A gate") == 1


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


class Readings(dict[str, Any]):
    """Has an interval for whatever is asked."""

    def __missing__(self, key: str) -> dict[str, float]:
        return interval(12.5)


RECORDS: dict[str, dict[str, Any]] = {
    "limits": {
        "bare": interval(40.0),
        "figures": Readings(),
        "controls": Readings(),
        "verdicts": {"limit by path µs": "fail", "limit by path part": "pass"},
        "peer": "slowapi",
    },
    "keys": {"bare": interval(40.0), "figures": Readings(), "controls": Readings()},
    "quick-limits": {
        "bare": interval(40.0),
        "figures": Readings(),
        "controls": Readings(),
        "server": "uvicorn's protocol code",
    },
    "replaced": {
        "bare": interval(40.0),
        "figures": Readings(),
        "controls": Readings(),
        "server": "gunicorn (sync)",
    },
    "stores": {
        "bare": interval(40.0),
        "figures": Readings(),
        "framework": "fastapi",
        "opening": 5,
    }
    | dict.fromkeys(("healthy_ms", "opening_ms", "opening_worst_ms"), 12.5)
    | dict.fromkeys(("after_ms", "after_p99_ms", "after_worst_ms"), 12.5),
    "scale": {"figures": Readings(), "controls": Readings()},
    "flood": {"buckets": 100_000}
    | dict.fromkeys(("memory_mb", "request_us", "before_p99_us", "during_p99_us"), 12.5)
    | dict.fromkeys(("p99_ratio", "before_wall_p99_us", "during_wall_p99_us"), 1.5)
    | dict.fromkeys(("longest_ms", "longest_wall_ms", "before_longest_ms"), 12.5)
    | dict.fromkeys(("new_bytes", "refused_bytes"), 120.0),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_program_shows_every_case_with_its_figures(name: str) -> None:
    program = PROGRAMS[name]
    found = [
        {"case": case, "verdict": "fail", "objections": [], "more": True} | RECORDS[name]
        for case in program.cases
    ]
    tables = program.tables(found)
    assert all(len(row) == len(table.columns) for table in tables for row in table.rows)
    shown = report.text(program, found)
    assert "12.5" in shown
    assert "fail" in shown


CALLGRIND = """# callgrind format
events: Ir Dr I1mr
summary: 0
fn=(1) main
0 288
totals: 57600 288 1440
"""


def test_the_counts_of_a_simulated_run_are_its_totals() -> None:
    assert code.totals(CALLGRIND) == {"Ir": 57600, "Dr": 288, "I1mr": 1440}
    with pytest.raises(ValueError, match="no totals"):
        code.totals("events: Ir\nsummary: 0\n")


def test_what_a_request_runs_is_shown_beside_the_bare_page() -> None:
    def counts(number: float) -> dict[str, float]:
        near = {"Ir": 1_000 * number, "I1mr": 10 * number, "D1mr": 5 * number, "D1mw": number}
        return near | {"ILmr": number, "DLmr": number, "DLmw": number}

    runs = {"bare": [counts(200), counts(202)], "guarded": [counts(225), counts(223)]}
    (table,) = code.tables([{"case": "asgi", "figures": {"/json": runs}}])
    shown = ("201,000", "23,000 [21,000, 25,000]", "2,010", "230 [210, 250]")
    data = ("1,206", "138 [126, 150]", "603", "69 [63, 75]")
    assert table.rows == (("asgi", "/json", *shown, *data),)


def test_without_valgrind_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    record = code.measure("asgi", DEFAULT_PLAN)
    assert record["verdict"] == "void"
    assert record["objections"] == ["valgrind is not installed"]


def test_what_needs_more_than_python_is_run_by_its_name_only() -> None:
    assert "code" not in command.chosen(command.parser().parse_args([]))
    assert command.chosen(command.parser().parse_args(["--only", "code:asgi"])) == {
        "code": ("asgi",)
    }


def test_a_kind_of_limit_is_judged_by_itself() -> None:
    record = {"case": "fastapi", "verdict": "fail", "objections": []} | RECORDS["limits"]
    (table,) = PROGRAMS["limits"].tables([record])
    verdicts = {row[1]: row[-1] for row in table.rows}
    assert verdicts["limiter.policies by path"] == "fail (µs), pass (part)"


def test_a_case_that_crashed_is_shown_as_void() -> None:
    crashed = {"case": "a", "verdict": "void", "objections": ["it ended with code 1"]}
    shown = report.text(program(), [crashed, *records("pass")])
    assert "VOID a: it ended with code 1" in shown
    assert "400" in shown


def test_the_blocks_of_a_table_are_aligned() -> None:
    shown = report.text(program(), records("pass", "undecided")).splitlines()
    widths = {line.index("400") for line in shown if "400" in line}
    assert len(widths) == 1
