"""What the layout promises: imports go one way, and torch's private API has one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A module imports from its own layer and from those below; layers on one line not from each other.
LAYERS: list[tuple[str, ...]] = [
    ("_checkout", "_version", "torch_private", "config", "function_cache"),
    ("codebooks",),
    ("codec",),
    ("eager", "passes"),
    ("reporting", "functional", "environment"),
    ("dynamo", "nn"),
    ("conversion", "integrations"),
    ("__main__", "__init__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# A tool for the developers of this project reads Inductor's own code: private API is what it is about.
EXEMPT = {ROOT / "bench/offline_triton.py"}


def modules(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "passes" if parts[0] == "passes" else Path(parts[1]).stem


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports from."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    package = ["fewbit_fx", *package] if package[0] == "passes" else package
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            beginning = package[: len(package) - node.level + 1]
            yield ".".join([*beginning, *([node.module] if node.module else [])])
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_layers(path: Path) -> set[str]:
    """The layers of ours that a file imports from."""
    names = [name.split(".") for name in imports(path)]
    return {parts[1] for parts in names if parts[0] == "fewbit_fx" and len(parts) > 1 and parts[1] in RANK}


@pytest.mark.parametrize("path", modules("fewbit_fx", "passes"), ids=identify)
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    assert layer in RANK, f"{path.name} is in no layer: give it one"
    assert not {other for other in own_layers(path) - {layer} if RANK[other] >= RANK[layer]}


def test_the_check_sees_imports() -> None:
    assert {"torch_private", "config"} <= own_layers(ROOT / "passes/partitioner.py")
    assert "fewbit_fx.passes.graph" in imports(ROOT / "passes/gain.py")
    assert "passes" in own_layers(ROOT / "fewbit_fx/dynamo/partitioned_run.py")


def private_uses(path: Path) -> list[str]:
    """Imports from torch's private modules and from functorch, and reads of private attributes of torch's modules."""
    found = [name for name in imports(path) if name.split(".")[0] in ("torch", "functorch") and _is_private(name)]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("torch.") and _is_private(name) and not name.startswith("torch.ops."):
                found.append(name)
    return found


def _is_private(name: str) -> bool:
    first, *rest = name.split(".")
    return first == "functorch" or any(part.startswith("_") and not part.startswith("__") for part in rest)


@pytest.mark.parametrize("path", modules("fewbit_fx", "passes", "bench"), ids=identify)
def test_private_api_is_in_its_own_package(path: Path) -> None:
    if "torch_private" not in path.parts and path not in EXEMPT:
        assert not private_uses(path)


def test_the_check_sees_private_api() -> None:
    assert "torch._guards.CompileContext" in private_uses(ROOT / "fewbit_fx/torch_private/dynamo.py")
    assert "torch._functorch.config.patch" in private_uses(ROOT / "fewbit_fx/torch_private/inductor.py")


def test_no_module_is_named_like_a_public_function() -> None:
    public = {"backend", "codebook", "convert", "explain", "fewbit", "last_report", "verify"}
    assert not public & {part for path in modules("fewbit_fx", "passes") for part in (path.stem, path.parent.name)}


@pytest.mark.parametrize("text", ["README.md", "CONTRIBUTING.md"])
def test_files_that_texts_name_are_there(text: str) -> None:
    named = re.findall(r"`((?:fewbit_fx|passes|tests|bench)/[\w./]*)`", (ROOT / text).read_text())
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]
