"""How a derivative is coded: its codebook, and whether its codes come from x or from the values of f'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewbit_fx.codebooks.density import Typical
from fewbit_fx.codebooks.fitting import Codebook, fit_codebook, is_mirrored
from fewbit_fx.codebooks.sampling import Function, sample_derivative
from fewbit_fx.codebooks.thresholds import Thresholds, find_thresholds
from fewbit_fx.codec.encode_decode import at_least_float32, bits_by_threshold, bits_by_value, takes_signs
from fewbit_fx.codec.nonfinite import Undefined, find_undefined, is_finite
from fewbit_fx.config import FewBitConfig


@dataclass(frozen=True)
class CodingScheme:
    """How a derivative is coded.

    Attributes:
        codebook: Its levels.
        thresholds: Where on the x axis the code changes; None if codes come from the values of f'.
        undefined: Which of NaN and the infinities have a derivative that is not finite; None if none has.
        mirrored: Half of the levels follow from the others (``fitting.is_mirrored``).
    """

    codebook: Codebook
    thresholds: Thresholds | None
    undefined: Undefined | None
    mirrored: bool = False

    @property
    def guarded(self) -> bool:
        """Whether codes tell what is not finite (``codec/nonfinite.py``)."""
        return self.undefined is not None

    def bits(self, x: Tensor, derivative: Callable[[Tensor], Tensor], compiled: bool = True) -> list[Tensor]:
        """The bits of the codes of f'(x), the most significant first. Where guarded, a last one says what is finite.

        Args:
            x: The tensor to encode, of any shape and dtype.
            derivative: The function f', elementwise.
            compiled: Whether Inductor compiles these operations.
        """
        if self.thresholds is None:
            values = at_least_float32(derivative(x))
            bits = bits_by_value(values, self.codebook.levels)
            return [*bits, is_finite(values)] if self.guarded else bits
        bits = bits_by_threshold(x, self.thresholds, compiled)
        if self.undefined is None:
            return bits
        return [*bits, self.undefined.spares(at_least_float32(x), takes_signs(x, compiled))]


def fit_scheme(derivative: Function, bits: int) -> CodingScheme:
    """Fit the codebook of a derivative, by what pre-activations typically are.

    Raises:
        NotCodableError: The derivative is unbounded, undefined or constant.
        ValueError, TypeError: ``bits`` is not allowed.
    """
    FewBitConfig(bits=bits)
    sample = sample_derivative(derivative, Typical())
    book = fit_codebook(sample.values, sample.weights, bits)
    thresholds = find_thresholds(derivative, book, sample.x)
    return CodingScheme(book, thresholds, find_undefined(derivative), is_mirrored(book.levels))
