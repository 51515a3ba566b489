"""How far each way of levels is from f' of normally distributed x, narrow and wide: no training, no memory.

``python -m bench.evidence.codebooks SETTINGS`` prints it as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import fewbit_fx
from bench.evidence.cases import Case, answer
from bench.evidence.piecewise import RELU_SUMS, Piecewise, paper_levels
from bench.measure import relative_error

PART = "codebooks"
FUNCTIONS = ("gelu", "silu")
BITS = (1, 2, 3, 4)
SPREADS = (0.1, 0.5, 1.0, 2.0, 5.0)
OURS, TYPICAL, PAPER, RELUS = "sampled", "typical", "the paper's", "ReGELU2, ReSiLU2"
_ELEMENTS, _SEED = 2**18, 0

Coded = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One way of levels.

    Attributes:
        function: Whose derivative.
        levels: Whose levels.
        bits: Of a code.
        errors: Relative error of f' for x of N(0, s), for each s of SPREADS.
    """

    function: str
    levels: str
    bits: int
    errors: tuple[float, ...]


def case(bits: Sequence[int] = BITS) -> Case:
    """All ways of levels at these numbers of bits."""
    return Case(PART, "levels", {"bits": list(bits), "elements": _ELEMENTS})


def measure(bits: Sequence[int], elements: int) -> list[Row]:
    """A row for each function, number of bits and way of levels."""
    with torch.compiler.set_stance("force_eager"):  # kernels would take longer to compile than all of this
        return [
            Row(function, levels, count, tuple(_error(function, coded, spread, elements) for spread in SPREADS))
            for function in FUNCTIONS
            for count in bits
            for levels, coded in _ways(function, count).items()
        ]


def _ways(function: str, bits: int) -> dict[str, Coded]:
    ways = {levels: _by_drop_in(function, bits, levels) for levels in (OURS, TYPICAL)}
    ways[PAPER] = _by_intervals(paper_levels(function, bits))
    if bits == 2:
        ways[RELUS] = _by_intervals(RELU_SUMS[function])
    return ways


def _by_intervals(piecewise: Piecewise) -> Coded:
    return lambda x: torch.from_numpy(piecewise(x.numpy()))


def _by_drop_in(function: str, bits: int, levels: str) -> Coded:
    """What the backward multiplies with: the gradient of a sum."""
    activation = getattr(fewbit_fx.functional, function)

    def coded(x: Tensor) -> Tensor:
        x = x.float().requires_grad_()
        activation(x, bits=bits, levels=levels).sum().backward()
        assert x.grad is not None
        return x.grad.double()

    return coded


def _error(function: str, coded: Coded, spread: float, elements: int) -> float:
    x = spread * torch.randn(elements, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float64)
    return relative_error(coded(x), _exact(function, x))


def _exact(function: str, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    getattr(torch.nn.functional, function)(x).sum().backward()
    assert x.grad is not None
    return x.grad


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line has as JSON."""
    answer(lambda settings: [asdict(row) for row in measure(**settings)], arguments)


if __name__ == "__main__":
    main()
