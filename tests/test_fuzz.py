"""The properties of ``fuzzing`` for random models: a few dozen here, thousands by ``make fuzz``."""

from __future__ import annotations

import os

from fuzzing import Case, cases, check
from hypothesis import HealthCheck, given, settings

GRAPHS = int(os.environ.get("FUZZ", "40"))


@settings(
    max_examples=GRAPHS,
    deadline=None,
    derandomize="FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
@given(cases())
def test_random_models(case: Case) -> None:
    check(case)
