"""Hooks of modules, and whether torch.compile has them."""

from __future__ import annotations

import copy

from torch import nn


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let a module have the hooks of another, those that come later included, and its mode."""
    for name, value in vars(old).items():
        if "hook" in name or name == "training":
            setattr(new, name, value)


def without_hooks(module: nn.Module) -> nn.Module:
    """A shallow copy without hooks."""
    bare = copy.copy(module)
    for name, value in vars(nn.Module()).items():
        if "hook" in name:
            setattr(bare, name, value)
    return bare


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is compiled, in place by ``module.compile()`` or as what torch.compile returns."""
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
