"""Where a process puts its metrics file, and what it clears away there first.

``<base>/opsguard-<uid>/<service>/<pid>-<start>-<namespace>/worker-<pid>``: no two services, users,
containers or runs share a folder, and a reused pid is another folder. `base` is the setting, else
``/dev/shm``, else the temporary folder.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from pathlib import Path

__all__ = ["is_held", "sweep", "worker_directory"]

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_GRACE = 60.0  # seconds a folder may be without a locked file: its owner is just starting


def worker_directory(base: str | None, service: str, now: float) -> Path:
    """The folder for this process's file, made with mode 0700; dead ones beside it are removed.

    Raises OSError when it cannot be made, or when somebody else owns what is in its place.
    """
    root = Path(base) if base is not None else _default_base()
    mine = root / f"opsguard-{os.getuid()}"
    services = mine / (_UNSAFE.sub("_", service)[:64].strip(".") or "service")
    directory = services / _run()
    root.mkdir(parents=True, exist_ok=True)
    for folder in (mine, services, directory):
        folder.mkdir(mode=0o700, exist_ok=True)
        _check(folder)
    sweep(services, now)
    return directory


def sweep(services: Path, now: float) -> None:
    """Remove the folders of processes that are gone: nobody holds a lock in them. Never raises."""
    try:
        folders = [folder for folder in services.iterdir() if folder.name != _run()]
    except OSError:
        return
    for folder in folders:
        _sweep_one(folder, now)


def _sweep_one(folder: Path, now: float) -> None:
    try:
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or now - found.st_mtime < _GRACE:
            return
        files = list(folder.iterdir())
        if any(is_held(file) for file in files):
            return
        for file in files:
            file.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # another process sweeps too, or it is not ours to remove


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock of this file. False if there is no file."""
    import fcntl

    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False


def _default_base() -> Path:
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _run() -> str:
    """This process among all that ever had its pid: start time and pid namespace say which."""
    pid = os.getpid()
    try:
        start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except (OSError, IndexError):
        return str(pid)
    return f"{pid}-{start}-{namespace}"


def _check(folder: Path) -> None:
    """The base may be writable by all: a folder or link that another user put there is refused."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a directory of ours")
