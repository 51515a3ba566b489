"""Results kept for as long as the function they belong to lives."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Result = TypeVar("Result")


def cached_per_function(make: Callable[..., Result]) -> Callable[..., Result]:
    """Cache ``make(function, *key)`` until the function is gone, so that nothing it closes over is kept alive.

    Equal functions share a result. A bound method, made anew at each look, lives as long as its object; an
    object that cannot be referred to weakly (``__slots__``) is kept.

    Args:
        make: Its result must not refer to the function. Its further arguments are hashable.
    """
    weak: weakref.WeakKeyDictionary[Any, dict[Hashable, Result]] = weakref.WeakKeyDictionary()
    strong: dict[Any, dict[Hashable, Result]] = {}

    @functools.wraps(make)
    def cached(function: Callable[..., Any], *key: Hashable) -> Result:
        owner, method = owner_of(function), getattr(function, "__func__", None)
        results = (weak if is_weakly_referable(owner) else strong).setdefault(owner, {})
        full_key = (method, *key)
        if full_key not in results:
            results[full_key] = make(function, *key)
        return results[full_key]

    return cached


def owner_of(function: Callable[..., Any]) -> Any:
    """The object whose life is the function's: that of a bound method, else the function itself."""
    return function.__self__ if inspect.ismethod(function) else function


def is_weakly_referable(value: object) -> bool:
    """Whether there are weak references to it; not to None, nor to objects with ``__slots__``."""
    try:
        weakref.ref(value)
    except TypeError:
        return False
    return True
