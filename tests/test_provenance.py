"""Module paths and source lines from a node's metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import fx

import fewbit_fx
from fewbit_fx.passes.provenance import module_path, source_line

PACKAGE = Path(fewbit_fx.__file__).parent


def node(**meta: object) -> fx.Node:
    created = fx.Graph().placeholder("x")
    created.meta = dict(meta)
    return created


def stack(*files: str) -> str:
    return "".join(f'  File "{file}", line {i}, in forward\n    y = f(x)\n' for i, file in enumerate(files, 1))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("L['self'].blocks.0.act", "blocks.0.act"),
        ("L['self']._modules['blocks']._modules['0'].act", "blocks.0.act"),
        ("L['fn'].head", "head"),
        ("L['self']", ""),
        ("L['original'].__closure__[0].cell_contents.blocks.0", "blocks.0"),
        ("G['__import___main__'].trainer.model.head", "trainer.model.head"),
        ("G['model'].blocks[0].act", "model.blocks.0.act"),
        ("L['self'].model.__dict__['_modules']['base'].layers.0", "model.base.layers.0"),
    ],
)
def test_the_innermost_module(path: str, expected: str) -> None:
    modules = {"outer": ("L['self'].blocks", object), "inner": (path, object)}
    assert module_path(node(nn_module_stack=modules)) == expected
    assert (
        module_path(node(fwd_nn_module_stack=modules, nn_module_stack={"other": ("L['self'].x", object)})) == expected
    )


def test_without_metadata_there_is_nothing_to_tell() -> None:
    assert (module_path(node()), source_line(node())) == ("", "")


def test_the_innermost_frame_of_the_users_code() -> None:
    assert source_line(node(stack_trace=stack("/home/a/train.py", "/home/a/model.py"))) == "/home/a/model.py:2"


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE / "dynamo"])
def test_our_own_frames_are_not_the_users(folder: Path) -> None:
    assert (
        source_line(node(stack_trace=stack("/home/a/model.py", str(folder / "explainer.py")))) == "/home/a/model.py:1"
    )


def test_a_folder_whose_name_begins_like_ours_is_the_users() -> None:
    theirs = f"{PACKAGE}_models/llama.py"
    assert source_line(node(stack_trace=stack("/home/a/train.py", theirs))) == f"{theirs}:2"
