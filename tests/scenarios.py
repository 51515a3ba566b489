"""Scenarios: what users do with a compiled model, run by torch.compile's own cut, by ours, and by a reference.

A scenario is a function of ``compile`` that returns outputs and gradients. The reference is torch.compile's partition
as it is, but that each coded site saves its exact tensor, and the backward reads of it what its codes decode to.
All run in plain ATen, without kernels: what differs is codes, rewritten graphs and what is saved, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import copy_of
from torch import Tensor, fx

from fewbit_fx import FewBitConfig
from fewbit_fx.codec.dither import rounding_seed
from fewbit_fx.passes.graph import by_name, output_values, placeholders, value_of
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.pipeline import Work
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.passes.representations import Exact, Representation
from fewbit_fx.passes.splice import after, splice, trace
from fewbit_fx.torch_private.inductor import CustomPartitionerFn, partition_only
from fewbit_fx.torch_private.inputs import kept_by_their_makers
from fewbit_fx.torch_private.modes import mode_of

_COARSE = FewBitConfig(bits=2, value_bits=4, norm_bits=4, min_numel=0, max_relative_error=10.0, strict=True)
DEFAULT = _COARSE  # few enough bits that a wrong code shows
LEAN = _COARSE.updated({"recipe": "lean", "bits": 2, "value_bits": 3, "norm_bits": 4, "softmax_bits": 5})
CONFIGS = {"default": DEFAULT, "lean": LEAN}
EXACT = FewBitConfig(recipe="exact", min_numel=0, strict=True)

Compile = Callable[..., Callable[..., Any]]
Scenario = Callable[[Compile], tuple[Sequence[Any], Sequence[Any]]]


class Reference(CustomPartitionerFn):
    """A partitioner that saves exact tensors and decodes what codes of them would be."""

    def __init__(self, config: FewBitConfig, record: Callable[[GraphRecord], None], kept: tuple[int, ...]) -> None:
        self._works: list[Work] = []
        self._partitioner = FewBitPartitioner(config, record, kept, observe=self._works.append)

    def __call__(self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        self._partitioner(gm, joint_inputs, **kwargs)
        return _with_decoded_values(self._works[-1])

    def uuid(self) -> Any:
        return None


def _with_decoded_values(work: Work) -> tuple[fx.GraphModule, fx.GraphModule]:
    plain = work.plain.copy()
    forward, backward = by_name(plain.forward.graph), by_name(plain.backward.graph)
    saved: list[fx.Node] = []
    for site, decision in work.plan.items():
        if isinstance(decision, Exact):
            continue
        stored = _in_forward(site.stored, forward, plain.forward.graph)
        taken = [_save(plain.backward.graph, saved, stored.graph, stored, torch.clone, (stored,))]
        if decision.encode.seeded:
            device = value_of(stored).device
            taken.append(_save(plain.backward.graph, saved, stored.graph, stored, rounding_seed, (device,)))
        replaced = backward[site.replaced.name]
        before, _ = site.place(replaced)
        inputs = [backward[n.name] for n in site.coded_inputs]
        given = [*inputs, *taken, *plain.symbols()[1]]
        traced = trace(_Decoded(decision, len(inputs), len(taken)), given)
        (value,) = splice(traced, given, before, replaced)
        replaced.replace_all_uses_with(value)
        backward[site.replaced.name] = value
    output = plain.forward.graph.output_node()
    values, split = output_values(plain.forward.graph), plain.num_fwd_outputs
    for key in ("desc", "output_stack_traces"):
        entries = output.meta.get(key)
        if isinstance(entries, (list, tuple)) and len(entries) == len(values):
            more = [entries[split]] * len(saved)
            output.meta[key] = [*entries[:split], *more, *entries[split:]]
    output.args = ((*values[:split], *saved, *values[split:]),)
    for module in (plain.forward, plain.backward):
        module.graph.lint()
        module.recompile()
    return plain.forward, plain.backward


class _Decoded:
    """What codes of a value decode to, in one go."""

    def __init__(self, decision: Representation, inputs: int, taken: int) -> None:
        self._decision, self._inputs, self._taken = decision, inputs, inputs + taken

    def __call__(self, *values: Tensor) -> list[Tensor]:
        inputs, taken = values[: self._inputs], values[self._inputs : self._taken]
        return [self._decision.decode(inputs, self._decision.encode(*taken))]


def _in_forward(node: fx.Node, known: dict[str, fx.Node], graph: fx.Graph) -> fx.Node:
    if node.name not in known:
        inputs = {n: _in_forward(n, known, graph) for n in node.all_input_nodes}
        with graph.inserting_before(after(max(inputs.values()) if inputs else placeholders(graph)[-1])):
            known[node.name] = graph.node_copy(node, lambda n: inputs[n])
    return known[node.name]


def _save(
    backward: fx.Graph, saved: list[fx.Node], forward: fx.Graph, value: fx.Node, function: Any, args: tuple[Any, ...]
) -> fx.Node:
    """The backward's placeholder of a new saved tensor of the forward."""
    with forward.inserting_before(after(value)), mode_of(value_of(value)):
        node = forward.create_node("call_function", function, args, name=f"exact_{len(saved)}")
        node.meta["val"] = fx.map_arg(args, value_of) and function(*fx.map_arg(args, value_of))
    first = next(n for n in placeholders(backward) if isinstance(n.meta.get("val"), Tensor))
    if saved:
        first = by_name(backward)[saved[-1].name].next
    with backward.inserting_before(first):
        placeholder = backward.placeholder(node.name)
        placeholder.meta["val"] = node.meta["val"]
    assert placeholder.name == node.name
    saved.append(node)
    return placeholder


@dataclass
class Outcome:
    outputs: list[Any] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)
    error: BaseException | None = None
    records: list[GraphRecord] = field(default_factory=list)

    @property
    def coded(self) -> list[Any]:
        return [s for r in self.records for s in r.sites if not s.is_exact]


def run(scenario: Scenario, config: FewBitConfig | None, reference: bool = False) -> Outcome:
    """config None: torch.compile's own partitioner."""
    torch.compiler.reset()
    torch.manual_seed(0)
    outcome = Outcome()

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if config is None:
            return partition_only(gm, inputs, None)
        kept = kept_by_their_makers(gm, inputs)
        maker = Reference if reference else FewBitPartitioner
        return partition_only(gm, inputs, maker(config, outcome.records.append, kept))

    try:
        outputs, gradients = scenario(lambda f, **kwargs: torch.compile(f, backend=backend, **kwargs))
        outcome.outputs, outcome.gradients = [copy_of(t) for t in outputs], [copy_of(t) for t in gradients]
    except Exception as error:
        outcome.error = error
    return outcome


def same(a: Any, b: Any) -> bool:
    """Equal bit for bit, NaN where NaN is."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and bool(torch.equal(a.isnan(), b.isnan()))
            and (bool(torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))))
        )
    return a is None and b is None


def compare(scenario: Scenario, recipes: Sequence[str] = ("lean",)) -> dict[str, Outcome]:
    """Run a scenario by each recipe, and check what must hold of any.

    Outputs are torch.compile's bit for bit; so are the gradients of the recipe "exact". Those of codes are the
    reference's bit for bit, with another value than the exact ones somewhere: a wrong decode would show.

    Args:
        scenario: What the user does.
        recipes: Which of the recipes with codes; something must be coded.
    """
    plain = run(scenario, None)
    assert plain.error is None, plain.error
    found = {"plain": plain, "exact": run(scenario, EXACT)}
    _assert_same(found["exact"], plain)
    for name in recipes:
        config = CONFIGS[name]
        found[name] = run(scenario, config)
        _assert_same(found[name], run(scenario, config, reference=True))
        assert all(map(same, found[name].outputs, plain.outputs)), "the forward is the same"
        assert found[name].coded
        assert not all(map(same, found[name].gradients, plain.gradients)), "the codes are used"
        assert all(r.fewbit_bytes <= r.plain_bytes for r in found[name].records)
    return found


def _assert_same(mine: Outcome, theirs: Outcome) -> None:
    assert mine.error is None, mine.error
    assert theirs.error is None, theirs.error
    assert len(mine.gradients) == len(theirs.gradients)
    assert all(map(same, mine.outputs, theirs.outputs))
    assert all(map(same, mine.gradients, theirs.gradients))
