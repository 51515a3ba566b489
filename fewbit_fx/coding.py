"""How a derivative is coded: its codebook, and whether its codes come from x or from the values of f'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewbit_fx.codec import at_least_float32, bits_by_threshold, bits_by_value
from fewbit_fx.config import FewBitConfig
from fewbit_fx.density import Typical
from fewbit_fx.levels import Codebook, fit_codebook
from fewbit_fx.sampling import Function, sample_derivative
from fewbit_fx.thresholds import Thresholds, find_thresholds


@dataclass(frozen=True)
class Coding:
    """How a derivative is coded.

    Attributes:
        codebook: Its levels.
        thresholds: Where on the x axis the code changes; None if codes come from the values of f'.
    """

    codebook: Codebook
    thresholds: Thresholds | None

    def bits(self, x: Tensor, derivative: Callable[[Tensor], Tensor], compiled: bool = True) -> list[Tensor]:
        """The bits of the codes of f'(x), the most significant first.

        Args:
            x: In any shape and dtype.
            derivative: f'.
            compiled: Inductor compiles these operations.
        """
        if self.thresholds is None:
            return bits_by_value(at_least_float32(derivative(x)), self.codebook.levels)
        return bits_by_threshold(x, self.thresholds, compiled)


def fit_coding(derivative: Function, bits: int) -> Coding:
    """The coding of a derivative, by what pre-activations typically are.

    Raises:
        NotCodableError: The derivative is unbounded, undefined or constant.
        ValueError, TypeError: ``bits`` is not allowed.
    """
    FewBitConfig(bits=bits)
    sample = sample_derivative(derivative, Typical())
    book = fit_codebook(sample.values, sample.weights, bits)
    return Coding(book, find_thresholds(derivative, book, sample.x))
