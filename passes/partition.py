"""A partition: the forward and the backward graph, and the tensors that go from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from fewbit_fx.torch_private.sizes import bare_symbol, is_symbol, storage_key, storage_nbytes

from .graph import output_values, placeholders, value_of
from .splice import copy_module


@dataclass(frozen=True)
class Partition:
    """The two graphs that torch's partitioners return.

    The forward returns ``num_fwd_outputs`` values of the model, then the saved tensors, then saved
    symbols. The backward takes the saved symbols, the saved tensors in the same order, then gradients.

    Attributes:
        forward: The forward graph.
        backward: The backward graph.
        num_fwd_outputs: How many outputs of the forward are the model's.
        static_inputs: Positions of the forward's inputs that live anyway: parameters, buffers, and what the graph
            that made it keeps.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_fwd_outputs: int
    static_inputs: tuple[int, ...]

    def copy(self) -> Partition:
        """A copy that shares no node with this one."""
        return Partition(
            copy_module(self.forward), copy_module(self.backward), self.num_fwd_outputs, self.static_inputs
        )

    def computed_in_backward(self) -> set[str]:
        """Names of all operations of the backward, which are those of the joint graph."""
        return {n.name for n in self.backward.graph.nodes if n.op == "call_function"}

    def saved(self) -> list[fx.Node]:
        """Nodes of the forward whose tensors are saved for the backward."""
        values = output_values(self.forward.graph)[self.num_fwd_outputs :]
        return [n for n in values if isinstance(n, fx.Node) and isinstance(value_of(n), Tensor)]

    def returned_storages(self) -> set[object]:
        """The storages of what the forward returns to its caller: views and aliases of them live as long."""
        values = output_values(self.forward.graph)[: self.num_fwd_outputs]
        return {storage_key(n) for n in values if isinstance(n, fx.Node) and isinstance(value_of(n), Tensor)}

    def saved_results(self) -> set[object]:
        """The storages of saved tensors that the caller has too, and may write to before the backward."""
        return self.returned_storages() & {storage_key(n) for n in self.saved()}

    def is_donated_in_part(self) -> bool:
        """Whether the backward may overwrite a saved tensor, so that it runs once: torch's own rule.

        It may where the tensor shares its storage with no input and no output of either graph.
        """
        results = [n for n in output_values(self.backward.graph) if isinstance(n, fx.Node)]
        shared = {storage_key(n) for n in (*placeholders(self.forward.graph), *results)} | self.returned_storages()
        return any(storage_key(n) not in shared for n in self.saved())

    def saved_storages(self) -> dict[object, list[fx.Node]]:
        """The saved tensors by storage, without those that live anyway."""
        inputs = placeholders(self.forward.graph)
        alive = {storage_key(inputs[i]) for i in self.static_inputs if i < len(inputs)}
        found: dict[object, list[fx.Node]] = {}
        for node in self.saved():
            if storage_key(node) not in alive:
                found.setdefault(storage_key(node), []).append(node)
        return found

    def saved_inputs(self) -> tuple[int, ...]:
        """Positions of the forward's inputs that share their storage with a saved tensor."""
        saved = {storage_key(n) for n in self.saved()}
        return tuple(i for i, n in enumerate(placeholders(self.forward.graph)) if storage_key(n) in saved)

    def saved_bytes(self) -> int:
        """Bytes saved for the backward: each storage once and whole, without those that live anyway."""
        return sum(max(map(storage_nbytes, nodes)) for nodes in self.saved_storages().values())

    def symbols_in_backward(self) -> frozenset[object]:
        """The symbols of sizes that are inputs of the backward, each by itself."""
        _, nodes = self.symbols()
        return frozenset(symbol for n in nodes if (symbol := bare_symbol(value_of(n))) is not None)

    def symbols(self) -> tuple[list[fx.Node], list[fx.Node]]:
        """Placeholders that are sizes, of the forward and of the backward."""
        forward, backward = (placeholders(g.graph) for g in (self.forward, self.backward))
        return [n for n in forward if is_symbol(n)], [n for n in backward if is_symbol(n)]
