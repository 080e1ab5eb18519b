"""What gunicorn does with the headers of an answer, which saves the path in C most of ours."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from opsguard_wsgi.types import StartResponse

__all__ = ["keeps_headers"]


def keeps_headers(start_response: StartResponse) -> bool:
    """Whether the server keeps an answer's headers in a list, `headers` of the object that its
    `start_response` belongs to. gunicorn does, for its hooks. What `start_response` is given it
    looks through, with two patterns and a set for each header, which costs more than all of ours;
    the C path puts the ids into that list where it sees that they are sound.

    It has to be gunicorn's own function: one put in its place may look at all headers itself.
    """
    answer, function = getattr(start_response, "__self__", None), _function(start_response)
    kind = type(answer)
    return (
        (kind.__module__, kind.__qualname__) == ("gunicorn.http.wsgi", "Response")
        and function == ("gunicorn.http.wsgi", "Response.start_response")
        and type(getattr(answer, "headers", None)) is list
    )


def _function(method: Any) -> tuple[object, object] | None:
    """Module and name of what a method runs, which `functools.wraps` does not hide."""
    function = getattr(method, "__func__", None)
    if not isinstance(function, FunctionType):
        return None
    return function.__globals__.get("__name__"), function.__code__.co_qualname
