"""torch's caches across processes: what hits, what misses, and processes that are killed on the way."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch._aot_autograd import autograd_cache
from warm_start import Small, data, model

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.representations import Decision
from fewbit_fx.passes.sites import Site

ROOT = Path(__file__).parent.parent
LEAN = {"recipe": "lean", "rounding": "stochastic", "dropout": 0.0, "seeds": [0, 7]}


def processes(folder: Path, hash_seed: int, *options: dict[str, Any]) -> list[dict[str, Any]]:
    """What a process prints that trains with these options one after another."""
    environment = {"PYTHONHASHSEED": str(hash_seed), "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    output = subprocess.run(
        [sys.executable, str(ROOT / "tests/warm_start.py"), *map(json.dumps, options)],
        env={**os.environ, **environment, "TORCHINDUCTOR_COMPILE_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    ).stdout
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("across")


@pytest.fixture(scope="module")
def first(folder: Path) -> list[dict[str, Any]]:
    """Two processes that are killed, and one that is not."""
    return processes(folder, 0, {**LEAN, "kill": "report"}, {**LEAN, "kill": "compiling"}, LEAN)


@pytest.fixture(scope="module")
def second(folder: Path, first: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A later process, and once more where the files of reports are cut off."""
    return processes(folder, 1, LEAN, {**LEAN, "garbage": True})


def test_after_processes_that_were_killed_the_next_one_works(first: list[dict[str, Any]], folder: Path) -> None:
    writing, compiling, cold = first
    assert writing == compiling == {"killed by": 9}
    (unfinished,) = (f for f in (folder / "fewbit").iterdir() if f.suffix != ".json")
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(unfinished.read_text())
    assert cold["counters"] == {
        **dict.fromkeys(cold["counters"], 0),
        "fxgraph_cache_miss": 2,
        "autograd_cache_miss": 1,
    }
    assert 0 < cold["report"]["fewbit_bytes"] < cold["report"]["plain_bytes"]
    assert all(0 < step["error"] < 0.1 for step in cold["steps"])


def test_a_second_process_starts_warm_with_the_same_gradients(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    cold, warm = first[-1], second[0]
    assert warm["counters"] == {**dict.fromkeys(cold["counters"], 0), "fxgraph_cache_hit": 2, "autograd_cache_hit": 1}
    assert warm["steps"] == cold["steps"]
    assert warm["report"] == cold["report"]


def test_a_seed_makes_other_codes_of_the_same_kernels(second: list[dict[str, Any]]) -> None:
    one, other = second[0]["steps"]
    assert one["loss"] == other["loss"]
    assert one["gradients"] != other["gradients"]


def test_a_report_that_is_cut_off_costs_the_report_alone(
    first: list[dict[str, Any]], second: list[dict[str, Any]]
) -> None:
    assert second[1]["steps"] == first[-1]["steps"]
    assert second[1]["counters"] == second[0]["counters"]
    assert second[1]["report"]["graphs"] == []


# Keys, looked up without compiling.


class Asked(BaseException):
    """AOTAutograd has a key."""


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., str]:
    """The key that AOTAutograd looks up for the first graph of a model."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    original = autograd_cache.autograd_cache_key

    def ask(*args: Any, **kwargs: Any) -> Any:
        raise Asked(original(*args, **kwargs)[0])

    monkeypatch.setattr(autograd_cache, "autograd_cache_key", ask)

    def key_of(net: nn.Module | None = None, **options: Any) -> str:
        torch.compiler.reset()
        with pytest.raises(Asked) as asked:
            torch.compile(net or model(), backend=fewbit_fx.backend(**options))(*data())
        return str(asked.value.args[0])

    return key_of


CHANGED = {
    "bits": 2, "min_numel": 1, "max_relative_error": 0.1, "derivatives": False, "masks": False, "strict": True,
    "skip": "head", "disable": "gain", "recipe": "lean", "recompute": False, "value_bits": 4, "norm_bits": 4,
    "softmax_bits": 4, "levels": "typical", "rounding": "stochastic",
}  # fmt: skip


def test_the_key_that_is_looked_up_is_that_of_the_first_process(
    first: list[dict[str, Any]], key: Callable[..., str], folder: Path
) -> None:
    options = {"recipe": "lean", "rounding": "stochastic", "min_numel": 0, "strict": True}
    assert (folder / "aotautograd" / key(model(0.0), **options)).is_dir()
    assert not (folder / "aotautograd" / key(model(0.0), **{**options, "value_bits": 5})).exists()


def test_every_option_and_what_else_decides_has_a_key_of_its_own(key: Callable[..., str]) -> None:
    assert CHANGED.keys() == set(FewBitConfig.option_names())
    keys = [key(), *(key(**{name: value}) for name, value in CHANGED.items())]
    keys += [key(options={"epilogue_fusion": False}), key(proposals=[propose_nothing])]
    for budget in (0.9, 0.5):
        with torch._functorch.config.patch(activation_memory_budget=budget):
            keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_seed_and_a_rank_are_in_no_key(key: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read when the kernels run."""
    net = model()
    before = key(net, rounding="stochastic")
    torch.manual_seed(7)
    assert key(net, rounding="stochastic") == before == key(model(), rounding="stochastic")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 1)
    assert key(net, rounding="stochastic") == before


def test_another_torch_or_numpy_misses(key: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own part is ``torch_key``: its version and sources."""
    before = key()
    with monkeypatch.context() as patched:
        patched.setattr("torch._inductor.codecache.torch_key", lambda: b"another")
        assert key() != before
    with monkeypatch.context() as patched:
        patched.setattr("numpy.__version__", "0.0")
        assert key() != before
    assert key() == before


class Renamed(Small):
    """The same graph, but the module of its GELU has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.other = self.act
        del self.act

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.drop(self.other(self.up(x)))), y)


def test_names_of_modules_are_in_the_key_for_the_option_skip_goes_by_them(key: Callable[..., str]) -> None:
    assert key(Renamed(), skip="other") != key(skip="other")
    assert key(Renamed()) != key(), "and so do reports"
    assert key(Renamed()) == key(Renamed())


def propose_nothing(site: Site, config: FewBitConfig) -> Decision | None:
    return None


def propose(bits: int) -> Callable[[Site, FewBitConfig], Decision | None]:
    return lambda site, config: None  # whatever it would do with its bits


@pytest.mark.parametrize(
    "proposal", [propose(2), functools.partial(propose_nothing)], ids=["made by a function", "partial"]
)
def test_a_proposal_that_no_module_has_by_its_name_is_in_no_cache(
    proposal: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them look the same to any key: ``propose(2)`` and ``propose(4)``."""
    from fewbit_fx.passes.partitioner import FewBitPartitioner
    from fewbit_fx.torch_private.inductor import partition_only

    partitioner = FewBitPartitioner(FewBitConfig(), print, (), [proposal])
    assert partitioner.cache_key() is None
    with pytest.raises(Exception, match="fewbit-fx has no key for it") as raised:
        partitioner.uuid()
    assert type(raised.value).__name__ == "BypassFxGraphCache"
    monkeypatch.setattr(
        "fewbit_fx.dynamo.fewbit_backend.compile_with_inductor",
        lambda gm, inputs, partitioner, mode, options: partition_only(gm, inputs, partitioner),
    )
    mine = fewbit_fx.backend(min_numel=0, proposals=[proposal])
    torch.compile(model(), backend=mine)(*data()).backward()
    assert 0 < mine.last_report().fewbit_bytes < mine.last_report().plain_bytes


KEYS_OF_COPIES = """
import os, sys
import torch, torch._inductor.codecache, torch._inductor.compile_fx
for folder in sys.argv[1:]:
    if os.fork() == 0:
        sys.path.insert(0, folder)
        import fewbit_fx
        from fewbit_fx.passes.partitioner import FewBitPartitioner
        assert fewbit_fx.__file__.startswith(folder)
        print(FewBitPartitioner(fewbit_fx.FewBitConfig(), print).uuid(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_comment_in_any_source_file_is_another_key(tmp_path: Path) -> None:
    """Of copies of the package, each imported by a process of its own."""
    changes = [None, None, "passes/plan.py", "passes/sites/find.py", "fewbit_fx/codec/dither.py"]
    copies = [tmp_path / str(i) for i in range(len(changes))]
    for copy, change in zip(copies, changes, strict=True):
        for package in ("fewbit_fx", "passes"):
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        if change:
            file = copy / change
            file.write_text(file.read_text() + "# a comment\n")
    output = subprocess.run(
        [sys.executable, "-c", KEYS_OF_COPIES, *map(str, copies)],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    one, same, *others = output.stdout.splitlines()
    assert one == same, "wherever it lies"
    assert len({one, *others}) == 1 + len(others) == 4
