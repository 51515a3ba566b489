"""The module and the source line of a node, read from the metadata that tracing left on it."""

from __future__ import annotations

import re
from pathlib import Path

from torch import fx

import fewbit_fx

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Dynamo's names of where a model is: an argument, what a function closes over, or a global variable.
_ROOT = re.compile(
    r"""^(?:L\[['"]\w+['"]\](?:\.__closure__\[\d+\]\.cell_contents)?|G\[['"]__import_\w+['"]\]|G(?=\[))"""
)
_INDEX = re.compile(r"""(?:\._modules|\.__dict__\[['"]_modules['"]\])?\[['"]?(\w+)['"]?\]""")
_OWN_FOLDER = Path(fewbit_fx.__file__).parent


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that the node was traced in, such as ``blocks.0.act``."""
    for key in ("fwd_nn_module_stack", "nn_module_stack"):
        stack = node.meta.get(key)
        if stack:
            path = str(list(stack.values())[-1][0])
            return _INDEX.sub(r".\1", _ROOT.sub("", path)).lstrip(".")
    return ""


def module_paths(gm: fx.GraphModule) -> list[str]:
    """Paths of the modules of all nodes of a graph and of those in it, such as checkpoints."""
    graphs = [part.graph for part in gm.modules() if isinstance(part, fx.GraphModule)]
    return [module_path(node) for graph in graphs for node in graph.nodes]


def source_line(node: fx.Node) -> str:
    """``file:line`` of the innermost frame of the user's code, or ""."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not Path(frame[0]).is_relative_to(_OWN_FOLDER)]  # explain's own call
    return ":".join(frames[-1]) if frames else ""
