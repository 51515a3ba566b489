"""What a representation says of itself; everything behind the plan asks this and no kinds of representations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fewbit_fx.config import FewBitConfig

from ..reasons import Reason
from ..sites import Site


class Encode(ABC):
    """Turns the value of ``Site.stored`` into the tensors to save.

    A frozen dataclass of all that it computes with. It is traced into the forward, and equal ones share a trace,
    and the saved tensors too where the value is one node's.

    Attributes:
        seeded: Whether it is given a seed behind the value, the result of ``dither.rounding_seed``.
    """

    seeded = False

    @abstractmethod
    def __call__(self, value: Tensor, *seed: Tensor) -> list[Tensor]:
        """The saved tensors."""


class Decode(ABC):
    """Turns the saved tensors into the value that is put in place of ``Site.replaced``.

    A frozen dataclass of all that it computes with; it is traced into the backward, and equal ones share a trace.
    """

    @abstractmethod
    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """The value.

        Args:
            inputs: Values of ``Site.coded_inputs``.
            saved: What was saved.
        """


class Representation(ABC):
    """How a site is stored, bound to it. Subclasses are frozen dataclasses.

    Attributes:
        site: The site.
        form: One word for the kind of representation, such as ``codes``.
    """

    site: Site
    form: str

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits stored per element."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the saved tensors, by hint where the size is symbolic."""

    @property
    @abstractmethod
    def tensors(self) -> int:
        """How many tensors are saved."""

    @property
    @abstractmethod
    def encode(self) -> Encode:
        """What the forward computes."""

    @property
    @abstractmethod
    def decode(self) -> Decode:
        """What the backward computes."""

    @property
    def relative_error(self) -> float:
        """Predicted root mean square of the error over that of the exact value; 0 if exact."""
        return 0.0

    @property
    def levels(self) -> tuple[float, ...]:
        """The codebook's levels; empty without one."""
        return ()


@dataclass(frozen=True)
class Exact:
    """A site left as it is, and why."""

    reason: Reason


Decision = Representation | Exact


class Proposal(Protocol):
    """Proposes a representation for a site by the options, or the reason why not; None for other kinds of sites.

    A function of a module: the compilers' caches know it by its name and its file.
    """

    __module__: str
    __qualname__: str

    def __call__(self, site: Site, config: FewBitConfig, /) -> Decision | None:
        """The answer for one site."""
        ...
