"""Functions apart from Dynamo's caches, which are kept per code object."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable
from typing import Any


def with_own_code_object(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a function with a code object of its own, so that Dynamo's caches and limits for others do not concern it.

    Args:
        function: A plain function, without default arguments.
    """
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return types.FunctionType(code, function.__globals__, closure=function.__closure__)


_numbers = itertools.count()
