"""The common part of representations that store bit planes of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewbit_fx.codec.bitplanes import PlaneLayout, plane_layout
from fewbit_fx.torch_private.sizes import bare_symbol, sizes_of

from ..laid_out import laid_out
from ..reasons import Cause, Reason
from .representation import Exact, Representation


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
        """The fake tensor that is encoded, as it will lie in memory."""
        value: Tensor = laid_out(self.site.stored)
        return value

    @property
    def layout(self) -> PlaneLayout:
        """The layout of the planes, which follows from that tensor's device, shape and strides."""
        return plane_layout(self.value)


def decoded_alone(stored: StoredInPlanes) -> StoredInPlanes | Exact:
    """What is to follow from its code alone; exact where the backward could not tell its size.

    Sizes are inputs of the backward, each by itself. A product of some is known to a trace only as the size of a
    saved tensor, which it is where the layout keeps that dimension.
    """
    sizes: list[Any] = sizes_of(stored.value)
    products = [n for n in sizes if isinstance(n, torch.SymInt) and bare_symbol(n) is None]
    return Exact(Reason(Cause.SIZE_NOT_IN_BACKWARD)) if products and not stored.layout.kept else stored
