"""What is called for each request: as Python would call it, and without a frame of ours."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import pickle
import sys
import weakref
from typing import Any

import pytest

from opsguard.accelerator import speed
from opsguard.calls import Front, straight

built = pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")


def echo(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return args, kwargs


@straight
class Desk(Front):
    def __init__(self, serve: Any = echo) -> None:
        self._serve = serve

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._serve(*args, **kwargs)


@pytest.mark.parametrize(
    "serve",
    [echo, functools.partial(echo), lambda *args, **kwargs: echo(*args, **kwargs)],
    ids=["function", "partial", "lambda"],
)
def test_arguments_and_result_pass(serve: Any) -> None:
    desk = Desk(serve)
    assert desk() == ((), {})
    assert desk(1, "b") == ((1, "b"), {})
    assert desk(1, b=2) == ((1,), {"b": 2})
    assert desk(a=1) == ((), {"a": 1})


def test_a_class_is_called_as_well_as_a_function() -> None:
    """One whose type has no vectorcall."""

    class Slow:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return echo(*args, **kwargs)

    assert Desk(Slow())(1, b=2) == ((1,), {"b": 2})


def test_an_exception_goes_on() -> None:
    with pytest.raises(ZeroDivisionError):
        Desk(divmod)(1, 0)


def test_what_serves_may_put_another_in_its_place() -> None:
    def first(value: int) -> str:
        desk._serve = str
        gc.collect()
        return f"first {value}"

    desk = Desk(first)
    del first
    assert [desk(1), desk(2)] == ["first 1", "2"]


def test_without_anything_that_serves_it_is_an_attribute_error() -> None:
    desk = Desk()
    del desk._serve
    for call in (desk, Desk.__new__(Desk)):
        with pytest.raises(AttributeError, match="_serve"):
            call()


def test_what_cannot_be_called_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="not callable"):
        Desk(3)()


def test_python_is_asked_for_a_class_below() -> None:
    """It may say more, and call ours."""

    class Loud(Desk):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return "loud", super().__call__(*args, **kwargs)

    class Same(Desk):
        pass

    assert Loud()(1) == ("loud", ((1,), {}))
    assert Same()(1, b=2) == ((1,), {"b": 2})
    assert Desk()(1) == ((1,), {})


def test_a_call_that_is_patched_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tracing libraries do it, to the class."""

    @straight
    class Patched(Desk):
        __call__ = Desk.__call__

    desk = Patched()
    with monkeypatch.context() as patch:
        patch.setattr(Patched, "__call__", lambda self, value: ("patched", value))
        assert desk(1) == ("patched", 1)
    assert desk(1) == ((1,), {})


def test_signature_and_method_are_those_in_python() -> None:
    desk = Desk()
    assert str(inspect.signature(desk)) == "(*args: 'Any', **kwargs: 'Any') -> 'Any'"
    assert desk.__call__(1) == Desk.__call__(desk, 1) == desk(1)


def test_a_copy_serves_and_is_its_own() -> None:
    desk = Desk()
    desk.name = "a"  # type: ignore[attr-defined]
    other: Any = copy.copy(desk)
    assert other.name == "a"
    assert other(1) == ((1,), {})
    other._serve = str
    assert desk(1) == ((1,), {})
    unset = copy.copy(Desk.__new__(Desk))
    assert not hasattr(unset, "_serve")


class Drawer(Desk):
    """With an attribute in a slot of its own, and one that is found by its name only."""

    __slots__ = ("key",)


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda desk: pickle.loads(pickle.dumps(desk))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_has_the_slots_of_a_class_below(again: Any) -> None:
    drawer: Any = Drawer()
    drawer.key, drawer.name = 1, "a"
    other = again(drawer)
    assert (other.key, other.name, other(2)) == (1, "a", ((2,), {}))


def test_a_circle_through_it_is_collected() -> None:
    class Clerk(Desk):
        def __init__(self) -> None:
            super().__init__(self.serve)

        def serve(self) -> None: ...

    clerk = Clerk()
    gone = weakref.ref(clerk)
    del clerk
    gc.collect()
    assert gone() is None


@built
def test_no_frame_of_the_class_is_between() -> None:
    assert Desk(lambda: sys._getframe(1).f_code)() is sys._getframe().f_code


@built
def test_calls_leave_nothing_behind() -> None:
    desk = Desk()

    def run() -> int:
        for _ in range(1_000):
            desk(1, "b")
            desk(1, b=2)
            copy.copy(desk)
        gc.collect()
        return sys.getallocatedblocks()

    run()
    before = run()
    assert run() - before < 100


@built
@pytest.mark.parametrize("other", [3, int, Front], ids=repr)
def test_only_a_class_below_it_can_be_marked(other: Any) -> None:
    with pytest.raises(TypeError, match="below Front"):
        straight(other)
