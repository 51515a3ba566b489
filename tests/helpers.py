"""What several test modules need: a look at partitions, an oracle, and models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fewbit_fx.codebooks.density import Typical
from fewbit_fx.codebooks.fitting import Codebook, fit_codebook
from fewbit_fx.codebooks.sampling import sample_derivative
from fewbit_fx.codec.sampled_levels import SampledScheme
from fewbit_fx.codec.scheme import choose_scheme
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.graph import output_values
from fewbit_fx.passes.partition import Partition
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.pipeline import Work
from fewbit_fx.passes.record import GraphRecord, SiteRecord
from fewbit_fx.passes.sites import Site
from fewbit_fx.passes.sites.value_site import READER_NAMES
from fewbit_fx.torch_private.inductor import partition_only

STRICT = FewBitConfig(recipe="derivatives", strict=True, min_numel=0)


@dataclass
class Seen:
    """One run of the partitioner on a real joint graph.

    ``inputs`` are those of Dynamo's graph, to which the placeholders ``primals_1``, ``primals_2``, ... belong.
    """

    sites: list[Site]
    plain: Partition
    chosen: Partition
    record: GraphRecord
    output: Any
    inputs: list[Any]

    def happened(self, function: str) -> list[SiteRecord]:
        return [s for s in self.record.sites if s.function == function]

    @property
    def coded(self) -> list[SiteRecord]:
        return [s for s in self.record.sites if not s.is_exact]


def watch(function: Callable[..., Any], *args: Any, config: FewBitConfig = STRICT, dynamic: bool | None = None) -> Seen:
    """Trace, partition with fewbit, run forward in plain ATen; no kernels are generated."""
    torch.compiler.reset()  # or Dynamo makes symbols of numbers that differ between modules
    records: list[GraphRecord] = []
    seen: list[tuple[list[Site], Partition, Partition]] = []
    given: list[Any] = []

    def observe(work: Work) -> None:
        if not {"rewrite", "compare"} & set(config.disable):
            assert work.predicted_bytes() == work.chosen.saved_bytes()
        seen.append((list(work.sites), work.plain.copy(), work.chosen))

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given[:] = inputs
        return partition_only(gm, inputs, partitioner)

    partitioner = FewBitPartitioner(config, records.append, observe=observe)
    output = torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    (record,) = records
    (sites, plain, chosen) = seen[-1]
    return Seen(sites, plain, chosen, record, output, given)


def check_sums(record: GraphRecord) -> None:
    """Every saved byte counts for one row, and no row counts others."""
    assert sum(row.bytes_before for row in record.rows) == record.plain_bytes
    assert sum(row.bytes_after for row in record.rows) == record.fewbit_bytes


def derivatives_and_masks(sites: Iterable[SiteRecord]) -> list[str]:
    """The names of the functions of all sites but those of values."""
    return [site.function for site in sites if site.function not in READER_NAMES.values()]


def targets(graph_module: Any) -> list[str]:
    """Names of the operations of a graph, in order."""
    return [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]


def saved_dtypes(partition: Partition) -> list[torch.dtype]:
    return [n.meta["val"].dtype for n in partition.saved()]


def check_interface(partition: Partition) -> None:
    """The forward's saved outputs and the backward's inputs agree in number, order, shape and dtype."""
    saved = partition.saved()
    returned = output_values(partition.forward.graph)[partition.num_fwd_outputs :]
    symbols = [n for n in returned if n not in saved]
    inputs = [n for n in partition.backward.graph.nodes if n.op == "placeholder"]
    taken = inputs[len(symbols) : len(symbols) + len(saved)]
    assert [n.name for n in taken] == [n.name for n in saved]
    for given, expected in zip(saved, taken, strict=True):
        assert given.meta["val"].shape == expected.meta["val"].shape
        assert given.meta["val"].dtype == expected.meta["val"].dtype
    assert all(n.users for n in taken), "nothing is saved in vain"


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f'(x) in float64, by eager autograd."""
    x = x.detach().double().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


def codebook_of(function: Callable[[Tensor], Tensor], bits: int) -> Codebook:
    """The codebook, from autograd's derivative: it never sees a graph."""
    sample = sample_derivative(lambda x: derivative(function, torch.from_numpy(x)).numpy(), Typical())
    return fit_codebook(sample.values, sample.weights, bits)


def oracle_factor(function: Callable[[Tensor], Tensor], x: Tensor, levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The level nearest to f'(x) by exhaustive comparison, and where it is beyond doubt in float32."""
    levels = torch.tensor(levels, dtype=torch.float64)
    exact = derivative(function, x)
    distance = (exact.unsqueeze(-1) - levels).abs()
    two_nearest = distance.topk(2, largest=False).values
    certain = (two_nearest[..., 1] - two_nearest[..., 0]) > 1e-5
    return levels[distance.argmin(-1)], certain


@functools.cache
def sampled_scheme(function: Callable[[Tensor], Tensor], bits: int) -> SampledScheme:
    """How a function's derivative is coded with levels from a sample, from autograd's derivative."""

    def slope(x: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            return derivative(function, torch.from_numpy(np.array(x))).numpy()

    scheme = choose_scheme(slope, bits)
    assert isinstance(scheme, SampledScheme)
    return scheme


def sampled_factor(function: Callable[[Tensor], Tensor], x: Tensor, bits: int) -> Tensor:
    """The level of each element with levels from a sample of the whole tensor: plain eager PyTorch, without planes."""

    def slope(points: Tensor) -> Tensor:
        with torch.enable_grad():
            points = (points if points.dtype == torch.float64 else points.float()).detach().requires_grad_()
            (gradient,) = torch.autograd.grad(function(points).sum(), points)
        return gradient

    return sampled_scheme(function, bits).coded(x.detach(), slope)


class CodedActivation(torch.autograd.Function):
    """The oracle as an eager activation: exact forward, backward by the nearest level."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor], levels: tuple[float, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.levels = function, levels
        return function(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            factor, _ = oracle_factor(ctx.function, x, ctx.levels)
        return (gradient * factor).to(gradient.dtype), None, None


class Oracle(nn.Module):
    """An activation module that is the oracle."""

    def __init__(self, function: Callable[[Tensor], Tensor], levels: tuple[float, ...]) -> None:
        super().__init__()
        self.function, self.levels = function, levels

    def forward(self, x: Tensor) -> Tensor:
        return CodedActivation.apply(x, self.function, self.levels)  # type: ignore[no-any-return]


def close_to_oracle(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Equal but for elements at a boundary, which may fall to either side.

    At most one element in a thousand does here, each by at most the largest gap between levels,
    which is a fifth of the largest derivative.
    """
    return all((a - b).norm() <= 0.2 * 1e-3**0.5 * b.norm() for a, b in zip(found, expected, strict=True))


def copy_of(value: Any) -> Any:
    """A tensor with a storage of its own; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """Gradients of all trained parameters."""
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp(activation: nn.Module, width: int = 64, frozen: bool = False) -> nn.Sequential:
    """Linear, activation, linear; ``frozen`` freezes the second linear, so that only f'(x) needs saving."""
    model = nn.Sequential(nn.Linear(32, width), activation, nn.Linear(width, 16))
    if frozen:
        model[2].requires_grad_(False)
    return model


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class ReadTwice(nn.Module):
    """One x whose GELU is taken twice, for two frozen layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 64)
        self.one, self.two = (nn.Linear(64, 8).requires_grad_(False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.one(F.gelu(h)) + self.two(F.gelu(h)).square()


class TransformerBlock(nn.Module):
    def __init__(self, width: int = 32, dropout: float = 0.1) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 2, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


def lora(block: TransformerBlock) -> TransformerBlock:
    """As with adapters on the attention: the MLP and the norms are frozen."""
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.startswith(("qkv", "out")))
    return block


class ResidualConv(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ConvNeXt(nn.Module):
    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


def model_zoo() -> dict[str, tuple[nn.Module, Tensor]]:
    """Small models of many kinds, with an input that requires gradients, as inside a larger model."""
    sequence, image = torch.randn(4, 16, 32), torch.randn(2, 8, 12, 12)
    features = torch.randn(64, 32)
    zoo: dict[str, tuple[nn.Module, Tensor]] = {
        "gpt": (nn.Sequential(TransformerBlock(), TransformerBlock()), sequence),
        "gpt without dropout": (TransformerBlock(dropout=0.0), sequence),
        "gpt lora": (nn.Sequential(lora(TransformerBlock()), lora(TransformerBlock())), sequence),
        "swiglu": (SwiGLU(), sequence),
        "resnet": (nn.Sequential(ResidualConv(), ResidualConv()), image),
        "convnext": (nn.Sequential(ConvNeXt(), ConvNeXt()), image),
        "relu dropout": (mlp(nn.Sequential(nn.ReLU(), nn.Dropout(0.2))), features),
        "tanh twice": (mlp(nn.Sequential(nn.Tanh(), nn.Tanh())), features),
        "maxpool": (nn.Sequential(nn.Conv2d(8, 8, 3), nn.SiLU(), nn.MaxPool2d(2)), image),
        "squared relu": (mlp(_SquaredReLU()), features),
        "prelu": (mlp(nn.PReLU()), features),
    }
    for name in ("GELU", "SiLU", "Mish", "Softplus", "ELU", "Hardswish", "Sigmoid", "Hardtanh", "LeakyReLU"):
        zoo[f"mlp {name}"] = (mlp(getattr(nn, name)()), features)
        zoo[f"frozen mlp {name}"] = (mlp(getattr(nn, name)(), frozen=True), features)
    return {name: (model, x.requires_grad_()) for name, (model, x) in zoo.items()}


class _SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) ** 2


def autograd_nodes(result: Tensor) -> Iterator[Any]:
    """Every node of the autograd graph behind a tensor, once."""
    seen, todo = set(), [result.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [following for following, _ in node.next_functions]
        yield node


def held_bytes(result: Tensor, model: nn.Module) -> int:
    """Bytes that really live on for the backward of ``result``: each storage once, without parameters and buffers.

    Found from the autograd graph itself, with what its nodes have saved; independent of any report.
    """
    alive = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    for node in autograd_nodes(result):
        saved = list(getattr(node, "saved_tensors", ()))
        saved += [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in saved:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(size for pointer, size in found.items() if pointer not in alive)
