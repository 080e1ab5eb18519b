"""All options together: which there are, and the settings of one OpsGuard.

Settings are loaded from the sources by rank and checked as a whole, and know where each value
came from.
"""

from __future__ import annotations

import dataclasses
import logging as std_logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, TypeAdapter, ValidationError

from opsguard.exceptions import SettingsError
from opsguard.settings import checks
from opsguard.settings.checks import Text
from opsguard.settings.groups import (
    Group,
    Ids,
    Keys,
    Limiter,
    Logging,
    Metrics,
    Option,
    Proxies,
    plain,
)
from opsguard.settings.messages import nearest, reason, shown
from opsguard.settings.sources import Reading, Said, means_development, working_directory

__all__ = ["Provenance", "Settings", "options"]


@dataclass(frozen=True, slots=True)
class Provenance:
    """What loading found out beside the values."""

    origins: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Where each option that is not at its default came from, by its dotted key."""
    warnings: tuple[str, ...] = ()
    folder: str = ""
    """The name of the working directory, the last resort for the service's name."""


@dataclass(frozen=True, kw_only=True)
class Settings(Group):
    """All options of one OpsGuard. Make it with :meth:`load`, which alone checks the values.

    Immutable and hashable, so it may be shared by threads and inherited over a fork.
    """

    service: Text = field(default="", metadata=plain("OTEL_SERVICE_NAME"))
    """Empty until :meth:`with_service` fills it, if nobody said."""
    version: Text = ""
    """`git_sha` if nobody said."""
    environment: Annotated[str, AfterValidator(checks.environment)] = field(
        default="production", metadata=plain("ENVIRONMENT")
    )
    git_sha: Text = field(default="", metadata=plain("GIT_SHA"))
    ids: Ids = field(default_factory=Ids)
    proxies: Proxies = field(default_factory=Proxies)
    metrics: Metrics = field(default_factory=Metrics)
    logging: Logging = field(default_factory=Logging)
    limiter: Limiter = field(default_factory=Limiter)
    keys: Keys = field(default_factory=Keys)
    provenance: Provenance = field(default_factory=Provenance, repr=False, compare=False)

    @classmethod
    def load(
        cls,
        keywords: Mapping[str, object],
        *,
        environ: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> Settings:
        """The settings from all sources; warnings are logged to the logger `opsguard`.

        `keywords` has the top-level options and the groups, each group as a mapping or as its
        typed model; None at the top level means not said. `environ` is the process
        environment if None, `directory` (of `.env` and `opsguard.toml`) the working directory.

        :raises SettingsError: for any number of wrong values, all in one message.
        """
        reading = Reading(options(), _groups())
        directory = working_directory() if directory is None else directory
        code = reading.table(keywords, "keyword", reading.problems)
        shell = reading.variables(os.environ if environ is None else environ)
        toml = reading.toml(directory)
        said = toml | code | shell
        # What stands in .env cannot decide whether .env is read: a file forgotten in an image
        # would turn development on in production.
        if "environment" in said and means_development(said["environment"].value):
            said = toml | reading.dotenv(directory) | code | shell
        settings = _checked(said, reading.problems)
        for warning in reading.warnings:
            std_logging.getLogger("opsguard").warning("%s", warning)
        provenance = Provenance(
            origins={key: one.origin for key, one in said.items()},
            warnings=tuple(reading.warnings),
            folder=directory.name if directory else "",
        )
        settings = dataclasses.replace(settings, provenance=provenance)
        if settings.git_sha and not settings.version:
            return settings._with("version", settings.git_sha, settings.origin("git_sha"))
        return settings

    @property
    def development(self) -> bool:
        """Whether this is a developer's machine; everywhere else the safe choices are taken."""
        return self.environment == "development"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was odd but no reason to stop, such as an unknown `OPSGUARD_` variable."""
        return self.provenance.warnings

    def origin(self, key: str) -> str:
        """Where the option `key` (`"metrics.path"`) got its value.

        One of `environment <VARIABLE>`, `keyword`, `.env`, `opsguard.toml`, `pyproject.toml`,
        `default`, `app` and `folder` (from :meth:`with_service`), `package` (the version of
        the installed distribution) and `override`.

        :raises KeyError: if there is no such option.
        """
        if key not in options():
            raise KeyError(f"no option {key!r}{nearest(key, options())}")
        return self.provenance.origins.get(key, "default")

    def with_service(self, name: str | None = None, version: str | None = None) -> Settings:
        """The same with an empty service name and version filled in; what was said stays.

        `name` and `version` are what the app calls itself. Without a name the working folder's
        is taken, without a version that of an installed distribution with the service's name.
        """
        filled = self
        if not filled.service:
            if text := _clean(name):
                filled = filled._with("service", text, "app")
            elif text := _clean(self.provenance.folder):
                filled = filled._with("service", text, "folder")
            else:
                filled = filled._with("service", "unknown_service", "default")
        if not filled.version:
            if text := _clean(version):
                filled = filled._with("version", text, "app")
            elif text := _distribution_version(filled.service):
                filled = filled._with("version", text, "package")
        return filled

    def merged(self, overrides: Mapping[str, object]) -> Settings:
        """The same with `overrides`, in the form of the keywords, on top of everything.

        :raises SettingsError: for wrong values, all in one message.
        """
        reading = Reading(options(), _groups())
        said = reading.table(overrides, "override", reading.problems)
        current = {key: Said(_value(self, key), self.origin(key), key) for key in options()}
        settings = _checked(current | said, reading.problems)
        origins = {**self.provenance.origins, **dict.fromkeys(said, "override")}
        return dataclasses.replace(
            settings, provenance=dataclasses.replace(self.provenance, origins=origins)
        )

    def _with(self, name: str, text: str, origin: str) -> Settings:
        origins = {**self.provenance.origins, name: origin}
        values: dict[str, Any] = {name: text}
        return dataclasses.replace(
            self, **values, provenance=dataclasses.replace(self.provenance, origins=origins)
        )


@cache
def options() -> Mapping[str, Option]:
    """Every option by its dotted key, in the order of the model."""
    found: dict[str, Option] = {}
    defaults = Settings()
    for holder, prefix in ((defaults, ""), *((getattr(defaults, g), g) for g in _groups())):
        for one in dataclasses.fields(holder):
            if one.name in _groups() or one.name == "provenance":
                continue
            variable = f"OPSGUARD_{prefix}__{one.name}" if prefix else f"OPSGUARD_{one.name}"
            key = f"{prefix}.{one.name}" if prefix else one.name
            found[key] = Option(
                key=key,
                variables=(variable.upper(), *one.metadata.get("plain", ())),
                default=getattr(holder, one.name),
                secret=not one.repr,
            )
    return found


@cache
def _groups() -> Mapping[str, type[Group]]:
    """The model of each group, by the group's name."""
    defaults = vars(Settings())
    return {name: type(value) for name, value in defaults.items() if isinstance(value, Group)}


@cache
def _adapter() -> TypeAdapter[Settings]:
    return TypeAdapter(Settings)


def _checked(said: Mapping[str, Said], problems: Iterable[str]) -> Settings:
    """The settings of these values, checked; one SettingsError for all that is wrong, `problems`
    of the reading included.
    """
    nested: dict[str, Any] = {}
    for key, one in said.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = one.value
    try:
        settings = _adapter().validate_python(nested)
    except ValidationError as error:
        raise _error([*problems, *_wrong_values(error, said)]) from None
    problems = [*problems, *_contradictions(settings, said)]
    if problems:
        raise _error(problems)
    # Made again from all their values, so that a loaded group used as a keyword counts whole.
    groups: dict[str, Any] = {
        name: dataclasses.replace(getattr(settings, name)) for name in _groups()
    }
    return dataclasses.replace(settings, **groups)


def _wrong_values(error: ValidationError, said: Mapping[str, Said]) -> Iterator[str]:
    for detail in error.errors(include_url=False, include_context=False):
        parts = detail["loc"][: 2 if detail["loc"][0] in _groups() else 1]
        key = ".".join(map(str, parts))
        value = "***" if options()[key].secret else shown(detail["input"])
        yield f"{said[key].place}: {value}: {reason(detail['type'], detail['msg'])}"


def _contradictions(settings: Settings, said: Mapping[str, Said]) -> Iterator[str]:
    if settings.proxies.trusted and settings.proxies.hops:
        yield (
            f"{said['proxies.trusted'].place} and {said['proxies.hops'].place}: "
            "must not both be set, as they can name different clients"
        )


def _error(problems: Iterable[str]) -> SettingsError:
    lines = "\n".join(f"  {problem}" for problem in problems)
    return SettingsError(f"wrong settings, nothing was started:\n{lines}")


def _distribution_version(name: str) -> str:
    try:
        return _clean(metadata.version(name))
    except (metadata.PackageNotFoundError, ValueError, OSError):
        return ""


def _clean(text: object) -> str:
    """A name that an app gave itself, without what may not stand in a label; never an error."""
    if not isinstance(text, str):
        return ""
    return "".join(character for character in text if character.isprintable()).strip()


def _value(settings: Settings, key: str) -> object:
    value: object = settings
    for name in key.split("."):
        value = getattr(value, name)
    return value
