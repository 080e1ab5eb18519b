"""The shop on a real server, in a child process that ends when we do."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from opsguard.demo.client import HOST, ID_HEADER, Answer, ask
from opsguard.settings import options

__all__ = ["FRAMEWORKS", "Service", "ServiceFailed", "environment", "missing", "serving"]

FRAMEWORKS: Mapping[str, tuple[str, ...]] = {
    "fastapi": ("fastapi", "uvicorn"),
    "flask": ("flask", "gunicorn"),
    "django": ("django", "uvicorn"),
    "asgi": ("uvicorn",),
    "wsgi": ("gunicorn",),
}
"""What each one needs to be installed; the server is the last."""

START = 30.0
STOP = 8.0
ATTEMPTS = 3

# Whatever else these would do, they would make another service of ours.
_FOREIGN = ("OPSGUARD_", "UVICORN_", "GUNICORN_")
_ALSO_FOREIGN = {
    *("DEV_MODE", "DJANGO_SETTINGS_MODULE", "FORWARDED_ALLOW_IPS", "PROMETHEUS_MULTIPROC_DIR"),
    "WEB_CONCURRENCY",
}


class ServiceFailed(Exception):
    """The service did not start, or it ended on its own. The message has its last words."""


@dataclass(frozen=True, slots=True)
class Service:
    """A running service: where it answers, and where its log lines and its server's own go."""

    port: int
    command: tuple[str, ...]
    """What started it, as somebody would type it."""
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> Path:
        return log_of(self.folder)

    def check(self) -> None:
        """:raises ServiceFailed: if it is not running any more."""
        if self.process.poll() is not None:
            raise ServiceFailed(
                f"the server ended by itself (status {self.process.returncode})\n"
                + last_words(self.folder)
            )


def missing(framework: str) -> list[str]:
    """The packages that the demo of a framework needs and this Python lacks."""
    return [name for name in FRAMEWORKS[framework] if find_spec(name) is None]


@contextlib.contextmanager
def serving(framework: str, port: int) -> Iterator[tuple[Service, Answer]]:
    """The service, up, and its first answer, to GET /health; ended on the way out.

    Port 0 means a free one. Everything it writes is in a folder that is removed at the end.

    :raises ServiceFailed: if the port is taken or the service does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="opsguard-demo-", ignore_cleanup_errors=True) as name:
        service, first = _up(framework, port, Path(name))
        try:
            yield service, first
        finally:
            stop(service.process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server: politely, and if it takes too long or the user insists, at once."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(STOP)
    except BaseException as error:
        # Its process group is its own (see _start), so that this takes its workers along.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise


def environment(folder: Path, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a child: ours, without what would change the shop, which is to be the
    same for everybody; and with its log lines and its numbers in `folder`.
    """
    plain = {variable for option in options().values() for variable in option.variables}
    kept = {
        name: value
        for name, value in environ.items()
        if not name.upper().startswith(_FOREIGN) and name not in plain | _ALSO_FOREIGN
    }
    if "PYTHONPATH" in kept:  # the child works in `folder`
        entries = kept["PYTHONPATH"].split(os.pathsep)
        kept["PYTHONPATH"] = os.pathsep.join([str(Path(entry).absolute()) for entry in entries])
    return kept | {
        "OPSGUARD_LOGGING__FILE": str(log_of(folder)),
        "OPSGUARD_METRICS__DIRECTORY": str(folder),
    }


def log_of(folder: Path) -> Path:
    return folder / "shop.log"


def last_words(folder: Path, lines: int = 12) -> str:
    """The end of what server and service wrote."""
    words = []
    for path in (folder / "server.out", log_of(folder)):
        if path.exists():
            words += path.read_text("utf-8", "replace").splitlines()[-lines:]
    return "\n".join(words) or "it said nothing"


def _up(framework: str, port: int, folder: Path) -> tuple[Service, Answer]:
    if port and _is_taken(port):
        raise ServiceFailed(f"port {port} of {HOST} is taken; without --port a free one is found")
    for _ in range(ATTEMPTS):
        service = _start(framework, port or _free_port(), folder)
        try:
            return service, _wait(service)
        except BaseException as error:
            stop(service.process)
            # Between our look and the server's somebody else may have taken the free port.
            raced = not port and isinstance(error, ServiceFailed) and _is_taken(service.port)
            if not raced:
                raise
    raise ServiceFailed(f"{ATTEMPTS} free ports were taken before the server had them")


def _start(framework: str, port: int, folder: Path) -> Service:
    app = f"opsguard.demo.apps.{framework}:app"
    if FRAMEWORKS[framework][-1] == "uvicorn":
        # Without --no-proxy-headers uvicorn believes any X-Forwarded-For that comes from this
        # machine; who is believed is a setting of opsguard.
        server = ["uvicorn", app, "--host", HOST, "--port", str(port), "--no-proxy-headers"]
    else:
        server = ["gunicorn", app, "--bind", f"{HOST}:{port}", "--threads", "8"]
        # In a file, as gunicorn before 25.1 does not know the option and passes over it there.
        (folder / "gunicorn.conf.py").write_text("control_socket_disable = True\n")
    with (folder / "server.out").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *server],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment(folder),
            # A Ctrl-C in the terminal is for us; we end the server when we are done with it.
            start_new_session=True,
        )
    return Service(port, tuple(server), process, folder)


def _wait(service: Service) -> Answer:
    """Ask until our own service answers: the one that returns our id."""
    deadline = time.monotonic() + START
    mine = (ID_HEADER, f"demo-start-{service.process.pid}")
    while time.monotonic() < deadline:
        service.check()
        try:
            # As patient as we are in all: a question given up might still be counted.
            answer = ask(service.port, "GET", "/health", headers=(mine,), timeout=START)
        except OSError:
            time.sleep(0.05)
            continue
        if answer.ids == mine[1:]:
            return answer
        time.sleep(0.05)  # not ours: it has taken the port, so our server is about to end
    raise ServiceFailed(f"no sound answer in {START:g} s\n{last_words(service.folder)}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return True
    return False
