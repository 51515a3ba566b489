"""Few-bit codes of a tensor's own values, with a scale for each block of 32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fewbit_fx.codec.bitplanes import PlaneLayout
from fewbit_fx.codec.block_scaled import (
    CODED_DTYPES,
    block_layout,
    decode_values,
    encode_values,
    saved_per_part,
    scale_nbytes,
)
from fewbit_fx.config import FewBitConfig

from ..graph import value_of
from ..reasons import Cause, Reason
from ..sites import Reader, Site, ValueSite
from ..splice import description
from .representation import Decision, Decode, Encode, Exact
from .stored_in_planes import StoredInPlanes, decoded_alone

# Root mean square of the error over that of the values, for a normal distribution; by bits.
NORMAL_ERROR = {2: 0.51, 3: 0.202, 4: 0.0912, 5: 0.0429, 6: 0.0204, 7: 0.011, 8: 0.0055}
# The same with stochastic rounding.
STOCHASTIC_ERROR = {2: 0.953, 3: 0.324, 4: 0.14, 5: 0.0655, 6: 0.0318, 7: 0.0158, 8: 0.0077}
# The same of the probabilities of normal logits, dithered, and below rounded at random.
SHARES_ERROR = {2: 0.462, 3: 0.1447, 4: 0.0726, 5: 0.0367, 6: 0.0366, 7: 0.0184, 8: 0.0093}
STOCHASTIC_SHARES_ERROR = {2: 0.396, 3: 0.207, 4: 0.107, 5: 0.0547, 6: 0.0548, 7: 0.0283, 8: 0.015}
_OPTIONS = {Reader.NORM: "norm_bits", Reader.SOFTMAX: "softmax_bits"}


@dataclass(frozen=True)
class EncodeValues(Encode):
    """Values to codes and scales."""

    bits: int
    layout: PlaneLayout
    shares: bool
    seeded: bool

    def __call__(self, value: Tensor, *seed: Tensor) -> list[Tensor]:
        """The codes, uint8 or bit planes, and the scales, bfloat16."""
        return encode_values(value, self.bits, self.layout, seed[0] if self.seeded else None, self.shares)


@dataclass(frozen=True)
class DecodeValues(Decode):
    """Codes and scales to values.

    Attributes:
        bits: Bits per element.
        layout: The layout of the blocks.
        like: The description of the tensor (``splice.description``).
        shares: Whether it holds shares of a whole.
        stochastic: Whether it was rounded with a seed.
        tensor: The fake tensor, for its sizes. It is not compared, because they are in the description.
    """

    bits: int
    layout: PlaneLayout
    shares: bool
    stochastic: bool
    like: tuple[object, ...]
    tensor: Tensor = field(compare=False)

    def __call__(self, inputs: Sequence[Tensor], saved: Sequence[Tensor]) -> Tensor:
        """The values."""
        return decode_values(saved, self.bits, self.layout, self.tensor, self.stochastic, self.shares)


@dataclass(frozen=True)
class ValueCodes(StoredInPlanes):
    """b bits per element and half a bit of scale."""

    site: ValueSite
    bits_per_element: int
    stochastic: bool = False
    form = "values"

    @property
    def bits(self) -> int:
        """Without the scales."""
        return self.bits_per_element

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and the scales."""
        return super().nbytes + scale_nbytes(self.value, self.layout)

    @property
    def tensors(self) -> int:
        """The fields of the codes and the scales, in as many parts as the layout has."""
        return saved_per_part(self.bits) * self.layout.parts(self.value)

    @property
    def layout(self) -> PlaneLayout:
        """Blocks of neighbours in memory, on every device."""
        return block_layout(self.value, self.bits)

    @property
    def encode(self) -> EncodeValues:
        """Encode the values."""
        return EncodeValues(self.bits, self.layout, self.site.shares, self.stochastic)

    @property
    def decode(self) -> DecodeValues:
        """Decode them."""
        like = description(self.site.node)
        return DecodeValues(self.bits, self.layout, self.site.shares, self.stochastic, like, self.value)

    @property
    def relative_error(self) -> float:
        """Predicted for a normal distribution, of the values or of the logits of which they are the softmax."""
        of_values, of_shares = NORMAL_ERROR, SHARES_ERROR
        if self.stochastic:
            of_values, of_shares = STOCHASTIC_ERROR, STOCHASTIC_SHARES_ERROR
        return (of_shares if self.site.shares else of_values)[self.bits]


def propose_value_codes(site: Site, config: FewBitConfig) -> Decision | None:
    """Codes of the bits that the options give to what reads the values."""
    if not isinstance(site, ValueSite):
        return None
    if site.kept_as is not None:
        return Exact(site.kept_as)
    option = _OPTIONS.get(site.reader, "value_bits")
    bits: int | None = getattr(config, option)
    if bits is None:
        return Exact(Reason.of(Cause.EXACT_BY_OPTION, option=option))
    dtype = value_of(site.node).dtype
    if dtype not in CODED_DTYPES:
        return Exact(Reason.of(Cause.DTYPE, dtype=str(dtype).removeprefix("torch.")))
    codes = ValueCodes(site, bits, stochastic=config.rounding == "stochastic")
    error, limit = codes.relative_error * site.amplification, config.max_relative_error
    if error > limit:
        return Exact(Reason.of(Cause.ERROR_TOO_LARGE, bits=bits, relative_error=error, max_relative_error=limit))
    return decoded_alone(codes)
