"""Random models, and what must hold for each: never more bytes, never another gradient than the codes' own.

A model is a list of steps, each of which makes a tensor of one shape out of two earlier ones. Its gradient is compared
with a replay: torch.compile's own forward and backward graph, run node by node in eager PyTorch, in which each coded
site is given what its codes decode to. So what is tested is all that lies between codes and gradient: which sites are
found, which graphs are cut and rewritten, what is shared, dropped and computed again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from helpers import check_sums
from hypothesis import HealthCheck, event, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import py_sym_types
from torch.utils.checkpoint import checkpoint

from fewbit_fx.codec.dither import rounding_seed
from fewbit_fx.config import FewBitConfig
from fewbit_fx.passes.graph import output_values, placeholders, value_of
from fewbit_fx.passes.partition import Partition
from fewbit_fx.passes.partitioner import FewBitPartitioner
from fewbit_fx.passes.pipeline import Work
from fewbit_fx.passes.record import GraphRecord
from fewbit_fx.passes.representations import Exact, Representation
from fewbit_fx.passes.splice import trace
from fewbit_fx.torch_private.inductor import GraphRun, activation_memory_budget, partition_only
from fewbit_fx.torch_private.modes import mode_of
from fewbit_fx.torch_private.sizes import hint, is_symbol

BATCH, TOKENS, WIDTH, HEADS, CLASSES, CHANNELS = 2, 32, 64, 4, 16, 8
GRAPHS = int(os.environ.get("FUZZ", "24"))
LARGE = 0.1  # of a gradient, from codes of 8 bits: 0.6 % of values, over a few layers
CLOSE = 1e-4  # of a gradient: what float32 rounds differently where strides, and so the order of sums, differ

Function = Callable[..., Tensor]

UNARY: dict[str, Function] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "sin": torch.sin,
    "softplus": F.softplus,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "leaky_relu": F.leaky_relu,
    "abs": torch.abs,
    "square": torch.square,
    "bell": lambda a: torch.exp(-a.square()),
    "clamp": lambda a: a.clamp(-1, 1),
    "dropout": lambda a: F.dropout(a, 0.2),
    "softmax": lambda a: a.softmax(-1),
    "centre": lambda a: a - a.mean(-1, keepdim=True),
    "norm": lambda a: a / (1 + a.square().mean(-1, keepdim=True)).sqrt(),
    "turn": lambda a: a.transpose(1, 2).reshape(a.shape),
    "half": lambda a: a.half().to(a.dtype),
    "narrow": lambda a: 0.01 * a,
    "in place": lambda a: a.clone().mul_(2).relu_(),
    "mish": F.mish,
    "erf": torch.erf,
    "log": lambda a: torch.log1p(a.abs()),
    "root": lambda a: (1 + a.square()).sqrt(),
    "cumsum": lambda a: 0.1 * a.float().cumsum(1).to(a.dtype),
    "logsumexp": lambda a: a - a.logsumexp(-1, keepdim=True),
    "masked": lambda a: a.masked_fill(a > 1, 0),
    "rounded": lambda a: a + (a.round() - a).detach(),
    "pooled": lambda a: F.max_pool1d(a, 3, 1, 1),
    "sorted": lambda a: a.sort(-1).values,
    "flipped": lambda a: a.flip(1),
    "row by row": lambda a: torch.stack([F.silu(row) for row in a.unbind(0)]),
    "every second": lambda a: a[:, ::2].repeat_interleave(2, 1),
    "wave": lambda a: a + 0.01 * torch.cos(300 * a),
    "spectrum": lambda a: torch.fft.irfft(torch.fft.rfft(a.float()), n=WIDTH).to(a.dtype),
}
BINARY: dict[str, Function] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "halves": lambda a, b: torch.cat([a[..., WIDTH // 2 :], b[..., : WIDTH // 2]], -1),
    "where": lambda a, b: torch.where(a > 0, a, b),
    "maximum": torch.maximum,
    "scale": lambda a, b: a * torch.sigmoid(b.mean(1, keepdim=True)),
    "attention": lambda a, b: _attention(a, b),
    "gated": lambda a, b: F.silu(a) * b,
    "scores": lambda a, b: (a @ b.transpose(1, 2) / WIDTH).softmax(-1) @ a,
    "outer": lambda a, b: torch.einsum("btw,bsw->bts", a, b).tanh() @ b / TOKENS,
    "distance": lambda a, b: (a - b).abs().sum(-1, keepdim=True).exp().reciprocal() * a,
    "chosen": lambda a, b: a.gather(-1, b.argsort(-1)),
    "added at": lambda a, b: a.index_add(1, torch.arange(0, TOKENS, 2, device=a.device), b[:, ::2]),
    "detached": lambda a, b: a * torch.sigmoid(b.detach()),
    "into a slice": lambda a, b: _into_a_slice(a, b),
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "conv": lambda: nn.Conv1d(TOKENS, TOKENS, 3, padding=1),
    "layer_norm": lambda: nn.LayerNorm(WIDTH),
    "rms_norm": lambda: nn.RMSNorm(WIDTH),
    "batch_norm": lambda: nn.BatchNorm1d(TOKENS),
    "prelu": nn.PReLU,
    "bottleneck": lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)),
    "fused gate and up": lambda: FusedGate(),
    "image": lambda: Image(),
    "group_norm": lambda: nn.GroupNorm(4, TOKENS),
    "embedding": lambda: Embedded(),
    "codebook": lambda: Quantised(),
}
OPERATIONS = (*UNARY, *BINARY, *MODULES, *["linear"] * 12)  # between which tensors are saved
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch innermost": lambda x: x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


class FusedGate(nn.Module):
    """A gated MLP whose gate and up are one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Image(nn.Module):
    """A convolution of the tokens as a picture, channels last in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        picture = x.reshape(BATCH, CHANNELS, -1, WIDTH // 4).contiguous(memory_format=torch.channels_last)
        return F.silu(self.norm(self.conv(picture))).reshape(x.shape)


class Embedded(nn.Module):
    """An embedding of what is largest, added."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x.argmax(-1))


class Quantised(nn.Module):
    """The nearest of a codebook that follows what it is given: it is read, and then written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 8 * WIDTH).view(8, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        nearest = self.table[(x @ self.table.T).argmax(-1)]
        with torch.no_grad():
            self.table.lerp_(x.mean((0, 1)).to(self.table.dtype), 0.5)
        return x * torch.sigmoid(nearest) + nearest


def _attention(a: Tensor, b: Tensor) -> Tensor:
    heads = [t.view(BATCH, TOKENS, HEADS, -1).transpose(1, 2) for t in (a, b, a + b)]
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(a.shape)


def _into_a_slice(a: Tensor, b: Tensor) -> Tensor:
    made = a.clone()
    made[..., : WIDTH // 2] = b[..., WIDTH // 2 :].tanh()
    return made


@dataclass(frozen=True)
class Step:
    """One operation of a random model.

    Attributes:
        operation: Its name.
        first, second: How many tensors back its operands are.
        trained: Whether the module's parameters are trained.
        checkpointed: Whether torch computes it again in the backward.
    """

    operation: str
    first: int
    second: int
    trained: bool
    checkpointed: bool


@dataclass(frozen=True)
class Case:
    """A random model, and the options to compile it with.

    Attributes:
        steps: Of the model.
        outputs: How many of the last tensors it returns.
        loss: What becomes of them: ``sum``, ``squares`` or ``cross entropy``.
        config: Options of fewbit.
        budget: torch's activation memory budget.
        dtype: Of parameters and inputs.
        layout: Of the input in memory: a name in ``LAYOUTS``.
        trained_input: Whether the input requires a gradient, as inside a larger model.
        dynamic: Whether sizes are symbols.
    """

    steps: tuple[Step, ...]
    outputs: int
    loss: str
    config: FewBitConfig
    budget: float
    dtype: torch.dtype
    layout: str = "contiguous"
    trained_input: bool = False
    dynamic: bool = False


class RandomModel(nn.Module):
    """The model of a case, that returns its losses."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.first = nn.Linear(WIDTH, WIDTH)
        self.parts = nn.ModuleList(
            MODULES[s.operation]().requires_grad_(s.trained) if s.operation in MODULES else nn.Identity()
            for s in case.steps
        )

    def forward(self, x: Tensor, classes: Tensor) -> tuple[Tensor, ...]:
        values = [x, self.first(x)]
        for step, part in zip(self.case.steps, self.parts, strict=True):
            a, b = (values[-1 - back % len(values)] for back in (step.first, step.second))
            function = _function_of(step, part)
            made = checkpoint(function, a, b, use_reentrant=False) if step.checkpointed else function(a, b)
            values.append(made)
        return tuple(_loss(self.case.loss, value, classes) for value in values[-self.case.outputs :])


def _function_of(step: Step, part: nn.Module) -> Function:
    if step.operation in UNARY:
        return lambda a, b: UNARY[step.operation](a)
    return BINARY[step.operation] if step.operation in BINARY else lambda a, b: part(a)


def _loss(name: str, value: Tensor, classes: Tensor) -> Tensor:
    if name == "cross entropy":
        return F.cross_entropy(value[..., :CLASSES].flatten(0, 1).float(), classes.flatten())
    return value.square().sum() if name == "squares" else value.sum()


def steps() -> st.SearchStrategy[Step]:
    """One step; checkpoints are rare."""
    back, rarely = st.integers(0, 5), st.sampled_from([False] * 7 + [True])
    return st.builds(Step, st.sampled_from(OPERATIONS), back, back, st.booleans(), rarely)


def configs() -> st.SearchStrategy[FewBitConfig]:
    """Options; sizes of codes from the least to the most."""
    bits = st.sampled_from([None, 2, 4, 5, 6, 8])
    return st.builds(
        FewBitConfig,
        recipe=st.sampled_from(["exact", "derivatives", "default", "lean"]),
        bits=st.integers(1, 4),
        levels=st.sampled_from(["sampled", "typical"]),
        rounding=st.sampled_from(["nearest", "stochastic"]),
        value_bits=bits,
        norm_bits=bits,
        softmax_bits=bits,
        recompute=st.booleans(),
        masks=st.booleans(),
        min_numel=st.just(0),
        max_relative_error=st.just(10.0),
        strict=st.just(True),
    )


def cases() -> st.SearchStrategy[Case]:
    """A model with its options."""
    return st.builds(
        Case,
        st.lists(steps(), min_size=2, max_size=12).map(tuple),
        st.integers(1, 2),
        st.sampled_from(["sum", "squares", "cross entropy"]),
        configs(),
        st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.0]),
        st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
        st.sampled_from(["contiguous", "contiguous", *LAYOUTS]),
        st.sampled_from([True, True, False]),
        st.sampled_from([False, False, True]),
    )


def random_examples(count: int) -> settings:
    """How a property is tried with so many models: the same each time, but for those that ``FUZZ`` asks for."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize="FUZZ" not in os.environ,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


def check(case: Case, device: str = "cpu") -> None:
    """Compile the model of a case up to and with the partition, and check what must hold."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = RandomModel(case).to(device, case.dtype)
    x, classes = torch.randn(BATCH, TOKENS, WIDTH).to(device, case.dtype), torch.randint(CLASSES, (BATCH, TOKENS))
    x, classes = LAYOUTS[case.layout](x).detach().requires_grad_(case.trained_input), classes.to(device)
    works: list[Work] = []
    records: list[GraphRecord] = []
    given: list[Any] = []

    def observe(work: Work) -> None:
        works.append(work)

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        given[:] = inputs
        return partition_only(gm, inputs, FewBitPartitioner(case.config, records.append, observe=observe))

    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with activation_memory_budget(case.budget):
        torch.manual_seed(1)
        try:
            losses = torch.compile(model, backend=backend, dynamic=case.dynamic)(x, classes)
        except Exception:
            if _compiles_without(case, model, x, classes):
                raise
            event("not compared: a limit of torch itself")  # such as dropout within a checkpoint around a whole graph
            return
    if not works:
        event("not compared: nothing to train")
        return
    (work,), (record,) = works, records
    event("compared, with coded sites" if work.chosen is not work.plain else "compared, all exact")
    trained = [i for i, t in enumerate(given) if isinstance(t, Tensor) and t.requires_grad]
    found = torch.autograd.grad(sum(losses), [given[i] for i in trained], allow_unused=True)
    assert record.fewbit_bytes <= record.plain_bytes
    check_sums(record)
    check_interface(work.chosen)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    outputs, expected = replay(work, given)
    for mine, theirs in zip(losses, outputs, strict=False):
        assert torch.equal(mine, theirs), "the forward is the same, bit for bit"
    for i, gradient in zip(trained, found, strict=True):
        assert_same(gradient, expected[i], case.dtype)


def check_error(case: Case) -> None:
    """Codes of 8 bits, of all that is saved for its values, change the gradient by little, whatever is made of them."""
    config = FewBitConfig(recipe="derivatives", derivatives=False, min_numel=0, strict=True)
    exact, coded = (
        _gradient(case, config.updated({"recompute": True, **dict.fromkeys(_BITS, bits)})) for bits in (None, 8)
    )
    if exact is None or coded is None or not exact.isfinite().all() or not exact.any():
        event("not compared: nothing to train, not finite, or a limit of torch itself")
        return
    event("error compared")
    assert (coded - exact).norm() <= LARGE * exact.norm()


_BITS = ("value_bits", "norm_bits", "softmax_bits")


def _gradient(case: Case, config: FewBitConfig) -> Tensor | None:
    """Of all parameters of the case's model, as one vector, by plain ATen; None where torch cannot compile it."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return partition_only(gm, inputs, FewBitPartitioner(config, lambda record: None))

    torch.compiler.reset()
    torch.manual_seed(0)
    model = RandomModel(case)
    x, classes = LAYOUTS[case.layout](torch.randn(BATCH, TOKENS, WIDTH)), torch.randint(CLASSES, (BATCH, TOKENS))
    try:
        losses = torch.compile(model, backend=backend, dynamic=case.dynamic)(x, classes)
    except Exception:
        if _compiles_without(case, model, x, classes):
            raise
        return None
    total, trained = torch.stack(losses).sum(), [p for p in model.parameters() if p.requires_grad]
    if not total.requires_grad:
        return None
    found = torch.autograd.grad(total, trained, allow_unused=True)
    present = [g.double().flatten() for g in found if g is not None]
    return torch.cat(present) if present else None


def _compiles_without(case: Case, model: nn.Module, *inputs: Tensor) -> bool:
    """Whether torch's own partitioner compiles the model of a case."""

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return partition_only(gm, inputs, None)

    torch.compiler.reset()
    try:
        with activation_memory_budget(case.budget):
            torch.compile(model, backend=backend, dynamic=case.dynamic)(*inputs)
    except Exception:
        return False
    return True


def check_interface(partition: Partition) -> None:
    """What the forward saves is what the backward takes. Names may differ: torch calls the state of a generator so."""
    returned = [n.meta["val"] for n in output_values(partition.forward.graph)[partition.num_fwd_outputs :]]
    taken = [n.meta["val"] for n in placeholders(partition.backward.graph)[: len(returned)]]
    for one, other in zip(_symbols_first(returned), taken, strict=True):
        assert isinstance(one, Tensor) == isinstance(other, Tensor)
        if isinstance(one, Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def _symbols_first(saved: list[Any]) -> list[Any]:
    """What a forward saves, in the order in which a backward takes it: objects such as a mesh stay after tensors."""
    return sorted(saved, key=lambda value: not isinstance(value, (*py_sym_types, int, float)))


def assert_same(mine: Tensor | None, theirs: Tensor | None, dtype: torch.dtype) -> None:
    """Equal but for rounding, and not finite in the same places."""
    if mine is None or theirs is None:
        present = mine if mine is not None else theirs
        assert present is None or not present.any(), "one of both has no gradient"
        return
    mine, theirs = mine.double(), theirs.double()
    finite = theirs.isfinite()
    assert torch.equal(mine.isfinite(), finite)
    close = CLOSE if dtype == torch.float32 else 2e-2
    assert (mine - theirs)[finite].norm() <= close * theirs[finite].norm() + 1e-30


class Recorder(GraphRun):
    """Runs a graph and keeps the value of each node by name."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = self.made(n, super().run_node(n))
        return self.values[n.name]

    def made(self, node: fx.Node, value: Any) -> Any:
        return value


class Replay(Recorder):
    """Runs a backward in which each coded site is given what its codes decode to, and rows of a softmax their sum."""

    def __init__(self, work: Work, forward: dict[str, Any]) -> None:
        super().__init__(work.plain.backward)
        self._forward = forward
        self._symbols = [n for n in placeholders(work.joint) if is_symbol(n)]
        self._coded = {
            site.replaced.name: decision for site, decision in work.plan.items() if not isinstance(decision, Exact)
        }
        self._rows = {row.total: row.factor for row in work.softmax_rows()}

    def made(self, node: fx.Node, value: Any) -> Any:
        if node.name in self._rows:
            product, dims, _ = node.args
            probabilities = self.values[product.args[self._rows[node.name]].name]
            rows = probabilities.sum(dims, keepdim=True)
            return torch.where(rows > 0, value / rows, value)
        if node.name not in self._coded:
            return value
        coded: Representation = self._coded[node.name]
        site = coded.site
        values = [*(self.values[n.name] for n in site.coded_inputs), self._forward[site.stored.name]]

        def decoded(*values: Any) -> Tensor:
            *inputs, stored = values[: len(site.coded_inputs) + 1]
            seed = [rounding_seed(stored.device)] if coded.encode.seeded else []
            return coded.decode(inputs, coded.encode(stored, *seed))

        if not self._symbols:
            return decoded(*values)
        # Where sizes are symbols, codes are a trace of them, as AOTAutograd traces.
        with mode_of(value_of(site.stored)), enable_python_dispatcher():
            traced = trace(lambda *values: [decoded(*values)], [*site.coded_inputs, site.stored, *self._symbols])
        (result,) = fx.Interpreter(fx.GraphModule({}, traced)).run(*values, *(hint(value_of(n)) for n in self._symbols))
        return result


def replay(work: Work, inputs: list[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and a gradient for each input, by the plain graphs and the codes of the plan."""
    with torch.no_grad():
        torch.manual_seed(1)
        forward = Recorder(work.plain.forward)
        results = forward.run(*(hint(i) if isinstance(i, torch.SymInt) else i for i in inputs))
        joint_values(work, forward.values)
        outputs, saved = results[: work.plain.num_fwd_outputs], _symbols_first(results[work.plain.num_fwd_outputs :])
        losses = [t for t in outputs if isinstance(t, Tensor) and t.dim() == 0 and t.is_floating_point()]
        backward = Replay(work, forward.values)
        taken = sum(n.op == "placeholder" for n in work.plain.backward.graph.nodes) - len(saved)
        gradients = backward.run(*saved, *(torch.ones_like(t) for t in losses[:taken]))
    return losses, list(gradients)


def joint_values(work: Work, values: dict[str, Any]) -> None:
    """Add what codes are made of that the forward had no use for, as a view of a saved tensor."""

    def value_of(node: fx.Node) -> Any:
        if node.name not in values:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
            assert callable(node.target)
            values[node.name] = node.target(*args, **kwargs)
        return values[node.name]

    for site, decision in work.plan.items():
        if not isinstance(decision, Exact):
            value_of(site.stored)
