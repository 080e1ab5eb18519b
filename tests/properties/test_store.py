"""Whatever bytes a store's file holds, reading it never raises; what was written comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opsguard.metrics.families import Family, clean
from opsguard.metrics.layout import FAMILY, SERIES, Record, pack_header, read_records
from opsguard.metrics.store import Store

labels = st.lists(st.text(st.characters(exclude_categories=()), max_size=20), max_size=4)
finite = st.floats(allow_nan=False)


def in_memory() -> Store:
    return Store(lambda: None, lambda site, error: None, limit=1 << 20)


def sound() -> bytes:
    store = in_memory()
    family = store.family({"name": "requests", "labels": ["method"]})
    for method in ("GET", "POST"):
        store.cells[store.series(family, (method,), 3)] = 1.0
    return store.read()


SOUND = sound()


@given(st.lists(st.tuples(labels, st.lists(finite, min_size=1, max_size=5)), max_size=8))
def test_series_round_trip(written: list[tuple[list[str], list[float]]]) -> None:
    """Any label text, any numbers, in the order in which they were made."""
    store = in_memory()
    family = store.family({})
    for texts, values in written:
        at = store.series(family, tuple(texts), len(values))
        for place, value in enumerate(values):
            store.cells[at + place] = value
    _, _, definition, *series = read_records(store.read())
    assert definition.kind == FAMILY
    assert series == [Record(SERIES, [0, *texts], tuple(values)) for texts, values in written]


@given(st.binary(max_size=400))
def test_random_bytes_are_read_without_an_exception(data: bytes) -> None:
    assert list(read_records(data)) == []


@given(st.binary(max_size=200), st.integers(0, 1 << 64))
def test_random_bytes_behind_a_sound_header_are_read_without_an_exception(
    data: bytes, used: int
) -> None:
    header = pack_header(pid=1, used=used % (1 << 64))
    for record in read_records(header + data):
        assert len(record.cells) * 8 <= len(data)


@given(st.integers(0, len(SOUND)))
def test_a_file_cut_anywhere_gives_its_first_records(length: int) -> None:
    whole = list(read_records(SOUND))
    found = list(read_records(SOUND[:length]))
    assert found == whole[: len(found)]


@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=8))
def test_flipped_bytes_are_read_without_an_exception(flips: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND)
    for place, value in flips:
        data[place] = value
    assert len(list(read_records(bytes(data)))) <= len(data) // 16


@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 9)), max_size=30), st.integers(1, 6))
def test_a_family_never_has_more_series_than_its_limit_and_no_sample_is_lost(
    samples: list[tuple[str, int]], limit: int
) -> None:
    """One series more for all that had no room; the sum over all series is the sum of samples."""
    store = in_memory()
    family = Family(store, "f_total", "", "counter", ("value",), limit=limit)
    for value, amount in samples:
        at = family.at((value,))
        store.cells[at] += float(amount)
    series = [record for record in read_records(store.read()) if record.kind == SERIES]
    assert len(family) == len(series) <= limit + 1
    assert sum(record.cells[0] for record in series) == sum(amount for _, amount in samples)


@given(st.text(st.characters(exclude_categories=()), max_size=3_000))
def test_cleaning_is_idempotent_bounded_and_always_encodable(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert len(cleaned) <= 1_024
    assert "\0" not in cleaned
    cleaned.encode()
