"""The options of the fewbit backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

MIN_BITS, MAX_BITS = 1, 8
MIN_VALUE_BITS = 2  # a sign and one bit of magnitude

LEVELS = ("sampled", "typical")
ROUNDINGS = ("nearest", "stochastic")
MOST_BITS_OF_SAMPLED_LEVELS = 4  # a threshold takes a comparison for each element

# What each recipe sets; an option given beside a recipe overrides it.
_EXACT = {
    "derivatives": False,
    "levels": "sampled",
    "recompute": True,
    "value_bits": None,
    "norm_bits": None,
    "softmax_bits": None,
}
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "exact": _EXACT,
    "derivatives": {**_EXACT, "derivatives": True, "levels": "typical", "recompute": False},
    "default": {**_EXACT, "derivatives": True, "value_bits": 8, "norm_bits": 8},
    "lean": {**_EXACT, "derivatives": True, "value_bits": 6, "norm_bits": 8, "softmax_bits": 8},
}


class _FromRecipe:
    """Stands for an option that was not given."""

    def __repr__(self) -> str:
        return "as the recipe says"


_FROM_RECIPE = _FromRecipe()


def _option(default: Any, unit: str, doc: str, *, kw_only: bool = False) -> Any:
    return field(default=default, metadata={"unit": unit, "doc": doc}, kw_only=kw_only)


def _of_recipe(unit: str, doc: str, *, kw_only: bool = True) -> Any:
    return _option(_FROM_RECIPE, unit, doc, kw_only=kw_only)


@dataclass(frozen=True)
class FewBitConfig:
    """Every option of the fewbit backend, with its default.

    Attributes:
        recipe: A name for several options at once, each of which an option beside it overrides:
            ``"exact"`` (no approximation: masks in one bit, and cheap operations computed again),
            ``"derivatives"`` (codes of derivatives and masks alone, on torch.compile's own cut, as in the paper),
            ``"default"`` (what you get without options), ``"lean"`` (fewer bytes, for a little more time and error).
        bits: Bits stored per element in place of a nonlinearity's input. Whole number, 1 to 8.
        levels: What the levels of a derivative's codes fit: ``"sampled"``, in every step a sample of the tensor itself,
            for up to 4 bits and a smooth derivative (8 % error at most of normally distributed x, however narrow or
            wide, at 3 bits), at the price of a few operations on 1,000 elements; or ``"typical"``, once and for all
            what pre-activations typically are, as in the paper.
        value_bits: Bits stored per element of a tensor that the backward needs for its own values, such as the input
            of a linear layer or a gate; half a bit of scales comes to it. Whole number, 2 to 8, or None: exact.
        norm_bits: The same for the inputs of norms.
        softmax_bits: The same for what enters or leaves a softmax: q, k, v and the output of attention, and the
            probabilities that stand in place of logits.
        rounding: How codes are chosen: ``"nearest"``, of the least error, or ``"stochastic"``, at random between the
            two values next to the exact one, such that the mean over all seeds is the exact one. What is linear in it,
            as the gradient of a linear layer's weight is, then has no bias, but a larger error. The seed is that of
            torch.manual_seed, the rank and the data; no generator is advanced. ``bits`` is then 4 or less.
            Probabilities in place of logits have hardly any bias with either: nearest levels are dithered by place.
        recompute: Compute pointwise operations again in the backward where that saves memory.
        min_numel: Tensors of fewer elements are left exact. Elements, 0 or more.
        max_relative_error: What codes are predicted to leave a larger relative error in is left exact: the derivative
            of a best codebook, or what the backward computes from coded values, such as the cosine of large angles
            (root mean square of the error over that of the derivative or value). A ratio, above 0.
        derivatives: Code the derivatives of pointwise nonlinearities.
        masks: Pack boolean masks (ReLU family, dropout) to one exact bit per element.
        strict: Raise on a fault inside fewbit-fx, instead of one warning and the exact graph.
        skip: Modules whose sites are left exact: patterns of their paths as the report names them, such as
            ``("blocks.0.*", "head")``, where ``*`` stands for anything. Names of sites match too. One pattern
            may be given by itself.
        disable: Names of passes that do not run, to find out which of them does what: ``find`` (sites),
            ``represent`` (choose codes), ``gain`` (drop codes that free nothing), ``protect`` (save masks that
            would be computed from decoded values), ``rewrite`` (put the codes in), ``compare`` (keep the smaller
            partition). One may be given by itself.

    Raises:
        TypeError: An option of the wrong type; the message names option, value and what is allowed.
        ValueError: An option outside its range; likewise.

    Examples:
        >>> from fewbit_fx import FewBitConfig
        >>> FewBitConfig(bits=2).updated({"skip": "head"}).skip
        ('head',)
        >>> FewBitConfig(bits=9)
        Traceback (most recent call last):
        ValueError: fewbit option 'bits' is 9 (int); allowed is a whole number from 1 to 8
    """

    recipe: str = _option(
        "default", "", 'several options at once: `"exact"`, `"derivatives"`, `"default"` or `"lean"`', kw_only=True
    )
    bits: int = _option(3, "bits per element", "size of the code of a derivative, 1 to 8")
    levels: str = _of_recipe(
        "", 'what the levels of derivatives fit: a sample of each tensor, `"sampled"`, or `"typical"` pre-activations'
    )
    value_bits: int | None = _of_recipe(
        "bits per element", "size of the code of a value that the backward needs itself, 2 to 8; `None`: exact"
    )
    norm_bits: int | None = _of_recipe("bits per element", "the same for inputs of norms")
    softmax_bits: int | None = _of_recipe(
        "bits per element",
        "the same for q, k, v and the output of attention, and for the probabilities that stand in place of logits",
    )
    rounding: str = _option(
        "nearest",
        "",
        'how codes are chosen: `"nearest"`, or `"stochastic"`: at random, without bias and with a larger error',
        kw_only=True,
    )
    recompute: bool = _of_recipe("", "compute pointwise operations again in the backward where that saves memory")
    min_numel: int = _option(4096, "elements", "tensors of fewer elements are left exact")
    max_relative_error: float = _option(
        0.5, "ratio", "what codes are predicted to leave a larger relative error in is left exact"
    )
    derivatives: bool = _of_recipe("", "code derivatives of pointwise nonlinearities", kw_only=False)
    masks: bool = _option(True, "", "pack boolean masks to one exact bit per element")
    strict: bool = _option(
        False, "", "raise on a fault inside fewbit-fx; otherwise one warning, and the graph stays exact"
    )
    skip: tuple[str, ...] = _option(
        (),
        "patterns of module paths",
        'sites in modules of these paths are left exact, such as `("blocks.0.*", "head")`',
    )
    disable: tuple[str, ...] = _option(
        (), "names of passes", "passes that do not run: `find`, `represent`, `gain`, `protect`, `rewrite`, `compare`"
    )

    def __post_init__(self) -> None:
        self._follow_the_recipe()
        allowed = f"a whole number from {MIN_BITS} to {MAX_BITS}"
        _require_int("bits", self.bits, allowed)
        _require("bits", self.bits, MIN_BITS <= self.bits <= MAX_BITS, allowed)
        allowed = "a whole number of elements, 0 or more"
        _require_int("min_numel", self.min_numel, allowed)
        _require("min_numel", self.min_numel, self.min_numel >= 0, allowed)
        allowed = "a number above 0"
        if isinstance(self.max_relative_error, bool) or not isinstance(self.max_relative_error, (int, float)):
            raise TypeError(_message("max_relative_error", self.max_relative_error, allowed))
        _require("max_relative_error", self.max_relative_error, self.max_relative_error > 0, allowed)
        _require_one_of("levels", self.levels, LEVELS)
        _require_one_of("rounding", self.rounding, ROUNDINGS)
        if self.rounding == "stochastic":
            allowed = f"at most {MOST_BITS_OF_SAMPLED_LEVELS} with rounding='stochastic'"
            _require("bits", self.bits, self.bits <= MOST_BITS_OF_SAMPLED_LEVELS, allowed)
        for name in ("value_bits", "norm_bits", "softmax_bits"):
            _require_value_bits(name, getattr(self, name))
        for name in ("derivatives", "masks", "recompute", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(_message(name, getattr(self, name), "True or False"))
        for name, what in (("skip", "a pattern of module paths"), ("disable", "the name of a pass")):
            texts = _texts(name, getattr(self, name), f"{what}, or a sequence of them")
            object.__setattr__(self, name, texts)  # as one form, which is hashable

    def _follow_the_recipe(self) -> None:
        """Give the options that were not given the values that the recipe has for them."""
        _require_one_of("recipe", self.recipe, RECIPES)
        for name, value in RECIPES[self.recipe].items():
            if getattr(self, name) is _FROM_RECIPE:
                object.__setattr__(self, name, value)

    @property
    def codes_values(self) -> bool:
        """Whether any option asks for codes of values."""
        return any(bits is not None for bits in (self.value_bits, self.norm_bits, self.softmax_bits))

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of all options, in the order in which they are declared."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def table(cls) -> list[str]:
        """The options as a Markdown table, as the README shows it."""
        defaults = cls()
        rows = [
            (f"`{f.name}`", f"`{getattr(defaults, f.name)!r}`", f.metadata["unit"], f.metadata["doc"])
            for f in dataclasses.fields(cls)
        ]
        return [
            "| option | default | unit | meaning |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]

    def updated(self, options: Mapping[str, Any]) -> FewBitConfig:
        """A new configuration with ``options`` replaced. Raises as the constructor does.

        A recipe among them replaces all that recipes set, but for what is given beside it.
        """
        from_recipe = dict.fromkeys(RECIPES["default"], _FROM_RECIPE) if "recipe" in options else {}
        return dataclasses.replace(self, **{**from_recipe, **options})


def _message(name: str, value: object, allowed: str) -> str:
    return f"fewbit option {name!r} is {value!r} ({type(value).__name__}); allowed is {allowed}"


def _texts(name: str, value: Any, allowed: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(_message(name, value, allowed))
    return tuple(texts)


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(_message(name, value, allowed))


def _require_one_of(name: str, value: object, names: Collection[str]) -> None:
    allowed = f"one of {', '.join(map(repr, names))}"
    if not isinstance(value, str):
        raise TypeError(_message(name, value, allowed))
    _require(name, value, value in names, allowed)


def _require_int(name: str, value: object, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(_message(name, value, allowed))


def _require_value_bits(name: str, value: Any) -> None:
    if value is None:
        return
    allowed = f"a whole number from {MIN_VALUE_BITS} to {MAX_BITS}, or None"
    _require_int(name, value, allowed)
    _require(name, value, MIN_VALUE_BITS <= value <= MAX_BITS, allowed)
