"""The plan of one site by itself: why nothing suits it, in which order the reasons come, and who is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy

from fewbit_fx import FewBitConfig
from fewbit_fx.passes.plan import (
    EMPTY,
    NO_REPRESENTATION,
    RECOMPUTED,
    SIZE_FROM_DATA,
    SIZE_NOT_IN_BACKWARD,
    choose,
)
from fewbit_fx.passes.reasons import Cause, Reason
from fewbit_fx.passes.representations import Decision, Exact, PackedMask
from fewbit_fx.passes.sites import MaskSite, Site
from fewbit_fx.torch_private.sizes import size_symbols

ALL = FewBitConfig(min_numel=0)


@dataclass(frozen=True)
class OfNoKind(Site):
    """A site that no representation of ours is for; it reads one node, and a gradient where it has one."""

    node: fx.Node
    gradient: tuple[fx.Node, ...] = ()
    function = "custom"

    @property
    def anchor(self) -> fx.Node:
        return self.node

    stored = replaced = anchor

    @property
    def exact_inputs(self) -> tuple[fx.Node, ...]:
        return tuple(self.node.all_input_nodes)

    determined_by = exact_inputs

    @property
    def coded_inputs(self) -> tuple[fx.Node, ...]:
        return self.gradient

    def place(self, replaced: fx.Node) -> tuple[fx.Node, fx.Node]:
        return replaced, replaced


def of_size(*shape: int) -> fx.Node:
    """A node of a size that is known."""
    return last_node(lambda x: x.sin(), torch.empty(shape), "fake")


def of_symbolic_size(*shape: int) -> fx.Node:
    """A node all of whose sizes are symbols, but those of 0 and 1."""
    return last_node(lambda x: x.sin(), torch.empty(shape), "symbolic")


def of_size_from_data() -> fx.Node:
    return last_node(lambda x: x[x > 0].sin(), torch.ones(64, 32), "symbolic")


def last_node(function: Callable[[Tensor], Tensor], x: Tensor, mode: str) -> fx.Node:
    graph = make_fx(function, tracing_mode=mode)(x).graph
    (node,) = graph.output_node().all_input_nodes
    return node


def reason(site: Site, config: FewBitConfig = ALL, symbols: frozenset[object] = frozenset()) -> Reason:
    decision = choose(site, config, symbols)
    assert isinstance(decision, Exact)
    return decision.reason


def test_a_site_of_no_kind_has_no_representation() -> None:
    """What nothing else speaks against; so that the reasons of the other tests are theirs."""
    assert reason(OfNoKind(of_size(64, 32))) == NO_REPRESENTATION


def test_a_size_from_data_comes_before_all_else() -> None:
    assert reason(OfNoKind(of_size_from_data()), FewBitConfig(min_numel=10**9)) == SIZE_FROM_DATA


def test_what_follows_from_a_code_alone_takes_its_size_from_the_backward() -> None:
    node = of_symbolic_size(64, 32)
    given = size_symbols(node.meta["val"])
    assert len(given) == 2
    assert reason(OfNoKind(node)) == SIZE_NOT_IN_BACKWARD
    assert reason(OfNoKind(node), symbols=frozenset(list(given)[:1])) == SIZE_NOT_IN_BACKWARD
    assert reason(OfNoKind(node), symbols=given | {"another"}) == NO_REPRESENTATION
    assert reason(OfNoKind(node, gradient=(node,))) == NO_REPRESENTATION, "a gradient has the size too"


@pytest.mark.parametrize("make", [of_size, of_symbolic_size])
def test_too_few_elements_by_the_size_or_its_hint(make: Callable[..., fx.Node]) -> None:
    node = make(64, 32)
    site, expected = OfNoKind(node, gradient=(node,)), Reason.of(Cause.TOO_FEW_ELEMENTS, elements=2048, min_numel=2049)
    assert reason(site, FewBitConfig(min_numel=2049)) == expected
    assert reason(site, FewBitConfig(min_numel=2048)) == NO_REPRESENTATION


def test_no_elements() -> None:
    assert reason(OfNoKind(of_size(0, 32))) == EMPTY
    too_few = Reason.of(Cause.TOO_FEW_ELEMENTS, elements=0, min_numel=1)
    assert reason(OfNoKind(of_size(0, 32)), FewBitConfig(min_numel=1)) == too_few


def test_a_symbolic_size_that_fills_no_block() -> None:
    """16 lanes of 32 bits on a CPU: a block has 512 elements, and a second part begins behind it."""

    def of_symbols(*shape: int) -> Reason:
        node = of_symbolic_size(*shape)
        return reason(OfNoKind(node, gradient=(node,)))

    assert of_symbols(16, 32) == Reason.of(Cause.NO_FULL_BLOCK, elements=512)
    assert of_symbols(16, 33) == NO_REPRESENTATION
    assert reason(OfNoKind(of_size(16, 3))) == NO_REPRESENTATION, "a known size is padded"


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE])
@pytest.mark.parametrize("which", ["stored", "exact input"])
def test_what_checkpointing_computes_again(policy: CheckpointPolicy, which: str) -> None:
    node = of_size(64, 32)
    marked = node if which == "stored" else node.all_input_nodes[0]
    marked.meta["recompute"] = policy
    assert reason(OfNoKind(node)) == RECOMPUTED
    marked.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    assert reason(OfNoKind(node)) == NO_REPRESENTATION


def named(node: fx.Node, module: str) -> fx.Node:
    node.meta["nn_module_stack"] = {"": (f"L['self'].{module}", object)}
    return node


@pytest.mark.parametrize(
    ("patterns", "first"),
    [
        (("blocks.0.act",), "blocks.0.act"),
        (("blocks.0.act.gelu",), "blocks.0.act.gelu"),
        (("head", "blocks.*", "*"), "blocks.*"),
        (("*.gel?", "blocks.0.*"), "*.gel?"),
    ],
)
def test_skip_matches_the_module_or_the_name_and_says_by_which_pattern(patterns: tuple[str, ...], first: str) -> None:
    site = OfNoKind(named(of_size(64, 32), "blocks.0.act"))
    decision = choose(site, FewBitConfig(min_numel=0, skip=patterns), name="blocks.0.act.gelu")
    assert decision == Exact(Reason.of(Cause.SKIPPED, pattern=first))


@pytest.mark.parametrize("pattern", ["blocks.0", "act", "BLOCKS.*", "head.*", ""])
def test_skip_matches_whole_paths_with_case(pattern: str) -> None:
    site = OfNoKind(named(of_size(64, 32), "blocks.0.act"))
    assert choose(site, FewBitConfig(min_numel=0, skip=pattern), name="blocks.0.act.gelu") == Exact(NO_REPRESENTATION)


def test_a_user_who_skips_is_told_so_first() -> None:
    assert reason(OfNoKind(of_size(0, 32)), FewBitConfig(skip="*")).cause is Cause.SKIPPED


def test_proposals_are_asked_in_their_order_before_our_own_until_one_answers() -> None:
    asked: list[str] = []

    def says(answer: Decision | None, name: str) -> Callable[[Site, FewBitConfig], Decision | None]:
        def propose(site: Site, config: FewBitConfig) -> Decision | None:
            asked.append(name)
            return answer

        return propose

    site = MaskSite(last_node(lambda x: x > 0, torch.ones(64, 32), "fake"))
    theirs = Exact(Reason.of(Cause.NOT_CODABLE, problem="theirs"))
    assert isinstance(choose(site, ALL), PackedMask)
    assert choose(site, ALL, proposals=[says(None, "a"), says(theirs, "b"), says(None, "c")]) is theirs
    assert asked == ["a", "b"]
    assert isinstance(choose(site, ALL, proposals=[says(None, "c")]), PackedMask), "ours, where none of theirs answers"
    asked.clear()
    choose(OfNoKind(of_size(0, 32)), ALL, proposals=[says(theirs, "a")])
    choose(site, FewBitConfig(min_numel=0, skip="*"), proposals=[says(theirs, "a")])
    assert asked == [], "nobody is asked of what is unsuitable or skipped"
