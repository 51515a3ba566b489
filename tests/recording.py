"""Runs of whole programs, graph by graph: each against the replay of ``fuzzing``, whatever is around it.

A program is compiled up to and with the partition. What its graphs were given and returned is recorded, below all
that torch wraps around them (subclasses, hooks, transforms), and compared with the plain graphs and the codes of the
plan, run node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import make_boxed_func
from fuzzing import Recorder, Replay, assert_same, check_interface, joint_values
from helpers import check_sums, copy_of
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx

from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.graph import placeholders
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.pipeline import Work
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.torch_private.inductor import GraphRun
from fewbit_fx.torch_private.inputs import kept_by_their_makers

EXACT, LEAN = (FewBitConfig(recipe=r, strict=True, min_numel=0) for r in ("exact", "lean"))


@dataclass
class Call:
    """One run of a compiled graph."""

    random_state: Tensor
    given: list[Any]
    returned: Sequence[Any]


@dataclass
class Graph:
    """One of Dynamo's graphs. Regions that are compiled once for many places are partitioned by themselves."""

    works: list[Work] = field(default_factory=list)
    records: list[GraphRecord] = field(default_factory=list)
    forward: list[Call] = field(default_factory=list)
    backward: list[Call] = field(default_factory=list)


class Recording:
    """A backend that runs graphs in plain ATen and remembers them."""

    def __init__(self, config: FewBitConfig) -> None:
        self.config = config
        self.graphs: list[Graph] = []

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = Graph()
        self.graphs.append(graph)
        kept = kept_by_their_makers(gm, inputs)
        partitioner = FewBitPartitioner(self.config, graph.records.append, kept, observe=graph.works.append)

        def inner_compile(module: fx.GraphModule, _inputs: Any, is_backward: bool = False, **_: Any) -> Any:
            run, calls = GraphRun(module).run, graph.backward if is_backward else graph.forward

            def recorded(*args: Any) -> Any:
                state, given = torch.get_rng_state(), [copy_of(a) for a in args]
                calls.append(Call(state, given, run(*args)))
                return calls[-1].returned

            return make_boxed_func(recorded)

        with torch._functorch.config.patch(enable_autograd_cache=False):
            patches = {"custom_partitioner_fn": partitioner}
            return compile_fx(gm, list(inputs), inner_compile=inner_compile, config_patches=patches)  # type: ignore

    @property
    def plain_bytes(self) -> int:
        return sum(r.plain_bytes for g in self.graphs for r in g.records)

    @property
    def fewbit_bytes(self) -> int:
        return sum(r.fewbit_bytes for g in self.graphs for r in g.records)

    @property
    def coded(self) -> int:
        return sum(not s.is_exact for g in self.graphs for r in g.records for s in r.sites)

    def check(self) -> int:
        """Bytes, sums, interface, a forward that is the same bit for bit, and gradients; returns the runs compared."""
        runs = 0
        for graph in self.graphs:
            for work, record in zip(graph.works, graph.records, strict=True):
                assert record.fewbit_bytes <= record.plain_bytes
                check_sums(record)
                check_interface(work.chosen)
            for forward, backward in zip(graph.forward, graph.backward, strict=False):
                _compare(graph.works[-1], forward, backward)
                runs += 1
            for region in graph.works[:-1]:
                _compare(region, *_calls_alone(region))
        return runs


def _calls_alone(region: Work) -> tuple[Call, Call]:
    """A run of the graphs of a region, which are parts of another's, on random numbers."""
    forward, backward = region.chosen.forward, region.chosen.backward
    state = torch.get_rng_state()
    given = [_random(n) for n in placeholders(forward.graph)]
    returned = GraphRun(forward).run(*map(copy_of, given))
    saved = returned[region.chosen.num_fwd_outputs :]
    taken = [*saved, *(_random(n) for n in placeholders(backward.graph)[len(saved) :])]
    return Call(state, given, returned), Call(state, taken, GraphRun(backward).run(*map(copy_of, taken)))


def _random(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    return torch.randn(value.shape, dtype=value.dtype)


def _compare(work: Work, forward: Call, backward: Call) -> None:
    outputs = work.plain.num_fwd_outputs
    with torch.no_grad():
        torch.set_rng_state(forward.random_state)
        recorder = Recorder(work.plain.forward)
        results = recorder.run(*map(copy_of, forward.given))
        joint_values(work, recorder.values)
        for mine, theirs in zip(forward.returned[:outputs], results[:outputs], strict=True):
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
        tangents = backward.given[len(forward.returned) - outputs :]
        torch.set_rng_state(backward.random_state)
        gradients = Replay(work, recorder.values).run(*results[outputs:], *map(copy_of, tangents))
    for mine, theirs in zip(backward.returned, gradients, strict=True):
        if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
            assert_same(mine, theirs, torch.float32)
        else:
            assert mine == theirs  # such as the mesh of a distributed tensor


def run(
    function: Callable[..., Tensor], wanted: Sequence[Tensor], config: FewBitConfig, **options: Any
) -> tuple[Recording, list[Tensor]]:
    """Compile and run a function that returns its loss; what was recorded, and the gradients of some tensors."""
    torch.compiler.reset()
    recording = Recording(config)
    torch.manual_seed(1)
    loss = torch.compile(function, backend=recording.backend, dynamic=False, **options)()
    loss.backward()
    gradients = [t.grad for t in wanted]
    for tensor in wanted:
        tensor.grad = None
    assert all(g is not None for g in gradients)
    return recording, gradients  # type: ignore[return-value]


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The error of a whole gradient, as a share of it."""
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True))
    return float((difference / sum(float(b.double().square().sum()) for b in expected)) ** 0.5)


def check_all(function: Callable[[], Tensor], wanted: Sequence[Tensor], **options: Any) -> Recording:
    """What must hold of a program without random numbers; returns the recording of the recipe lean, which codes most.

    The replay is what the codes say; recipe "exact" must besides be eager PyTorch but for the order of sums.
    """
    expected = torch.autograd.grad(function(), wanted)
    recording, gradients = run(function, wanted, EXACT, **options)
    assert error(gradients, expected) <= 1e-5
    recording, _ = run(function, wanted, LEAN, **options)
    assert recording.check() == len(recording.graphs)
    assert recording.coded
    assert recording.fewbit_bytes < recording.plain_bytes
    return recording
