"""What test_distributed.py looks at, on two processes: ``torchrun --nproc-per-node 2 distributed_cases.py FILE``.

Each case returns what it found on its rank; the file has them by case and rank. They run in plain ATen, up to and with
the partition. The oracle of gradients is one process: the same model without anything distributed, compiled alike, with
the batch of the rank; its gradients are averaged over the ranks.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import autograd_nodes
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fewbit_fx
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.graph import descendants, placeholders
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.pipeline import Work
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.torch_private.inductor import partition_only
from fewbit_fx.torch_private.inputs import kept_by_their_makers

WIDTH, TOKENS = 64, 32
# The code of an element then follows from the element and the 31 beside it alone.
CODED = FewBitConfig(levels="typical", min_numel=0, strict=True)
EXACT = FewBitConfig(recipe="exact", min_numel=0, strict=True)
AT_RANDOM = FewBitConfig(rounding="stochastic", min_numel=0, strict=True)
Facts = dict[str, Any]
Alone = Callable[[nn.Module, Any], Callable[..., Tensor]]
Together = Callable[[nn.Module, Any], tuple[Callable[..., Tensor], nn.Module]]
OF_ONE_PROCESS: dict[str, dict[str, Tensor]] = {}
CASES: dict[str, Callable[[], Facts]] = {}


def case(function: Callable[[], Facts]) -> Callable[[], Facts]:
    CASES[function.__name__] = function
    return function


class Gelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Tanh(nn.Module):
    """A layer that saves what it returns, so that a code of it in the next one would free nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Layers(nn.Module):
    """Unlike nn.Sequential, whose forward is torch's own, a model that Dynamo compiles as one within DDP."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def transformer() -> nn.Module:
    return Layers(Residual(Gated()), Gelu())


def tanhs() -> nn.Module:
    return Layers(Tanh(), Tanh())


class Streams(Layers):
    """Its blocks take and return two tensors, as those of many models do."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = super().forward((x, x))  # type: ignore[arg-type]
        return first + second


class TwoStreams(Tanh):
    def forward(self, streams: Any) -> Any:
        first, second = streams
        return torch.tanh(self.linear(first)), second + self.linear.bias


def two_streams() -> nn.Module:
    return Streams(TwoStreams(), TwoStreams())


def with_batch_norm() -> nn.Module:
    return Layers(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(TOKENS), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def batch(of_rank: int | None = None) -> Tensor:
    """The rank's two examples."""
    size = dist.get_world_size()
    everyones = torch.randn(2 * size, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).chunk(size)
    return everyones[dist.get_rank() if of_rank is None else of_rank]


def from_layer(x: Tensor) -> Tensor:
    """As an earlier layer makes it, that does not keep it: so it is coded as any other tensor."""
    return -x.detach().clone().requires_grad_()


class Backend:
    """fewbit up to and with the partition, or torch.compile's own partition."""

    def __init__(self, config: FewBitConfig | None) -> None:
        self.config = config
        self.records: list[GraphRecord] = []
        self.works: list[Work] = []

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.config is None:
            return partition_only(gm, inputs, None)  # type: ignore[arg-type]
        kept = kept_by_their_makers(gm, inputs)
        partitioner = FewBitPartitioner(self.config, self.records.append, kept, observe=self.works.append)
        return partition_only(gm, inputs, partitioner)


def whole(model: nn.Module, backend: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend=backend, dynamic=False)


def in_blocks(model: nn.Module, backend: Any) -> nn.Module:
    for block in model.layers:
        block.compile(backend=backend, dynamic=False)
    return model


def saved_tensors(result: Tensor) -> Iterator[Tensor]:
    """What compiled graphs have saved for the backward of a result."""
    for node in autograd_nodes(result):
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                saved = getattr(node, name)
                for raw in saved if isinstance(saved, (tuple, list)) else (saved,):
                    if isinstance(raw.data, Tensor):
                        yield raw.data


def held(result: Tensor, model: nn.Module) -> int:
    """Bytes that live on for the backward, each storage once, without parameters and buffers.

    What FSDP has freed of a gathered parameter has none.
    """
    alive = {storage(local(t)) for t in (*model.parameters(), *model.buffers())}
    found = {storage(t): t.untyped_storage().nbytes() for t in saved_tensors(result)}
    return sum(size for key, size in found.items() if key not in alive)


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def averaged(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over ranks; halves are exact, so that it does not matter when one divides."""
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradients


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative error of a parameter's gradient."""
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


def compared(
    name: str,
    model: Callable[[], nn.Module],
    alone: Alone,
    together: Together,
) -> Facts:
    """A model with and without codes, distributed, and with codes in one process.

    Args:
        name: Of what one process does; done once for all cases that share it.
        model: Makes the model.
        alone: How one process compiles it.
        together: Wraps and compiles it; returns what to call, and the module with the parameters.
    """
    x = batch()
    plain = taken(model, together, None, x)
    coded = taken(model, together, CODED, x)
    if name not in OF_ONE_PROCESS:
        OF_ONE_PROCESS[name] = averaged(taken(model, lambda m, b: (alone(m, b), m), CODED, x).gradients)
    return facts_of(plain, coded) | {"error": error(coded.gradients, OF_ONE_PROCESS[name])}


def facts_of(plain: Taken, coded: Taken) -> Facts:
    works = coded.backend.works
    return {
        "forward is identical": torch.equal(coded.output, plain.output),
        "buffers are identical": all(torch.equal(a, b) for a, b in zip(coded.buffers, plain.buffers, strict=True)),
        "inductor": plain.held,
        "held": coded.held,
        "reported": sum(r.fewbit_bytes for r in coded.backend.records),
        "graphs": len(works),
        "collectives, joint": sum(map(collectives, (w.joint for w in works)), Counter()),
        "collectives, cut": sum((collectives(p.graph) for w in works for p in cut(w)), Counter()),
        "parameters are coded": any(map(codes_parameters, works)),
    }


@dataclass
class Taken:
    """One step."""

    output: Tensor
    held: int
    gradients: dict[str, Tensor]
    buffers: list[Tensor]
    backend: Backend


def taken(
    model: Callable[[], nn.Module],
    together: Together,
    config: FewBitConfig | None,
    x: Tensor,
    given: Callable[[Tensor], Tensor] = from_layer,
) -> Taken:
    torch.compiler.reset()
    torch.manual_seed(0)
    backend = Backend(config)
    run, module = together(model(), backend)
    result = run(given(x))
    size = held(result, module)
    full(result).square().sum().backward()
    gradients = {
        name.replace("module.", "").replace("_orig_mod.", ""): full(p.grad).clone()
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    return Taken(full(result.detach()), size, gradients, list(module.buffers()), backend)


def eager(model: nn.Module, backend: Backend) -> tuple[Callable[..., Tensor], nn.Module]:
    return model, model


def collectives(graph: fx.Graph) -> Counter[str]:
    return Counter(str(n.target) for n in graph.nodes if "c10d" in str(n.target))


def cut(work: Work) -> tuple[fx.GraphModule, fx.GraphModule]:
    return work.chosen.forward, work.chosen.backward


def codes_parameters(work: Work) -> bool:
    """Whether something is coded whose value follows from parameters alone."""
    data = [n for n in placeholders(work.joint) if not is_parameter(work, n)]
    from_data = descendants(data)
    return any(site.stored not in from_data for site in work.coded)


def is_parameter(work: Work, node: fx.Node) -> bool:
    """In these models a parameter has two dimensions or one, and the data has three."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and value.dim() < 3 and "tangents" not in node.name


# Distributed data parallel.


def compiled_ddp(model: nn.Module, backend: Any, **options: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    ddp = DistributedDataParallel(model, **options)
    return whole(ddp, backend), ddp


def ddp_of_compiled(model: nn.Module, backend: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    ddp = DistributedDataParallel(whole(model, backend))  # type: ignore[arg-type]
    return ddp, ddp


def ddp_in_buckets(model: nn.Module, backend: Any, **options: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    """A bucket for each layer or two, and a graph for each bucket."""
    return compiled_ddp(model, backend, bucket_cap_mb=0.01, **options)


def alone_in_buckets(model: nn.Module, backend: Any) -> Callable[..., Tensor]:
    """In a group of one process, so that the graph is cut as in the larger one."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    run, _ = ddp_in_buckets(model, backend, process_group=groups[dist.get_rank()])
    return run


@contextlib.contextmanager
def small_first_bucket() -> Iterator[None]:
    """Else DDPOptimizer's first bucket has 1 MiB, and so the whole of a model of this size."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000):
        yield


@case
def ddp() -> Facts:
    return compared("transformer", transformer, whole, compiled_ddp)


@case
def ddp_around_compiled() -> Facts:
    return compared("transformer", transformer, whole, ddp_of_compiled)


@case
def ddp_buckets() -> Facts:
    with small_first_bucket():
        facts = compared("buckets", Gated, alone_in_buckets, ddp_in_buckets)
        exact = taken(Gated, ddp_in_buckets, EXACT, batch())
    of_eager = averaged(taken(Gated, eager, None, batch()).gradients)
    return facts | {"error of exact": error(exact.gradients, of_eager)}


@case
def ddp_buckets_that_keep_what_they_return() -> Facts:
    with small_first_bucket():
        return facts_of(*(taken(tanhs, ddp_in_buckets, config, batch(), torch.clone) for config in (None, CODED)))


@case
def ddp_batch_norm() -> Facts:
    return compared("batch norm", with_batch_norm, whole, compiled_ddp)


# Fully sharded data parallel.


def fsdp_in_blocks(model: nn.Module, backend: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    in_blocks(model, backend)
    return sharded(model), model


def fsdp_whole(model: nn.Module, backend: Any) -> tuple[Callable[..., Tensor], nn.Module]:
    return whole(sharded(model), backend), model


def sharded(model: nn.Module) -> nn.Module:
    for block in model.layers:
        fully_shard(block, reshard_after_forward=True)
    return fully_shard(model)


@case
def fsdp_compiled_in_blocks() -> Facts:
    return compared("blocks", transformer, in_blocks, fsdp_in_blocks)


@case
def fsdp_compiled_whole() -> Facts:
    return compared("blocks", transformer, in_blocks, fsdp_whole)


@case
def fsdp_blocks_that_keep_what_they_return() -> Facts:
    return facts_of(*(taken(two_streams, fsdp_in_blocks, config, batch(), torch.clone) for config in (None, CODED)))


# Tensor parallel, and DTensor.


def tensor_parallel(plan: dict[str, ParallelStyle]) -> Together:
    def together(model: nn.Module, backend: Any) -> tuple[Callable[..., Tensor], nn.Module]:
        return whole(parallelize_module(model, mesh(), plan), backend), model

    return together


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def compared_with_whole_batch(model: Callable[[], nn.Module], plan: dict[str, ParallelStyle], x: Tensor) -> Facts:
    """All ranks have the same batch; with sequences in shards, a part of each of its sequences."""
    plain = taken(model, tensor_parallel(plan), None, x)
    coded = taken(model, tensor_parallel(plan), CODED, x)
    of_one = taken(model, lambda m, b: (whole(m, b), m), CODED, batch(0))
    return facts_of(plain, coded) | {"error": error(coded.gradients, of_one.gradients)}


@case
def tensor_parallel_gelu() -> Facts:
    return compared_with_whole_batch(Gelu, {"up": ColwiseParallel(), "down": RowwiseParallel()}, batch(0))


@case
def tensor_parallel_gated() -> Facts:
    plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    return compared_with_whole_batch(Gated, plan, batch(0))


@case
def sequence_parallel() -> Facts:
    """Sequences are in shards outside of the layer, and gathered within: a collective whose result is saved."""
    plan: dict[str, ParallelStyle] = {
        "": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "gate": ColwiseParallel(),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    }
    part = batch(0).chunk(dist.get_world_size(), dim=1)[dist.get_rank()].contiguous()
    return compared_with_whole_batch(Gated, plan, part)


@case
def distributed_tensors() -> Facts:
    """A DTensor that one graph returns and keeps is an input of the next, behind a graph break."""

    def run(config: FewBitConfig | None) -> tuple[int, Tensor]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = in_blocks(Layers(Tanh(), Gelu()), Backend(config))
        for name, p in model.named_parameters():
            layer = model.get_submodule(name.rpartition(".")[0])
            setattr(layer, name.rpartition(".")[2], nn.Parameter(distribute_tensor(p.detach(), mesh(), [Replicate()])))
        x = distribute_tensor(batch(0), mesh(), [Shard(0)])
        result = model(from_layer(x))
        size = held(result, model)
        full(result).square().sum().backward()
        return size, full(model.layers[0].linear.weight.grad)

    (inductor, exact), (size, gradient) = run(None), run(CODED)
    (_, of_exact) = run(EXACT)
    return {
        "inductor": inductor,
        "held": size,
        "error": float((gradient - exact).norm() / exact.norm()),
        "error of exact": float((of_exact - exact).norm() / exact.norm()),
    }


# Seeds.


@case
def stochastic_rounding() -> Facts:
    """Codes of equal data, of both ranks, and of one in a second run."""

    def codes(config: FewBitConfig, times: int) -> list[list[list[int]]]:
        torch.compiler.reset()
        run, _ = compiled_ddp(Gelu(), Backend(config))
        return [once(run) for _ in range(times)]

    def once(run: Callable[..., Tensor]) -> list[list[int]]:
        torch.manual_seed(0)
        result = run(from_layer(batch(0)))
        found = [t.flatten().tolist() for t in saved_tensors(result) if t.dtype in (torch.int8, torch.int32)]
        result.sum().backward()
        return found

    everyone: list[Any] = [None] * dist.get_world_size()
    (first, again), (nearest,) = codes(AT_RANDOM, 2), codes(CODED, 1)
    dist.all_gather_object(everyone, (first, nearest))
    return {
        "again": first == again,
        "ranks alike at random": [a == b for a, b in zip(everyone[0][0], everyone[1][0], strict=True)],
        "ranks alike nearest": [a == b for a, b in zip(everyone[0][1], everyone[1][1], strict=True)],
    }


# What verify and explain say.


def checked(wrap: Callable[[nn.Module], nn.Module]) -> Facts:
    """What they find, and the gradients of a step afterwards."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = wrap(Gelu()), batch(0)[:1]
    try:
        found = fewbit_fx.verify(model, x, loss=lambda m, x: m(x).square().sum(), fewbit_config=CODED)
        errors = {p.name.removeprefix("module."): p.relative_error for p in found.parameters}
        verified: Any = [found.bytes_before, found.bytes_after, found.loss_identical, errors]
    except ValueError as fault:
        verified = str(fault)
    report = fewbit_fx.explain(model, x, fewbit_config=CODED)
    model(x).square().sum().backward()
    norms = {name.removeprefix("module."): full(p.grad).norm().item() for name, p in model.named_parameters()}
    return {"verified": verified, "explained": [report.plain_bytes, report.fewbit_bytes], "gradients": norms}


@case
def verify_one_process() -> Facts:
    return checked(lambda model: model)


@case
def verify_ddp() -> Facts:
    return checked(DistributedDataParallel)


@case
def verify_fsdp() -> Facts:
    return checked(fully_shard)


@case
def verify_tensor_parallel() -> Facts:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return checked(lambda model: parallelize_module(model, mesh(), plan))


def main(file: str, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    everything: dict[str, list[Facts]] = {}
    for name in names or CASES:
        found: list[Any] = [None] * dist.get_world_size()
        began = time.perf_counter()
        try:
            facts = CASES[name]()
        except Exception:
            facts = {"fault": traceback.format_exc()}
        facts["seconds"] = time.perf_counter() - began
        dist.all_gather_object(found, facts)
        everything[name] = found
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(everything))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
