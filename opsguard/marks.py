"""What decorators leave on a handler, and how it is found again under what frameworks wrap.

A decorator of ours marks: it puts one :class:`Marks` on the function or class as the attribute
``__opsguard_marks__``. The route hook of each adapter reads the marks of whatever the route leads
to with :func:`marks_of`, which looks under `functools.wraps`, partial objects, bound methods,
class-based views and the view sets of Django REST framework.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from opsguard.policies import Policy

__all__ = ["NO_MARKS", "Marks", "layers", "marked", "marks_of"]

_NAME: Final = "__opsguard_marks__"
_MOST_LAYERS: Final = 100  # a chain of wrappers longer than this is a circle

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Marks:
    """What is declared about one handler. Immutable."""

    limits: tuple[Policy, ...] = ()
    """Of `limit`, the innermost decorator first."""
    exempt: bool = False
    """By `exempt`: no limit at the route stage."""
    keys: object | None = None
    """By `require_key`: what a caller must show."""
    public: bool = False
    """By `public`: no key is needed."""

    def over(self, inner: Marks) -> Marks:
        """These on top of `inner`: limits add up, and of two requirements the outer one counts."""
        extra = tuple(one for one in self.limits if all(one is not other for other in inner.limits))
        return Marks(
            limits=inner.limits + extra,
            exempt=self.exempt or inner.exempt,
            keys=self.keys if self.keys is not None else inner.keys,
            public=self.public or inner.public,
        )


NO_MARKS: Final = Marks()
NO_ACTIONS: Final[Mapping[str, str]] = MappingProxyType({})


def marked(target: T, **changes: Any) -> T:
    """Put `changes` (fields of :class:`Marks`) on top of what `target` is marked with.

    `limits` are added to those there are. Returns `target`, changed in place; one that
    takes no attributes (a bound method, a builtin) is a TypeError that says so.
    """
    try:
        setattr(target, _NAME, replace(NO_MARKS, **changes).over(marks_of(target)))
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"{target!r} cannot be marked: decorate a function, a method in its class, or a class"
        ) from error
    return target


def marks_of(target: object, method: str = "") -> Marks:
    """All marks on `target` and under it; :data:`NO_MARKS` if there are none. Never raises.

    `method` (`GET`) is for class-based views: the marks of the class's own function for
    that method count too, on top of those of the class.
    """
    found = NO_MARKS
    for layer in layers(target, method):
        marks = _get(layer, _NAME)
        if isinstance(marks, Marks):
            # From the outside in: what was found before is on top.
            found = marks if found is NO_MARKS else found.over(marks)
    return found


def layers(target: object, method: str = "") -> Iterator[object]:
    """`target` and what it stands for, from the outside in: see `marks_of`."""
    waiting = [target]
    for _ in range(_MOST_LAYERS):
        if not waiting:
            return
        layer = waiting.pop(0)
        if inspect.isclass(layer):
            yield from _of_class(layer, method)
            yield layer
            continue
        yield layer
        view, actions = _get(layer, "cls"), _get(layer, "actions")
        if inspect.isclass(view) and isinstance(actions, Mapping):
            yield from _of_class(view, method, actions)
            yield view
        # __func__ of a bound method; view_class of what Flask's and Django's as_view() returns.
        names = ["__wrapped__", "__func__", "view_class"]
        if isinstance(layer, functools.partial):
            names = ["func"]
        waiting += [under for name in names if (under := _get(layer, name)) is not None]


def _of_class(view: type, method: str, actions: Mapping[str, str] = NO_ACTIONS) -> Iterator[object]:
    """The functions of a class-based view that a request of this method goes through. `actions` are
    those of a view set of Django REST framework: which function a method is bound to.
    """
    name = method.lower()
    if name == "head" and name not in actions and not hasattr(view, "head"):
        name = "get"  # all frameworks answer HEAD with it
    name = actions.get(name, name)
    for one in ("dispatch", "dispatch_request", name):
        function = _get(view, one) if one else None
        if function is not None and not inspect.isclass(function):
            yield from layers(function, "")


def _get(target: object, name: str) -> Any:
    try:
        return getattr(target, name, None)
    except Exception:  # a proxy outside its request, for one
        return None
