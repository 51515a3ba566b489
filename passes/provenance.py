"""Where a site comes from in the user's model, read from the metadata that tracing left on nodes."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch
from torch import fx

import fewbit_fx
from fewbit_fx.codebooks.activations import is_affine, recognise

from .derivative import Derivative, NotEvaluableError
from .graph import constant_value, is_pointwise
from .sites import MaskSite, Site

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_ROOT = re.compile(r"^L\[['\"]\w+['\"]\]\.?")
_INDEX = re.compile(r"(?:\._modules)?\[['\"]?(\w+)['\"]?\]")
_OWN_FOLDER = Path(fewbit_fx.__file__).parent
_RANDOM = frozenset({torch.ops.prims.inductor_random.default})


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in, such as ``blocks.0.act``."""
    for key in ("fwd_nn_module_stack", "nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            path = str(list(stack.values())[-1][0])
            return _INDEX.sub(r".\1", _ROOT.sub("", path)).lstrip(".")
    return ""


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the user's code, or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not Path(frame[0]).is_relative_to(_OWN_FOLDER)]  # explain's own call
    return ":".join(frames[-1]) if frames else ""


def function_name(site: Site) -> str:
    """The activation's name, ``dropout``, ``mask``, ``product`` or ``custom``."""
    if isinstance(site, MaskSite):
        if _comes_from_chance(site.mask):
            return "dropout"
        return (site.derivative and _activation(site.derivative)) or "mask"
    if site.is_gate:
        return "product"
    return _activation(site.derivative) or ("product" if _is_product(site.derivative) else "custom")


@functools.lru_cache(maxsize=1024)
def _activation(derivative: Derivative) -> str | None:
    try:
        return recognise(derivative.evaluated)
    except NotEvaluableError:  # the plan gives the reason
        return None


@functools.lru_cache(maxsize=1024)
def _is_product(derivative: Derivative) -> bool:
    try:
        return is_affine(derivative.evaluated)
    except NotEvaluableError:
        return False


def _comes_from_chance(node: fx.Node) -> bool:
    """Whether a mask follows from random numbers alone; ReLU's after a dropout does not."""
    while is_pointwise(node):
        inputs = [n for n in node.all_input_nodes if constant_value(n) is None]
        if len(inputs) != 1:
            return False
        (node,) = inputs
    return _is_random(node)


def _is_random(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    return node.target in _RANDOM or torch.Tag.nondeterministic_seeded in tags
