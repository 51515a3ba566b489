"""Every nonlinearity: those of torch.nn, gated units, and what a user writes, in all surroundings and dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import STRICT, Lambda, check_interface, codebook_of, derivative, oracle_factor, watch
from torch import Tensor, nn

import fewbit_fx
from fewbit_fx import FewBitConfig
from fewbit_fx.passes.gain import NEEDED
from fewbit_fx.passes.reasons import Cause, Reason
from fewbit_fx.passes.representations.derivative_codes import PRODUCT
from fewbit_fx.reporting.words import action, because

PLAIN = FewBitConfig(recipe="derivatives", derivatives=False, masks=False, min_numel=0, strict=True)
UNBOUNDED = Reason.of(Cause.NOT_CODABLE, problem="its derivative grows without bound")


class SwishByHand(torch.autograd.Function):
    """As users write it to save memory: y is computed again from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s)))


@dataclass(frozen=True)
class Case:
    """A function, the name that a report gives it, and whether its derivative has two values (one exact bit)."""

    module: nn.Module
    name: str
    one_bit: bool = False


CASES = {
    "ELU": Case(nn.ELU(), "elu or celu"),
    "ELU alpha": Case(nn.ELU(1.7), "custom"),
    "CELU": Case(nn.CELU(), "elu or celu"),
    "CELU alpha": Case(nn.CELU(2.0), "custom"),
    "SELU": Case(nn.SELU(), "selu"),
    "GELU": Case(nn.GELU(), "gelu"),
    "GELU tanh": Case(nn.GELU("tanh"), "gelu (tanh)"),
    "SiLU": Case(nn.SiLU(), "silu"),
    "Mish": Case(nn.Mish(), "mish"),
    "Softplus": Case(nn.Softplus(), "softplus"),
    "Softplus beta": Case(nn.Softplus(0.1), "custom"),
    "Softplus threshold": Case(nn.Softplus(3.0, 5.0), "custom"),
    "Softsign": Case(nn.Softsign(), "softsign"),
    "Tanh": Case(nn.Tanh(), "tanh"),
    "Tanhshrink": Case(nn.Tanhshrink(), "tanhshrink"),
    "Sigmoid": Case(nn.Sigmoid(), "sigmoid"),
    "LogSigmoid": Case(nn.LogSigmoid(), "logsigmoid"),
    "Hardswish": Case(nn.Hardswish(), "hardswish"),
    "Hardsigmoid": Case(nn.Hardsigmoid(), "hardsigmoid", True),
    "Hardtanh": Case(nn.Hardtanh(), "hardtanh", True),
    "Hardtanh interval": Case(nn.Hardtanh(-2.0, 3.0), "mask", True),
    "ReLU": Case(nn.ReLU(), "relu", True),
    "ReLU6": Case(nn.ReLU6(), "relu6", True),
    "LeakyReLU": Case(nn.LeakyReLU(), "leaky relu", True),
    "RReLU in eval": Case(nn.RReLU().eval(), "mask", True),
    "PReLU frozen": Case(nn.PReLU().requires_grad_(False), "mask", True),
    "Hardshrink": Case(nn.Hardshrink(), "hardshrink or softshrink", True),
    "Softshrink": Case(nn.Softshrink(), "hardshrink or softshrink", True),
    "Threshold": Case(nn.Threshold(0.1, 20.0), "mask", True),
    "SiLU in place": Case(nn.SiLU(inplace=True), "silu"),
    "ELU in place": Case(nn.ELU(inplace=True), "elu or celu"),
    "Mish in place": Case(nn.Mish(inplace=True), "mish"),
    "Hardswish in place": Case(nn.Hardswish(inplace=True), "hardswish"),
    "ReLU in place": Case(nn.ReLU(inplace=True), "relu", True),
    "tanh in place": Case(Lambda(lambda x: x.tanh_()), "tanh"),
    "quick GELU": Case(Lambda(lambda x: x * torch.sigmoid(1.702 * x)), "quick gelu"),
    "x erf(softplus)": Case(Lambda(lambda x: x * torch.erf(F.softplus(x))), "custom"),
    "x / sqrt(1 + x^2)": Case(Lambda(lambda x: x / torch.sqrt(1 + x**2)), "custom"),
    "atan": Case(Lambda(torch.atan), "atan"),
    "soft cap 50": Case(Lambda(lambda x: 50 * torch.tanh(x / 50)), "custom"),
    "soft cap 0.3": Case(Lambda(lambda x: 0.3 * torch.tanh(x / 0.3)), "custom"),
    "exp(-x^2)": Case(Lambda(lambda x: torch.exp(-(x**2))), "custom"),
    "x + sin(x)^2": Case(Lambda(lambda x: x + torch.sin(x) ** 2), "custom"),
    "autograd.Function": Case(Lambda(lambda x: SwishByHand.apply(x)), "silu"),
}


class Network(nn.Module):
    """Linear, function, frozen linear, so that a code really replaces x; ``probe`` receives the gradient of x."""

    def __init__(self, function: nn.Module, dtype: torch.dtype = torch.float32, width: int = 256) -> None:
        super().__init__()
        self.before, self.function = nn.Linear(32, 256), copy.deepcopy(function)
        self.after = nn.Linear(width, 16).requires_grad_(False)
        self.probe = nn.Parameter(torch.zeros(64, 256))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.function(3 * self.before(x) + self.probe))


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16))],
    ids=str,
)
@pytest.mark.parametrize("name", CASES)
def test_every_bounded_derivative_is_coded(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model, x = Network(case.module, dtype), torch.randn(64, 32, dtype=dtype)
    seen = watch(model, x, config=STRICT)
    (site,) = seen.record.sites
    assert site.function == case.name
    assert action(site) == ("exact one-bit mask" if case.one_bit else "coded in 3 bits")
    assert site.bytes_after == 64 * 256 * (1 if case.one_bit else 3) // 8
    freed = 64 * 256 * (1 if case.one_bit else dtype.itemsize)
    assert seen.record.plain_bytes - seen.record.fewbit_bytes == freed - site.bytes_after
    check_interface(seen.chosen)
    assert torch.equal(seen.output, watch(model, x, config=PLAIN).output)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", CASES)
def test_the_gradients_error_is_what_the_codebook_predicts(name: str) -> None:
    """Against the exact gradient; the prediction comes from autograd's derivative and never sees a graph."""
    model, x = Network(CASES[name].module), torch.randn(64, 32)
    direction = torch.randn(64, 16)
    (found,) = torch.autograd.grad((watch(model, x).output * direction).sum(), model.probe)
    check_prediction(name, model, x, direction, found)


def check_prediction(name: str, model: Network, x: Tensor, direction: Tensor, found: Tensor) -> None:
    """``found`` is the gradient of the probe as the nearest levels make it, where ``direction`` comes in."""
    reference = copy.deepcopy(CASES[name].module).double()

    def function(x: Tensor) -> Tensor:
        return reference(x * 1)  # not in place on the leaf

    pre = (3 * model.before(x)).detach()
    arriving = direction @ model.after.weight
    exact = arriving * derivative(function, pre)
    error = (found - exact).norm() / exact.norm()
    if CASES[name].one_bit:
        assert error < 1e-6, name  # float32 against float64
        return
    levels, _ = oracle_factor(function, pre, codebook_of(function, 3).levels)
    predicted = (arriving * levels - exact).norm() / exact.norm()
    assert 0 < error <= predicted * 1.001 + 1e-6, name  # boundaries are compared in float32


@pytest.mark.parametrize("name", ["squared ReLU", "x^3", "exp"])
def test_unbounded_derivatives_are_left_exact(name: str) -> None:
    function = {"squared ReLU": lambda x: F.relu(x) ** 2, "x^3": lambda x: x**3, "exp": torch.exp}[name]
    seen = watch(Network(Lambda(function)), torch.randn(64, 32))
    assert not seen.coded
    assert seen.record.fewbit_bytes == seen.record.plain_bytes
    beginnings = ("its derivative grows", "its derivative is not defined")
    assert any(because(s.reason).startswith(beginnings) for s in seen.record.sites)


GATES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "GLU": (torch.sigmoid, "softplus"),
    "ReGLU": (F.relu, "relu"),
    "GEGLU": (F.gelu, "gelu"),
    "SwiGLU": (F.silu, "silu"),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gated_units_stay_exact_and_the_report_says_why(name: str, frozen: bool) -> None:
    function, _ = GATES[name]

    def gated(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, -1)
        return function(gate) * value

    model = Network(Lambda(gated), width=128)
    model.after.requires_grad_(not frozen)
    seen = watch(model, torch.randn(64, 32))
    assert not seen.coded
    assert seen.record.fewbit_bytes == seen.record.plain_bytes
    products = seen.happened("product")
    assert len(products) == 2, "each factor of a product is needed by the other's gradient"
    assert {s.reason for s in products} == {PRODUCT}
    (nonlinearity,) = (s for s in seen.record.sites if s.function != "product")
    assert nonlinearity.reason == NEEDED


def test_torchs_own_glu_stays_exact() -> None:
    seen = watch(Network(nn.GLU(), width=128), torch.randn(64, 32))
    assert not seen.coded
    assert {s.reason for s in seen.record.sites} == {PRODUCT, NEEDED}


def test_a_trained_prelu_needs_its_input() -> None:
    seen = watch(Network(nn.PReLU()), torch.randn(64, 32))
    assert not seen.coded
    assert {s.reason for s in seen.record.sites} == {NEEDED, UNBOUNDED}


def test_a_bounded_gate_is_a_value_and_not_coded() -> None:
    """tanh(x) * p: the gradient of p is tanh(x) itself, not a derivative of a nonlinearity."""
    scale = nn.Parameter(torch.ones(256))
    seen = watch(Network(Lambda(lambda x: torch.tanh(x) * scale)), torch.randn(64, 32))
    assert [s.reason for s in seen.happened("product")] == [PRODUCT]
    assert [s.reason for s in seen.happened("tanh")] == [NEEDED]


BIAS = torch.linspace(-1, 1, 256)
Step = Callable[[Tensor], Tensor]
SURROUNDINGS: dict[str, tuple[Step, Step]] = {
    "dropout after": (nn.Identity(), nn.Dropout(0.1)),
    "dropout before": (nn.Dropout(0.1), nn.Identity()),
    "bias before": (lambda x: x + BIAS, nn.Identity()),
    "bias after": (nn.Identity(), lambda x: x + BIAS),
    "scale before": (lambda x: 0.5 * x, nn.Identity()),
    "scale after": (nn.Identity(), lambda x: 3 * x),
    "view before": (lambda x: x.view(8, 8, 256), nn.Identity()),
    "view after": (nn.Identity(), lambda x: x.view(8, 8, 256)),
    "transpose around": (lambda x: x.t(), lambda x: x.t()),
    "transposed copy": (lambda x: x.t().contiguous(), lambda x: x.t()),
    "narrower": (lambda x: x.to(torch.bfloat16), lambda x: x.to(torch.float32)),
    "wider": (lambda x: x.to(torch.float64), lambda x: x.to(torch.float32)),
    "rounded after": (nn.Identity(), lambda x: x.to(torch.bfloat16).to(torch.float32)),
    "read twice": (nn.Identity(), lambda x: x + x.flip(0)),
}


@pytest.mark.one_in(24)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("function", [F.gelu, F.relu, F.tanh])
@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_do_not_hide_a_function(name: str, function: Step, autocast: bool) -> None:
    before, after = SURROUNDINGS[name]
    model = Network(Lambda(lambda x: after(function(before(x)))))

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(x)

    seen = watch(run, torch.randn(64, 32))
    dropped = "dropout" in name
    assert len(seen.happened("dropout")) == dropped
    assert [action(s) for s in seen.coded] == [action(s) for s in seen.record.sites]
    assert len(seen.coded) == 1 + dropped
    check_interface(seen.chosen)
    torch.manual_seed(1)
    output = watch(run, torch.ones(64, 32)).output
    torch.manual_seed(1)
    assert torch.equal(output, watch(run, torch.ones(64, 32), config=PLAIN).output)


@pytest.mark.slow
def test_all_together_compiled() -> None:
    """One compiled model of many functions: the forward is bit for bit inductor's, the gradients the codes'."""
    names = [n for n in CASES if "in place" not in n and CASES[n].name not in ("mask", "elu or celu")]
    branches = nn.ModuleList(Network(CASES[n].module) for n in names)

    def run(x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in branches])

    x, outputs, gradients = torch.randn(64, 32), [], []
    probes = [branch.probe for branch in branches]
    for backend in ("inductor", fewbit_fx.backend(recipe="derivatives", strict=True)):
        torch.compiler.reset()
        outputs.append(torch.compile(run, backend=backend)(x))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), probes))
    assert torch.equal(*outputs)
    assert len(fewbit_fx.last_report().sites) == len(names)
    for name, branch, output, found in zip(names, branches, outputs[1], gradients[1], strict=True):
        check_prediction(name, branch, x, 2 * output.detach(), found)
