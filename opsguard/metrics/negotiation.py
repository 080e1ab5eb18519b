"""What a scraper asked for: the form of the answer, and whether it may be compressed.

Prometheus text 0.0.4 and 1.0.0, OpenMetrics 1.0.0
(https://prometheus.io/docs/instrumenting/content_negotiation/); weights as in RFC 9110.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Form", "accepts_gzip", "negotiate"]

_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")  # RFC 9110, section 12.4.2


class Form(NamedTuple):
    """One representation of the answer."""

    content_type: str
    openmetrics: bool
    utf8_names: bool


_TEXT = Form("text/plain; version=0.0.4; charset=utf-8", openmetrics=False, utf8_names=False)


def _offer(media: str, version: str, escaping: str) -> Form | None:
    """Return the form that serves one media range, or None if there is none."""
    if media in ("*/*", "text/*") or (media == "text/plain" and version in ("", "0.0.4")):
        return _TEXT
    openmetrics = media == "application/openmetrics-text"
    if openmetrics and not version:
        return Form(f"{media}; version=1.0.0; charset=utf-8", True, False)
    if not version.startswith("1.") or not (openmetrics or media == "text/plain"):
        return None
    # `dots` and `values` are answered by `underscores`, and Content-Type says so.
    scheme = "allow-utf-8" if escaping == "allow-utf-8" else "underscores"
    content_type = f"{media}; version=1.0.0; charset=utf-8; escaping={scheme}"
    return Form(content_type, openmetrics, scheme == "allow-utf-8")


def _ranges(header: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield (name, parameters, weight) of each element; a malformed weight is 0."""
    for element in header.lower().split(","):
        name, *rest = element.split(";")
        pairs = (item.partition("=") for item in rest)
        parameters = {key.strip(): value.strip().strip('"') for key, _, value in pairs}
        weight = parameters.get("q", "1")
        yield name.strip(), parameters, float(weight) if _WEIGHT.fullmatch(weight) else 0.0


def negotiate(accept: str) -> Form:
    """Return the form with the highest weight in an Accept header.

    Equal weights: a named type before a wildcard, then the first. Nothing acceptable, or
    no header, gives text 0.0.4, which every scraper reads (RFC 9110, section 12.4.1
    allows that instead of 406).
    """
    best, rank = _TEXT, (0.0, False)
    for media, parameters, weight in _ranges(accept):
        form = _offer(media, parameters.get("version", ""), parameters.get("escaping", ""))
        if form is not None and weight > 0 and (weight, "*" not in media) > rank:
            best, rank = form, (weight, "*" not in media)
    return best


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding header likes gzip at least as much as no encoding."""
    weights = {name: weight for name, _, weight in _ranges(accept_encoding)}
    weight = weights.get("gzip", weights.get("*", 0.0))
    return weight > 0 and weight >= weights.get("identity", 0.0)
