"""fewbit-fx: torch.compile with few-bit saved tensors.

model = torch.compile(model, backend="fewbit")    # a compiled model
fewbit_fx.convert(model, bits=3)                   # an eager one
"""

from __future__ import annotations

from importlib.metadata import entry_points

from fewbit_fx._checkout import find_passes
from fewbit_fx._version import __version__, require_torch

require_torch()
find_passes()

from fewbit_fx import functional, nn  # noqa: E402  (only once torch is known to be new enough)
from fewbit_fx.codebooks import activations as functions  # noqa: E402
from fewbit_fx.codebooks import density  # noqa: E402  (only once torch is known to be new enough)
from fewbit_fx.codebooks.fitting import Codebook  # noqa: E402
from fewbit_fx.codebooks.of_functions import codebook  # noqa: E402
from fewbit_fx.codebooks.sampling import NotCodableError  # noqa: E402
from fewbit_fx.config import FewBitConfig  # noqa: E402
from fewbit_fx.conversion import convert  # noqa: E402
from fewbit_fx.dynamo.bisector import Bisection, bisect  # noqa: E402
from fewbit_fx.dynamo.explainer import explain  # noqa: E402
from fewbit_fx.dynamo.fewbit_backend import FewBitBackend, backend, fewbit, last_report  # noqa: E402
from fewbit_fx.dynamo.verifier import Verification, Watch, verify  # noqa: E402
from fewbit_fx.reporting.report import Report  # noqa: E402
from fewbit_fx.torch_private.dynamo import register_backend  # noqa: E402

__all__ = [
    "__version__",
    "Bisection",
    "Codebook",
    "FewBitBackend",
    "FewBitConfig",
    "NotCodableError",
    "Report",
    "Verification",
    "Watch",
    "backend",
    "bisect",
    "codebook",
    "convert",
    "density",
    "explain",
    "fewbit",
    "functional",
    "functions",
    "last_report",
    "nn",
    "verify",
]

if not entry_points(group="torch_dynamo_backends", name="fewbit"):  # run from a checkout, not installed
    register_backend(fewbit, name="fewbit")
