"""fewbit-fx: torch.compile with few-bit saved tensors.

model = torch.compile(model, backend="fewbit")
"""

from __future__ import annotations

from importlib.metadata import entry_points

from fewbit_fx._version import require_torch

require_torch()

from fewbit_fx._torch import register_backend  # noqa: E402  (only once torch is known to be new enough)
from fewbit_fx.config import FewBitConfig  # noqa: E402
from fewbit_fx.dynamo_backend import FewBitBackend, backend, fewbit, last_report  # noqa: E402
from fewbit_fx.explainer import explain  # noqa: E402
from fewbit_fx.report import Report  # noqa: E402

__all__ = ["FewBitBackend", "FewBitConfig", "Report", "backend", "explain", "fewbit", "last_report"]

if not entry_points(group="torch_dynamo_backends", name="fewbit"):  # run from a checkout, not installed
    register_backend(fewbit, name="fewbit")
