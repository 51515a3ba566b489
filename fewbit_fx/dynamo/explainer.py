"""Explain what fewbit would do to a model, without generating kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fewbit_fx.config import FewBitConfig
from fewbit_fx.dynamo.listener import Listener
from fewbit_fx.dynamo.partitioned_run import partitioned, undisturbed
from fewbit_fx.reporting.report import Report


def explain(model: Callable[..., Any], *args: Any, fewbit_config: FewBitConfig | None = None, **kwargs: Any) -> Report:
    """Trace ``model(*args, **kwargs)`` and report what fewbit does to its graphs.

    The model runs forward once in plain ATen, without computing gradients. Its buffers and the random
    state are put back afterwards; what Dynamo has compiled of it stays as it is.

    Args:
        model: A module or function, compiled or not.
        *args: Inputs of the model. One of them, or a parameter, must require gradients.
        fewbit_config: Other options than the default.
        **kwargs: Further inputs of the model.

    Returns:
        The report; it prints as a table and has ``to_dict()``.

    Examples:
        >>> import torch, fewbit_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> model = model.requires_grad_(False)  # what trains is before it
        >>> report = fewbit_fx.explain(model, torch.randn(128, 32, requires_grad=True))
        >>> print(report)  # doctest: +ELLIPSIS
        graph 0/0: recipe default
          where  count  function  shape   dtype    what happened    bytes before  after  rel. error
          1          1  gelu      128x64  float32  coded in 3 bits        32,768  3,088       ...%
        ...
        bytes saved for backward: torch.compile 32,768   fewbit 3,088   (-90.6%)
    """
    listener = Listener()
    with undisturbed(model), torch.enable_grad():
        partitioned(model, fewbit_config or FewBitConfig(), listener)(*args, **kwargs)
    return Report(tuple(listener.records))
