"""The common part of representations that store bit planes of a tensor."""

from __future__ import annotations

from torch import Tensor

from fewbit_fx.codec.bitplanes import PlaneLayout, plane_layout

from ..graph import value_of
from .representation import Representation


class StoredInPlanes(Representation):
    """A code of ``bits`` bits per element of the site's stored tensor, in as many bit planes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all the planes."""
        return self.bits * self.layout.nbytes(self.value)

    @property
    def tensors(self) -> int:
        """The number of saved tensors: each plane is in as many parts as the layout has."""
        return self.bits * self.layout.parts(self.value)

    @property
    def value(self) -> Tensor:
        """The fake tensor that is encoded."""
        value: Tensor = value_of(self.site.stored)
        return value

    @property
    def layout(self) -> PlaneLayout:
        """The layout of the planes, which follows from that tensor's device, shape and strides."""
        return plane_layout(self.value)
