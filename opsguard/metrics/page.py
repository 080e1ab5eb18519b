"""The families of one answer, each name once, and the answer's bytes."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable

from prometheus_client import Metric

from opsguard.metrics.cleaning import EOF, UNSAFE, claims, encoded, exposed_name, joined
from opsguard.metrics.negotiation import Form

__all__ = ["Page", "finished"]

_TYPE_LINE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)


class Page:
    """The families of one answer, each name once."""

    def __init__(self, form: Form, failures: Callable[[str, BaseException | None], None]) -> None:
        self.blocks: list[bytes] = []
        self._form = form
        self._failures = failures
        self._taken: set[str] = set()

    def add_texts(self, site: str, texts: Iterable[tuple[str, str]]) -> None:
        for name, text in texts:
            line = _TYPE_LINE.search(text)
            if not self._take(claims(*line.groups()) if line else {name}):
                continue
            try:
                self.blocks.append(text.encode())
            except UnicodeEncodeError as error:
                self._failures(site, error)
                self.blocks.append(UNSAFE.sub("\ufffd", text).encode())

    def add_metrics(self, site: str, metrics: Iterable[Metric]) -> None:
        parts: dict[tuple[str, str], list[Metric]] = {}
        for metric in metrics:
            try:
                name = exposed_name(metric.name, self._form.utf8_names)
                parts.setdefault((name, metric.type), []).append(metric)
            except Exception as error:
                self._failures(site, error)
        for same_name in parts.values():
            try:
                family, fault = joined(same_name, self._form)
                names = {sample.name for sample in family.samples}
                if not self._take(claims(family.name, family.type) | names):
                    continue
                self.blocks.append(encoded(family, self._form))
            except Exception as error:
                fault = error
            if fault is not None:
                self._failures(site, fault)

    def _take(self, names: set[str]) -> bool:
        if not self._taken.isdisjoint(names):
            return False
        self._taken |= names
        return True


def finished(blocks: list[bytes], form: Form, compressed: bool) -> bytes:
    body = b"".join([*blocks, EOF] if form.openmetrics else blocks)
    # Exposition text is so repetitive that level 1 takes nine tenths off it already;
    # mtime=0 keeps the wall clock out.
    return gzip.compress(body, compresslevel=1, mtime=0) if compressed else body
