"""Where the workers of a group meet, and what is cleared away there first.

``<base>/opsguard-<uid>/<service>/<manager pid>-<start>-<namespace>``, mode 0700: no two services,
users, containers or runs share a folder, and a reused pid is another folder. `base` is the setting,
else ``/dev/shm``, else the temporary folder. Several OpsGuards of one service in a process count
apart: the second one has the folder ``1`` in there, and so on.

A folder goes when its manager is gone and no living process holds a file in it; an orphaned worker
keeps it. So a restart starts with an empty folder, and touches no other service's.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from opsguard.workers.group import Process, manager
from opsguard.workers.seats import OFD_LOCKS, is_taken

__all__ = ["Place", "is_held", "living", "sweep"]

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_GRACE = 60.0  # seconds a folder may be without a held file: its owner is just starting
_GRACE_ELSEWHERE = 3600.0  # and one of another container, whose manager we can't see
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_numbers: dict[str, Iterator[int]] = {}


class Place:
    """The folder of one OpsGuard: the same in all workers of its group.

    It gets its number among the places of its service when it is made, and keeps it over forks:
    workers that run the same code give the same one to each. Numbers are not given twice, since
    when an object dies may differ from worker to worker. Makes nothing but in `directory`.
    """

    __slots__ = ("_path", "_root", "_services")

    def __init__(self, base: str | None, service: str) -> None:
        self._root = _root(base)
        self._services = _services(self._root, service)
        number = next(_numbers.setdefault(str(self._services), itertools.count()))
        self._path = [str(number)] if number else []

    def directory(self, now: float) -> Path:
        """The folder, made with mode 0700; dead ones beside it are removed. `now` is wall time.

        Raises OSError when it cannot be made, or when somebody else owns what is in its place.
        """
        services, directory = self._services, self._folder()
        self._root.mkdir(parents=True, exist_ok=True)
        for folder in (services.parent, services, services / manager().name, directory):
            folder.mkdir(mode=0o700, exist_ok=True)
            _check(folder)
        os.utime(services / manager().name)  # who sweeps sees that somebody is about to come in
        sweep(services, now)
        return directory

    def found(self) -> Path | None:
        """The folder if somebody has made it, and if it is ours. Makes nothing, never raises."""
        directory = self._folder()
        try:
            _check(directory)
        except OSError:
            return None
        return directory

    def _folder(self) -> Path:
        return self._services.joinpath(manager().name, *self._path)


def living(base: str | None, service: str) -> list[Path]:
    """The folders in which workers of this service meet now. Makes and removes nothing."""
    try:
        groups = [one for one in _services(_root(base), service).iterdir() if _is_folder(one)]
        folders = [one for group in groups for one in (*_inside(group), group)]
        return sorted(folder for folder in folders if any(map(is_held, _files(folder))))
    except OSError:
        return []  # there is none, or it is not ours to read


def sweep(services: Path, now: float) -> None:
    """Remove the folders of groups that are gone. Never raises."""
    try:
        folders = [folder for folder in services.iterdir() if folder.name != manager().name]
    except OSError:
        return
    for folder in folders:
        try:
            _sweep_one(folder, now)
        except OSError:
            continue  # another process sweeps too, or it is not ours to remove


def _sweep_one(folder: Path, now: float) -> None:
    owner = Process.parse(folder.name)
    if owner is not None and owner.here and owner.alive:
        return
    grace = _GRACE if owner is None or owner.here else _GRACE_ELSEWHERE
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or now - found.st_mtime < grace:
        return
    inside = _inside(folder)
    folders = [*inside, folder]
    files = [file for one in folders for file in one.iterdir() if file not in inside]
    if any(_is_folder(file) or is_held(file) for file in files):
        return
    for file in files:
        file.unlink(missing_ok=True)
    for one in folders:
        one.rmdir()


def is_held(path: Path) -> bool:
    """Whether a living process holds a lock of this file, on all of it or on a part. False if
    there is no file.
    """
    try:
        file = os.open(path, _FLAGS)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return OFD_LOCKS and is_taken(file)
    except OSError:
        return True
    finally:
        os.close(file)


def _inside(folder: Path) -> list[Path]:
    """The folders of further OpsGuards in a group's."""
    return [child for child in folder.iterdir() if child.name.isdigit() and _is_folder(child)]


def _files(folder: Path) -> list[Path]:
    return [child for child in folder.iterdir() if not _is_folder(child)]


def _root(base: str | None) -> Path:
    return Path(base) if base is not None else _default_base()


def _services(root: Path, service: str) -> Path:
    name = _UNSAFE.sub("_", service)[:64].strip(".") or "service"
    return root / f"opsguard-{os.getuid()}" / name


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)


def _default_base() -> Path:
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())


def _check(folder: Path) -> None:
    """The base may be writable by all: a folder or link that another user put there is refused."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a directory of ours")
