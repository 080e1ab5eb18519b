"""What is limited, how and by whom: one policy, and the ways to write it.

A policy comes from the settings (a rate, or a mapping with the names of :func:`policy`'s
parameters) or from a decorator. It says what is wanted; `opsguard.limiter` does it.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, get_args

from opsguard.rates import OnStoreError, Rate, Strategy, parse_rates

__all__ = ["EXEMPT", "KEYS", "Policy", "policy", "policy_from"]

KEYS: Final = ("address", "key", "tenant", "user", "global")
"""Who shares a bucket, by name: the client's address (IPv6: its /64), its API key, the key's
tenant, the key's user, or everybody."""

EXEMPT: Final = "exempt"
"""In place of a rate, for a path: no limit by path there, and no default either."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One rule of the limiter. Immutable.

    What is None is taken from the settings of the limiter.
    """

    rates: tuple[Rate, ...] = ()
    """Decided as one: a request is admitted by all of them or charged by none."""
    strategy: Strategy | None = None
    key: str | Callable[..., object] | None = None
    """One of :data:`KEYS`, or a function that names the bucket."""
    cost: int | Callable[..., object] = 1
    scope: str = ""
    """The name under which policies share buckets; empty: a policy's own."""
    methods: frozenset[str] = frozenset()
    """Upper case; empty for all."""
    on_store_error: OnStoreError | None = None
    shadow: bool | None = None
    exempt: bool = False
    name: str = ""
    """In metrics, headers and explanations: the path pattern, or the function's name."""

    def __str__(self) -> str:
        return "; ".join(rate.text for rate in self.rates) or EXEMPT

    def named(self, name: str) -> Policy:
        """The same under another name."""
        return replace(self, name=name)


def policy(
    rate: str,
    *,
    strategy: str | None = None,
    key: str | Callable[..., object] | None = None,
    cost: int | Callable[..., object] = 1,
    scope: str = "",
    methods: Iterable[str] | str = (),
    burst: int | None = None,
    on_store_error: str | None = None,
    shadow: bool | None = None,
) -> Policy:
    """A policy from what people write.

    :raises ValueError: for anything in it that could not be meant, in words for its author.
    """
    _check_text("rate", rate)
    if rate.strip() == EXEMPT:
        return Policy(methods=_methods(methods), exempt=True)
    rates = parse_rates(rate)
    _among("strategy", strategy, get_args(Strategy))
    _among("on_store_error", on_store_error, get_args(OnStoreError))
    _check_text("scope", scope)
    if shadow is not None and not isinstance(shadow, bool):
        raise ValueError(f"shadow must be true or false, not {shadow!r}")
    if strategy == "concurrency":
        # The text is read by people who were refused: a period would mislead them.
        rates = tuple(replace(one, text=f"{one.amount} at once") for one in rates)
    if burst is not None:
        if strategy != "gcra":
            raise ValueError("burst belongs to the strategy 'gcra'")
        rates = tuple(one.with_burst(_whole("burst", burst)) for one in rates)
    return Policy(
        rates=rates,
        strategy=strategy,  # type: ignore[arg-type]  # checked above
        key=_key(key),
        cost=_cost(cost, rates),
        scope=scope,
        methods=_methods(methods),
        on_store_error=on_store_error,  # type: ignore[arg-type]  # checked above
        shadow=shadow,
    )


_NAMES = tuple(inspect.signature(policy).parameters)


def policy_from(written: object) -> Policy:
    """The policy that a value of the settings stands for: a rate, a mapping, or a policy.

    :raises ValueError: in words for the author of the settings.
    """
    if isinstance(written, Policy):
        return written
    if isinstance(written, str):
        return policy(written)
    if not isinstance(written, Mapping):
        raise ValueError(f"must be a rate like '10/minute' or a mapping, not {written!r}")
    named: dict[str, Any] = {str(name): value for name, value in written.items()}
    for name in named:
        if name not in _NAMES:
            near = difflib.get_close_matches(name, _NAMES, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name!r} is no part of a policy{hint}")
    if "rate" not in named:
        raise ValueError("a policy needs a rate, like '10/minute'")
    return policy(**named)


def _key(key: object) -> str | Callable[..., object] | None:
    if key is None or isinstance(key, str):
        _among("key", key, KEYS)
        return key
    if not callable(key):
        raise ValueError(f"key must be one of {', '.join(KEYS)} or a function, not {key!r}")
    _must_not_wait("key", key)
    return key


def _cost(cost: object, rates: tuple[Rate, ...]) -> int | Callable[..., object]:
    if callable(cost):
        _must_not_wait("cost", cost)
        return cost
    number = _whole("cost", cost)
    most = min(rate.most for rate in rates)
    if not 1 <= number <= most:
        raise ValueError(
            f"cost must be from 1 to {most}, not {number}: no request could ever be admitted, or "
            f"each would be free (that is written {EXEMPT!r})"
        )
    return number


def _must_not_wait(what: str, function: Callable[..., object]) -> None:
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"{what} must be a plain function: limits are decided without waiting")


def _methods(methods: Iterable[object] | str) -> frozenset[str]:
    named = methods.replace(",", " ").split() if isinstance(methods, str) else list(methods)
    if not all(isinstance(one, str) and one.isalpha() for one in named):
        raise ValueError(f"methods must be names like 'POST', not {methods!r}")
    found = frozenset(str(one).upper() for one in named)
    # Frameworks answer HEAD by running GET; a limit that HEAD walked around would be none.
    return found | {"HEAD"} if "GET" in found else found


def _among(what: str, value: object, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")


def _check_text(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {value!r}")


def _whole(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} must be a whole number, not {value!r}")
    return value
