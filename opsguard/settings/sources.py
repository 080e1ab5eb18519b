"""The sources of options: the code, the environment, `.env` and the TOML files.

They are read here rather than by pydantic-settings' own, which can tell neither where a value came
from nor a service variable of Kubernetes from one of ours. Values are checked by the model, later;
only `DEV_MODE` and `REDIS_PORT`, which are no options of their own, are checked here.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from opsguard.settings.groups import Group, Option, given
from opsguard.settings.messages import nearest, shown

__all__ = ["Reading", "Said", "means_development", "working_directory"]


@dataclass(frozen=True, slots=True)
class Said:
    """A value as a source gave it, and how to name that place to a person."""

    value: object
    origin: str
    place: str


class Reading:
    """One reading of the sources; collects what is wrong and what is odd."""

    def __init__(self, options: Mapping[str, Option], groups: Mapping[str, type[Group]]) -> None:
        self._options = options
        self._groups = groups
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def table(
        self, table: Mapping[str, object], origin: str, unknown: list[str]
    ) -> dict[str, Said]:
        """What nested keywords or a TOML table say; unknown names are added to `unknown`."""
        found: dict[str, Said] = {}
        for name, value in table.items():
            if value is None:
                continue
            if name not in self._groups:
                self._take(found, str(name), value, origin, unknown)
                continue
            model = self._groups[name]
            if isinstance(value, model):
                value = given(value)
            if not isinstance(value, Mapping):
                self.problems.append(
                    f"{origin} {name}: {shown(value)}: must be a mapping or a {model.__name__}"
                )
                continue
            for key, one in value.items():
                self._take(found, f"{name}.{key}", one, origin, unknown)
        return found

    def _take(
        self, found: dict[str, Said], key: str, value: object, origin: str, unknown: list[str]
    ) -> None:
        if key in self._options:
            found[key] = Said(value, origin, f"{origin} {key}")
        else:
            near = nearest(key, [*self._options, *self._groups])
            unknown.append(f"{origin} {key}: no such option{near}")

    def variables(self, environ: Mapping[str, str], file: str = "") -> dict[str, Said]:
        """What environment variables say, or variables that stand in `file`."""

        def said(variable: str, value: object) -> Said:
            return Said(value, file or f"environment {variable}", f"{file} {variable}".strip())

        found: dict[str, Said] = {}
        known = {variable for option in self._options.values() for variable in option.variables}
        known.add("OPSGUARD_PURE")  # read at import: see opsguard.accelerator
        for key, option in self._options.items():
            for variable in option.variables:
                text = environ.get(variable)
                if text is None or _injected(variable, text):
                    continue
                # An empty plain variable is nobody's wish; an empty one of ours may be.
                if text.strip() or variable == option.variables[0]:
                    found[key] = said(variable, text.strip())
                    break
        for variable, text in environ.items():
            ours = variable.upper().startswith("OPSGUARD_")
            if ours and variable not in known and not _injected(variable, text):
                near = nearest(variable.upper(), known)
                self.warnings.append(
                    f"{said(variable, text).place}: no such option, passed over{near}"
                )
        self._redis(environ, said, found)
        self._development(said("DEV_MODE", environ.get("DEV_MODE", "").strip()), found)
        return found

    def _redis(
        self,
        environ: Mapping[str, str],
        said: Callable[[str, object], Said],
        found: dict[str, Said],
    ) -> None:
        """REDIS_HOST and REDIS_PORT name a server, if nobody gave its URL."""
        host, port = (environ.get(name, "").strip() for name in ("REDIS_HOST", "REDIS_PORT"))
        if not host or "limiter.redis_url" in found:
            return
        if _injected("REDIS_PORT", port):
            port = ""
        if port and not (port.isascii() and port.isdigit() and int(port) < 65536):
            place = said("REDIS_PORT", port).place
            self.problems.append(f"{place}: {shown(port)}: must be a port number")
            return
        name = f"[{host}]" if ":" in host and not host.startswith("[") else host
        url = f"redis://{name}:{port or 6379}/0"
        found["limiter.redis_url"] = said("REDIS_HOST", url)

    def _development(self, mode: Said, found: dict[str, Said]) -> None:
        """`DEV_MODE=true` means development; it cannot stand beside another environment."""
        if not mode.value:
            return
        try:
            if not TypeAdapter(bool).validate_python(mode.value):
                return
        except ValidationError:
            self.problems.append(f"{mode.place}: {shown(mode.value)}: must be true or false")
            return
        other = found.get("environment")
        if other is None:
            found["environment"] = dataclasses.replace(mode, value="development")
        elif not means_development(other.value):
            self.problems.append(
                f"{mode.place}: {shown(mode.value)}: means development, but {other.place} says "
                f"{shown(other.value)}: set one of the two"
            )

    def dotenv(self, directory: Path | None) -> dict[str, Said]:
        """What `.env` says. `${NAME}` in it is not expanded."""
        text = self._text(directory, ".env")
        if text is None:
            return {}
        from dotenv import dotenv_values  # production never needs it

        pairs = dotenv_values(stream=StringIO(text), interpolate=False)
        environ = {name: value for name, value in pairs.items() if value is not None}
        found = self.variables(environ, ".env")
        environment = found.pop("environment", None)
        if environment is not None and not means_development(environment.value):
            self.warnings.append(
                f"{environment.place}: passed over, as the environment must be known "
                "before this file is read"
            )
        return found

    def toml(self, directory: Path | None) -> dict[str, Said]:
        """What `opsguard.toml` says, or if there is none, `[tool.opsguard]`.

        An unknown name in it is a warning: the file may be mounted apart from the code, and
        an older version of the code must start with it.
        """
        name = "opsguard.toml"
        text = self._text(directory, name)
        if text is None:
            name = "pyproject.toml"
            text = self._text(directory, name)
            if text is None or "opsguard" not in text:  # most of them; no need to parse it
                return {}
        try:
            table: object = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            self.problems.append(f"{name}: is not valid TOML: {error}")
            return {}
        if name == "pyproject.toml":
            for part in ("tool", "opsguard"):
                table = table.get(part, {}) if isinstance(table, dict) else {}
        return self.table(table, name, self.warnings) if isinstance(table, dict) else {}

    def _text(self, directory: Path | None, name: str) -> str | None:
        if directory is None:
            return None
        try:
            return (directory / name).read_text(encoding="utf-8-sig")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None  # a directory called .env is somebody's virtual environment
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{name}: cannot be read: {error}")
            return None


# What Kubernetes puts into a container for each service of the namespace; a service called
# `opsguard` or `opsguard-…` gives names in our own room.
_SERVICE_VARIABLE = re.compile(
    r"[A-Z0-9_]+_(?:SERVICE_HOST|SERVICE_PORT(?:_[A-Z0-9_]+)?"
    r"|PORT_[0-9]+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://")


def _injected(variable: str, text: str) -> bool:
    """Whether a variable is Kubernetes' description of a service rather than a setting."""
    if variable.endswith("_PORT") and _SERVICE_ADDRESS.match(text):
        return True
    return _SERVICE_VARIABLE.fullmatch(variable) is not None


def working_directory() -> Path | None:
    """The working directory; None if it was deleted."""
    try:
        return Path.cwd()
    except OSError:
        return None  # no files then, and no name


def means_development(value: object) -> bool:
    """Whether a source that said this for `environment` said development."""
    return isinstance(value, str) and value.strip().lower() == "development"
