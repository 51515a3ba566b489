"""Representations: the forms in which a site can be saved. Each is a file, and a line in :data:`PROPOSALS`."""

from .derivative_codes import DerivativeCodes, propose_derivative_codes
from .packed_mask import PackedMask, propose_packed_mask
from .representation import Decision, Decode, Encode, Exact, Proposal, Representation
from .value_codes import ValueCodes, propose_value_codes

# Asked in this order; the first answer counts.
PROPOSALS: tuple[Proposal, ...] = (propose_packed_mask, propose_derivative_codes, propose_value_codes)

__all__ = [
    "PROPOSALS",
    "Decision",
    "Decode",
    "DerivativeCodes",
    "Encode",
    "Exact",
    "PackedMask",
    "Proposal",
    "Representation",
    "ValueCodes",
]
