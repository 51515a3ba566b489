"""The activation modules of torch.nn with few-bit saved tensors, for eager and compiled pipelines.

Each is a subclass of its namesake, with its arguments, and ``bits``, 1 to 8 (default 3), and ``levels``, as of
:class:`fewbit_fx.FewBitConfig`. The output is the namesake's own, bit for bit. For the backward b bits per element are
saved (fewer where fewer levels are exact: one for ReLU and its kind); and with ``levels="sampled"``, the default, up to
4 bits and where no levels are exact, the levels themselves, 2^b numbers for each call or half of them. They have the
namesake's parameters and state_dict.

All raise TypeError or ValueError for ``bits`` or ``levels`` that are not allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fewbit_fx import functional as F
from fewbit_fx.config import FewBitConfig
from fewbit_fx.eager.autograd import apply_function
from fewbit_fx.eager.coded_derivative import coded_function


class _FewBit(nn.Module):
    """Adds ``bits`` and ``levels`` to an activation module of torch.nn."""

    bits: int
    levels: str

    def __init__(self, *args: Any, bits: int = 3, levels: str = "sampled", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = FewBitConfig(bits=bits, levels=levels)
        self.bits, self.levels = config.bits, config.levels

    def extra_repr(self) -> str:
        """The namesake's arguments, and bits, and levels that are not the default ones."""
        levels = "" if self.levels == "sampled" else f"levels={self.levels!r}"
        return ", ".join(part for part in (super().extra_repr(), f"bits={self.bits}", levels) if part)


class Pointwise(_FewBit):
    """Any pointwise function with a bounded derivative.

    Args:
        function: Takes a tensor, returns a tensor of the same shape, element by element. It is fitted and
            compiled once per function object; to pickle the module, the function must be picklable.
        bits: Bits per element.
        levels: ``"sampled"`` or ``"typical"``.

    Raises:
        NotCodableError: A ValueError: the derivative is unbounded, undefined or constant.
        ValueError: The function fails on a float64 tensor, or is not pointwise; or an option is not allowed.

    Examples:
        >>> import torch, fewbit_fx
        >>> snake = fewbit_fx.nn.Pointwise(lambda x: x + torch.sin(x) ** 2, bits=2)
        >>> snake(torch.zeros(3))
        tensor([0., 0., 0.])
        >>> fewbit_fx.nn.Pointwise(torch.exp)
        Traceback (most recent call last):
        fewbit_fx.codebooks.sampling.NotCodableError: its derivative grows without bound
    """

    def __init__(self, function: Callable[[Tensor], Tensor], bits: int = 3, levels: str = "sampled") -> None:
        nn.Module.__init__(self)
        self.function = function
        self._code(bits, levels)

    @property
    def bits(self) -> int:
        """Bits per element."""
        return self._bits

    @bits.setter
    def bits(self, bits: int) -> None:
        self._code(bits, self._levels)

    @property
    def levels(self) -> str:
        """What the levels fit."""
        return self._levels

    @levels.setter
    def levels(self, levels: str) -> None:
        self._code(self._bits, levels)

    def _code(self, bits: int, levels: str) -> None:
        self._coded = coded_function(self.function, bits, levels)  # here, so that it fails here, not in training
        self._bits, self._levels = bits, levels

    def forward(self, input: Tensor) -> Tensor:
        """``function(input)``."""
        return apply_function(self.function, input, self.bits, self.levels, self._coded)

    def __getstate__(self) -> dict[str, Any]:
        """All but what follows from the function."""
        return {k: v for k, v in vars(self).items() if k != "_coded"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._code(self._bits, self._levels)


class ELU(_FewBit, nn.ELU):
    """:class:`torch.nn.ELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.elu(input, self.alpha, self.inplace, bits=self.bits, levels=self.levels)


class CELU(_FewBit, nn.CELU):
    """:class:`torch.nn.CELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.celu(input, self.alpha, self.inplace, bits=self.bits, levels=self.levels)


class SELU(_FewBit, nn.SELU):
    """:class:`torch.nn.SELU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.selu(input, self.inplace, bits=self.bits, levels=self.levels)


class GELU(_FewBit, nn.GELU):
    """:class:`torch.nn.GELU`.

    Examples:
        >>> import torch, fewbit_fx
        >>> fewbit_fx.nn.GELU(approximate="tanh", bits=2)
        GELU(approximate='tanh', bits=2)
        >>> x = torch.randn(4, 8)
        >>> torch.equal(fewbit_fx.nn.GELU()(x), torch.nn.GELU()(x))
        True
    """

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.gelu(input, self.approximate, bits=self.bits, levels=self.levels)


class SiLU(_FewBit, nn.SiLU):
    """:class:`torch.nn.SiLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.silu(input, self.inplace, bits=self.bits, levels=self.levels)


class Mish(_FewBit, nn.Mish):
    """:class:`torch.nn.Mish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.mish(input, self.inplace, bits=self.bits, levels=self.levels)


class Softplus(_FewBit, nn.Softplus):
    """:class:`torch.nn.Softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.softplus(input, self.beta, self.threshold, bits=self.bits, levels=self.levels)


class Softsign(_FewBit, nn.Softsign):
    """:class:`torch.nn.Softsign`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.softsign(input, bits=self.bits, levels=self.levels)


class Tanh(_FewBit, nn.Tanh):
    """:class:`torch.nn.Tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.tanh(input, bits=self.bits, levels=self.levels)


class Tanhshrink(_FewBit, nn.Tanhshrink):
    """:class:`torch.nn.Tanhshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.tanhshrink(input, bits=self.bits, levels=self.levels)


class Sigmoid(_FewBit, nn.Sigmoid):
    """:class:`torch.nn.Sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.sigmoid(input, bits=self.bits, levels=self.levels)


class LogSigmoid(_FewBit, nn.LogSigmoid):
    """:class:`torch.nn.LogSigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.logsigmoid(input, bits=self.bits, levels=self.levels)


class Hardswish(_FewBit, nn.Hardswish):
    """:class:`torch.nn.Hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardswish(input, self.inplace, bits=self.bits, levels=self.levels)


class Hardsigmoid(_FewBit, nn.Hardsigmoid):
    """:class:`torch.nn.Hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardsigmoid(input, self.inplace, bits=self.bits, levels=self.levels)


class Hardtanh(_FewBit, nn.Hardtanh):
    """:class:`torch.nn.Hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace, bits=self.bits, levels=self.levels)


class ReLU(_FewBit, nn.ReLU):
    """:class:`torch.nn.ReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.relu(input, self.inplace, bits=self.bits, levels=self.levels)


class ReLU6(_FewBit, nn.ReLU6):
    """:class:`torch.nn.ReLU6`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.relu6(input, self.inplace, bits=self.bits, levels=self.levels)


class LeakyReLU(_FewBit, nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.leaky_relu(input, self.negative_slope, self.inplace, bits=self.bits, levels=self.levels)


class RReLU(_FewBit, nn.RReLU):
    """:class:`torch.nn.RReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.rrelu(input, self.lower, self.upper, self.training, self.inplace, bits=self.bits, levels=self.levels)


class PReLU(_FewBit, nn.PReLU):
    """:class:`torch.nn.PReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.prelu(input, self.weight, bits=self.bits, levels=self.levels)


class Hardshrink(_FewBit, nn.Hardshrink):
    """:class:`torch.nn.Hardshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.hardshrink(input, self.lambd, bits=self.bits, levels=self.levels)


class Softshrink(_FewBit, nn.Softshrink):
    """:class:`torch.nn.Softshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.softshrink(input, self.lambd, bits=self.bits, levels=self.levels)


class Threshold(_FewBit, nn.Threshold):
    """:class:`torch.nn.Threshold`."""

    def forward(self, input: Tensor) -> Tensor:
        """Elementwise."""
        return F.threshold(input, self.threshold, self.value, self.inplace, bits=self.bits, levels=self.levels)
