"""The tasks that convergence is measured on. Importing them needs none of the packages that their data are in."""

from __future__ import annotations

from collections.abc import Mapping

from bench.evidence.tasks import glue, images, language
from bench.evidence.tasks.task import Task

TASKS: Mapping[str, Task] = {task.name: task for module in (glue, images, language) for task in module.tasks()}
"""By name, in the order of tables."""

DATA = "FEWBIT_EVIDENCE_DATA"
"""The environment variable with the folder that the user has data in: it decides no result, and is kept in none."""
