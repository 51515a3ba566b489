"""How a site's derivative is kept for the backward: as codes, as one exact bit, or exactly.

What a site *is* (``sites``) stays apart from how it is *represented*; a new representation is a new
class here, a line in ``plan`` and a line in ``rewrite``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit_fx.passes.graph import value_of
from fewbit_fx.passes.sites import DerivativeSite, MaskSite, Site
from torch import Tensor

from fewbit_fx.codec import BitPlanes, at_least_float32, decode, encode, plane_layout
from fewbit_fx.levels import Codebook


@dataclass(frozen=True)
class Exact:
    """Left as it is; the reason completes the sentence "left exact, because ..."."""

    reason: str
    label = "left exact"


@dataclass(frozen=True)
class Coded:
    """A few-bit code of f'(x), the nearest of the codebook's levels.

    The factor of the gradient becomes ``decode(encode(f'(x)))``.
    """

    codebook: Codebook

    @property
    def label(self) -> str:
        """What a report says happened."""
        return f"coded in {self.codebook.bits} bit{'s' if self.codebook.bits > 1 else ''}"

    def layout(self, site: DerivativeSite) -> BitPlanes:
        """The bit planes' layout."""
        return plane_layout(value_of(site.source))

    def encode(self, site: DerivativeSite, x: Tensor) -> list[Tensor]:
        """Bit planes of f'(x)."""
        return encode(at_least_float32(site.derivative(x)), self.codebook.levels, self.layout(site))

    def gradient(self, site: DerivativeSite, g: Tensor, planes: list[Tensor]) -> Tensor:
        """The exit gradient, from the entry gradient and the planes."""
        wide = at_least_float32(g)
        like = value_of(site.exit)
        level = decode(planes, self.codebook.levels, self.layout(site), like.shape, wide.dtype)
        return (wide * level).to(like.dtype)

    def nbytes(self, site: DerivativeSite) -> int:
        """Bytes of all the planes, by hint where the size is symbolic."""
        return self.codebook.bits * self.layout(site).nbytes(value_of(site.source))


@dataclass(frozen=True)
class PackedMask:
    """One exact bit per element of a boolean tensor."""

    label = "exact one-bit mask"

    def layout(self, site: MaskSite) -> BitPlanes:
        """The bit plane's layout."""
        return plane_layout(value_of(site.mask))

    def encode(self, site: MaskSite, mask: Tensor) -> list[Tensor]:
        """The one bit plane of the mask."""
        return [self.layout(site).pack(mask)]

    def decode(self, site: MaskSite, plane: Tensor) -> Tensor:
        """The mask."""
        return self.layout(site).unpack(plane, value_of(site.mask).shape) != 0

    def nbytes(self, site: MaskSite) -> int:
        """Bytes of the plane, by hint where the size is symbolic."""
        return self.layout(site).nbytes(value_of(site.mask))


Representation = Coded | PackedMask | Exact


def code_bytes(site: Site, representation: Representation) -> int | None:
    """Bytes that the code of a site takes; None where it is left exact."""
    match site, representation:
        case DerivativeSite(), Coded():
            return representation.nbytes(site)
        case MaskSite(), PackedMask():
            return representation.nbytes(site)
    return None
