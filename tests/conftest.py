"""What holds for every test: which opsguard is under test, and how hard Hypothesis tries."""

from __future__ import annotations

import os
import signal
import sys
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import hypothesis
import pytest

import tests.coverage_over_forks  # noqa: F401  (before anything else registers for forks)

PACKAGES = (
    "opsguard",
    "opsguard_asgi",
    "opsguard_wsgi",
    "opsguard_fastapi",
    "opsguard_flask",
    "opsguard_django",
)

# Checked by mypy and pyright, never run.
collect_ignore = ["typing"]

# No deadline: on a busy machine a slow example says nothing about the code.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("full", deadline=None, max_examples=2_000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_runtest_teardown() -> None:
    """A test may leave its request open, as a server does that drops one: the next is not in it."""
    from opsguard.context import current

    current.set(None)


def pytest_sessionstart() -> None:
    """Under nox the installed wheel is under test; the checkout's packages must be out of reach."""
    _listen_to_signals()
    if "TESTED_CHECKOUT" not in os.environ:
        return
    installed = Path(sysconfig.get_path("purelib"))
    for package in PACKAGES:
        spec = find_spec(package)
        found = Path(spec.origin) if spec and spec.origin else None
        if found is None or not found.is_relative_to(installed):
            raise pytest.UsageError(f"{package} is to come from {installed}, not from {found}")


def _listen_to_signals() -> None:
    """What a shell starts with `&` ignores Ctrl-C, under `nohup` a lost terminal as well, and so do
    all processes below it: then the ones that tests start could not be ended by these.
    """
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The folder with pyproject.toml and the sources, wherever the tests themselves run."""
    return Path(os.environ.get("TESTED_CHECKOUT", Path(__file__).parents[1]))


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns as often as the interpreter can make them: they meet in more ways, and
    who forks beside them does not wait 5 ms for each step.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture(autouse=True)
def nothing_starts_over() -> Iterator[None]:
    """What a test has made begins nothing in the forks of later tests: each store would begin a
    file, hundreds in one process, which takes seconds.
    """
    from opsguard import forks

    yield
    forks._starting.clear()


@pytest.fixture(autouse=True)
def no_logging_left_behind() -> Iterator[None]:
    """An install leads all loggers to its output; the next test starts with them as they were."""
    yield
    from opsguard.logging import setup

    with setup._lock:
        if setup._layers:
            for layer in setup._layers:
                layer.sink.close()
            setup._layers.clear()
            setup._restore()


@pytest.fixture(autouse=True)
def no_metrics_adopted() -> Iterator[None]:
    """An install adopts what is registered with prometheus_client; each test begins without."""
    yield
    from opsguard.testing import release_metrics

    release_metrics()
