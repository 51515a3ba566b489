"""Records beside Inductor's caches, so that a report is there after a warm start too.

Where torch's caches spare a process the compilation, the passes do not run and record nothing. What
they recorded when the graph was compiled lies in a file of the same cache folder, under a key of all
that decides it. It informs only; nothing that is compiled depends on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fewbit_fx.passes.reasons import Cause, Reason
from fewbit_fx.passes.record import GraphRecord, OtherRecord, SiteRecord
from fewbit_fx.torch_private.inductor import cache_folder, partition_settings


class RecordFile:
    """The records of one graph.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs, fake or real.
        pass_key: The partitioner's key, which covers its sources and options.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], pass_key: str) -> None:
        parts = [pass_key, torch.__version__, partition_settings(), gm.code, *map(_describe, example_inputs)]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._path = Path(cache_folder()) / "fewbit" / f"{digest}.json"

    def write(self, records: Iterable[GraphRecord]) -> None:
        """Keep the records; a folder that cannot be written to is passed over."""
        # Others may read and write it meanwhile, on other machines too.
        unfinished = self._path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps([dataclasses.asdict(r) for r in records]))
            unfinished.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)  # a part, where the disk is full

    def read(self, compile_id: str) -> list[GraphRecord]:
        """The records, under this compilation's id; none if there is no readable file of this format."""
        try:
            return [_record(data, compile_id) for data in json.loads(self._path.read_text())]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad
        return f"{type(value).__name__} {layout}"
    return str(value)


def _record(data: dict[str, Any], compile_id: str) -> GraphRecord:
    own = {
        "compile_id": compile_id,
        "sites": tuple(
            SiteRecord(**{**_with_tuples(site), "reason": _reason(site["reason"])}) for site in data["sites"]
        ),
        "others": tuple(OtherRecord(**_with_tuples(other)) for other in data["others"]),
        "note": _reason(data["note"]),
    }
    return GraphRecord(**{**_with_tuples(data), **own})


def _reason(data: dict[str, Any] | None) -> Reason | None:
    return Reason.of(Cause(data["cause"]), **dict(data["details"])) if data else None


def _with_tuples(data: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only."""
    return {key: _as_tuples(value) for key, value in data.items()}


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
