"""Sites: what in a joint graph could be saved in another form than its own.

``site`` says what all sites have in common; each kind is a file; ``find`` finds them.
"""

from .derivative_site import DerivativeSite, Origin
from .find import find_sites, linear_inputs
from .find_values import find_values
from .mask_site import MaskSite
from .site import Site, Unreadable
from .value_site import Reader, ValueSite

__all__ = [
    "DerivativeSite",
    "MaskSite",
    "Origin",
    "Reader",
    "Site",
    "Unreadable",
    "ValueSite",
    "find_sites",
    "find_values",
    "linear_inputs",
]
