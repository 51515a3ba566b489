"""The kernels that a GPU would run, run without one: codes bit for bit those of the same graphs in plain ATen.

Inductor's output code for a GPU, wrapper and kernels, runs in Triton's interpreter on CPU tensors. The oracle is the
graph that it was made of, run node by node in plain ATen. So what is tested is what Inductor makes of the codec: masks
at the ends of odd sizes, indices and hashes in 32 and 64 bits, reductions within a block, the order of planes. What
a GPU itself rounds otherwise (fused multiply-adds, approximate division) is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewbit_fx.config import FewBitConfig

pytest.importorskip("triton", reason="Triton, which generates a GPU's kernels, is not installed")
from triton_interpreter import Interpret, interpreter

from bench.offline_triton import Run, compile_offline, kernels, run_on_cpu

# Of the norm of what is summed in another order. A sum of n terms of either sign errs by log2(n) roundings of a partial
# sum, which is at most sqrt(n) times the result: 7 * 2^-24 * sqrt(127), as the longest sums here are. One wrong code
# of 8 bits would be 1e-4.
CLOSE = 5e-6
ODD, WHOLE, ONE_ROW = (33, 127), (16, 64), (1, 45)


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    with interpreter() as run:
        yield run


def activations(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    return F.gelu(a) + F.silu(b) + torch.tanh(c) + F.relu(d)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def norms(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * weight + F.rms_norm(y, y.shape[-1:]) * weight


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


class GatedMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 127), nn.Linear(32, 127), nn.Linear(127, 32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(gated(self.gate(h), self.up(h)))


def config(**options: Any) -> FewBitConfig:
    return FewBitConfig(**options, min_numel=0, max_relative_error=10.0, strict=True)


def derivatives(bits: int, **options: Any) -> FewBitConfig:
    return config(recipe="derivatives", bits=bits, **options)


def values(bits: int, rounding: str = "nearest") -> FewBitConfig:
    return config(recipe="lean", value_bits=bits, norm_bits=bits, softmax_bits=bits, rounding=rounding)


@dataclass(frozen=True)
class Case:
    """A function with its inputs and options.

    Attributes:
        function: What is compiled.
        shapes: Of its inputs.
        config: The options.
        forms: Of the codes, in the order of the report.
        sums: Whether it sums floats, whose order is the kernel's own.
        dynamic: Whether sizes are symbols.
    """

    function: Callable[..., Any]
    shapes: list[tuple[int, ...]]
    config: FewBitConfig
    forms: str
    sums: bool = False
    dynamic: bool | None = None


@functools.cache
def run(name: str) -> list[Run]:
    case = CASES[name]
    torch.manual_seed(0)
    function = case.function() if isinstance(case.function, type) else case.function
    inputs = [torch.randn(shape, requires_grad=True) for shape in case.shapes]
    runs, record = run_on_cpu(function, inputs, case.config, dynamic=case.dynamic)
    assert " ".join(f"{s.form}:{s.bits}" for s in record.sites if s.form) == case.forms
    assert bool(runs[0].planes) == bool(case.forms)
    return runs


def check(runs: list[Run], interpret: Interpret, exact: bool, config: int) -> None:
    forward, backward = runs
    assert (forward.is_backward, backward.is_backward) == (False, True)
    for one in runs:
        outputs, launched = interpret(one.code, one.constants, list(one.inputs), config)
        assert launched >= len(kernels(one.code)) > 0
        for i, (found, expected) in enumerate(zip(outputs, one.outputs, strict=True)):
            if not isinstance(expected, Tensor):
                assert found == expected
                continue
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            is_code = i in one.planes and expected.dtype != torch.float32  # that are levels of a sample: means
            if is_code or (exact and one is forward and i not in one.planes):
                same = torch.equal(found, expected)
            else:
                same = bool((found - expected).norm() <= CLOSE * expected.norm())
            assert same, f"{'code' if is_code else 'number'} {i} of the {'backward' if one is backward else 'forward'}"


def cases() -> dict[str, Case]:
    made = {}
    for bits, shape in [(1, ODD), (3, ODD)]:
        made[f"masks and derivatives in {bits} bits"] = Case(
            activations, [shape] * 4, derivatives(bits), f"mask:1 codes:{bits} codes:{bits} codes:{bits}"
        )
    for bits, shape in [(2, WHOLE), (4, ONE_ROW), (5, ODD)]:
        made[f"a derivative in {bits} bits"] = Case(F.gelu, [shape], derivatives(bits), f"codes:{bits}")
    for bits, shape, function in [(1, WHOLE, F.gelu), (3, ODD, F.silu), (4, ONE_ROW, F.gelu)]:
        options = derivatives(bits, levels="sampled")
        made[f"levels of a sample in {bits} bits"] = Case(function, [shape], options, f"codes:{bits}")
    for bits, shape in [(1, ODD), (3, ONE_ROW), (4, ODD)]:
        options = derivatives(bits, rounding="stochastic")
        made[f"a derivative at random in {bits} bits"] = Case(F.silu, [shape], options, f"codes:{bits}")
    for bits, shape in [(2, ODD), (3, WHOLE), (4, ONE_ROW), (6, ODD), (7, ODD), (8, ODD)]:
        made[f"values in {bits} bits"] = Case(gated, [shape] * 2, values(bits), f"values:{bits} values:{bits}")
    for bits, shape in [(2, ONE_ROW), (5, ODD), (8, ODD)]:
        options = values(bits, "stochastic")
        made[f"values at random in {bits} bits"] = Case(gated, [shape] * 2, options, f"values:{bits} values:{bits}")
    for recipe, forms in RECIPES.items():
        made[f"gated MLP, {recipe}"] = Case(GatedMLP, [(33, 32)], config(recipe=recipe), forms, sums=True)
    made["norms"] = Case(norms, [ODD, ODD, (127,)], values(8), "values:8 values:8 values:8", sums=True)
    made["probabilities"] = Case(
        attention, [(2, 33, 7)] * 3, values(4), "values:4 values:4 values:4 values:4", sums=True
    )
    made["symbolic sizes, values"] = Case(gated, [ODD] * 2, values(6), "values:6 values:6", dynamic=True)
    made["symbolic sizes, a sample"] = Case(F.gelu, [ODD], derivatives(3, levels="sampled"), "codes:3", dynamic=True)
    return made


RECIPES = {
    "exact": "",
    "derivatives": "",  # the gate is saved for its own values
    "default": "values:8 values:8 values:8",
    "lean": "values:8 values:6 values:6",
}
CASES = cases()
MORE = {  # of what others test
    "masks and derivatives in 1 bits",
    "a derivative in 2 bits",
    "a derivative in 5 bits",
    "levels of a sample in 1 bits",
    "levels of a sample in 4 bits",
    "a derivative at random in 1 bits",
    "a derivative at random in 4 bits",
    "values in 3 bits",
    "values in 4 bits",
    "values in 7 bits",
    "values at random in 5 bits",
    "gated MLP, exact",
    "gated MLP, derivatives",
}
CHOSEN = [pytest.param(name, marks=pytest.mark.slow) if name in MORE else name for name in CASES]


@pytest.mark.one_in(12)
@pytest.mark.parametrize("name", CHOSEN)
def test_codes_are_those_of_plain_aten_and_gradients_too(name: str, interpret: Interpret) -> None:
    check(run(name), interpret, exact=not CASES[name].sums, config=-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masks and derivatives in 3 bits", "values in 6 bits", "gated MLP, lean"])
def test_so_they_are_in_the_first_of_the_configurations(name: str, interpret: Interpret) -> None:
    """Which has smaller blocks, so more of them at the ends."""
    check(run(name), interpret, exact=not CASES[name].sums, config=0)


COMPILED = ["levels of a sample in 3 bits", "a derivative at random in 3 bits", "gated MLP, lean"]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_kernels_compile_without_spills(name: str, capability: int) -> None:
    """In the configuration that Inductor tries first. A number beyond int32 does not compile beside indices."""
    for one in run(name):
        for kernel in kernels(one.code):
            (resources,) = compile_offline(kernel, capability, slice(1))
            assert resources.spilled == 0, kernel.name
