"""Boolean tensors in one exact bit per element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fewbit_fx.codec.bitplanes import PlaneLayout, bit_weights
from fewbit_fx.codec.encode_decode import encode
from fewbit_fx.config import FewBitConfig

from ..reasons import Cause, Reason
from ..sites import MaskSite, Site
from ..splice import description
from .representation import Decision, Decode, Encode, Exact
from .stored_in_planes import StoredInPlanes, decoded_alone

SWITCHED_OFF = Reason.of(Cause.SWITCHED_OFF, option="masks")


@dataclass(frozen=True)
class Pack(Encode):
    """Booleans to bit planes, in as many parts as the layout has."""

    layout: PlaneLayout

    def __call__(self, value: Tensor, *seed: Tensor) -> list[Tensor]:
        """The planes, int32."""
        return encode(value, lambda blocks: [blocks], self.layout)


@dataclass(frozen=True)
class Unpack(Decode):
    """Bit planes to booleans.

    Attributes:
        layout: The layout of the planes.
        like: The description of the mask (``splice.description``).
        mask: The mask itself, for its sizes; not compared, for they are in the description.
    """

    layout: PlaneLayout
    like: tuple[object, ...]
    mask: Tensor = field(compare=False)

    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """The mask."""
        weights = bit_weights(saved[0].device)
        return self.layout.join([self.layout.unpack(plane, weights) for plane in saved], self.mask)


@dataclass(frozen=True)
class PackedMask(StoredInPlanes):
    """One exact bit per element of a boolean tensor."""

    site: MaskSite
    form = "mask"
    bits = 1

    @property
    def encode(self) -> Pack:
        """Pack the mask."""
        return Pack(self.layout)

    @property
    def decode(self) -> Unpack:
        """Unpack it."""
        return Unpack(self.layout, description(self.site.node), self.value)


def propose_packed_mask(site: Site, config: FewBitConfig) -> Decision | None:
    """One bit per element, for boolean tensors."""
    if not isinstance(site, MaskSite):
        return None
    return decoded_alone(PackedMask(site)) if config.masks else Exact(SWITCHED_OFF)
