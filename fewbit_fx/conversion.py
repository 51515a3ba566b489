"""Replace the activations of a model by their few-bit forms."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import fewbit_fx.functional
import fewbit_fx.nn
from fewbit_fx.codebooks.of_functions import codebook
from fewbit_fx.codebooks.sampling import NotCodableError
from fewbit_fx.config import FewBitConfig
from fewbit_fx.torch_private.modules import share_hooks, without_hooks

_MODULES: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): few_bit
    for name, few_bit in vars(fewbit_fx.nn).items()
    if isinstance(few_bit, type) and issubclass(few_bit, nn.Module) and hasattr(nn, name)
}
_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(F, name): few_bit
    for name, few_bit in vars(fewbit_fx.functional).items()
    if inspect.isfunction(few_bit) and hasattr(F, name)
}
_PLAIN = frozenset(vars(nn.Module()))  # attributes that every module has


def convert(
    model: nn.Module, bits: int = 3, *, levels: str | None = None, recipe: str = "default"
) -> dict[str, nn.Module | Callable[..., Any]]:
    """Replace the activations in a model, in place, by those of :mod:`fewbit_fx.nn`.

    Replaced are activation modules of torch.nn (not their subclasses), those of
    ``transformers.activations`` and functions of torch.nn.functional that a module keeps as an attribute, as
    nn.TransformerEncoderLayer does. What a ``forward`` calls by itself is out of reach; the backend finds
    that too. The model's state_dict stays as it is, and hooks on replaced modules stay.

    In an eager pipeline ReLU, sigmoid and tanh save their output, which a following linear layer saves
    anyway: where that layer is trained, their code comes on top, with nothing saved in return.

    Args:
        model: Any module; if it is an activation itself, it is not replaced, having no parent.
        bits: Bits per element, 1 to 8.
        levels: What the levels fit, ``"sampled"`` or ``"typical"``, as of the backend; by default as the recipe says.
        recipe: As of the backend: ``"exact"`` replaces just activations whose codes are exact, such as ReLU, and
            ``"derivatives"`` has typical levels. The other recipes are the same here, for an eager pipeline has no
            codes of values.

    Returns:
        What was replaced: the path of each in the model, and the original.

    Raises:
        TypeError, ValueError: ``bits``, ``levels`` or ``recipe`` is not allowed.

    Examples:
        >>> import torch, fewbit_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
        >>> fewbit_fx.convert(model, bits=2)
        {'1': GELU(approximate='none')}
        >>> model[1]
        GELU(approximate='none', bits=2)
    """
    config = FewBitConfig(bits=bits, recipe=recipe).updated({} if levels is None else {"levels": levels})
    replaced: dict[str, nn.Module | Callable[..., Any]] = {}
    known: dict[nn.Module, nn.Module | None] = {}  # a module used in several places stays one
    modules = dict(model.named_modules(remove_duplicate=False))
    closed: set[str] = set()  # what a replacement calls is to stay as it is
    for path, module in modules.items():
        head, _, name = path.rpartition(".")
        if (path and head in closed) or isinstance(module, fewbit_fx.nn.Pointwise):
            closed.add(path)
            continue
        if path:
            if module not in known:
                wanted = config.derivatives or _is_exact(module, bits)
                known[module] = _few_bit_form(module, bits, config.levels) if wanted else None
            new = known[module]
            if new is not None:
                setattr(modules[head], name, new)
                replaced[path] = module
                closed.add(path)
                continue
        for attribute, value in list(vars(module).items()):
            if callable(value) and not attribute.startswith("_") and _hashable(value) and value in _FUNCTIONS:
                if not config.derivatives and not _is_exact(value, bits):
                    continue
                setattr(module, attribute, functools.partial(_FUNCTIONS[value], bits=bits, levels=config.levels))
                replaced[f"{path}.{attribute}".lstrip(".")] = value
    return replaced


def _is_exact(activation: Callable[[Tensor], Tensor], bits: int) -> bool:
    """Whether codes of so many bits tell all values of the derivative apart."""
    try:
        return codebook(activation, bits).relative_error == 0
    except (TypeError, ValueError):  # no pointwise function, or none that has a codebook
        return False


def _few_bit_form(module: nn.Module, bits: int, levels: str) -> nn.Module | None:
    """The module's replacement, or None."""
    if type(module) in _MODULES:
        new = copy.copy(module)  # with the same parameters and hooks
        new.__class__ = _MODULES[type(module)]
        vars(new).update(bits=bits, levels=levels)
        return new
    if type(module).__module__ == "transformers.activations" and not module.state_dict():
        try:
            new = fewbit_fx.nn.Pointwise(_Stateless(module), bits, levels)
        except NotCodableError:  # squared ReLU, a linear one
            return None
        share_hooks(module, new)
        return new
    return None


class _Stateless:
    """An activation module as a function: those of one class and the same attributes are equal."""

    def __init__(self, module: nn.Module) -> None:
        self.module = without_hooks(module)  # they are the replacement's

    def __call__(self, x: Tensor) -> Tensor:
        result: Tensor = self.module(x)
        return result

    def _key(self) -> object:
        own = {k: v for k, v in vars(self.module).items() if k not in _PLAIN}
        return type(self.module), repr(sorted(own.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stateless) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
