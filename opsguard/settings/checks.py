"""Checks of one value each. Each takes what a source said and gives what the option holds.

A wrong value raises ValueError with a text that goes on after the value: "must start with '/'".
Every check is idempotent: `Settings.merged` checks values again that have passed before.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from opsguard.addresses import network as parse
from opsguard.patterns import check as check_pattern
from opsguard.policies import KEYS, Policy, policy_from
from opsguard.settings.messages import nearest

__all__ = [
    "File",
    "List",
    "Renames",
    "Text",
    "Whole",
    "buckets",
    "credential",
    "default_policy",
    "environment",
    "field_name",
    "header",
    "id_header",
    "key_hash",
    "key_part",
    "label_name",
    "level",
    "limit_key",
    "limiter_store",
    "master",
    "metric_name",
    "network",
    "optional_id_header",
    "path",
    "path_policies",
    "pattern",
    "pepper",
    "policies",
    "policy",
    "redis_url",
    "renames_of",
    "tier_policies",
]


def _list_from_text(value: object) -> object:
    """`a,b` or a JSON array as a list; empty pieces are dropped. Other values pass through."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("["):
        return _json(value)
    return _pieces(value)


def _pieces(text: str) -> list[str]:
    return [piece for piece in map(str.strip, text.split(",")) if piece]


def _mapping_from_text(value: object) -> object:
    """`a=b,c=d` or a JSON object as a dict. Other values pass through."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        return _json(value)
    found: dict[str, str] = {}
    for piece in _pieces(value):
        name, separator, target = (part.strip() for part in piece.partition("="))
        if not separator:
            raise ValueError("must be a JSON object or name=value pairs with commas between them")
        if name in found:
            raise ValueError(f"must not name {name!r} twice")
        found[name] = target
    return found


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"must be valid JSON as it begins like JSON ({error})") from None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be printable text: no line breaks, control or surrogate characters")
    return text.strip()


def environment(text: str) -> str:
    text = _printable(text).lower()
    if not text:
        raise ValueError("must not be empty: 'production', 'development' or a name of your own")
    return text


_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")


def header(name: str) -> str:
    if not _TOKEN.fullmatch(name):
        raise ValueError("must be a header name (RFC 9110: letters, digits and !#$%&'*+-.^_`|~)")
    return name


_SERVERS = frozenset(
    [
        *("connection", "content-length", "date", "keep-alive", "proxy-authenticate"),
        *("proxy-authorization", "server", "te", "trailer", "trailers", "transfer-encoding"),
        "upgrade",
    ]
)


def id_header(name: str) -> str:
    """A header of ours in an answer: none that the server itself writes, or that says where the
    answer ends.
    """
    if header(name).lower() in _SERVERS:
        raise ValueError("must be a header of your own: this one is the server's")
    return name


def optional_id_header(name: str) -> str:
    return id_header(name) if name else name


def network(text: str) -> str:
    try:
        return str(parse(text))
    except ValueError as error:
        raise ValueError(f"must be an address or a network like '10.0.0.0/8' ({error})") from None


def path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must start with '/'")
    if not text.isascii() or not text.isprintable() or set(text) & set(" ?#"):
        raise ValueError("must be a plain path: printable ASCII without spaces, '?' and '#'")
    return text


_METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_RESERVED_LABELS = ("le", "quantile")


def metric_name(name: str) -> str:
    if not _METRIC_NAME.fullmatch(name):
        raise ValueError(
            "must be a Prometheus metric name: letters, digits, '_' and ':', not a digit first"
        )
    return name


def label_name(name: str) -> str:
    if not _LABEL_NAME.fullmatch(name) or name.startswith("__"):
        raise ValueError(
            "must be a Prometheus label name: letters, digits and '_', not a digit or '__' first"
        )
    if name in _RESERVED_LABELS:
        raise ValueError(f"must not be {name!r}: Prometheus uses that label itself")
    return name


def renames_of(
    known: tuple[str, ...], *, others: bool = False
) -> Callable[[dict[str, str]], dict[str, str]]:
    """A check that a mapping renames `known` names only, and gives no two the same name.

    With `others` it may rename names that are not known here as well.
    """

    def check(renames: dict[str, str]) -> dict[str, str]:
        for name in renames:
            if name not in known and not others:
                raise ValueError(
                    f"cannot rename {name}{nearest(name, known)}; known are {', '.join(known)}"
                )
        taken: dict[str, str] = {}
        for name, target in ({name: name for name in known} | renames).items():
            if target in taken:
                raise ValueError(f"must not give {taken[target]} and {name} the name {target}")
            taken[target] = name
        return renames

    return check


def field_name(name: str) -> str:
    if not name or not name.isprintable():
        raise ValueError("must be a name: printable text, not empty")
    return name


def buckets(bounds: tuple[float, ...]) -> tuple[float, ...]:
    if bounds and math.isinf(bounds[-1]):  # prometheus_client's habit; ours is implied
        bounds = bounds[:-1]
    finite = bool(bounds) and all(map(math.isfinite, bounds))
    if not finite or bounds[0] <= 0 or any(b <= a for a, b in itertools.pairwise(bounds)):
        raise ValueError("must be seconds above 0, each more than the one before (+Inf is implied)")
    return bounds


_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_LEVEL_ALIASES = {"WARN": "WARNING", "FATAL": "CRITICAL"} | {
    str(getattr(logging, name)): name for name in _LEVELS
}


def level(value: object) -> object:
    """A level by name in any case or by its standard number, as its name."""
    text = str(value).strip().upper()
    name = _LEVEL_ALIASES.get(text, text)
    if name not in _LEVELS or not isinstance(value, str | int):
        raise ValueError(f"must be one of {', '.join(_LEVELS)}")
    return name


def _file(value: object) -> object:
    """A path as text; an empty text, which is what an empty variable gives, means none."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return None if value == "" else value


def _whole(value: object) -> object:
    """Refuse a bool, which Python counts among the numbers."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return value


def pattern(text: str) -> str:
    check_pattern(text)
    return text


_KEY_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_KEY_HASH = re.compile(r"[0-9a-f]{64}")


def key_part(text: str) -> str:
    if not _KEY_PART.fullmatch(text):
        raise ValueError("must be at most 32 letters, digits, '_' and '-', not '_' or '-' first")
    return text


def key_hash(text: str) -> str:
    if text and not _KEY_HASH.fullmatch(text):
        raise ValueError("must be 64 hexadecimal digits, as `opsguard keys hash` prints them")
    return text


def credential(text: str) -> str:
    if text and not re.fullmatch(r"[!-+\--~]{1,256}", text):
        raise ValueError("must be at most 256 ASCII characters without spaces and commas")
    return text


def pepper(text: str) -> str:
    if text and len(text) < 16:
        raise ValueError("must have 16 characters or more: it is what makes the hashes secret")
    return text


def master(text: str) -> str:
    if text and len(text) < 8:
        raise ValueError("must have 8 characters or more: it opens every door")
    return credential(text)


def policy(value: object) -> object:
    """A policy as people write it; an empty text, which an empty variable gives, is none."""
    return None if value is None or value == "" else policy_from(value)


def policies(value: object) -> object:
    """A mapping of names to policies as people write them."""
    value = _mapping_from_text(value)
    if not isinstance(value, Mapping):
        return value
    found: dict[object, Policy] = {}
    for name, written in value.items():
        try:
            found[name] = policy_from(written).named(str(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found


def path_policies(by_path: dict[str, Policy]) -> dict[str, Policy]:
    for written in by_path:
        check_pattern(written)
    return by_path


def tier_policies(by_tier: dict[str, Policy]) -> dict[str, Policy]:
    for name, one in by_tier.items():
        if one.exempt or one.methods:
            raise ValueError(f"{name}: a tier has a rate, for all methods")
    return by_tier


def default_policy(one: Policy | None) -> Policy | None:
    if one is not None and (one.exempt or one.methods):
        raise ValueError("must be a rate, for all methods")
    return one


_STORES = ("auto", "local", "workers")
_REDIS_SCHEMES = ("redis://", "rediss://", "unix://", "valkey://", "valkeys://")


def limiter_store(text: str) -> str:
    if text not in _STORES and "://" not in text:
        raise ValueError(f"must be one of {', '.join(_STORES)}, or a URL like redis://host:6379/0")
    return text


def redis_url(text: str) -> str:
    if text and not text.startswith(_REDIS_SCHEMES):
        raise ValueError(
            f"must begin with one of {', '.join(_REDIS_SCHEMES)}; the URL of another store, say "
            "redis+cluster://, goes into limiter.store"
        )
    return text


def limit_key(text: str) -> str:
    if text not in KEYS:
        raise ValueError(f"must be one of {', '.join(KEYS)}")
    return text


Text = Annotated[str, AfterValidator(_printable)]
List = BeforeValidator(_list_from_text)
Renames = BeforeValidator(_mapping_from_text)
Whole = BeforeValidator(_whole)
File = Annotated[str | None, BeforeValidator(_file)]
