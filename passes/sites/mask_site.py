"""Sites at which the backward reads a boolean tensor."""

from __future__ import annotations

from dataclasses import dataclass

from ..derivative import Derivative
from ..function_names import activation_name, comes_from_random_numbers
from .tensor_site import TensorSite


@dataclass(frozen=True)
class MaskSite(TensorSite):
    """A boolean tensor of the forward that the backward reads.

    Attributes:
        derivative: The factor that it alone decides, as a function of a float tensor, where it does.
    """

    derivative: Derivative | None = None

    @property
    def function(self) -> str:
        """The activation's name, ``dropout`` or ``mask``."""
        if comes_from_random_numbers(self.node):
            return "dropout"
        return (self.derivative and activation_name(self.derivative)) or "mask"
