"""Drop-ins where others look on: torch.func, dispatch modes, fake tensors, hooks, caches.

Where results of compiled kernels and of single operations are compared bit for bit, levels are typical ones: those of a
sample differ by roundings. With these: test_drop_ins_sampled.py.
"""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fewbit_fx.functional
import fewbit_fx.nn
from fewbit_fx.eager.coded_derivative import NAMED

silu = functools.partial(fewbit_fx.functional.silu, levels="typical")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(12, 70)


def coded_gradient(x: Tensor, function: Callable[[Tensor], Tensor] = silu) -> Tensor:
    """By plain autograd, with compiled kernels: what the others have to agree with."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(x).sum(), x)
    return gradient


@pytest.mark.slow
def test_first_use_under_a_transform(x: Tensor) -> None:
    """The fit and the trace of the derivative happen there, and leave the transform."""
    celu = functools.partial(fewbit_fx.functional.celu, alpha=0.77, levels="typical")
    assert torch.equal(grad(lambda v: celu(v).sum())(x), coded_gradient(x, celu))


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_of_grad(x: Tensor, dim: int) -> None:
    found = vmap(grad(lambda v: silu(v).sum()), in_dims=dim, out_dims=dim)(x)
    assert torch.equal(found, coded_gradient(x))
    assert torch.equal(vmap(silu, in_dims=dim, out_dims=dim)(x), F.silu(x))


def test_one_forward_and_many_gradients(x: Tensor) -> None:
    expected = torch.diag(coded_gradient(x)[0])
    _, pullback = vjp(silu, x[0])
    assert torch.equal(vmap(pullback)(torch.eye(70))[0], expected)
    assert torch.equal(jacrev(silu)(x[0]), expected)


def test_forward_mode_is_exact(x: Tensor) -> None:
    found, expected = (jvp(f, (x,), (x,)) for f in (silu, F.silu))
    assert all(map(torch.equal, found, expected))


@pytest.mark.slow
def test_gradients_per_sample(x: Tensor) -> None:
    gelu = fewbit_fx.nn.GELU(levels="typical")
    model = nn.Sequential(nn.Linear(70, 30), gelu, fewbit_fx.nn.PReLU(), nn.Linear(30, 1))
    model[2].requires_grad_(False)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).sum()

    found = vmap(grad(loss), in_dims=(None, 0))(trained, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(loss(trained, sample), list(trained.values()))
        for name, value in zip(trained, expected, strict=True):
            torch.testing.assert_close(found[name][i], value, rtol=1e-5, atol=1e-6)


def test_a_second_derivative_is_never_silently_zero(x: Tensor) -> None:
    """Here the gradient of y is a constant, so that only the codes depend on x."""
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad(lambda v: grad(lambda w: silu(w).sum())(v).sum())(x)
    x.requires_grad_()
    (first,) = torch.autograd.grad(silu(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad((first + x**2).sum(), x)


@pytest.mark.slow
def test_an_unused_output(x: Tensor) -> None:
    x.requires_grad_()
    for unused in (silu(x), fewbit_fx.functional.prelu(x, torch.ones(1))):
        assert torch.autograd.grad((x * 1).sum() + unused.detach().sum(), x)[0].eq(1).all()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("where", ["forward", "backward", "both"])
def test_dispatch_modes(x: Tensor, where: str) -> None:
    expected, x = coded_gradient(x), x.requires_grad_()
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    if where == "backward":
        y = silu(x)
    else:
        with forward:
            y = silu(x)
    if where == "forward":
        (found,) = torch.autograd.grad(y.sum(), x)
    else:
        with backward:
            (found,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_selective_checkpointing(x: Tensor) -> None:
    model = nn.Sequential(nn.Linear(70, 30), fewbit_fx.nn.GELU(levels="typical"), nn.Linear(30, 5))
    (expected,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    saved = [torch.ops.aten.addmm.default]

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(saved)

    y = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    (found,) = torch.autograd.grad(y.square().sum(), model[0].weight)
    assert torch.equal(found, expected)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("inside", [True, False])
def test_fake_tensors(inside: bool) -> None:
    """Nothing of theirs may stay behind in a cache: real tensors go the usual way afterwards."""
    with FakeTensorMode() as mode:
        fake = torch.randn(8, 100, requires_grad=True)
        y = fewbit_fx.functional.mish(fake, bits=4)
        if inside:
            y.sum().backward()
    if not inside:
        y.sum().backward()
    assert fake.grad is not None
    assert (fake.grad.shape, fake.grad.fake_mode) == (fake.shape, mode)
    real = torch.randn(8, 100)
    exact = torch.autograd.grad(F.mish(real.requires_grad_()).sum(), real)[0]
    error = coded_gradient(real.detach(), lambda v: fewbit_fx.functional.mish(v, bits=4)) - exact
    assert error.norm() <= 0.06 * exact.norm()


def test_meta_tensors_and_tensors_made_on_the_inputs_device() -> None:
    def function(v: Tensor) -> Tensor:
        return torch.where(v > torch.zeros(v.shape, device=v.device), v.tanh(), torch.zeros((), device=v.device))

    for module in (fewbit_fx.nn.Hardtanh(), fewbit_fx.nn.Pointwise(function)):
        x = torch.randn(8, 1000, device="meta", requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert (x.grad.device, x.grad.shape) == (x.device, x.shape)


def in_place_at_once(v: Tensor) -> Tensor:
    return v.mul_(0.5).tanh_()


def in_place_before(v: Tensor) -> Tensor:
    v.mul_(0.5)
    return v.tanh()


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", [in_place_at_once, in_place_before])
def test_functions_in_place(function: Callable[[Tensor], Tensor], compiled: bool) -> None:
    module = fewbit_fx.nn.Pointwise(function)
    assert module._coded.scheme == fewbit_fx.nn.Pointwise(lambda v: (v * 0.5).tanh())._coded.scheme
    run = torch.compile(module, fullgraph=True) if compiled else module
    leaf = torch.randn(500, requires_grad=True)
    for x in (leaf * 1, leaf.detach()):
        before = x.detach().clone()
        y = run(x)
        assert torch.equal(x, before)
        torch.testing.assert_close(y.detach(), function(before.clone()), rtol=1e-6 if compiled else 0, atol=0)
        if y.requires_grad:
            (found,), (exact,) = (torch.autograd.grad(t.sum(), leaf) for t in (y, (leaf * 0.5).tanh()))
            assert (found - exact).norm() <= 0.05 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inductor", "fewbit"])
def test_compiled_within_hooks_on_saved_tensors(x: Tensor, backend: str) -> None:
    model = nn.Sequential(nn.Linear(70, 64), fewbit_fx.nn.GELU(), fewbit_fx.nn.Pointwise(torch.atan), nn.Linear(64, 8))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    y = checkpoint(compiled, x, use_reentrant=False)  # its hooks are there while the graph is compiled
    (found,) = torch.autograd.grad(y.square().sum(), model[0].weight)
    with torch.autograd.graph.save_on_cpu():
        y = compiled(x)
    (again,) = torch.autograd.grad(y.square().sum(), model[0].weight)
    with torch.compiler.set_stance("force_eager"):
        (expected,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    for value in (found, again):
        assert (value - expected).norm() <= 1e-2 * expected.norm()  # codes at a boundary


@pytest.mark.slow
def test_compiled_functions_that_read_a_tensor(x: Tensor) -> None:
    scale = torch.tensor([0.7])

    def function(v: Tensor) -> Tensor:
        return torch.tanh(v * scale)

    pointwise = functools.partial(fewbit_fx.functional.pointwise, bits=2, levels="typical")
    run = torch.compile(lambda v: pointwise(function, v), fullgraph=True)
    for size in (12, 20):
        leaf = torch.randn(size, 70, requires_grad=True)
        (found,) = torch.autograd.grad(run(leaf).sum(), leaf)
        expected = coded_gradient(leaf.detach(), lambda v: pointwise(function, v))
        assert (found != expected).float().mean() <= 1e-3


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = torch.tensor(scale)

    def method(self, v: Tensor) -> Tensor:
        return torch.tanh(v * self.scale)


def by_closure(scaled: Scaled) -> Callable[[Tensor], Tensor]:
    scale = scaled.scale
    return lambda v: torch.tanh(v * scale)


def by_method(scaled: Scaled) -> Callable[[Tensor], Tensor]:
    return scaled.method


def use(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    coded_gradient(x, lambda v: fewbit_fx.functional.pointwise(function, v))
    fewbit_fx.codebook(function, 2)
    module = fewbit_fx.nn.Pointwise(function)
    torch.compile(module)(x.clone().requires_grad_())
    if isinstance(function, types.FunctionType):  # other callables Dynamo of torch 2.11 finds in a module only
        torch.compile(lambda v: fewbit_fx.functional.pointwise(function, v))(x.clone().requires_grad_())
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("make", [by_closure, by_method])
def test_nothing_keeps_a_function_alive(x: Tensor, make: Callable[[Scaled], Callable[[Tensor], Tensor]]) -> None:
    named, scaled = set(vars(NAMED)), Scaled(0.9)
    use(make(scaled), x)
    gone = [weakref.ref(scaled), weakref.ref(scaled.scale)]
    del scaled
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert set(vars(NAMED)) <= named


def test_a_function_is_prepared_once() -> None:
    scaled = Scaled(1.1)
    first, second = fewbit_fx.nn.Pointwise(scaled.method), fewbit_fx.nn.Pointwise(scaled.method)
    assert first._coded is second._coded
    second.bits = 2
    assert second._coded.scheme.code_bits == 2
    assert pickle.loads(pickle.dumps(fewbit_fx.nn.Pointwise(torch.atan, bits=2)))._coded.scheme == (
        fewbit_fx.nn.Pointwise(torch.atan, bits=2)._coded.scheme
    )


@pytest.mark.slow
def test_hooks_of_converted_hugging_face_activations(x: Tensor) -> None:
    activations = pytest.importorskip("transformers.activations", reason="Hugging Face transformers is not installed")
    model = nn.Sequential(*(copy.deepcopy(activations.ACT2FN["gelu_new"]) for _ in range(2)))
    calls: list[nn.Module] = []
    model[0].register_forward_hook(lambda module, *_: calls.append(module))
    handle = model[1].register_forward_pre_hook(lambda module, *_: calls.append(module))
    model[1].eval()
    fewbit_fx.convert(model)
    assert calls == [], "nor do they fire when the function is looked at"
    assert [m.training for m in model] == [True, False]
    model(x.requires_grad_()).sum().backward()
    assert calls == [model[0], model[1]]
    handle.remove()
    model(x)
    assert calls[2:] == [model[0]]


# Tensors that are not strided ones.


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def jagged() -> Tensor:
    return torch.nested.nested_tensor(
        [torch.linspace(-2, 2, 8 * n).view(n, 8) for n in (3, 5)], layout=torch.jagged, requires_grad=True
    )


def strided_nested() -> Tensor:
    return torch.nested.nested_tensor(list(jagged().unbind()), layout=torch.strided, requires_grad=True)


def sparse() -> Tensor:
    return (torch.eye(5) - 0.5 * torch.eye(5).roll(1, 0)).to_sparse().requires_grad_()


def mkldnn() -> Tensor:
    return torch.linspace(-2, 2, 24).view(4, 6).to_mkldnn().requires_grad_()


def values_of(x: Tensor) -> list[Tensor]:
    if x.is_nested:
        return [part.detach() for part in x.unbind()]
    if isinstance(x, DTensor):
        return [x.to_local().detach()]
    return [x.detach() if x.layout == torch.strided else x.detach().to_dense()]


def outcome(function: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    """The result and the gradient, or the kind of error that torch raises for want of a kernel."""
    try:
        y = function(x)
        if y.layout == torch.sparse_coo:
            (gradient,) = torch.autograd.grad(torch.sparse.sum(y), x)
        else:
            (gradient,) = torch.autograd.grad(y, x, y.detach())
    except (RuntimeError, NotImplementedError) as error:
        return type(error)
    return [*values_of(y), *values_of(gradient)]


def pairs_of_functions() -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    names = ["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "softplus", "hardtanh", "rrelu"]
    libraries = fewbit_fx.functional, F
    pairs = {name: tuple(getattr(library, name) for library in libraries) for name in names}
    pairs["threshold"] = tuple(lambda x, f=library.threshold: f(x, 0.1, 20.0) for library in libraries)
    weight = torch.full((1,), 0.2)
    pairs["prelu"] = (lambda x: fewbit_fx.functional.prelu(x, weight), lambda x: F.prelu(x, weight))
    pairs["pointwise"] = (lambda x: fewbit_fx.functional.pointwise(torch.atan, x), torch.atan)
    pairs["module"] = (fewbit_fx.nn.Pointwise(torch.relu), torch.relu)
    pairs["in place"] = tuple(lambda x, f=f: f(x * 1, inplace=True) for f in (fewbit_fx.functional.relu, F.relu))
    return pairs  # type: ignore[return-value]


def check_torchs_own(make: Callable[[], Tensor]) -> int:
    """Results and gradients are torch's, bit for bit, and so are errors. How many functions torch has for it."""
    known = 0
    for name, functions in pairs_of_functions().items():
        found, expected = (outcome(function, make()) for function in functions)
        if isinstance(expected, type):
            assert found is expected, name
            continue
        known += 1
        assert all(map(torch.equal, found, expected)), name
    return known


@pytest.mark.parametrize(
    ("make", "at_least"),
    [(jagged, 10), (strided_nested, 4), (sparse, 1), (mkldnn, 2)],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_torchs_own_on_other_layouts(make: Callable[[], Tensor], at_least: int) -> None:
    assert check_torchs_own(make) >= at_least


def test_torchs_own_on_distributed_tensors(mesh: DeviceMesh) -> None:
    def make() -> Tensor:
        return distribute_tensor(torch.linspace(-2, 2, 24).view(4, 6), mesh, [Shard(0)]).requires_grad_()

    assert check_torchs_own(make) >= 8
    compiled = torch.compile(lambda x: fewbit_fx.functional.gelu(x), backend="aot_eager", fullgraph=True)
    found, expected = outcome(compiled, make()), outcome(F.gelu, make())
    assert all(map(torch.equal, found, expected))


def test_torchs_own_on_jagged_tensors_within_torch_compile() -> None:
    for ours, theirs in (pairs_of_functions()[name] for name in ("relu", "gelu", "pointwise", "module")):
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        assert all(map(torch.equal, outcome(compiled, jagged()), outcome(theirs, jagged())))
