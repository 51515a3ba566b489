"""How a site's derivative is kept for the backward: as codes, as one exact bit, or exactly.

What a site *is* (``sites``) stays apart from how it is *represented*; a new representation is a new
class here, a line in ``plan`` and a line in ``rewrite``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fewbit_fx.codebooks.levels import Codebook
from fewbit_fx.codec.bitplanes import BitPlanes, bit_weights, plane_layout
from fewbit_fx.codec.encode_decode import encode, scale
from fewbit_fx.codec.scheme import Coding

from .graph import value_of
from .sites import DerivativeSite, MaskSite, Site


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

    coding: Coding

    @property
    def codebook(self) -> Codebook:
        """The levels."""
        return self.coding.codebook

    @property
    def label(self) -> str:
        """What a report says happened."""
        return f"coded in {self.codebook.bits} bit{'s' if self.codebook.bits > 1 else ''}"

    def layout(self, site: DerivativeSite) -> BitPlanes:
        """The bit planes' layout."""
        return plane_layout(value_of(site.source))

    def encode(self, site: DerivativeSite, x: Tensor) -> list[Tensor]:
        """Bit planes of f'(x)."""
        coding = self.coding
        layout = self.layout(site)
        return encode(x, lambda b: coding.bits(b, site.derivative), layout, coding.guarded, coding.mirrored)

    def planes(self, site: DerivativeSite) -> int:
        """How many planes there are."""
        return self.codebook.bits * self.layout(site).parts(value_of(site.source))

    def gradient(self, site: DerivativeSite, g: Tensor, planes: list[Tensor]) -> Tensor:
        """The exit gradient, from the entry gradient and the planes."""
        dtype, guarded, mirrored = value_of(site.exit).dtype, self.coding.guarded, self.coding.mirrored
        levels, layout = self.codebook.levels, self.layout(site)
        return scale(g, planes, levels, layout, dtype, guarded=guarded, mirrored=mirrored)

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
        """The bit plane of the mask, in as many parts as the layout has."""
        return encode(mask, lambda blocks: [blocks], self.layout(site))

    def planes(self, site: MaskSite) -> int:
        """How many parts there are."""
        return self.layout(site).parts(value_of(site.mask))

    def decode(self, site: MaskSite, planes: list[Tensor]) -> Tensor:
        """The mask."""
        layout = self.layout(site)
        weights = bit_weights(planes[0].device)
        return layout.join([layout.unpack(plane, weights) for plane in planes], value_of(site.mask))

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
