"""The text of the numbers is the same in C as in Python, and can be read back."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families as parse

from opsguard.accelerator import speed
from opsguard.metrics import text
from opsguard.metrics.definitions import Definition
from opsguard.metrics.text import Numbers, clean

built = pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")

DEFINITIONS = {
    kind: Definition(f"a_{kind}", kind, labels, buckets)
    for kind, buckets in (
        ("counter", ()),
        ("gauge", ()),
        ("unknown", ()),
        ("summary", ()),
        ("histogram", (0.1, 1.0, 2.5)),
    )
    for labels in [("method", "who")]
} | {
    "bare": Definition("bare_total", "counter"),
    "bare histogram": Definition("bare_seconds", "histogram", (), (0.5,)),
    "bare summary": Definition("bare_sizes", "summary"),
    "below zero": Definition("below", "histogram", ("who",), (-1.0, 1.0)),
    "last set": Definition("last_set", "gauge", ("who",), mode="latest"),
}
kinds = st.sampled_from(sorted(DEFINITIONS))
marks = st.sampled_from(["%s", "%", '"', "\\", "\n", "{", "\1", ",", "}", " ", "\r", ""])
plain = st.text(st.characters(min_codepoint=1, max_codepoint=126), max_size=20)
ascii_values = st.one_of(plain, st.lists(marks, max_size=6).map("".join))
numbers = st.one_of(
    st.floats(), st.integers(-(2**63), 2**63).map(float), st.integers(0, 12).map(float)
)
counts = st.one_of(st.integers(0, 2**48).map(float), st.floats(0, 1e6))


def lines(definition: Definition, found: Numbers) -> tuple[str, str | None]:
    """(in Python, in C or None)."""
    labels = found.labels(definition)
    form = text._form(definition, labels)
    by_c = speed.lines_of(
        form,
        labels,
        list(found.series.items()),
        found.cells,
        text._counts(definition),
        definition.summed,
    )
    return "".join(text._lines(form, definition, found, {})), by_c


def drawn(data: st.DataObject, definition: Definition, values: Any, cell: Any) -> Numbers:
    """Some series of a family, each behind a cell that is none of theirs."""
    row = st.tuples(*[values] * len(definition.labels))
    series, cells = {}, [math.nan]
    for labels in data.draw(st.lists(row, max_size=4, unique=True)):
        series[labels] = len(cells)
        cells += [*(data.draw(cell) for _ in range(definition.width - 1)), data.draw(numbers)]
        cells.append(math.nan)
    as_memory = data.draw(st.booleans())
    return Numbers(memoryview(array("d", cells)) if as_memory else cells, series, {})


@built
@given(data=st.data(), kind=kinds)
def test_the_usual_text_is_the_same(data: st.DataObject, kind: str) -> None:
    """All that is ASCII, finite and no less than nothing is made in C."""
    definition = DEFINITIONS[kind]
    found = drawn(data, definition, ascii_values, counts)
    if not all(math.isfinite(number) for number in last_cells(definition, found)):
        return
    by_python, by_c = lines(definition, found)
    assert by_c == by_python


def last_cells(definition: Definition, found: Numbers) -> list[float]:
    counted = text._counts(definition) if definition.summed else 0
    return [found.cells[at + counted] for at in found.series.values()] + [
        count
        for at in found.series.values()
        for count in found.cells[at : at + text._counts(definition)]
    ]


@built
@given(data=st.data(), kind=kinds)
def test_what_is_made_in_c_is_the_same_whatever_there_is(data: st.DataObject, kind: str) -> None:
    definition = DEFINITIONS[kind]
    found = drawn(data, definition, st.text(max_size=8).map(clean), st.one_of(counts, numbers))
    try:
        by_python, by_c = lines(definition, found)
    except (ValueError, OverflowError):  # no count is NaN or infinite
        assert any(not math.isfinite(count) for count in found.cells[1:-1])
        return
    assert by_c is None or by_c == by_python


@given(values=st.lists(st.text(max_size=12).map(clean), min_size=1, unique=True), cell=numbers)
@example(values=["%s", "%", '"', "\\n", "\\", "\n", "{le=", "é", "\U0001f984"], cell=1e15)
@example(values=["a"], cell=-0.0)
@example(values=["a"], cell=999_999_999_999_999.0)
@example(values=["a"], cell=1e16)
def test_every_label_value_and_number_comes_back(values: list[str], cell: float) -> None:
    definition = Definition("a", "gauge", ("who",))
    series: dict[tuple[str, ...], int] = {(value,): at for at, value in enumerate(values)}
    _, page = text.expose(definition, Numbers([cell] * len(values), series, {}), False)
    (family,) = parse(page)
    assert [sample.labels["who"] for sample in family.samples] == values
    for sample in family.samples:
        assert sample.value == cell or (math.isnan(cell) and math.isnan(sample.value))


@pytest.mark.parametrize("kind", ["counter", "histogram"])
def test_of_more_series_than_are_written_in_one_step_each_is_there_once(kind: str) -> None:
    definition = DEFINITIONS[kind]
    form = text._form(definition, definition.labels)
    step = text._AT_ONCE // form.count("%s")
    names = [*(str(number) for number in range(3 * step)), "é", "last"]
    width = definition.width
    series: dict[tuple[str, ...], int] = {
        ("GET", name): place * width for place, name in enumerate(names)
    }
    cells = [float(place) for place in range(len(names) * width)]
    _, page = text.expose(definition, Numbers(cells, series, {}), False)
    (family,) = parse(page)
    assert list(dict.fromkeys(sample.labels["who"] for sample in family.samples)) == names
    in_python = "".join(text._lines(form, definition, Numbers(cells, series, {}), {}))
    assert page.endswith(in_python)


@built
def test_python_makes_the_text_of_an_unusual_series_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, ...]] = []
    in_python = text._lines

    def watched(form: str, family: Definition, numbers: Numbers, exemplars: Any) -> Any:
        made.extend(numbers.series)
        return in_python(form, family, numbers, exemplars)

    monkeypatch.setattr(text, "_lines", watched)
    series = {("GET", f"/é{n}" if n == 7 else f"/{n}"): n for n in range(20)}
    text.expose(DEFINITIONS["counter"], Numbers([1.0] * 20, series, {}), False)
    assert made == [("GET", "/é7")]


@built
def test_many_buckets_are_written_for_few_series_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All other threads wait meanwhile."""
    steps: list[int] = []
    lines_of = speed.lines_of

    def watched(form: str, labels: Any, series: Any, *rest: Any) -> Any:
        steps.append(len(series) * form.count("%s"))
        return lines_of(form, labels, series, *rest)

    monkeypatch.setattr(speed, "lines_of", watched)
    wide = Definition("wide", "histogram", ("who",), tuple(float(n) for n in range(1, 500)))
    series = {(str(n),): n * wide.width for n in range(40)}
    text.expose(wide, Numbers([1.0] * 40 * wide.width, series, {}), False)
    assert len(steps) == 3
    assert max(steps) <= text._AT_ONCE


@built
def test_what_is_not_what_it_seems_is_left_to_python() -> None:
    form, labels = "a{\0} %s\n", ("who",)
    series, cells = [(("x",), 0)], [1.0]
    usual = form, labels, series, cells, 0, True
    assert speed.lines_of(*usual) == 'a{who="x"} 1.0\n'
    for place, other in (
        (0, b"a"),
        (0, "é %s"),
        (0, "%d"),
        (0, "%"),
        (1, ["who"]),
        (1, ("who", "else")),
        (1, (1,)),
        (2, [["x", 0]]),
        (2, [(("x",), 1)]),  # beyond the cells
        (2, [(("x",), -1)]),
        (2, [(("x",), 0.0)]),
        (2, [((1,), 0)]),
        (3, [1]),
        (3, ()),
        (3, b"12345678"),
        (3, memoryview(array("f", [1.0]))),
        (4, -1),
        (4, 1),
    ):
        asked = [*usual]
        asked[place] = other
        assert speed.lines_of(*asked) is None, (place, other)
    with pytest.raises(TypeError):
        speed.lines_of()
    with pytest.raises(OverflowError):
        speed.lines_of(form, labels, [(("x",), 2**70)], cells, 0, True)
